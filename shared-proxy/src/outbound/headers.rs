//! Headers of the CONNECT: telemetry's, no decision depends on them.

use std::fmt::Write;

use http::{HeaderMap, HeaderValue};

use super::Source;
use super::route::Destination;
use crate::hbone::baggage::baggage;
use crate::hbone::{BAGGAGE, FORWARDED, FORWARDED_NETWORK};

/// `baggage` says who the source is, `forwarded` for whom and to which name the stream is opened, `traceparent` begins a
/// trace that is not sampled.
pub(super) fn connect(source: &Source, destination: &Destination) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(4);
    if let Ok(value) = HeaderValue::try_from(baggage(&source.workload)) {
        headers.insert(BAGGAGE, value);
    }
    let mut forwarded = String::with_capacity(96);
    // Writing to a String cannot fail.
    let _ = match &destination.service {
        Some(service) => write!(
            forwarded,
            "for=\"{}\";host={}",
            source.client, service.hostname
        ),
        None => write!(forwarded, "for=\"{}\"", source.client),
    };
    if let Ok(value) = HeaderValue::try_from(forwarded) {
        headers.insert(FORWARDED, value);
    }
    let (trace, span) = (rand::random::<u128>().max(1), rand::random::<u64>().max(1));
    if let Ok(value) = HeaderValue::try_from(format!("00-{trace:032x}-{span:016x}-00")) {
        headers.insert("traceparent", value);
    }
    headers
}

/// Adds the source's network.
pub(super) fn add_network(headers: &mut HeaderMap, network: &str) {
    if let Ok(value) = HeaderValue::try_from(network) {
        headers.insert(FORWARDED_NETWORK, value);
    }
}
