//! What a hold has cost, on its way from the proxy to the agent.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::messages::{DelayReport, DelayedConnection, decode_addresses, encode_addresses};

/// Connections that a report names each: they fit into one packet, at fewer than 64 bytes each.
const NAMED: usize = 1000;

/// Connections that began while their pod was held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Delays {
    /// How many.
    pub count: u64,
    /// Median of their waits.
    pub median: Duration,
    /// The longest wait.
    pub longest: Duration,
    /// Those that are named each: the first thousand.
    pub connections: Vec<Delayed>,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delayed {
    /// Who opened it; port 0 where only the address is known.
    pub client: SocketAddr,
    /// Where it was to go.
    pub destination: SocketAddr,
    /// How long it waited.
    pub waited: Duration,
}

impl Delays {
    /// Of the waits that are known, and how many there were.
    pub fn new(connections: Vec<Delayed>, count: u64) -> Self {
        let mut waits: Vec<Duration> = connections.iter().map(|one| one.waited).collect();
        waits.sort_unstable();
        let at = |index: usize| waits.get(index).copied().unwrap_or_default();
        Self {
            count,
            median: at(waits.len() / 2),
            longest: at(waits.len().saturating_sub(1)),
            connections,
        }
    }
}

impl From<&Delays> for DelayReport {
    fn from(delays: &Delays) -> Self {
        let ip = |ip: IpAddr| encode_addresses(&[ip]).pop().unwrap_or_default();
        let named = delays.connections.iter().take(NAMED);
        Self {
            count: delays.count,
            median_micros: micros(delays.median),
            longest_micros: micros(delays.longest),
            connections: named
                .map(|one| DelayedConnection {
                    client: ip(one.client.ip()),
                    client_port: one.client.port().into(),
                    destination: ip(one.destination.ip()),
                    destination_port: one.destination.port().into(),
                    waited_micros: micros(one.waited),
                })
                .collect(),
        }
    }
}

impl From<DelayReport> for Delays {
    /// Connections whose addresses are none are left out; they are counted all the same.
    fn from(report: DelayReport) -> Self {
        let at = |address: Vec<u8>, port: u32| {
            let address = decode_addresses(&[address]).ok()?.pop()?;
            Some(SocketAddr::new(address, u16::try_from(port).ok()?))
        };
        let named = report.connections.into_iter().filter_map(|one| {
            Some(Delayed {
                client: at(one.client, one.client_port)?,
                destination: at(one.destination, one.destination_port)?,
                waited: Duration::from_micros(one.waited_micros),
            })
        });
        Self {
            count: report.count,
            median: Duration::from_micros(report.median_micros),
            longest: Duration::from_micros(report.longest_micros),
            connections: named.collect(),
        }
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
