//! Kernel objects as data: the words in which a capture mode says what it wants.
//!
//! A [`Plan`] belongs to one [`Place`] (one network namespace) and lists [`Step`]s in the order in which they are to be
//! made; they are taken away in the reverse order. Plans are values: they can be compared, printed, stored in the
//! journal and snapshot-tested without root.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::netns::Netns;

/// Where a plan is applied: always one explicit network namespace, never "the current one".
#[derive(Debug, Clone)]
pub struct Place {
    /// What the place is to the operator: `host`, `proxy`, `pod alpha/pod1-1`. Used in messages only.
    pub label: String,
    /// The namespace itself.
    pub netns: Netns,
}

/// How far a capture is established. A mode's plan is a pure function of (facts, phase).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Phase {
    /// Nothing.
    Absent,
    /// Everything that captures new connections and carries existing ones.
    Active,
    /// Only what connections that were captured earlier still need; captures nothing new.
    Draining,
}

/// Kernel objects wanted in one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Unique name of the plan on its node, used as the journal's key: `host-node`, `proxy-node`, `pod-<uid>`,
    /// `host-pod-<uid>`. Letters, digits, `-`, `_` and `.` only.
    pub name: String,
    /// Steps in the order of making. Removed in reverse.
    pub steps: Vec<Step>,
}

impl Plan {
    /// A plan without steps: what [`Phase::Absent`] means.
    pub fn empty(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            steps: Vec::new(),
        }
    }
}

/// One kernel object with its exact parameters.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Step {
    /// An overlay device, brought up.
    Link(Link),
    /// An address on a device.
    Address(Address),
    /// A policy routing rule.
    Rule(Rule),
    /// A route.
    Route(Route),
    /// A sysctl below `/proc/sys/net`; the previous value is kept in the journal and put back on removal.
    Sysctl(Sysctl),
    /// An own iptables chain with its complete, ordered content.
    Chain(Chain),
    /// A single rule in a chain that is shared with others (built-in chains, or own chains with one rule per pod).
    ChainRule(ChainRule),
    /// An own nftables table with its complete, ordered content.
    NftTable(NftTable),
    /// An ipset of type `hash:ip`.
    Set(Set),
    /// One entry of an ipset.
    Member(Member),
}

impl Step {
    /// Whether it is made by iptables.
    pub fn is_firewall(&self) -> bool {
        matches!(self, Step::Chain(_) | Step::ChainRule(_))
    }

    /// Whether it is rules that packets pass, by whichever program they are made.
    pub fn is_rules(&self) -> bool {
        self.is_firewall() || matches!(self, Step::NftTable(_))
    }
}

/// Kind of an overlay device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OverlayKind {
    /// GENEVE (RFC 8926), the field's choice.
    Geneve,
    /// VXLAN (RFC 7348) with the same VNIs, port and MTU, for kernels without geneve.
    Vxlan,
}

impl fmt::Display for OverlayKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            OverlayKind::Geneve => "geneve",
            OverlayKind::Vxlan => "vxlan",
        })
    }
}

/// An overlay (tunnel) device: point to point, in the plan's namespace.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Link {
    /// Device name, e.g. `istioin`.
    pub name: String,
    /// geneve or vxlan.
    pub overlay: OverlayKind,
    /// Virtual network identifier (24 bit).
    pub vni: u32,
    /// Address of the other end of the tunnel.
    pub remote: Ipv4Addr,
    /// UDP destination port, 6081 by default.
    pub port: u16,
    /// MTU in bytes; set explicitly so that geneve and vxlan agree (1450 on a 1500 link).
    pub mtu: u32,
}

/// An address on a device, e.g. `192.168.126.1/30 dev istioin`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Address {
    /// Device name.
    pub dev: String,
    /// Address of either family with prefix length.
    pub addr: IpNet,
}

/// A policy routing rule (`ip rule`, `ip -6 rule`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Rule {
    /// Packets of which family it is about. Stored only for IPv6: what does not say so is about IPv4.
    #[serde(default, skip_serializing_if = "Family::is_v4")]
    pub family: Family,
    /// Preference; lower is looked at first.
    pub priority: u32,
    /// `fwmark value/mask`; none matches all packets.
    pub fwmark: Option<MarkMatch>,
    /// What to do.
    pub action: RuleAction,
}

/// A mark compared under a mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MarkMatch {
    /// Value after masking.
    pub value: u32,
    /// Mask.
    pub mask: u32,
}

impl fmt::Display for MarkMatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}/{:#x}", self.value, self.mask)
    }
}

/// Action of a [`Rule`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleAction {
    /// Look the destination up in this table.
    Lookup(u32),
    /// Continue at the rule with this preference.
    Goto(u32),
}

