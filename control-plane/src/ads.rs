//! The client of delta discovery: keeps a store like the control plane's.
//!
//! One stream carries both types of resources. While there is none the store stays as it is, for as long as it takes; the
//! next stream begins with the versions of what is held, so that the server answers with the differences only.

mod demand;
mod metrics;
mod mirror;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use futures_util::Stream;
use http::uri::PathAndQuery;
use prost::Message;
use shared_proxy::state::Store;
use shared_proxy::telemetry::ReadinessTask;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tonic_prost::ProstCodec;

pub use demand::Demands;
pub use metrics::{AdsMetrics, Termination};

use crate::backoff::Backoff;
use crate::messages::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, Node, Status, Struct,
};
use crate::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use crate::transport::{ConnectError, Endpoint};
use demand::Pending;
use mirror::{Mirror, Outcome};

/// Path of the call.
pub const DELTA_AGGREGATED_RESOURCES: &str =
    "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources";

/// The name that stands for all resources of a type.
pub(crate) const WILDCARD: &str = "*";

/// This many unusable resources are named to the server and in the log; the others are counted.
const NAMED_REFUSALS: usize = 20;

/// Who the proxy is, to the control plane.
#[derive(Debug, Clone, Default)]
pub struct NodeInfo {
    /// Name of the proxy's pod.
    pub pod_name: String,
    /// Namespace of the proxy's pod.
    pub pod_namespace: String,
    /// Address of the proxy's pod; empty if it is not known.
    pub instance_ip: String,
    /// Name of the node.
    pub node_name: String,
    /// Further metadata.
    pub metadata: BTreeMap<String, serde_json::Value>,
}

impl NodeInfo {
    fn message(&self) -> Node {
        let Self {
            pod_name,
            pod_namespace,
            instance_ip,
            node_name,
            metadata,
        } = self;
        let ip = if instance_ip.is_empty() {
            "1.1.1.1"
        } else {
            instance_ip
        };
        let mut fields: BTreeMap<_, _> = metadata
            .iter()
            .map(|(name, value)| (name.clone(), value.clone().into()))
            .collect();
        for (name, text) in [
            ("NAME", pod_name.as_str()),
            ("NAMESPACE", pod_namespace),
            ("INSTANCE_IPS", ip),
            ("NODE_NAME", node_name),
        ] {
            fields.insert(name.to_owned(), text.to_owned().into());
        }
        Node {
            id: format!(
                "ztunnel~{ip}~{pod_name}.{pod_namespace}~{pod_namespace}.svc.cluster.local"
            ),
            cluster: String::new(),
            metadata: Some(Struct { fields }),
        }
    }
}

/// What a client is started with.
#[derive(Debug)]
pub struct AdsConfig {
    /// The server.
    pub endpoint: Endpoint,
    /// Who asks.
    pub node: NodeInfo,
    /// Follow only the workloads and services that are asked for ([`Demands`]), not all. Policies are followed all the
    /// same.
    pub on_demand: bool,
    /// Waits between streams.
    pub backoff: Backoff,
}

/// A running client. Dropping it ends it; the store stays as it is.
#[derive(Debug)]
pub struct AdsClient {
    task: JoinHandle<()>,
    demands: Demands,
}

impl Drop for AdsClient {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl AdsClient {
    /// Starts following a control plane. `ready` is done when the first answers have been put into the store. Must be called
    /// on a Tokio runtime.
    pub fn start(
        config: AdsConfig,
        store: Arc<Store>,
        metrics: AdsMetrics,
        ready: Option<ReadinessTask>,
    ) -> Self {
        let (demands, asked) = Demands::new();
        let follower = Follower {
            mirror: Arc::new(Mutex::new(Mirror::new(config.on_demand))),
            node: config.node.message(),
            pending: Pending::default(),
            awaited: if config.on_demand {
                BTreeSet::from([AUTHORIZATION_TYPE])
            } else {
                BTreeSet::from([ADDRESS_TYPE, AUTHORIZATION_TYPE])
            },
            config,
            store,
            metrics,
            ready,
            asked,
        };
        Self {
            task: tokio::spawn(follower.run()),
            demands,
        }
    }

