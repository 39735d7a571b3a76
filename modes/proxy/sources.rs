//! Where a proxy's view of the mesh and its certificates come from: files and the built-in CA, or a control plane.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use control_plane::ads::{AdsClient, AdsConfig, AdsMetrics, NodeInfo};
use control_plane::backoff::Backoff;
use control_plane::ca::CaClient;
use control_plane::transport::{Endpoint, Roots, Token};
use serde_json::{Value, json};
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

/// An endpoint as the configuration dump shows it: without the token itself, and without the values of headers, of which
/// one may be a secret too.
fn describe(endpoint: &Endpoint) -> Value {
    json!({
        "address": endpoint.address.to_string(),
        "rootCert": match &endpoint.roots {
            Roots::File(path) => path.display().to_string(),
            Roots::Text(_) => "given as a text".to_owned(),
            Roots::System => "SYSTEM".to_owned(),
        },
        "altHostname": endpoint.server_name,
        "token": endpoint.token.as_ref().map(|token| match token {
            Token::File(path) => path.display().to_string(),
            Token::Text(_) => "given as a text".to_owned(),
        }),
        "clusterId": endpoint.cluster_id,
        "headers": endpoint.headers.iter().map(|(name, _)| name).collect::<Vec<_>>(),
    })
}

impl MeshSource {
    /// For the configuration dump.
    pub(super) fn describe(&self) -> Value {
        match self {
            Self::File(path) => json!({ "file": path }),
            Self::Text(_) => json!({ "text": true }),
            Self::ControlPlane(followed) => json!({
                "xds": describe(&followed.endpoint),
                "onDemand": followed.on_demand,
                "node": {
                    "name": followed.node.pod_name,
                    "namespace": followed.node.pod_namespace,
                    "instanceIp": followed.node.instance_ip,
                    "nodeName": followed.node.node_name,
                    "metadata": followed.node.metadata,
                },
            }),
        }
    }

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
    /// For the configuration dump.
    pub(super) fn describe(&self) -> Value {
        match self {
            Self::BuiltIn(dir) => json!({ "builtIn": dir }),
            Self::Remote(endpoint) => json!({ "ca": describe(endpoint) }),
        }
    }

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
