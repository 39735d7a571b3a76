//! Names and numbers of the in-pod capture: the field's (Istio since 1.24), unless marked as ours.

use std::net::{Ipv4Addr, Ipv6Addr};

use host_net::plan::MarkMatch;

/// On every socket that the proxy makes in a pod's namespace.
pub const MARK_PROXY: MarkMatch = MarkMatch {
    value: 0x539,
    mask: 0xfff,
};
/// Packet and connection mark of answers to the proxy's sockets that speak with a client's address.
pub const MARK_RETURN: MarkMatch = MarkMatch {
    value: 0x111,
    mask: 0xfff,
};

/// Preference of the rule that makes answers local.
pub const RULE_RETURN: u32 = 32764;
/// Routing table in the pod: everything is local.
pub const TABLE_LOCAL: u32 = 100;

/// Ours: preference of the rule that makes answers local when the first one is gone.
pub const SPARE_RULE_RETURN: u32 = 32765;

/// Ours: routing table in the pod, as [`TABLE_LOCAL`].
pub const SPARE_TABLE_LOCAL: u32 = 101;

/// Connection tracking zone of the proxy's own DNS queries.
pub const DNS_ZONE: u16 = 1;

/// Chain entered from PREROUTING.
pub const PREROUTING_CHAIN: &str = "ISTIO_PRERT";
/// Chain entered from OUTPUT.
pub const OUTPUT_CHAIN: &str = "ISTIO_OUTPUT";
/// Chain on the node, entered from POSTROUTING.
pub const POSTROUTING_CHAIN: &str = "ISTIO_POSTRT";
/// Ours: ip6tables chain (filter) that drops what enters the pod by IPv6.
pub const V6_INPUT_CHAIN: &str = "AMBIDEX_V6_IN";
/// Ours: ip6tables chain (filter) that drops what leaves the pod by IPv6.
pub const V6_OUTPUT_CHAIN: &str = "AMBIDEX_V6_OUT";

/// Ours: ip6tables chain (filter) that drops what guests of the pod would send on by IPv6.
pub const V6_FORWARD_CHAIN: &str = "AMBIDEX_V6_FWD";

/// Source address of the node's own connections to captured pods, probes first of all.
pub const PROBE_ADDRESS: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);
/// The same of IPv6.
pub const PROBE_ADDRESS6: Ipv6Addr = Ipv6Addr::new(
    0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xffff,
);
/// Set on the node: captured pods by their IPv6 addresses.
pub const PROBES_SET6: &str = "istio-inpod-probes-v6";
/// Set on the node: captured pods.
pub const PROBES_SET: &str = "istio-inpod-probes-v4";

/// Ours: iptables chain (filter) that drops what would enter the pod past the proxy.
pub const GUARD_INPUT_CHAIN: &str = "AMBIDEX_GUARD_IN";

/// Ours: iptables chain (filter) that drops what would leave the pod past the proxy.
pub const GUARD_OUTPUT_CHAIN: &str = "AMBIDEX_GUARD_OUT";

/// Ours: iptables chain (filter) that drops what guests of the pod would send past the proxy.
pub const GUARD_FORWARD_CHAIN: &str = "AMBIDEX_GUARD_FWD";

/// Ours: iptables chain (mangle or nat) that keeps connections which are older than the capture out of it, on their way in.
pub const OLDER_INPUT_CHAIN: &str = "AMBIDEX_OLDER_IN";

/// Ours: iptables chain (nat) that keeps connections which are older than the capture out of it, on their way out.
pub const OLDER_OUTPUT_CHAIN: &str = "AMBIDEX_OLDER_OUT";

/// nftables table (inet) that redirects.
pub const NFT_NAT_TABLE: &str = "istio-ambient-nat";
/// nftables table (inet) that marks.
pub const NFT_MANGLE_TABLE: &str = "istio-ambient-mangle";
/// nftables table (inet) that keeps the proxy's DNS queries apart.
pub const NFT_RAW_TABLE: &str = "istio-ambient-raw";
/// Chain of the nftables tables that is entered from prerouting.
pub const NFT_PREROUTING_CHAIN: &str = "istio-prerouting";
/// Chain of the nftables tables that is entered from output.
pub const NFT_OUTPUT_CHAIN: &str = "istio-output";
/// Ours: chain of [`NFT_NAT_TABLE`], as [`OLDER_INPUT_CHAIN`] and [`OLDER_OUTPUT_CHAIN`].
pub const NFT_OLDER_CHAIN: &str = "ambidex-older";
/// Ours: nftables table (inet) with the guards.
pub const NFT_GUARD_TABLE: &str = "ambidex-guard";
