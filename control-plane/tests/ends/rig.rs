//! What the tests have in common: a real control plane on loopback, clients of it, waits.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control_plane::ads::{AdsClient, AdsConfig, AdsMetrics, NodeInfo};
use control_plane::backoff::Backoff;
use control_plane::server::{ControlPlane, ControlPlaneOptions};
use control_plane::transport::{Endpoint, Keepalive, Roots};
use prometheus_client::registry::Registry;
use shared_proxy::identity::LocalCa;
use shared_proxy::state::{Store, local_xds};
use shared_proxy::telemetry::Readiness;
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

pub const DAY: Duration = Duration::from_secs(86_400);

/// A control plane with its CA in a directory of its own.
pub struct Served {
    pub control: ControlPlane,
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

pub fn ca_in(dir: &Path) -> LocalCa {
    LocalCa::open(dir, "cluster.local", DAY).unwrap()
}

pub async fn serve(dir: &TempDir, address: &str, token: bool) -> Served {
    let control = ControlPlane::new(ControlPlaneOptions {
        ca: ca_in(dir.path()),
        names: vec!["127.0.0.1".to_owned(), "istiod".to_owned()],
        token: token.then(|| dir.path().join("token")),
        longest_ttl: DAY,
    });
    // A port that was in use until now may take a moment.
    let mut listener = TcpListener::bind(address).await;
    for _ in 0..50 {
        if listener.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        listener = TcpListener::bind(address).await;
    }
    let listener = listener.unwrap();
    let address = listener.local_addr().unwrap();
    let task = tokio::spawn({
        let control = control.clone();
        async move { control.serve(listener).await.unwrap() }
    });
    Served {
        control,
        address,
        task,
    }
}

impl Served {
    pub fn publish(&self, yaml: &str) {
        self.control.publish(local_xds::parse(yaml).unwrap());
    }

    /// Returns when the last connection has ended.
    pub async fn stop(self) {
        self.control.shut_down();
        self.task.await.unwrap();
    }
}

pub fn endpoint(dir: &TempDir, address: &str) -> Endpoint {
    Endpoint {
        address: address.parse().unwrap(),
        roots: Roots::File(dir.path().join("root-cert.pem")),
        server_name: None,
        token: None,
        cluster_id: "c1".to_owned(),
        headers: Vec::new(),
        keepalive: Keepalive::default(),
    }
}

/// A client with its store and metrics.
pub struct Client {
    pub store: Arc<Store>,
    pub readiness: Readiness,
    pub ads: AdsClient,
    registry: Registry,
}

pub fn follow(endpoint: Endpoint, on_demand: bool) -> Client {
    let backoff = Backoff {
        longest: Duration::from_millis(200),
        ..Backoff::default()
    };
    follow_with(endpoint, on_demand, backoff)
}

pub fn follow_with(endpoint: Endpoint, on_demand: bool, backoff: Backoff) -> Client {
    let store = Arc::new(Store::new());
    let readiness = Readiness::new();
    let metrics = AdsMetrics::default();
    let mut registry = Registry::default();
    metrics.register(&mut registry);
    let config = AdsConfig {
        endpoint,
        node: NodeInfo {
            pod_name: "z1".to_owned(),
            pod_namespace: "istio-system".to_owned(),
            ..NodeInfo::default()
        },
        on_demand,
        backoff,
    };
    let ready = readiness.register("state manager");
    Client {
        ads: AdsClient::start(config, Arc::clone(&store), metrics, Some(ready)),
        store,
        readiness,
        registry,
    }
}

impl Client {
    /// The value of a metric with these words in its line; 0 if there is no such line.
    pub fn metric(&self, words: &[&str]) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        text.lines()
            .filter(|line| !line.starts_with('#') && words.iter().all(|word| line.contains(word)))
            .map(|line| line.rsplit(' ').next().unwrap().parse::<u64>().unwrap())
            .sum()
    }

    pub fn workloads(&self) -> Vec<String> {
        let snapshot = self.store.load();
        snapshot.workloads().map(|w| w.uid.to_string()).collect()
    }
}

/// Waits up to ten seconds for something to become true.
pub async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not within ten seconds: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
