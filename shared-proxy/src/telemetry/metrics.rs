//! Counters of connections, and how they are written for a scrape.
//!
//! A connection looks up its [`Series`] once. All metrics of a label set live in that one object, so that a connection
//! costs one lookup and not one per metric.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
use super::series::{Series, SeriesTable};

/// Writes the connection metrics. Before it does, every live connection adds what it has moved since the last scrape:
/// counters are read nowhere else, so a scrape is never behind and no timer is needed.
#[derive(Debug)]
pub(super) struct ConnectionCollector {
    pub series: Arc<SeriesTable>,
    pub live: Arc<LiveConnections>,
}

type Read = fn(&Series) -> &AtomicU64;

/// When a counter is listed.
enum Listed {
    /// From the first connection of a label set on, if it is 0 or not: a rate needs a beginning.
    FromOpening,
    /// When it is not 0: the label sets of failures are listed only for what failed.
    WhenCounted,
}

/// Name without the suffix `_total`, help, where the value is, and when it is listed.
const COUNTERS: [(&str, &str, Read, Listed); 5] = [
    (
        "istio_tcp_connections_opened",
        "Connections that were opened",
        |s| &s.opened,
        Listed::FromOpening,
    ),
    (
        "istio_tcp_connections_closed",
        "Opened connections that have ended, for whatever reason",
        |s| &s.closed,
        Listed::FromOpening,
    ),
    (
        "istio_tcp_connections_failed",
        "Connections that were refused or ended with an error; response_flags says at what",
        |s| &s.failed,
        Listed::WhenCounted,
    ),
    (
        "istio_tcp_sent_bytes",
        "Bytes from the client towards the destination, whoever reports",
        |s| &s.sent,
        Listed::FromOpening,
    ),
    (
        "istio_tcp_received_bytes",
        "Bytes from the destination back to the client, whoever reports",
        |s| &s.received,
        Listed::FromOpening,
    ),
];

impl Collector for ConnectionCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let mut open: BTreeMap<(Direction, &'static str), i64> = BTreeMap::new();
        for connection in self.live.all() {
            connection.flush(&self.series);
            *open.entry(connection.kind()).or_default() += 1;
        }
        self.series.expire();
        let all = self.series.sorted();
        for (name, help, read, listed) in &COUNTERS {
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for series in &all {
                let value = read(series).load(Relaxed);
                let opened =
                    matches!(listed, Listed::FromOpening) && series.opened.load(Relaxed) > 0;
                if value > 0 || opened {
                    let metric = family.encode_family(&*series.labels)?;
                    ConstCounter::new(value).encode(metric)?;
                }
            }
        }
        let expired = encoder.encode_descriptor(
            "ambidex_metric_series_expired",
            "Time series of connections that were dropped because nothing used them for long",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(self.series.expired()).encode(expired)?;
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

/// A number that somebody else knows.
pub(super) enum Reading {
    Gauge(Box<dyn Fn() -> i64 + Send + Sync>),
    Counter(Box<dyn Fn() -> u64 + Send + Sync>),
}

/// Asks for it at every scrape.
pub(super) struct Reader {
    pub name: &'static str,
    pub help: &'static str,
    pub reading: Reading,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Reader").field(&self.name).finish()
    }
}

impl Collector for Reader {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let kind = match self.reading {
            Reading::Gauge(_) => MetricType::Gauge,
            Reading::Counter(_) => MetricType::Counter,
        };
        let metric = encoder.encode_descriptor(self.name, self.help, None, kind)?;
        match &self.reading {
            Reading::Gauge(read) => ConstGauge::new(read()).encode(metric),
            Reading::Counter(read) => ConstCounter::new(read()).encode(metric),
        }
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
