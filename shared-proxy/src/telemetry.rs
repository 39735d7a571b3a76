//! What an operator sees: access log, metrics, readiness and the admin pages.
//!
//! The data plane calls [`Telemetry::open`] once per connection, tells the [`ConnectionRecord`] what it moves, and
//! finishes it. Connections that are turned away before there is anything to account for go to [`Telemetry::refused`].
//! [`admin`] serves what is known.

use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use serde::Serialize;

use crate::capture::{ClientAddr, OrigDstAddr, Refusal};
use crate::hbone::authority::Authority;
use crate::identity::Identity;
use crate::state::{Service, Workload};

pub mod access_log;
pub mod admin;
mod connection;
mod exposition;
mod half_open;
mod labels;
mod latency;
mod metrics;
mod open;
mod process;
mod readiness;
mod runtime;
mod series;
#[cfg(test)]
mod tests;

pub use connection::{ApplicationLeg, ConnectionInfo, ConnectionRecord, EndpointInfo, TunnelLeg};
pub use half_open::HalfOpenWatch;
pub use latency::Step;
pub use metrics::WorkloadManagerMetrics;
pub use open::OpenConnections;
pub use readiness::{Readiness, ReadinessTask};
pub use series::SeriesLimits;

use connection::LiveConnections;
use labels::ConnectionLabels;
use latency::{Latencies, LatencyCollector};
use metrics::ConnectionCollector;
use series::SeriesTable;

/// Which end of a connection is captured here: the one that opened it, or the one that it goes to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// To a captured pod; the destination reports.
    Inbound,
    /// From a captured pod; the source reports.
    Outbound,
}

impl Direction {
    /// Value of the access log's key `direction`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inbound => "inbound",
            Self::Outbound => "outbound",
        }
    }

    /// Value of the label `reporter`.
    pub fn reporter(self) -> &'static str {
        match self {
            Self::Inbound => "destination",
            Self::Outbound => "source",
        }
    }
}

/// At what a connection failed: the label `response_flags`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ResponseFlag {
    /// `-`: nothing failed, or something that has no flag (a reset in the middle, an abort).
    None,
    /// `DENY`: an authorization policy said no.
    Denied,
    /// `CONNECT`: the upstream connection could not be made.
    Connect,
    /// `TLS_FAILURE`: the TLS handshake.
    TlsFailure,
    /// `H2_HANDSHAKE_FAILURE`: HTTP/2 on top of TLS.
    H2HandshakeFailure,
    /// `NETWORK_POLICY`: something between the proxies drops the tunnel.
    NetworkPolicy,
    /// `IDENTITY_ERROR`: no certificate for the workload's identity.
    IdentityError,
    /// `CERT_REVOKED`: the peer's certificate is revoked.
    CertificateRevoked,
}

impl ResponseFlag {
    /// The text of the label.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Denied => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
            Self::CertificateRevoked => "CERT_REVOKED",
        }
    }
}

impl fmt::Display for ResponseFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a connection ended badly or was not served: a flag for the metrics, a sentence for the log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct ConnectionError {
    flag: ResponseFlag,
    text: String,
}

impl ConnectionError {
    /// `cause` is written to the log as it displays.
    pub fn new(flag: ResponseFlag, cause: impl fmt::Display) -> Self {
        Self {
            flag,
            text: cause.to_string(),
        }
    }

    /// Its flag.
    pub fn flag(&self) -> ResponseFlag {
        self.flag
    }
}

impl From<Refusal> for ConnectionError {
    fn from(refusal: Refusal) -> Self {
        Self::new(ResponseFlag::None, refusal)
    }
}

/// One end of a connection.
#[derive(Debug, Clone)]
pub struct Endpoint {
    /// Address and port on the wire. For the destination of a tunnelled connection: the tunnel's.
    pub addr: SocketAddr,
    /// The workload that has this address, if it is known.
    pub workload: Option<Arc<Workload>>,
    /// Who it is. At the far end only what a certificate proved.
    pub identity: Option<Identity>,
}

impl Endpoint {
    /// An end of which only the address is known.
    pub fn unknown(addr: SocketAddr) -> Self {
        Self {
            addr,
            workload: None,
            identity: None,
        }
    }
}

/// What is known when a connection is accepted, or, better, when its destination has been chosen.
#[derive(Debug, Clone)]
pub struct Opening {
    /// Which end is captured here.
    pub direction: Direction,
    /// `ScopeId::capture_mode` of the scope that brought it.
    pub capture_mode: &'static str,
    /// Who opened it.
    pub source: Endpoint,
    /// Where it goes.
    pub destination: Endpoint,
    /// The service that the client named, if it named one.
    pub destination_service: Option<Arc<Service>>,
    /// Destination inside the tunnel, if there is a tunnel.
    pub hbone_addr: Option<Authority>,
    /// Whether the peers authenticate each other.
    pub mutual_tls: bool,
}

/// What the process says about itself in `istio_build`, and what it keeps.
#[derive(Debug, Clone, Default)]
pub struct TelemetryOptions {
    /// Name of the program.
    pub component: String,
    /// Its version.
    pub tag: String,
    /// Time series of connections.
    pub series: SeriesLimits,
}

