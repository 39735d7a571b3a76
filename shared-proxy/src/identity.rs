//! Who a workload is, and the proof of it.
//!
//! An [`Identity`] is a SPIFFE ID. A [`WorkloadCertificate`] proves one and makes the TLS configurations of its
//! connections. A [`CertificateAuthority`] issues certificates ([`LocalCa`] is the built-in one) and [`Certificates`]
//! keeps them fresh. [`Revocations`] says which ones are taken back. All contact with rustls' traits is in `certificate.rs`,
//! `verify.rs` and `key_log.rs`.

mod authority;
mod certificate;
mod facts;
mod key_log;
mod local_ca;
mod manager;
mod provider;
pub mod revocation;
mod spiffe;
mod verify;

pub use authority::{CaError, CertificateAuthority};
pub use certificate::{ALPN_H2, CertificateError, TlsOptions, WorkloadCertificate};
pub use facts::CertificateFacts;
pub use key_log::{KeyLogError, KeyLogFile};
pub use local_ca::{DEFAULT_LEAF_TTL, LocalCa, LocalCaError, ROOT_VALIDITY, SigningError};
pub use manager::{CertificateInfo, CertificateState, Certificates, RefreshPolicy};
pub use provider::{
    FipsError, PostQuantumError, describe as describe_provider, is_fips, provider, require_fips,
    require_post_quantum,
};
pub use revocation::{PeerRole, PeerStanding, PeerWatch, Revocations};
pub use spiffe::{DEFAULT_TRUST_DOMAIN, Identity, InvalidIdentity};
pub use verify::{PeerError, is_revocation, peer_identity};

#[cfg(test)]
mod handshake_tests;
