//! Revocation lists, read and asked.

use std::path::PathBuf;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, UnixTime};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, OwnedCertRevocationList,
    RevocationCheckDepth, RevocationOptionsBuilder, UnknownStatusPolicy,
};
use x509_parser::prelude::{CertificateRevocationList, FromDer, X509Certificate};
use x509_parser::time::ASN1Time;

use super::super::provider;

/// Why there are no revocation lists in a file, or in what it holds.
#[derive(Debug, thiserror::Error)]
pub enum RevocationError {
    /// The file cannot be read.
    #[error("revocation lists in {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The content is neither PEM nor DER.
    #[error("neither revocation lists in PEM (`X509 CRL`) nor one in DER: {0}")]
    Encoding(String),
    /// One of the lists is not usable.
    #[error("list {number}{}: {reason}", issuer.as_ref().map(|name| format!(" (of {name})")).unwrap_or_default())]
    List {
        /// Counted from 1.
        number: usize,
        /// Whose list, if that much can be read.
        issuer: Option<String>,
        /// What is wrong with it.
        reason: String,
    },
    /// A file with one of the errors above in it.
    #[error("revocation lists in {path}: {error}")]
    InFile {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        error: Box<RevocationError>,
    },
}

/// What all PEM begins with.
const PEM: &[u8] = b"-----BEGIN ";

/// Lists of any number of issuers.
#[derive(Debug, Default)]
pub(super) struct Lists {
    /// Of one issuer, the latest first: only the first that answers for a certificate is asked.
    lists: Vec<CertRevocationList<'static>>,
    revoked: usize,
}

impl Lists {
    /// From PEM (several lists, and whatever else), DER (one list), or nothing (no list).
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, RevocationError> {
        if bytes.trim_ascii().is_empty() {
            return Ok(Self::default());
        }
        let lists = if bytes.windows(PEM.len()).any(|window| window == PEM) {
            let lists: Result<Vec<_>, _> =
                CertificateRevocationListDer::pem_slice_iter(bytes).collect();
            lists.map_err(|error| RevocationError::Encoding(error.to_string()))?
        } else {
            vec![CertificateRevocationListDer::from(bytes)]
        };
        if lists.is_empty() {
            let text = "the PEM in it is something else".to_owned();
            return Err(RevocationError::Encoding(text));
        }
        let mut read = Vec::with_capacity(lists.len());
        let mut revoked = 0;
        for (index, list) in lists.iter().enumerate() {
            let (issued, entries, list) = read_list(list).map_err(|(issuer, reason)| {
                let number = index + 1;
                RevocationError::List {
                    number,
                    issuer,
                    reason,
                }
            })?;
            revoked += entries;
            read.push((issued, list));
        }
        read.sort_by_key(|(issued, _)| std::cmp::Reverse(*issued));
        Ok(Self {
            lists: read.into_iter().map(|(_, list)| list).collect(),
            revoked,
        })
    }

    pub(super) fn is_empty(&self) -> bool {
        self.lists.is_empty()
    }

    pub(super) fn revoked(&self) -> usize {
        self.revoked
    }

    /// Fails with [`webpki::Error::CertRevoked`] if a certificate of the chain (leaf first) is revoked, and with another
    /// error if it is listed and the list is not to be relied on. The chain reaches one of the roots: that was verified.
    pub(super) fn check(
        &self,
        chain: &[CertificateDer<'_>],
        roots: &RootCertStore,
        now: UnixTime,
        usage: KeyUsage,
    ) -> Result<(), webpki::Error> {
        // No signature has to be verified for a chain of which nothing is listed, which is nearly every one.
        if !chain.iter().any(|certificate| self.names(certificate)) {
            return Ok(());
        }
        let [leaf, above @ ..] = chain else {
            return Ok(());
        };
        let lists: Vec<_> = self.lists.iter().collect();
        let Ok(options) = RevocationOptionsBuilder::new(&lists) else {
            return Ok(());
        };
        let options = options
            .with_depth(RevocationCheckDepth::Chain)
            .with_status_policy(UnknownStatusPolicy::Allow)
            .with_expiration_policy(ExpirationPolicy::Ignore)
            .build();
        let algorithms = provider().signature_verification_algorithms.all;
        EndEntityCert::try_from(leaf)?.verify_for_usage(
            algorithms,
            &roots.roots,
            above,
            now,
            usage,
            Some(options),
            None,
        )?;
        Ok(())
    }

    /// Whether a list in the name of the certificate's issuer has it.
    fn names(&self, certificate: &CertificateDer<'_>) -> bool {
        let Ok(certificate) = EndEntityCert::try_from(certificate) else {
            return false;
        };
        self.lists.iter().any(|list| {
            // An error is not for here: a list that cannot be searched is asked, and fails, in full.
            list.issuer() == certificate.issuer()
                && !matches!(list.find_serial(certificate.serial()), Ok(None))
        })
    }
}

/// When the list was issued (seconds since 1970), how many it revokes, and the list; or whose it is and what is wrong.
fn read_list(
    der: &CertificateRevocationListDer<'_>,
) -> Result<(i64, usize, CertRevocationList<'static>), (Option<String>, String)> {
    let (rest, list) =
        CertificateRevocationList::from_der(der).map_err(|error| (None, error.to_string()))?;
    let issuer = list.issuer().to_string();
    if !rest.is_empty() {
        return Err((Some(issuer), "something follows it".to_owned()));
    }
    let readable = OwnedCertRevocationList::from_der(der)
        .map_err(|error| (Some(issuer.clone()), error.to_string()))?;
    if list
        .next_update()
        .is_some_and(|next| next < ASN1Time::now())
    {
        tracing::warn!(
            %issuer,
            "a revocation list should have had a successor by now: it still counts, but what was revoked since is not known"
        );
    }
    let entries = list.iter_revoked_certificates().count();
    Ok((list.last_update().timestamp(), entries, readable.into()))
}

/// The serial number of a certificate as [`CertificateInfo`](super::super::CertificateInfo) has it.
pub(super) fn serial_hex(certificate: &CertificateDer<'_>) -> String {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return String::new();
    };
    let digits = certificate.raw_serial().iter();
    digits.map(|byte| format!("{byte:02x}")).collect()
}