/// Metrics and access log of one process.
#[derive(Debug)]
pub struct Telemetry {
    options: TelemetryOptions,
    registry: Mutex<Registry>,
    series: Arc<SeriesTable>,
    live: Arc<LiveConnections>,
    latencies: Arc<Latencies>,
    workloads: WorkloadManagerMetrics,
}

impl Telemetry {
    /// Registers every metric of the proxy.
    pub fn new(options: TelemetryOptions) -> Self {
        let mut registry = Registry::default();
        let series = Arc::new(SeriesTable::new(options.series));
        let live = Arc::new(LiveConnections::default());
        let latencies = Arc::new(Latencies::default());
        let workloads = WorkloadManagerMetrics::default();
        registry.register_collector(Box::new(ConnectionCollector {
            series: Arc::clone(&series),
            live: Arc::clone(&live),
        }));
        registry.register_collector(Box::new(LatencyCollector(Arc::clone(&latencies))));
        workloads.register(&mut registry);
        registry.register_collector(Box::new(BuildCollector(options.clone())));
        registry.register_collector(Box::new(process::ProcessCollector));
        Self {
            options,
            registry: Mutex::new(registry),
            series,
            live,
            latencies,
            workloads,
        }
    }

    /// Adds a gauge without labels that is read at every scrape.
    pub fn gauge(
        &self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> i64 + Send + Sync + 'static,
    ) {
        self.read_at_scrape(name, help, metrics::Reading::Gauge(Box::new(read)));
    }

    /// Adds a counter without labels that is read at every scrape; `name` is without `_total`.
    pub fn counter(
        &self,
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> u64 + Send + Sync + 'static,
    ) {
        self.read_at_scrape(name, help, metrics::Reading::Counter(Box::new(read)));
    }

    fn read_at_scrape(&self, name: &'static str, help: &'static str, reading: metrics::Reading) {
        self.register(|registry| {
            registry.register_collector(Box::new(metrics::Reader {
                name,
                help,
                reading,
            }));
        });
    }

    /// Adds the `tokio_*` metrics of a runtime: the one that carries the connections.
    pub fn watch_runtime(&self, runtime: tokio::runtime::Handle) {
        self.register(|registry| {
            registry.register_collector(Box::new(runtime::RuntimeCollector(runtime)));
        });
    }

    /// Counts how long a step of a connection took.
    pub fn took(
        &self,
        step: Step,
        capture_mode: &'static str,
        direction: Direction,
        time: std::time::Duration,
    ) {
        self.latencies.observe(step, capture_mode, direction, time);
    }

    /// Lets another part of the program add its own metrics.
    pub fn register(&self, add: impl FnOnce(&mut Registry)) {
        add(&mut self.registry.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Opens the account of a connection.
    pub fn open(&self, opening: Opening) -> ConnectionRecord {
        ConnectionRecord::open(opening, &self.series, &self.live, &self.latencies)
    }

    /// A connection that is turned away before it is opened: one line at WARN, and one more failed connection.
    pub fn refused(
        &self,
        direction: Direction,
        capture_mode: &'static str,
        client: ClientAddr,
        destination: Option<OrigDstAddr>,
        reason: &ConnectionError,
    ) {
        self.series
            .get(ConnectionLabels::refused(
                direction,
                capture_mode,
                reason.flag(),
            ))
            .failed
            .fetch_add(1, Relaxed);
        let destination = destination.map(|address| address.0);
        access_log::refused(direction, capture_mode, client.0, destination, reason);
    }

    /// The open connections, oldest first.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.live.infos()
    }

    /// The open connections from and to these addresses that a capture brought.
    pub fn connections_of(
        &self,
        addresses: &[std::net::IpAddr],
        capture_mode: &'static str,
    ) -> OpenConnections {
        OpenConnections::of(&self.live, addresses, capture_mode)
    }

    /// Finds connections that are half-open for too long.
    pub fn half_open_watch(&self) -> HalfOpenWatch {
        HalfOpenWatch::new(Arc::clone(&self.live))
    }

    /// Counters of the part that starts and stops pods' listeners.
    pub fn workload_manager(&self) -> &WorkloadManagerMetrics {
        &self.workloads
    }

    /// What the program calls itself.
    pub fn options(&self) -> &TelemetryOptions {
        &self.options
    }

    /// All metrics in Prometheus' text format 0.0.4.
    pub fn encode_prometheus(&self) -> Result<String, fmt::Error> {
        self.encode().map(|text| exposition::prometheus(&text))
    }

    /// All metrics as OpenMetrics text, up to date with the live connections.
    pub fn encode(&self) -> Result<String, fmt::Error> {
        let registry = self.registry.lock().unwrap_or_else(PoisonError::into_inner);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// `istio_build{component, tag} 1`.
#[derive(Debug)]
struct BuildCollector(TelemetryOptions);

impl Collector for BuildCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let help = "Program and version, always 1";
        let mut family = encoder.encode_descriptor("istio_build", help, None, MetricType::Gauge)?;
        let labels = [
            ("component", self.0.component.as_str()),
            ("tag", self.0.tag.as_str()),
        ];
        let metric = family.encode_family(&labels)?;
        ConstGauge::new(1i64).encode(metric)
    }
}
