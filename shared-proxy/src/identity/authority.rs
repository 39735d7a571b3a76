//! Where certificates come from.

use std::sync::Arc;

use futures_util::future::BoxFuture;

use super::{Identity, WorkloadCertificate};

/// Issues certificates. The built-in one is [`LocalCa`](super::LocalCa).
pub trait CertificateAuthority: Send + Sync + 'static {
    /// A certificate, with its own fresh key, that proves `identity`.
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<WorkloadCertificate, CaError>>;
}

/// Why there is no certificate. Cheap to clone: one failed request answers all who wait for it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CaError {
    /// This authority does not vouch for that trust domain.
    #[error("{identity}: this CA issues certificates for trust domain {trust_domain} only")]
    ForeignTrustDomain {
        /// What was asked for.
        identity: Identity,
        /// What the authority vouches for.
        trust_domain: Arc<str>,
    },
    /// The authority could not be reached, refused, or answered with something unusable.
    #[error("no certificate for {identity}: {reason}")]
    Failed {
        /// What was asked for.
        identity: Identity,
        /// The authority's or the decoder's words.
        reason: Arc<str>,
    },
    /// The certificate ran out before another one could be had.
    #[error("the certificate of {identity} has expired and could not be renewed: {reason}")]
    Expired {
        /// Whose certificate.
        identity: Identity,
        /// Why it could not be renewed.
        reason: Arc<str>,
    },
    /// The identity was forgotten while somebody waited for its certificate: its last workload is gone.
    #[error("{0} is no longer served here: its last workload has gone")]
    Forgotten(Identity),
}