/// A route in a table.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Route {
    /// Routing table.
    pub table: u32,
    /// Destination, which also tells the family; `0.0.0.0/0` and `::/0` are the default routes.
    pub dst: IpNet,
    /// Output device.
    pub dev: String,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Preferred source address of host sockets.
    pub src: Option<IpAddr>,
    /// Whether the next hop is reachable on the device although no prefix says so.
    pub onlink: bool,
    /// unicast, or `local` (deliver to this host).
    pub kind: RouteKind,
    /// Scope. IPv6 routes have none, whatever is said here.
    pub scope: RouteScope,
}

/// Type of a [`Route`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteKind {
    /// Forward or send.
    Unicast,
    /// Deliver to this namespace.
    Local,
}

/// Scope of a [`Route`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RouteScope {
    /// Reached through a next hop.
    Global,
    /// Directly on the link.
    Link,
    /// On this host.
    Host,
}

/// A sysctl: `key` is the path below `/proc/sys` with `/` as separator (interface names may contain dots).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Sysctl {
    /// e.g. `net/ipv4/conf/istioin/rp_filter`.
    pub key: String,
    /// Value to be written, without newline.
    pub value: String,
}

/// Address family.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// IPv4: `iptables`, `ip rule`, sets of `family inet`.
    #[default]
    V4,
    /// IPv6: `ip6tables`, `ip -6 rule`, sets of `family inet6`.
    V6,
}

impl Family {
    /// Both, IPv4 first.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    pub fn of(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Whether it is IPv4, which stored plans leave out.
    pub fn is_v4(&self) -> bool {
        *self == Self::V4
    }
}

/// iptables table. The order is the order in which they are restored: the gate (`nat`, which starts redirecting) last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Table {
    /// `raw`.
    Raw,
    /// `filter`.
    Filter,
    /// `mangle`.
    Mangle,
    /// `nat`.
    Nat,
}

impl Table {
    /// Name as iptables spells it.
    pub fn as_str(self) -> &'static str {
        match self {
            Table::Raw => "raw",
            Table::Filter => "filter",
            Table::Mangle => "mangle",
            Table::Nat => "nat",
        }
    }
}

/// An own chain, its whole content in order, and the jump that leads to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Chain {
    /// iptables or ip6tables.
    pub family: Family,
    /// Table.
    pub table: Table,
    /// Name, at most 28 characters.
    pub name: String,
    /// Rule specifications without `-A NAME`, spelled exactly as `iptables-save` prints them, in order.
    pub rules: Vec<String>,
    /// Where the chain is entered from; none for a chain reached only from other chains.
    pub jump: Option<Jump>,
}

/// The jump from a built-in chain to an own one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Jump {
    /// Built-in chain, e.g. `PREROUTING`.
    pub from: String,
    /// First rule or last rule of the built-in chain.
    pub position: Position,
}

/// Where a rule is put in a chain that others use too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Position {
    /// Inserted as the first rule.
    First,
    /// Appended.
    Last,
}

/// An own table of nftables, of the family `inet`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NftTable {
    /// Name.
    pub name: String,
    /// All chains of the table.
    pub chains: Vec<NftChain>,
}

/// A chain of an [`NftTable`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NftChain {
    /// Name.
    pub name: String,
    /// Where it hangs in the packet path; none for a chain reached only from others.
    pub base: Option<NftBase>,
    /// Rules in nft's language, in order.
    pub rules: Vec<String>,
}

/// What makes an nftables chain a base chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct NftBase {
    /// `nat`, `filter` or `route`.
    pub kind: String,
    /// `prerouting`, `input`, `forward`, `output` or `postrouting`.
    pub hook: String,
    /// Lower is passed first.
    pub priority: i32,
}

/// One rule in a shared chain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChainRule {
    /// iptables or ip6tables.
    pub family: Family,
    /// Table.
    pub table: Table,
    /// Chain, built-in or made by another plan.
    pub chain: String,
    /// Specification as `iptables-save` prints it, without `-A CHAIN`.
    pub rule: String,
    /// First or last.
    pub position: Position,
}

/// An ipset of type `hash:ip`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Set {
    /// Name, at most 31 characters.
    pub name: String,
    /// Family of its entries: `inet` or `inet6`. Stored only for IPv6.
    #[serde(default, skip_serializing_if = "Family::is_v4")]
    pub family: Family,
    /// Whether entries carry comments (the owning pod's UID).
    pub comments: bool,
}

/// One entry of an ipset.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Member {
    /// Set name.
    pub set: String,
    /// Address, of the set's family.
    pub ip: IpAddr,
    /// Comment: the UID of the pod that owns the entry. Removal happens only when it still matches.
    pub comment: Option<String>,
}
