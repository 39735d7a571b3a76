//! How long the steps of a connection take, per capture: histograms of atomic counters, looked up once per step.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use super::Direction;

/// A step whose time is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Step {
    /// A TLS handshake that succeeded, of a client or of a server.
    TlsHandshake,
    /// A TCP connection made by the proxy, from the call to its success.
    Connect,
    /// From the decision where a connection goes to the first byte that came back from there.
    FirstByte,
    /// Until it is known where a connection goes and whether it may.
    Decide,
    /// Until there is room in a tunnel: a pooled one, or one that is made for it.
    Tunnel,
    /// From CONNECT to its answer.
    Request,
    /// All of it: from accepting a connection until its bytes flow.
    Total,
}

/// Metrics with no more labels than who reports.
const PLAIN: [(Step, &str, &str); 3] = [
    (
        Step::TlsHandshake,
        "ambidex_tls_handshake_duration",
        "TLS handshakes of tunnels that succeeded",
    ),
    (
        Step::Connect,
        "ambidex_upstream_connect_duration",
        "TCP connections that the proxy made, from the call until they stood",
    ),
    (
        Step::FirstByte,
        "ambidex_first_byte_duration",
        "From the decision where a connection goes to the first byte that came back",
    ),
];

/// Steps that are one metric together.
const STAGES: [(Step, &str); 4] = [
    (Step::Decide, "decide"),
    (Step::Tunnel, "tunnel"),
    (Step::Request, "request"),
    (Step::Total, "total"),
];

/// Upper bounds of the buckets, in nanoseconds: 50 µs to 10 s, because a step within a node takes tens of microseconds and
/// the longest time limit is ten seconds.
const BOUNDS: [u64; 17] = [
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
];

#[derive(Debug, Default)]
struct Histogram {
    /// The last one has no bound.
    buckets: [AtomicU64; BOUNDS.len() + 1],
    nanoseconds: AtomicU64,
}

impl Histogram {
    fn observe(&self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|bound| *bound < nanoseconds);
        self.buckets[bucket].fetch_add(1, Relaxed);
        self.nanoseconds.fetch_add(nanoseconds, Relaxed);
    }
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        let bounds = BOUNDS.iter().map(|bound| *bound as f64 / 1e9);
        let counts = self.buckets.iter().map(|count| count.load(Relaxed));
        let buckets: Vec<(f64, u64)> = bounds.chain([f64::INFINITY]).zip(counts).collect();
        // The count is the buckets' sum and not a number of its own, so that the two agree in every scrape.
        let count = buckets.iter().map(|(_, count)| count).sum();
        let sum = self.nanoseconds.load(Relaxed) as f64 / 1e9;
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

type Key = (Step, &'static str, Direction);

/// All histograms. There are as many as captures, directions and steps: a fixed, small number.
#[derive(Debug, Default)]
pub(super) struct Latencies {
    histograms: RwLock<BTreeMap<Key, Arc<Histogram>>>,
}

impl Latencies {
    pub fn observe(
        &self,
        step: Step,
        capture_mode: &'static str,
        direction: Direction,
        time: Duration,
    ) {
        let key = (step, capture_mode, direction);
        let known = self
            .histograms
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .cloned();
        let histogram = known.unwrap_or_else(|| {
            let mut all = self
                .histograms
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            Arc::clone(all.entry(key).or_default())
        });
        histogram.observe(time);
    }

    fn of(&self, step: Step) -> Vec<(Key, Arc<Histogram>)> {
        let all = self
            .histograms
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        all.iter()
            .filter(|((of, ..), _)| *of == step)
            .map(|(key, histogram)| (*key, Arc::clone(histogram)))
            .collect()
    }
}

/// Writes the histograms.
#[derive(Debug)]
pub(super) struct LatencyCollector(pub Arc<Latencies>);

impl Collector for LatencyCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let unit = Some(&Unit::Seconds);
        for (step, name, help) in PLAIN {
            let all = self.0.of(step);
            if all.is_empty() {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, unit, MetricType::Histogram)?;
            for ((_, capture_mode, direction), histogram) in all {
                let labels = [
                    ("capture_mode", capture_mode),
                    ("reporter", direction.reporter()),
                ];
                histogram.encode(family.encode_family(&labels)?)?;
            }
        }
        let stages: Vec<_> = STAGES
            .iter()
            .flat_map(|(step, stage)| self.0.of(*step).into_iter().map(move |it| (*stage, it)))
            .collect();
        if stages.is_empty() {
            return Ok(());
        }
        let help = "Time that the proxy adds before a connection's bytes flow, by stage";
        let mut family = encoder.encode_descriptor(
            "ambidex_added_latency",
            help,
            unit,
            MetricType::Histogram,
        )?;
        for (stage, ((_, capture_mode, direction), histogram)) in stages {
            let labels = [
                ("capture_mode", capture_mode),
                ("reporter", direction.reporter()),
                ("stage", stage),
            ];
            histogram.encode(family.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
