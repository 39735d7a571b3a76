//! Certificates that their issuer has taken back before their end.
//!
//! [`Revocations`] holds the revocation lists in force: [`follow_file`] reads them and reads them again when the file
//! changes. A handshake with a peer whose certificate, or one above it, is listed is refused, in either direction; a
//! [`PeerWatch`] ends a tunnel that stands. A list counts for what its issuer has signed; a list whose time for the next
//! one is over still counts; a certificate whose issuer has given no list is not revoked.

mod file;
#[cfg(test)]
mod fuzz;
mod lists;
mod metrics;
mod standing;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arc_swap::ArcSwap;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::{CertificateError, Error, OtherError, RootCertStore};
use webpki::KeyUsage;

pub use file::follow_file;
pub use lists::RevocationError;
pub use standing::{PeerStanding, PeerWatch, until_revoked};

use super::Identity;
use lists::Lists;
use metrics::RevocationMetrics;
use standing::Standing;

/// Which end of a tunnel the peer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerRole {
    /// It opened the tunnel; we are the destination.
    Client,
    /// It accepts the tunnel; we are the source.
    Server,
}

impl PeerRole {
    /// What its certificate has to be good for.
    fn usage(self) -> KeyUsage {
        match self {
            Self::Client => KeyUsage::client_auth(),
            Self::Server => KeyUsage::server_auth(),
        }
    }

    /// Our end, as the label `reporter` has it.
    fn reporter(self) -> &'static str {
        match self {
            Self::Client => "destination",
            Self::Server => "source",
        }
    }
}

/// The revocation lists in force, and the tunnels that end when their peer's certificate is on one.
#[derive(Default)]
pub struct Revocations {
    lists: ArcSwap<Lists>,
    standing: Mutex<HashMap<u64, Arc<Standing>>>,
    metrics: RevocationMetrics,
}

impl Revocations {
    /// Without a list: nothing is revoked.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts these lists in the place of those in force, and ends the tunnels whose peers they revoke. Bytes as in a file:
    /// PEM, DER, or nothing.
    ///
    /// Takes as long as there are tunnels; not for an event loop.
    ///
    /// # Errors
    /// What is wrong with the bytes; the lists in force stay.
    pub fn replace(&self, bytes: &[u8]) -> Result<(), RevocationError> {
        let lists = Lists::parse(bytes)?;
        self.metrics.in_force(lists.revoked());
        self.lists.store(Arc::new(lists));
        // The map is not locked meanwhile: tunnels come and go. One that comes looks at the lists itself, after it was
        // entered.
        let standing: Vec<_> = self.standing().values().cloned().collect();
        for peer in standing {
            self.ask_again(&peer);
        }
        Ok(())
    }

    /// How many certificates the lists in force revoke.
    pub fn revoked(&self) -> usize {
        self.lists.load().revoked()
    }

    /// Adds the metrics of revocation.
    pub fn register(&self, registry: &mut prometheus_client::registry::Registry) {
        self.metrics.register(registry);
    }

    /// Watches the certificates (leaf first) of a peer whose handshake is done.
    pub(super) fn watch(
        self: &Arc<Self>,
        role: PeerRole,
        chain: &[CertificateDer<'static>],
        roots: &Arc<RootCertStore>,
    ) -> PeerWatch {
        let standing = Arc::new(Standing::new(role, chain.to_vec(), Arc::clone(roots)));
        let number = standing::next_number();
        self.standing().insert(number, Arc::clone(&standing));
        // Lists that came between the handshake and this moment found it neither there nor here.
        self.ask_again(&standing);
        PeerWatch::new(Arc::clone(self), number, standing)
    }

    fn ask_again(&self, peer: &Standing) {
        let lists = self.lists.load();
        match lists.check(&peer.chain, &peer.roots, peer.since, peer.role.usage()) {
            Err(webpki::Error::CertRevoked) => {
                if peer.revoke() {
                    self.metrics.rejected(peer.role);
                    self.metrics.closed(peer.role);
                }
            }
            Err(error) => {
                tracing::warn!(%error, "a tunnel stands whose peer is on a revocation list that cannot be relied on");
            }
            Ok(()) => {}
        }
    }

    /// Refuses a peer whose certificates (leaf and those above it), which reach one of the roots, are revoked.
    pub(super) fn check(
        &self,
        role: PeerRole,
        who: &Identity,
        chain: (&CertificateDer<'_>, &[CertificateDer<'_>]),
        roots: &RootCertStore,
        now: UnixTime,
    ) -> Result<(), Error> {
        let lists = self.lists.load();
        if lists.is_empty() {
            return Ok(());
        }
        let (leaf, above) = chain;
        let chain: Vec<CertificateDer<'_>> = std::iter::once(leaf).chain(above).cloned().collect();
        let error = match lists.check(&chain, roots, now, role.usage()) {
            Ok(()) => return Ok(()),
            Err(error) => error,
        };
        self.metrics.rejected(role);
        if error == webpki::Error::CertRevoked {
            let serial = lists::serial_hex(leaf);
            tracing::warn!(peer = %who, serial, "refused: the peer's certificate is revoked");
            return Err(CertificateError::Revoked.into());
        }
        // It is on a list that its issuer has not signed, or may not sign. To let it in would be to trust the list to be
        // wrong.
        let error = OtherError(Arc::new(Unreliable(who.clone(), error)));
        Err(CertificateError::Other(error).into())
    }

    fn standing(&self) -> MutexGuard<'_, HashMap<u64, Arc<Standing>>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Listed, but not by somebody who may.
#[derive(thiserror::Error)]
#[error("{0} is on a revocation list that cannot be relied on: {1}")]
struct Unreliable(Identity, webpki::Error);

/// rustls shows it in its debug form.
impl fmt::Debug for Unreliable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Revocations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Revocations")
            .field("revoked", &self.revoked())
            .field("watched", &self.standing().len())
            .finish()
    }
}
