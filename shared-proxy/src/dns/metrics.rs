//! What is counted about queries.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

/// The labels of every metric here.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Labels {
    capture_mode: &'static str,
}

/// Counters of the DNS proxy. Clones count together.
#[derive(Debug, Clone)]
pub(crate) struct DnsMetrics {
    requests: Family<Labels, Counter>,
    upstream_requests: Family<Labels, Counter>,
    upstream_failures: Family<Labels, Counter>,
    upstream_seconds: Family<Labels, Histogram, fn() -> Histogram>,
}

/// From a resolver on the node to one that has to ask far away and is asked twice.
fn seconds() -> Histogram {
    Histogram::new([
        0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
    ])
}

impl Default for DnsMetrics {
    fn default() -> Self {
        Self {
            requests: Family::default(),
            upstream_requests: Family::default(),
            upstream_failures: Family::default(),
            upstream_seconds: Family::new_with_constructor(seconds),
        }
    }
}

impl DnsMetrics {
    pub(crate) fn register(&self, registry: &mut Registry) {
        registry.register(
            "istio_dns_requests",
            "DNS queries of captured pods",
            self.requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_requests",
            "DNS queries that were passed on to a resolver",
            self.upstream_requests.clone(),
        );
        registry.register(
            "istio_dns_upstream_failures",
            "Passed on DNS queries that no resolver answered",
            self.upstream_failures.clone(),
        );
        registry.register_with_unit(
            "istio_dns_upstream_request_duration",
            "Time until a passed on DNS query was answered or given up",
            Unit::Seconds,
            self.upstream_seconds.clone(),
        );
    }

    pub(super) fn asked(&self, capture_mode: &'static str) {
        self.requests.get_or_create(&Labels { capture_mode }).inc();
    }

    pub(super) fn passed_on(&self, capture_mode: &'static str) {
        self.upstream_requests
            .get_or_create(&Labels { capture_mode })
            .inc();
    }

    pub(super) fn came_back(&self, capture_mode: &'static str, seconds: f64, answered: bool) {
        let labels = Labels { capture_mode };
        self.upstream_seconds
            .get_or_create(&labels)
            .observe(seconds);
        let failures = self.upstream_failures.get_or_create(&labels);
        if !answered {
            failures.inc();
        }
    }
}
