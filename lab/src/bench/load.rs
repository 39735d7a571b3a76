//! Load on a lab: by tools that everybody knows where there is one, else by this project's own clients.

mod connect;
mod enrol;
mod idle;
mod process;
mod restart;
mod servers;
mod tools;

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::Result;
use host_net::netns::Netns;
use serde::{Deserialize, Serialize};

use super::accounting::Cpu;
use super::case::{Load, Path};
use super::stage::Stage;
use crate::topology::APPLICATION_PORT;

pub use process::{Running, output_of, output_of_client};
pub use servers::{BULK_PORT, Servers, listening};

/// Time that a tool may take beyond the duration that it was asked for.
const GRACE: Duration = Duration::from_secs(15);
/// Fewer samples than this say nothing about the 99.9th percentile: it would be the slowest one.
const ENOUGH_FOR_P999: f64 = 1000.0;

/// What one run of a tool found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Measured {
    /// In the case's unit: Gbit/s, requests/s, microseconds.
    pub value: f64,
    /// Work done: bytes, or requests.
    pub work: f64,
    /// Failed requests; a sample with any is not a sample.
    pub errors: u64,
    /// Latency in microseconds, where the tool tells.
    pub latency_us: Option<Latency>,
    /// Numbers that the case has beyond these, with their unit in the name: `rss_kib`.
    pub extra: BTreeMap<String, f64>,
    /// CPU time of the proxies, where the load ended one of them and therefore had to count itself.
    pub proxies_cpu: Option<Cpu>,
}

/// Percentiles of a latency, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// The 50th.
    pub p50: f64,
    /// The 99th.
    pub p99: f64,
    /// The 99.9th, where it can be told.
    pub p999: Option<f64>,
}

impl Latency {
    /// Of measured times in microseconds; none of no times.
    pub fn of(mut times: Vec<f64>) -> Option<Self> {
        times.sort_by(f64::total_cmp);
        let last = times.len().checked_sub(1)?;
        // The smallest time that at least this share of all is not above.
        let at = |share: f64| times[((share * times.len() as f64).ceil() as usize - 1).min(last)];
        Some(Self {
            p50: at(0.5),
            p99: at(0.99),
            p999: (times.len() as f64 >= ENOUGH_FOR_P999).then(|| at(0.999)),
        })
    }
}

/// Where a load goes.
#[derive(Debug)]
pub struct Target<'a> {
    /// The lab and its servers.
    pub stage: &'a Stage,
    /// Which of the servers.
    pub path: Path,
    /// Namespace of the client's pod.
    pub client: Netns,
    /// Address of the server's pod.
    pub server: Ipv4Addr,
    /// How long, unless the load is of a fixed count.
    pub seconds: u64,
}

impl Target<'_> {
    /// Where the server answers requests.
    pub fn web(&self) -> SocketAddr {
        (self.server, APPLICATION_PORT).into()
    }

    fn limit(&self) -> Duration {
        Duration::from_secs(self.seconds) + GRACE
    }
}

/// Runs one load.
///
/// # Errors
/// When it cannot be made, or what it is about did not happen.
pub fn run(load: Load, target: &Target<'_>) -> Result<Measured> {
    match load {
        Load::Bulk { streams, way } => tools::iperf3(target, streams, way),
        Load::RequestResponse { connections } => tools::wrk(target, connections, &[]),
        Load::NewConnections => tools::wrk(target, 16, &["-H", "Connection: close"]),
        Load::FirstByte => connect::first_byte(target),
        Load::Cold => connect::cold(target),
        Load::Idle { connections } => idle::idle(target, connections),
        Load::Enrol { pods, pace } => enrol::enrol(target, pods, pace),
        Load::Restart { killed } => restart::restart(target, killed),
    }
}

/// Does what has to be done before a load and is no part of it.
///
/// # Errors
/// When it cannot be done.
pub fn prepare(load: Load, target: &Target<'_>) -> Result<()> {
    match load {
        Load::Idle { .. } => idle::prepare(target),
        Load::Enrol { pods, .. } => enrol::prepare(target, pods),
        _ => Ok(()),
    }
}

/// Undoes what a load did to the lab.
///
/// # Errors
/// When it cannot be undone.
pub fn clean_up(load: Load, target: &Target<'_>) -> Result<()> {
    match load {
        Load::Enrol { .. } => enrol::clean_up(target),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let latency = |count: u32| Latency::of((1..=count).rev().map(f64::from).collect());
        assert_eq!(latency(0), None);
        let one = latency(1).unwrap();
        assert_eq!((one.p50, one.p99, one.p999), (1.0, 1.0, None));
        let many = latency(1000).unwrap();
        assert_eq!((many.p50, many.p99, many.p999), (500.0, 990.0, Some(999.0)));
    }
}
