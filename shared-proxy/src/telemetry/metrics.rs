//! Counters of connections, and how they are written for a scrape.
//!
//! A connection looks up its [`Series`] once. All metrics of a label set live in that one object, so that a connection
//! costs one lookup and not one per metric.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{
    DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelEncoder, LabelSetEncoder,
};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::gauge::{ConstGauge, Gauge};
use prometheus_client::registry::Registry;

use super::Direction;
use super::connection::LiveConnections;
use super::labels::ConnectionLabels;

/// What is counted for one label set.
#[derive(Debug)]
pub(super) struct Series {
    pub labels: Arc<ConnectionLabels>,
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    pub sent: AtomicU64,
    pub received: AtomicU64,
}

/// Every label set that was seen.
#[derive(Debug, Default)]
pub(super) struct SeriesTable {
    series: RwLock<HashMap<Arc<ConnectionLabels>, Arc<Series>>>,
}

impl SeriesTable {
    pub fn get(&self, labels: ConnectionLabels) -> Arc<Series> {
        let known = self
            .series
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&labels)
            .cloned();
        if let Some(series) = known {
            return series;
        }
        let labels = Arc::new(labels);
        let mut table = self.series.write().unwrap_or_else(PoisonError::into_inner);
        let series = table.entry(Arc::clone(&labels)).or_insert_with(|| {
            Arc::new(Series {
                labels,
                opened: AtomicU64::new(0),
                closed: AtomicU64::new(0),
                failed: AtomicU64::new(0),
                sent: AtomicU64::new(0),
                received: AtomicU64::new(0),
            })
        });
        Arc::clone(series)
    }

    /// All series, in the order of their labels, so that two scrapes list them alike.
    fn sorted(&self) -> Vec<Arc<Series>> {
        let mut all: Vec<_> = self
            .series
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        all.sort_by(|a, b| a.labels.cmp(&b.labels));
        all
    }
}

/// Writes the connection metrics. Before it does, every live connection adds what it has moved since the last scrape:
/// counters are read nowhere else, so a scrape is never behind and no timer is needed.
#[derive(Debug)]
pub(super) struct ConnectionCollector {
    pub series: Arc<SeriesTable>,
    pub live: Arc<LiveConnections>,
}

type Read = fn(&Series) -> &AtomicU64;

/// Name without the suffix `_total`, help, and where the value is.
const COUNTERS: [(&str, &str, Read); 5] = [
    (
        "istio_tcp_connections_opened",
        "Connections that were opened",
        |s| &s.opened,
    ),
    (
        "istio_tcp_connections_closed",
        "Opened connections that have ended, for whatever reason",
        |s| &s.closed,
    ),
    (
        "istio_tcp_connections_failed",
        "Connections that were refused or ended with an error; response_flags says at what",
        |s| &s.failed,
    ),
    (
        "istio_tcp_sent_bytes",
        "Bytes from the client towards the destination, whoever reports",
        |s| &s.sent,
    ),
    (
        "istio_tcp_received_bytes",
        "Bytes from the destination back to the client, whoever reports",
        |s| &s.received,
    ),
];

impl Collector for ConnectionCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut open: BTreeMap<(Direction, &'static str), i64> = BTreeMap::new();
        for connection in self.live.all() {
            connection.flush(&self.series);
            *open.entry(connection.kind()).or_default() += 1;
        }
        let all = self.series.sorted();
        for (name, help, read) in COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                let metric = family.encode_family(&*series.labels)?;
                ConstCounter::new(read(series).load(Relaxed)).encode(metric)?;
            }
        }
        // A kind of connection that was seen stays, with 0: a gauge that vanishes cannot be told from a dead process.
        for series in &all {
            open.entry((series.labels.direction, series.labels.capture_mode))
                .or_default();
        }
        let mut family = encoder.encode_descriptor(
            "istio_tcp_sockets_open",
            "Connections that are open",
            None,
            MetricType::Gauge,
        )?;
        for ((direction, capture_mode), count) in open {
            let labels = [
                ("reporter", direction.reporter()),
                ("capture_mode", capture_mode),
            ];
            let metric = family.encode_family(&labels)?;
            ConstGauge::new(count).encode(metric)?;
        }
        Ok(())
    }
}

impl EncodeLabelSet for ConnectionLabels {
    fn encode(&self, encoder: &mut LabelSetEncoder) -> Result<(), fmt::Error> {
        self.for_each(|name, value| DisplayLabel(name, value).encode(encoder.encode_label()))
    }
}

struct DisplayLabel<'a>(&'static str, &'a dyn fmt::Display);

impl EncodeLabel for DisplayLabel<'_> {
    fn encode(&self, mut encoder: LabelEncoder) -> Result<(), fmt::Error> {
        use std::fmt::Write;
        let mut key = encoder.encode_label_key()?;
        key.write_str(self.0)?;
        let mut value = key.encode_label_value()?;
        write!(value, "{}", self.1)?;
        value.finish()
    }
}

/// The pods that are captured through this process.
#[derive(Debug, Clone, Default)]
pub struct WorkloadManagerMetrics {
    active: Gauge,
    pending: Gauge,
    started: Counter,
    stopped: Counter,
}

impl WorkloadManagerMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "workload_manager_active_proxy_count",
            "Pods whose listeners are up",
            self.active.clone(),
        );
        registry.register(
            "workload_manager_pending_proxy_count",
            "Pods whose listeners could not be started yet and are tried again",
            self.pending.clone(),
        );
        registry.register(
            "workload_manager_proxies_started",
            "Pods whose listeners were started",
            self.started.clone(),
        );
        registry.register(
            "workload_manager_proxies_stopped",
            "Pods whose listeners were stopped",
            self.stopped.clone(),
        );
    }

    /// A pod's listeners are up.
    pub fn proxy_started(&self) {
        self.started.inc();
        self.active.inc();
    }

    /// A pod's listeners, which were up, are gone.
    pub fn proxy_stopped(&self) {
        self.stopped.inc();
        self.active.dec();
    }

    /// How many pods wait for another attempt.
    pub fn set_pending(&self, pods: usize) {
        self.pending.set(i64::try_from(pods).unwrap_or(i64::MAX));
    }
}
