//! What any relay costs: the benchmark's bound.
//!
//! The same capture as the node proxy's in-pod one (redirect rules, listeners in each pod's namespace, handed over by
//! ZDS), and between two nodes one plain TCP connection for each of the client's, to port 15008, which begins with the
//! addresses of the original connection ([`header`]). Bytes move by splice(2) ([`splice`]) and never enter the process.
//! No encryption, no identity, no policy, no word per connection: it protects nothing and is run by the benchmark only.
//! Whatever a proxy costs beyond this, it costs for what it does.
#![forbid(unsafe_code)]

pub mod header;
pub mod pipe;
mod pods;
mod serve;
pub mod splice;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::Netns;
use inpod_redirect::zds::client::{self, ClientOptions};
use shared_proxy::state::Store;
use shared_proxy::state::local_xds::{self, LocalXdsError};

use pipe::Pipes;
use pods::Pods;

/// What a relay is started with.
#[derive(Debug, Clone)]
pub struct RelayConfig {
    /// The agent's ZDS socket.
    pub zds_socket: PathBuf,
    /// Workloads and services, in LOCAL_XDS form.
    pub local_xds: PathBuf,
    /// Network that addresses without one belong to.
    pub network: String,
    /// How long connections may go on when the relay, or their pod, ends.
    pub drain: Duration,
}

/// Why a relay cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Workloads and services cannot be read.
    #[error(transparent)]
    LocalXds(#[from] LocalXdsError),
    /// The namespace that the relay runs in cannot be opened.
    #[error("the relay's own network namespace: {0}")]
    OwnNetns(#[source] std::io::Error),
}

/// Serves the pods that the agent names until `shutdown` is ready, then lets their connections end. Must be called on a
/// Tokio runtime.
///
/// # Errors
/// The relay cannot start. Nothing ends it later.
pub async fn run(
    config: RelayConfig,
    shutdown: impl Future<Output = ()>,
) -> Result<(), StartError> {
    let own_netns = Netns::current().map_err(StartError::OwnNetns)?;
    let store = Arc::new(Store::in_network(config.network.as_str()));
    let watch = local_xds::watch_file(&config.local_xds, Arc::clone(&store))?;
    let pods = Arc::new(Pods::new(store, Arc::new(Pipes::new()), own_netns.clone()));
    let options = ClientOptions {
        path: config.zds_socket.clone(),
        // For the pods' addresses, which the original protocol does not tell.
        extension: true,
        own_netns,
        default_drain: config.drain,
    };
    tracing::info!(zds = %config.zds_socket.display(), "relay started");
    client::run(options, Arc::clone(&pods), shutdown).await;
    watch.abort();
    tracing::info!(deadline = ?config.drain, "draining");
    pods.shutdown(config.drain).await;
    Ok(())
}
