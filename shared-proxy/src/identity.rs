//! Who a workload is, and the proof of it.
//!
//! An [`Identity`] is a SPIFFE ID. A [`WorkloadCertificate`] proves one and makes the TLS configurations of its
//! connections. A [`CertificateAuthority`] issues certificates ([`LocalCa`] is the built-in one) and [`Certificates`]
//! keeps them fresh. All contact with rustls' traits is in `certificate.rs` and `verify.rs`.

mod authority;
mod certificate;
mod facts;
mod local_ca;
mod manager;
mod provider;
mod spiffe;
mod verify;

pub use authority::{CaError, CertificateAuthority};
pub use certificate::{ALPN_H2, CertificateError, WorkloadCertificate};
pub use facts::CertificateFacts;
pub use local_ca::{DEFAULT_LEAF_TTL, LocalCa, LocalCaError, ROOT_VALIDITY, SigningError};
pub use manager::{CertificateInfo, CertificateState, Certificates, RefreshPolicy};
pub use provider::{PostQuantumError, provider, require_post_quantum};
pub use spiffe::{DEFAULT_TRUST_DOMAIN, Identity, InvalidIdentity};
pub use verify::{PeerError, peer_identity};

#[cfg(test)]
mod handshake_tests;
