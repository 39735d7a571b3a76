//! The cryptography that TLS runs on, chosen at compile time and always named explicitly, so that no process-wide default
//! and no other crate's choice can change it.

use std::sync::{Arc, LazyLock};

use rustls::crypto::CryptoProvider;
#[cfg(feature = "tls-aws-lc")]
use rustls::crypto::aws_lc_rs as backend;
#[cfg(all(feature = "tls-ring", not(feature = "tls-aws-lc")))]
use rustls::crypto::ring as backend;

#[cfg(not(any(feature = "tls-aws-lc", feature = "tls-ring")))]
compile_error!("no cryptography for TLS: turn on one of the features `tls-aws-lc` and `tls-ring`");

/// The provider of every TLS configuration: the two AES-GCM suites of TLS 1.3 that the field's proxies offer, AES-256
/// first. Feature `tls-aws-lc` (the default) uses aws-lc, `tls-ring` uses ring; with both, aws-lc.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                backend::cipher_suite::TLS13_AES_256_GCM_SHA384,
                backend::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ],
            ..backend::default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}
