//! Flags of the proxy's TLS beside certificates and their source.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Args;
use shared_proxy::identity::{KeyLogFile, Revocations, TlsOptions, revocation};
use shared_proxy::telemetry::Telemetry;
use tokio::task::JoinHandle;

/// What peers are asked beside their identity, and what is written down.
#[derive(Debug, Clone, Args)]
pub struct TlsArgs {
    /// File of certificate revocation lists (PEM or DER), followed: revoked peers are refused, and their tunnels closed
    #[arg(long, env = "CRL_PATH", value_name = "FILE")]
    pub crl: Option<PathBuf>,
    /// DEBUGGING: write the secrets of all TLS sessions to this file, with which captured traffic can be read. It has to
    /// be the user's own with mode 0600, and is made if it is not there
    // SSLKEYLOGFILE is not listened to: a variable that is set for another program must not open this one's traffic.
    #[arg(long, env = "AMBIDEX_DEBUG_TLS_KEY_LOG", value_name = "FILE")]
    pub debug_tls_key_log: Option<PathBuf>,
}

/// Keeps the revocation lists up to date until it is dropped.
#[derive(Debug)]
pub struct FollowedLists(Option<JoinHandle<()>>);

impl Drop for FollowedLists {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl TlsArgs {
    /// Opens the files. Must be called on a Tokio runtime.
    ///
    /// # Errors
    /// A file is not what it should be.
    pub fn open(&self, telemetry: &Telemetry) -> anyhow::Result<(TlsOptions, FollowedLists)> {
        let mut options = TlsOptions::default();
        let mut followed = FollowedLists(None);
        if let Some(path) = &self.crl {
            let revocations = Arc::new(Revocations::new());
            telemetry.register(|registry| revocations.register(registry));
            let task = revocation::follow_file(path, Arc::clone(&revocations));
            followed.0 = Some(task.context("CRL_PATH (--crl)")?);
            options.revocations = Some(revocations);
        }
        if let Some(path) = &self.debug_tls_key_log {
            let key_log = KeyLogFile::open(path)
                .context("AMBIDEX_DEBUG_TLS_KEY_LOG (--debug-tls-key-log)")?;
            tracing::warn!(
                path = %path.display(),
                "DEBUGGING: the secrets of all TLS sessions are written to a file; whoever reads it can read the pods' traffic"
            );
            options.key_log = Some(Arc::new(key_log));
        }
        Ok((options, followed))
    }
}
