//! The runtime that carries the connections, read at every scrape.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use tokio::runtime::Handle;

/// `tokio_*` of one runtime.
#[derive(Debug)]
pub(super) struct RuntimeCollector(pub Handle);

impl Collector for RuntimeCollector {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let metrics = self.0.metrics();
        let gauges = [
            (
                "tokio_num_workers",
                "Worker threads of the runtime",
                metrics.num_workers(),
            ),
            (
                "tokio_num_alive_tasks",
                "Tasks that have not ended",
                metrics.num_alive_tasks(),
            ),
            (
                "tokio_global_queue_depth",
                "Tasks that wait for any worker",
                metrics.global_queue_depth(),
            ),
        ];
        for (name, help, value) in gauges {
            let metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(i64::try_from(value).unwrap_or(i64::MAX)).encode(metric)?;
        }
        Ok(())
    }
}
