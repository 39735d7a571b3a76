//! Where a proxy's view of the mesh and its certificates come from: files and the built-in CA, or a control plane.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use control_plane::ads::{AdsClient, AdsConfig, AdsMetrics, NodeInfo};
use control_plane::backoff::Backoff;
use control_plane::ca::CaClient;
use control_plane::transport::Endpoint;
use shared_proxy::identity::{CertificateAuthority, LocalCa};
use shared_proxy::state::{Store, local_xds};
use shared_proxy::telemetry::{Readiness, Telemetry};
use tokio::task::JoinHandle;

/// Readiness task that is open until the control plane has told of the mesh.
const STATE: &str = "state manager";

/// Where workloads, services and policies come from.
#[derive(Debug, Clone)]
pub enum MeshSource {
    /// A file in LOCAL_XDS form, followed.
    File(PathBuf),
    /// A text in LOCAL_XDS form.
    Text(String),
    /// A control plane.
    ControlPlane(Box<Followed>),
}

/// A control plane that is followed.
#[derive(Debug, Clone)]
pub struct Followed {
    /// Where it is.
    pub endpoint: Endpoint,
    /// Who asks.
    pub node: NodeInfo,
    /// Follow only what is asked for.
    pub on_demand: bool,
}

/// Where certificates come from.
#[derive(Debug, Clone)]
pub enum AuthoritySource {
    /// The built-in CA, whose root is in this directory.
    BuiltIn(PathBuf),
    /// A CA that is asked.
    Remote(Endpoint),
}

/// What keeps a store up to date, until it is dropped.
#[derive(Debug)]
pub(super) enum Following {
    Nothing,
    File(JoinHandle<()>),
    ControlPlane { _client: AdsClient },
}

impl Drop for Following {
    fn drop(&mut self) {
        if let Self::File(task) = self {
            task.abort();
        }
    }
}

impl MeshSource {
    /// Fills the store, now or as soon as the control plane answers, and keeps it up to date.
    pub(super) fn follow(
        &self,
        store: &Arc<Store>,
        telemetry: &Telemetry,
        readiness: &Readiness,
    ) -> anyhow::Result<Following> {
        match self {
            Self::File(path) => {
                let task = local_xds::watch_file(path, Arc::clone(store)).context("workloads")?;
                Ok(Following::File(task))
            }
            Self::Text(text) => {
                store.replace(local_xds::parse(text).context("workloads (LOCAL_XDS)")?);
                Ok(Following::Nothing)
            }
            Self::ControlPlane(followed) => {
                let Followed {
                    endpoint,
                    node,
                    on_demand,
                } = &**followed;
                let metrics = AdsMetrics::default();
                telemetry.register(|registry| metrics.register(registry));
                tracing::info!(server = %endpoint.address, on_demand, "the mesh comes from a control plane");
                let config = AdsConfig {
                    endpoint: endpoint.clone(),
                    node: node.clone(),
                    on_demand: *on_demand,
                    backoff: Backoff::default(),
                };
                let ready = readiness.register(STATE);
                let client = AdsClient::start(config, Arc::clone(store), metrics, Some(ready));
                if *on_demand {
                    store.learn_from(Arc::new(client.demands()));
                }
                Ok(Following::ControlPlane { _client: client })
            }
        }
    }
}

impl AuthoritySource {
    pub(super) fn open(
        &self,
        trust_domain: &str,
        ttl: Duration,
    ) -> anyhow::Result<Arc<dyn CertificateAuthority>> {
        Ok(match self {
            Self::BuiltIn(dir) => Arc::new(
                LocalCa::open(dir, trust_domain, ttl)
                    .with_context(|| format!("built-in CA in {}", dir.display()))?,
            ),
            Self::Remote(endpoint) => {
                tracing::info!(server = %endpoint.address, "certificates come from a CA");
                Arc::new(CaClient::new(endpoint.clone(), ttl))
            }
        })
    }
}
