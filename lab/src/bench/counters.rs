//! Counters of network devices.

use anyhow::Result;
use host_net::netns::Netns;
use serde::{Deserialize, Serialize};

/// The overlay device of a node through which its pods' outgoing connections reach the proxy.
pub const ISTIOOUT: &str = "istioout";
/// The overlay device of a node through which incoming connections reach the proxy.
pub const ISTIOIN: &str = "istioin";

/// Bytes and packets that a device received and sent. Headers count.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
}

impl Counters {
    /// What passed since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            rx_bytes: self.rx_bytes.saturating_sub(earlier.rx_bytes),
            rx_packets: self.rx_packets.saturating_sub(earlier.rx_packets),
            tx_bytes: self.tx_bytes.saturating_sub(earlier.tx_bytes),
            tx_packets: self.tx_packets.saturating_sub(earlier.tx_packets),
        }
    }
}

/// Counters of a device, or zeros when there is no such device.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn of(netns: &Netns, device: &str) -> Result<Counters> {
    Ok(parse(&devices(netns)?, device).unwrap_or_default())
}

/// Whether there is such a device.
///
/// # Errors
/// When the namespace cannot be entered.
pub fn exists(netns: &Netns, device: &str) -> Result<bool> {
    Ok(parse(&devices(netns)?, device).is_some())
}

fn devices(netns: &Netns) -> Result<String> {
    // `/proc/net` belongs to the process's main thread; this one is in the namespace.
    Ok(netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??)
}

fn parse(text: &str, device: &str) -> Option<Counters> {
    let fields = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = fields
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let &[
        rx_bytes,
        rx_packets,
        _,
        _,
        _,
        _,
        _,
        _,
        tx_bytes,
        tx_packets,
        ..,
    ] = numbers.as_slice()
    else {
        return None;
    };
    Some(Counters {
        rx_bytes,
        rx_packets,
        tx_bytes,
        tx_packets,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_by_device() {
        let text = "Inter-|   Receive\n face |bytes\n istioout: 10 2 0 0 0 0 0 0 30 4 0 0 0 0 0 0\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n";
        let found = parse(text, "istioout").unwrap();
        assert_eq!(
            found,
            Counters {
                rx_bytes: 10,
                rx_packets: 2,
                tx_bytes: 30,
                tx_packets: 4
            }
        );
        assert!(parse(text, "istioin").is_none());
    }
}
