//! Headers of the CONNECT: telemetry's, no decision depends on them.

use std::fmt::Write;

use http::{HeaderMap, HeaderValue};

use super::Source;
use super::route::Destination;
use crate::core::CoreConfig;

/// `baggage` says who the source is, `forwarded` for whom and to which name the stream is opened.
pub(super) fn connect(
    config: &CoreConfig,
    source: &Source,
    destination: &Destination,
) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(2);
    if let Ok(value) = HeaderValue::try_from(baggage(config, source)) {
        headers.insert("baggage", value);
    }
    let host = match &destination.service {
        Some(service) => service.hostname.to_string(),
        None => destination.target.ip().to_string(),
    };
    let forwarded = format!("for=\"{}\";host=\"{host}\"", source.client);
    if let Ok(value) = HeaderValue::try_from(forwarded) {
        headers.insert("forwarded", value);
    }
    headers
}

fn baggage(config: &CoreConfig, source: &Source) -> String {
    let workload = &source.workload;
    let mut text = String::with_capacity(160);
    let mut add = |key: &str, value: &str| {
        if !value.is_empty() {
            let separator = if text.is_empty() { "" } else { "," };
            // Writing to a String cannot fail.
            let _ = write!(text, "{separator}{key}={value}");
        }
    };
    add("k8s.cluster.name", &config.cluster);
    add("k8s.namespace.name", &workload.namespace);
    add("k8s.deployment.name", &workload.workload_name);
    add("service.name", &workload.canonical_name);
    add("service.version", &workload.canonical_revision);
    text
}
