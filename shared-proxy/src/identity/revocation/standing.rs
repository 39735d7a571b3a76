//! Peers of tunnels that stand.

use std::fmt;
use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::task::Poll;

use futures_util::task::AtomicWaker;
use rustls::RootCertStore;
use rustls::pki_types::{CertificateDer, UnixTime};

use super::{PeerRole, Revocations};

/// A peer as its handshake left it.
pub(super) struct Standing {
    pub(super) role: PeerRole,
    pub(super) chain: Vec<CertificateDer<'static>>,
    pub(super) roots: Arc<RootCertStore>,
    /// Its certificates were in force then. That they have run out since is no reason to end a tunnel.
    pub(super) since: UnixTime,
    revoked: AtomicBool,
    waker: AtomicWaker,
}

impl Standing {
    pub(super) fn new(
        role: PeerRole,
        chain: Vec<CertificateDer<'static>>,
        roots: Arc<RootCertStore>,
    ) -> Self {
        Self {
            role,
            chain,
            roots,
            since: UnixTime::now(),
            revoked: AtomicBool::new(false),
            waker: AtomicWaker::new(),
        }
    }

    /// False if it was revoked before.
    pub(super) fn revoke(&self) -> bool {
        let first = !self.revoked.swap(true, Ordering::AcqRel);
        self.waker.wake();
        first
    }
}

pub(super) fn next_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Watches the certificates of a tunnel's peer. Belongs to the tunnel's task; dropped when the tunnel ends.
pub struct PeerWatch {
    revocations: Arc<Revocations>,
    number: u64,
    standing: Arc<Standing>,
}

impl PeerWatch {
    pub(super) fn new(revocations: Arc<Revocations>, number: u64, standing: Arc<Standing>) -> Self {
        Self {
            revocations,
            number,
            standing,
        }
    }

    /// What the tunnel's streams may know of it.
    pub fn standing(&self) -> PeerStanding {
        PeerStanding(Some(Arc::clone(&self.standing)))
    }

    async fn revoked(&self) {
        poll_fn(|cx| {
            self.standing.waker.register(cx.waker());
            if self.standing.revoked.load(Ordering::Acquire) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }
}

impl Drop for PeerWatch {
    fn drop(&mut self) {
        self.revocations.standing().remove(&self.number);
    }
}

impl fmt::Debug for PeerWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PeerWatch").field(&self.standing()).finish()
    }
}

/// Ends when the watched peer's certificate is revoked; never, where nothing is watched. Two atomic operations per poll.
pub async fn until_revoked(watch: Option<&PeerWatch>) {
    match watch {
        Some(watch) => watch.revoked().await,
        None => std::future::pending().await,
    }
}

/// Whether a tunnel ended because its peer's certificate was revoked. The default knows nothing of a peer.
#[derive(Clone, Default)]
pub struct PeerStanding(Option<Arc<Standing>>);

impl PeerStanding {
    /// Whether it was revoked while it was watched.
    pub fn is_revoked(&self) -> bool {
        let revoked = |standing: &Arc<Standing>| standing.revoked.load(Ordering::Acquire);
        self.0.as_ref().is_some_and(revoked)
    }
}

impl fmt::Debug for PeerStanding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PeerStanding")
            .field("revoked", &self.is_revoked())
            .finish()
    }
}
