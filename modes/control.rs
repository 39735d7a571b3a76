//! The control plane of a mesh that is described in YAML files: for a laboratory, a test, or a cluster without Kubernetes.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use control_plane::server::{ControlPlane, ControlPlaneOptions, directory};
use shared_proxy::identity::{DEFAULT_LEAF_TTL, LocalCa};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

/// What a control plane is started with.
#[derive(Debug, Clone)]
pub struct ControlConfig {
    /// Directory of the YAML files.
    pub dir: PathBuf,
    /// Where it listens.
    pub listen: SocketAddr,
    /// Directory of the CA.
    pub ca_dir: PathBuf,
    /// Trust domain.
    pub trust_domain: String,
    /// Names and addresses under which proxies reach it.
    pub names: Vec<String>,
    /// File with the token that proxies must have.
    pub token: Option<PathBuf>,
    /// Longest lifetime of workload certificates.
    pub longest_ttl: Duration,
    /// File to write the root to.
    pub root_file: Option<PathBuf>,
}

/// Runs a control plane until SIGTERM or SIGINT.
///
/// It listens once the mesh has been read: whoever can connect is served all of it.
#[allow(
    clippy::disallowed_methods,
    reason = "a server of its own, not a pod's listener"
)]
pub async fn run(config: ControlConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let ca = LocalCa::open(&config.ca_dir, &config.trust_domain, DEFAULT_LEAF_TTL)
        .with_context(|| format!("CA in {}", config.ca_dir.display()))?;
    let control = ControlPlane::new(ControlPlaneOptions {
        ca,
        names: config.names,
        token: config.token.clone(),
        longest_ttl: config.longest_ttl,
    });
    if let Some(path) = &config.root_file {
        std::fs::write(path, control.root_pem())
            .with_context(|| format!("root to {}", path.display()))?;
    }
    let followed = directory::publish(config.dir.clone(), control.clone()).await?;
    let listener = TcpListener::bind(config.listen)
        .await
        .with_context(|| format!("listening on {}", config.listen))?;
    if config.token.is_none() {
        tracing::warn!(
            "no token is asked for: whoever can connect gets the certificate of any workload"
        );
    }
    tracing::info!(address = %listener.local_addr()?, dir = %config.dir.display(), root = %config.ca_dir.join("root-cert.pem").display(), "control plane started");
    let serving = control.serve(listener);
    let mut serving = std::pin::pin!(serving);
    tokio::select! {
        ended = serving.as_mut() => return Ok(ended?),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("shutting down");
    followed.abort();
    control.shut_down();
    tokio::select! {
        ended = serving => ended?,
        // Whoever asks twice does not want to wait.
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}
