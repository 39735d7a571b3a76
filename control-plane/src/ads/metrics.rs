//! What is counted of the connection to the control plane.

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

/// Counters of one client. Clones count together.
#[derive(Debug, Clone, Default)]
pub struct AdsMetrics {
    terminations: Family<TerminationLabels, Counter>,
    messages: Family<TypeLabels, Counter>,
    bytes: Family<TypeLabels, Counter>,
    refused: Family<TypeLabels, Counter>,
    connected: Gauge,
}

/// Why a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, EncodeLabelValue)]
pub enum Termination {
    /// There was none: the server could not be reached or could not prove who it is.
    ConnectionError,
    /// The stream broke.
    Error,
    /// The server asked to connect again.
    Reconnect,
    /// The server ended the stream.
    Complete,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TerminationLabels {
    reason: Termination,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct TypeLabels {
    url: String,
}

impl AdsMetrics {
    /// Adds the metrics to a registry.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "istio_xds_connection_terminations",
            "Connections to the control plane that ended or could not be made",
            self.terminations.clone(),
        );
        registry.register(
            "istio_xds_message",
            "Messages from the control plane",
            self.messages.clone(),
        );
        registry.register(
            "istio_xds_message_bytes",
            "Bytes of messages from the control plane",
            self.bytes.clone(),
        );
        registry.register(
            "ambidex_xds_refused_resources",
            "Resources from the control plane that were not usable",
            self.refused.clone(),
        );
        registry.register(
            "ambidex_xds_connected",
            "Whether the control plane's answers arrive, 1 or 0",
            self.connected.clone(),
        );
    }

    pub(super) fn ended(&self, reason: Termination) {
        self.connected.set(0);
        self.terminations
            .get_or_create(&TerminationLabels { reason })
            .inc();
    }

    pub(super) fn connected(&self) {
        self.connected.set(1);
    }

    pub(super) fn message(&self, url: &str, bytes: usize, refused: usize) {
        let labels = TypeLabels {
            url: url.to_owned(),
        };
        self.messages.get_or_create(&labels).inc();
        self.bytes.get_or_create(&labels).inc_by(bytes as u64);
        if refused > 0 {
            self.refused.get_or_create(&labels).inc_by(refused as u64);
        }
    }
}
