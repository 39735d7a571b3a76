//! The cryptography that TLS runs on, chosen at compile time and always named explicitly, so that no process-wide default
//! and no other crate's choice can change it.

use std::sync::{Arc, LazyLock, OnceLock};

use rustls::NamedGroup;
use rustls::crypto::CryptoProvider;
#[cfg(feature = "tls-aws-lc")]
use rustls::crypto::aws_lc_rs as backend;
#[cfg(all(feature = "tls-ring", not(feature = "tls-aws-lc")))]
use rustls::crypto::ring as backend;

#[cfg(not(any(feature = "tls-aws-lc", feature = "tls-ring")))]
compile_error!("no cryptography for TLS: turn on one of the features `tls-aws-lc` and `tls-ring`");

/// Why TLS cannot be restricted to validated cryptography.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FipsError {
    /// It is a matter of the build.
    #[error("this build has no validated cryptography: build with the feature fips")]
    NotBuilt,
    /// The module's tests of itself failed, or something beside it is in use.
    #[error("the cryptographic module is not in its FIPS mode")]
    NotInForce,
}

/// Whether everything that TLS does here is done by a module that is validated for FIPS 140-3: cipher suites, key exchange,
/// signatures and random numbers. Only in builds with the feature `fips`.
pub fn is_fips() -> bool {
    cfg!(feature = "fips") && make(false).fips()
}

/// Fails unless [`is_fips`]. Changes nothing: a build with the feature `fips` has nothing else.
///
/// # Errors
/// The build has no such module, or it does not work.
pub fn require_fips() -> Result<(), FipsError> {
    if !cfg!(feature = "fips") {
        return Err(FipsError::NotBuilt);
    }
    is_fips().then_some(()).ok_or(FipsError::NotInForce)
}

/// What TLS runs on, for `--version` and the configuration dump.
pub fn describe() -> &'static str {
    if is_fips() {
        "aws-lc, FIPS 140-3 module"
    } else if cfg!(feature = "fips") {
        "aws-lc, FIPS 140-3 module NOT in force"
    } else if cfg!(feature = "tls-aws-lc") {
        "aws-lc"
    } else {
        "ring"
    }
}

/// Why TLS cannot be restricted to post-quantum key exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PostQuantumError {
    /// ring has none.
    #[error("this build has no post-quantum key exchange: build with the feature tls-aws-lc")]
    NotBuilt,
    /// A TLS configuration was made before.
    #[error("TLS is in use already: require post-quantum key exchange before")]
    InUse,
}

static POST_QUANTUM: OnceLock<bool> = OnceLock::new();

/// Restricts key exchange to X25519MLKEM768 in this process. To be called before the first TLS configuration is made.
///
/// # Errors
/// The provider has no such key exchange, or it is too late.
pub fn require_post_quantum() -> Result<(), PostQuantumError> {
    if !cfg!(feature = "tls-aws-lc") {
        return Err(PostQuantumError::NotBuilt);
    }
    POST_QUANTUM.set(true).map_err(|_| PostQuantumError::InUse)
}

/// The provider of every TLS configuration: the two AES-GCM suites of TLS 1.3 that the field's proxies offer, AES-256
/// first. Feature `tls-aws-lc` (the default) uses aws-lc, `fips` its validated module, `tls-ring` ring; with both, aws-lc.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> =
        LazyLock::new(|| Arc::new(make(*POST_QUANTUM.get_or_init(|| false))));
    Arc::clone(&PROVIDER)
}

/// A provider, with post-quantum key exchange only or with whatever the backend offers.
pub(super) fn make(post_quantum: bool) -> CryptoProvider {
    let mut provider = CryptoProvider {
        cipher_suites: vec![
            backend::cipher_suite::TLS13_AES_256_GCM_SHA384,
            backend::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ],
        ..backend::default_provider()
    };
    // The provider's defaults leave these out in such a build already; what is in force must not hang on its defaults.
    if cfg!(feature = "fips") {
        provider.cipher_suites.retain(|suite| suite.fips());
        provider.kx_groups.retain(|group| group.fips());
    }
    if post_quantum {
        provider
            .kx_groups
            .retain(|group| group.name() == NamedGroup::X25519MLKEM768);
    }
    provider
}