    /// Asks for single workloads and services; useful with [`AdsConfig::on_demand`] only.
    pub fn demands(&self) -> Demands {
        self.demands.clone()
    }
}

struct Follower {
    config: AdsConfig,
    node: Node,
    store: Arc<Store>,
    metrics: AdsMetrics,
    mirror: Arc<Mutex<Mirror>>,
    /// Types whose first answer is awaited.
    awaited: BTreeSet<&'static str>,
    ready: Option<ReadinessTask>,
    asked: mpsc::UnboundedReceiver<demand::Demand>,
    pending: Pending,
}

/// How a stream ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Connect(#[from] ConnectError),
    #[error("{0:?}: {1}")]
    Status(tonic::Code, String),
    #[error("the server closed the stream")]
    Complete,
    #[error("the response could not be taken in: {0}")]
    Panic(#[from] tokio::task::JoinError),
    #[error(transparent)]
    Path(#[from] http::uri::InvalidUri),
}

impl Ended {
    fn reason(&self) -> Termination {
        match self {
            Self::Connect(_) | Self::Path(_) => Termination::ConnectionError,
            Self::Complete => Termination::Complete,
            Self::Status(tonic::Code::Unavailable, message) if message.contains("GOAWAY") => {
                Termination::Reconnect
            }
            Self::Status(..) | Self::Panic(_) => Termination::Error,
        }
    }
}

impl From<tonic::Status> for Ended {
    fn from(status: tonic::Status) -> Self {
        Self::Status(status.code(), status.message().to_owned())
    }
}

impl Follower {
    async fn run(mut self) {
        let mut failures = 0;
        loop {
            let mut progress = false;
            let Err(ended) = self.stream(&mut progress).await;
            self.metrics.ended(ended.reason());
            failures = if progress { 1 } else { failures + 1 };
            let wait = self.config.backoff.wait(failures);
            let server = &self.config.endpoint.address;
            match &ended {
                Ended::Complete => tracing::info!(%server, retry_in = ?wait, "XDS stream closed"),
                error => {
                    tracing::warn!(%server, %error, retry_in = ?wait, "XDS client connection error");
                }
            }
            tokio::time::sleep(wait).await;
        }
    }

    /// Follows one stream to its end. `progress` tells whether a response arrived on it.
    async fn stream(&mut self, progress: &mut bool) -> Result<std::convert::Infallible, Ended> {
        let mut grpc = self.config.endpoint.connect().await?;
        let (requests, outgoing) = mpsc::unbounded_channel();
        for request in self.first_requests() {
            // Cannot fail while the receiver is here.
            let _ = requests.send(request);
        }
        let mut call = tonic::Request::new(stream_of(outgoing));
        *call.metadata_mut() = self.config.endpoint.metadata()?;
        grpc.ready()
            .await
            .map_err(|error| Ended::Status(tonic::Code::Unavailable, error.to_string()))?;
        let codec = ProstCodec::<DeltaDiscoveryRequest, DeltaDiscoveryResponse>::default();
        let path = PathAndQuery::try_from(DELTA_AGGREGATED_RESOURCES)?;
        let mut responses = grpc.streaming(call, path, codec).await?.into_inner();
        tracing::info!(server = %self.config.endpoint.address, "XDS stream opened");
        loop {
            tokio::select! {
                response = responses.message() => {
                    let response = response?.ok_or(Ended::Complete)?;
                    let answer = self.take(response).await?;
                    *progress = true;
                    self.metrics.connected();
                    for request in answer {
                        let _ = requests.send(request);
                    }
                }
                // The client lives as long as this task, and holds the sender.
                Some(demand) = self.asked.recv() => {
                    if let Some(name) = self.pending.add(demand) {
                        let _ = requests.send(DeltaDiscoveryRequest {
                            type_url: ADDRESS_TYPE.to_owned(),
                            resource_names_subscribe: vec![name],
                            ..DeltaDiscoveryRequest::default()
                        });
                    }
                }
            }
        }
    }

    fn first_requests(&mut self) -> [DeltaDiscoveryRequest; 2] {
        while let Ok(demand) = self.asked.try_recv() {
            self.pending.add(demand);
        }
        let mirror = self.mirror.lock().unwrap_or_else(PoisonError::into_inner);
        let first = |type_url: &str| DeltaDiscoveryRequest {
            node: Some(self.node.clone()),
            type_url: type_url.to_owned(),
            initial_resource_versions: mirror.versions(type_url),
            ..DeltaDiscoveryRequest::default()
        };
        let mut addresses = first(ADDRESS_TYPE);
        if self.config.on_demand {
            // Both at once: neither all, which nothing at all would mean, nor none for want of a request.
            addresses.resource_names_subscribe = vec![WILDCARD.to_owned()];
            addresses
                .resource_names_subscribe
                .extend(self.pending.followed());
            addresses.resource_names_unsubscribe = vec![WILDCARD.to_owned()];
        }
        [addresses, first(AUTHORIZATION_TYPE)]
    }

    /// Puts a response into the store, and says what to answer.
    async fn take(
        &mut self,
        response: DeltaDiscoveryResponse,
    ) -> Result<Vec<DeltaDiscoveryRequest>, Ended> {
        let type_url = response.type_url.clone();
        let nonce = response.nonce.clone();
        let bytes = response.encoded_len();
        let (mirror, store) = (Arc::clone(&self.mirror), Arc::clone(&self.store));
        // The first response of a large mesh takes a while.
        let outcome = tokio::task::spawn_blocking(move || {
            let mut mirror = mirror.lock().unwrap_or_else(PoisonError::into_inner);
            let mut outcome = mirror.take(response)?;
            let changes = std::mem::take(&mut outcome.changes);
            let count = changes.len();
            if count > 0 {
                store.update(changes);
            }
            Some((outcome, count))
        })
        .await?;
        let mut answer = DeltaDiscoveryRequest {
            type_url: type_url.clone(),
            response_nonce: nonce,
            ..DeltaDiscoveryRequest::default()
        };
        let Some((outcome, changes)) = outcome else {
            tracing::warn!(
                type_url,
                "the control plane sent resources of a type that nobody asked for"
            );
            self.metrics.message(&type_url, bytes, 0);
            answer.error_detail = Some(refusal("this type was not asked for".to_owned()));
            return Ok(vec![answer]);
        };
        tracing::debug!(type_url, bytes, changes, "XDS response");
        self.metrics
            .message(&type_url, bytes, outcome.refused.len());
        if !outcome.refused.is_empty() {
            let message = refusals(&outcome);
            tracing::warn!(type_url, %message, "some resources from the control plane are not usable");
            answer.error_detail = Some(refusal(message));
        }
        self.awaited.remove(type_url.as_str());
        if self.awaited.is_empty()
            && let Some(ready) = self.ready.take()
        {
            ready.done();
        }
        let mut answers = vec![answer];
        if self.config.on_demand && type_url == ADDRESS_TYPE {
            let forgotten =
                self.pending
                    .answered(&outcome.answered, &outcome.ranges, &outcome.absent);
            if !forgotten.is_empty() {
                answers.push(DeltaDiscoveryRequest {
                    type_url,
                    resource_names_unsubscribe: forgotten,
                    ..DeltaDiscoveryRequest::default()
                });
            }
        }
        Ok(answers)
    }
}

fn refusal(message: String) -> Status {
    Status {
        code: tonic::Code::InvalidArgument.into(),
        message,
    }
}

fn refusals(outcome: &Outcome) -> String {
    let mut message = String::new();
    for (name, why) in outcome.refused.iter().take(NAMED_REFUSALS) {
        if !message.is_empty() {
            message.push_str("; ");
        }
        message.push_str(&format!("{name}: {why}"));
    }
    let more = outcome.refused.len().saturating_sub(NAMED_REFUSALS);
    if more > 0 {
        message.push_str(&format!("; and {more} more"));
    }
    message
}

fn stream_of<T: Send + 'static>(
    receiver: mpsc::UnboundedReceiver<T>,
) -> impl Stream<Item = T> + Send {
    futures_util::stream::unfold(receiver, |mut receiver| async move {
        receiver.recv().await.map(|item| (item, receiver))
    })
}

#[cfg(test)]
mod tests;
