//! Names and numbers of the node capture: the field's (Istio 1.15 to 1.20), unless marked as ours.

use std::net::{Ipv4Addr, Ipv6Addr};

use host_net::plan::{Family, MarkMatch};

const fn bit(value: u32) -> MarkMatch {
    MarkMatch { value, mask: value }
}

const fn low(value: u32) -> MarkMatch {
    MarkMatch { value, mask: 0xfff }
}

/// On the node: packet of a captured pod that goes to the proxy's outbound listener.
pub const MARK_OUTBOUND: MarkMatch = bit(0x100);
/// On the node: routed by the main table, not captured.
pub const MARK_SKIP: MarkMatch = bit(0x200);
/// On the node: skipped, and remembered on the connection (the proxy's own traffic).
pub const MARK_CONN_SKIP: MarkMatch = bit(0x220);
/// On the node: packet that the proxy sends with somebody else's address; remembered on the connection.
pub const MARK_PROXY: MarkMatch = bit(0x210);
/// On the node: answer to such a packet, back to the proxy's own interface.
pub const MARK_PROXY_RETURN: MarkMatch = bit(0x40);
/// Ours, on the node: connection whose packets from the proxy come through `istioin`; its other direction goes there
/// too, for life, whatever becomes of the pod's route.
pub const MARK_STAYS_IN: MarkMatch = bit(0x80);
/// Ours, on the node, tunnel flow: connection whose packets from the proxy come through `istioout`; its other direction
/// goes there too, for life, whatever becomes of the pod's membership.
pub const MARK_STAYS_OUT: MarkMatch = bit(0x8);

/// In the proxy's namespace: packet taken by TPROXY.
pub const MARK_TPROXY: MarkMatch = low(0x400);
/// In the proxy's namespace, tunnel flow: socket of the outbound listener; its packets leave through `pistioout`.
pub const MARK_SOCKET_OUTBOUND: MarkMatch = low(0x401);
/// In the proxy's namespace, tunnel flow: socket of an inbound listener; its packets leave through `pistioin`.
pub const MARK_SOCKET_INBOUND: MarkMatch = low(0x402);
/// In the proxy's namespace: packet for a socket that speaks with somebody else's address.
pub const MARK_RETURN: MarkMatch = low(0x4d3);
/// Ours, in the proxy's namespace: tunnel between two pods of this node, looped on `lo`.
pub const MARK_SAME_NODE: MarkMatch = low(0x404);

/// The set of captured pods.
pub const PODS_SET: &str = "ztunnel-pods-ips";
/// Ours: captured pods that were running before they were enrolled.
pub const LIVE_PODS_SET: &str = "mesh-live-pods";
/// Ours: the set of captured pods once more, for the rules that stop what would pass beside the proxy when something of
/// the capture is gone, the other set for one.
pub const GUARD_SET: &str = "ambidex-guarded";
/// Set of captured pods whose DNS queries are not captured; on the node and in the proxy's namespace.
pub const DNS_EXEMPT_SET: &str = "mesh-dns-exempt";
/// The set of this name for addresses of a family. The field has none for IPv6; ours end in `6`.
pub fn set_of(name: &str, family: Family) -> String {
    match family {
        Family::V4 => name.to_owned(),
        Family::V6 => format!("{name}6"),
    }
}

/// Ours: ip6tables chain (filter) that drops what is not captured of the IPv6 of captured pods.
pub const V6_CHAIN: &str = "ambidex-v6";

/// A tunnel between node and proxy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tunnel {
    /// Device on the node.
    pub host: &'static str,
    /// Device in the proxy's namespace.
    pub proxy: &'static str,
    /// Virtual network identifier.
    pub vni: u32,
    /// Address on the node.
    pub host_addr: Ipv4Addr,
    /// Address in the proxy's namespace.
    pub proxy_addr: Ipv4Addr,
    /// Ours: IPv6 address on the node, where IPv6 is captured.
    pub host_addr6: Ipv6Addr,
    /// Ours: IPv6 address in the proxy's namespace.
    pub proxy_addr6: Ipv6Addr,
}

/// Prefix length of the tunnels' addresses.
pub const TUNNEL_PREFIX: u8 = 30;
/// Prefix length of the tunnels' IPv6 addresses.
pub const TUNNEL_PREFIX6: u8 = 126;
/// The IPv6 address in a tunnel's own /64, beside the field's prefix for probes (fd16:9254:7127:1337::/64).
const fn tunnel6(subnet: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd16, 0x9254, 0x7127, subnet, 0, 0, 0, host)
}
/// To captured pods.
pub const TUNNEL_IN: Tunnel = Tunnel {
    host: "istioin",
    proxy: "pistioin",
    vni: 1000,
    host_addr: Ipv4Addr::new(192, 168, 126, 1),
    proxy_addr: Ipv4Addr::new(192, 168, 126, 2),
    host_addr6: tunnel6(0x126, 1),
    proxy_addr6: tunnel6(0x126, 2),
};
/// From captured pods.
pub const TUNNEL_OUT: Tunnel = Tunnel {
    host: "istioout",
    proxy: "pistioout",
    vni: 1001,
    host_addr: Ipv4Addr::new(192, 168, 127, 1),
    proxy_addr: Ipv4Addr::new(192, 168, 127, 2),
    host_addr6: tunnel6(0x127, 1),
    proxy_addr6: tunnel6(0x127, 2),
};
/// UDP port of the overlay when nothing else on the node uses it.
pub const OVERLAY_PORT: u16 = 6081;
/// Bytes that the overlay takes from the underlying MTU.
pub const OVERLAY_OVERHEAD: u32 = 50;

/// Routing table on the node: captured pods, through `istioin`.
pub const TABLE_INBOUND: u32 = 100;
/// Routing table on the node: everything, through `istioout`.
pub const TABLE_OUTBOUND: u32 = 101;
/// Routing table on the node: everything, to the proxy's own interface.
pub const TABLE_PROXY_RETURN: u32 = 102;
/// Ours, routing table on the node: everything, through `istioin`.
pub const TABLE_STAYS_IN: u32 = 103;

/// Routing table in the proxy's namespace: everything is local.
pub const PROXY_TABLE_LOCAL: u32 = 100;
/// Routing table in the proxy's namespace, tunnel flow: everything, through `pistioout`.
pub const PROXY_TABLE_OUT: u32 = 101;
/// Routing table in the proxy's namespace, tunnel flow: everything, through `pistioin`.
pub const PROXY_TABLE_IN: u32 = 102;

/// Preference of the rule that looks up the main table.
pub const RULE_MAIN: u32 = 32766;
