//! The node capture as kernel objects: on the node, in the proxy's namespace, and per pod on the node.
//!
//! Two flows. *Hybrid* (Istio 1.18 to 1.20): only the first packet of a connection goes through the overlay; the proxy
//! answers through its own interface, and the connection's mark leads the rest there. *Tunnel* (1.15): the proxy's
//! listeners mark their sockets, so its answers go back through the overlay, and the whole connection stays in it both
//! ways. In both, what the proxy sends with somebody else's address leaves through its own interface and comes back there
//! by connmark.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use host_net::plan::{
    Address, Chain, ChainRule, Family, Jump, Link, MarkMatch, Member, OverlayKind, Phase, Plan,
    Position, Route, RouteKind, RouteScope, Rule, RuleAction, Set, Step, Sysctl, Table,
};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use shared_proxy::capture::{
    DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT, SAME_NODE_HBONE_PORT,
};

use crate::facts::*;

mod guard;
mod rules;

/// How much of a connection goes through the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Flow {
    /// The first packet.
    #[default]
    Hybrid,
    /// All of it, both ways.
    Tunnel,
}

impl Flow {
    /// The word used in flags and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            Flow::Hybrid => "hybrid",
            Flow::Tunnel => "tunnel",
        }
    }
}

impl fmt::Display for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is neither `hybrid` nor `tunnel`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no flow of the node capture: hybrid or tunnel")]
pub struct UnknownFlow(pub String);

impl FromStr for Flow {
    type Err = UnknownFlow;

    fn from_str(text: &str) -> Result<Self, UnknownFlow> {
        match text {
            "hybrid" => Ok(Flow::Hybrid),
            "tunnel" => Ok(Flow::Tunnel),
            other => Err(UnknownFlow(other.to_owned())),
        }
    }
}

/// What the plan for the node has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// The proxy's address.
    pub proxy_ip: Ipv4Addr,
    /// The node's end of the proxy's veth pair.
    pub proxy_veth: String,
    /// The node's address as pods see it.
    pub host_ip: Ipv4Addr,
    /// Kind of the tunnels.
    pub overlay: OverlayKind,
    /// UDP port of the tunnels.
    pub port: u16,
    /// MTU of the tunnels: the veth's minus [`OVERLAY_OVERHEAD`].
    pub mtu: u32,
    /// Whether the main table has a default route. Without one, addresses of services have no route, which the loose
    /// reverse path filter refuses, so the filter has to be off.
    pub main_has_default_route: bool,
    /// Whether the node has IPv6.
    pub ipv6: bool,
    /// Whether the pods' DNS queries are captured.
    pub dns: bool,
}

/// What the plan for the proxy's namespace has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyFacts {
    /// The proxy's address.
    pub proxy_ip: Ipv4Addr,
    /// The node's address as pods see it: the other end of the tunnels.
    pub host_ip: Ipv4Addr,
    /// The proxy's own interface, usually `eth0`.
    pub device: String,
    /// Kind of the tunnels.
    pub overlay: OverlayKind,
    /// UDP port of the tunnels.
    pub port: u16,
    /// MTU of the tunnels.
    pub mtu: u32,
    /// Whether the pods' DNS queries are captured.
    pub dns: bool,
}

/// What a captured pod's plan on the node has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Pod UID.
    pub uid: String,
    /// The pod's IPv4 address.
    pub ip: Ipv4Addr,
    /// The node's end of the pod's veth pair.
    pub veth: String,
    /// The node's address as pods see it.
    pub host_ip: Ipv4Addr,
    /// See [`HostFacts::main_has_default_route`].
    pub main_has_default_route: bool,
    /// Whether the pod was running when it was enrolled: then it has connections that go on uncaptured.
    pub live: bool,
    /// Whether the node has IPv6, and so something to drop.
    pub ipv6: bool,
    /// Whether its DNS queries are not captured while those of others are.
    pub dns_exempt: bool,
}

/// Objects on the node, shared by all captured pods.
pub fn host(facts: &HostFacts, flow: Flow) -> Plan {
    let mut steps = vec![
        set(PODS_SET, true),
        set(GUARD_SET, true),
        set(LIVE_PODS_SET, false),
    ];
    if facts.dns {
        steps.push(set(DNS_EXEMPT_SET, false));
    }
    for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
        steps.push(link(
            tunnel.host,
            tunnel.vni,
            facts.overlay,
            facts.proxy_ip,
            facts.port,
            facts.mtu,
        ));
        steps.push(address(tunnel.host, tunnel.host_addr));
    }
    // The outer packet keeps the inner one's mark during its own route lookup: every table must lead it to the proxy.
    for table in [
        TABLE_INBOUND,
        TABLE_OUTBOUND,
        TABLE_PROXY_RETURN,
        TABLE_STAYS_IN,
    ] {
        steps.push(on_link(table, facts.proxy_ip, &facts.proxy_veth));
    }
    steps.push(default_via(
        TABLE_OUTBOUND,
        TUNNEL_OUT.proxy_addr,
        TUNNEL_OUT.host,
        false,
    ));
    steps.push(default_via(
        TABLE_PROXY_RETURN,
        facts.proxy_ip,
        &facts.proxy_veth,
        true,
    ));
    steps.push(default_via(
        TABLE_STAYS_IN,
        TUNNEL_IN.proxy_addr,
        TUNNEL_IN.host,
        false,
    ));
    steps.extend([
        // Before the field's: the packet may have one of its marks as well.
        rule(99, Some(MARK_STAYS_IN), RuleAction::Lookup(TABLE_STAYS_IN)),
        rule(100, Some(MARK_SKIP), RuleAction::Goto(RULE_MAIN)),
        rule(101, Some(MARK_OUTBOUND), RuleAction::Lookup(TABLE_OUTBOUND)),
        rule(
            102,
            Some(MARK_PROXY_RETURN),
            RuleAction::Lookup(TABLE_PROXY_RETURN),
        ),
        rule(103, None, RuleAction::Lookup(TABLE_INBOUND)),
    ]);
    let filter = reverse_path_filter(facts.main_has_default_route);
    steps.push(sysctl(&facts.proxy_veth, filter));
    if flow == Flow::Tunnel {
        // The proxy's answers come out of the tunnels, from addresses whose routes lead elsewhere.
        steps.push(sysctl(TUNNEL_IN.host, filter));
        steps.push(sysctl(TUNNEL_OUT.host, filter));
    }
    if facts.ipv6 {
        steps.extend(v6_gate());
    }
    steps.extend(rules::host(facts, flow));
    Plan {
        name: "host-node".to_owned(),
        steps,
    }
}

/// Objects in the proxy's namespace.
pub fn proxy(facts: &ProxyFacts, flow: Flow) -> Plan {
    let mut steps = Vec::new();
    if facts.dns {
        steps.push(set(DNS_EXEMPT_SET, false));
    }
    for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
        steps.push(link(
            tunnel.proxy,
            tunnel.vni,
            facts.overlay,
            facts.host_ip,
            facts.port,
            facts.mtu,
        ));
        steps.push(address(tunnel.proxy, tunnel.proxy_addr));
    }
    steps.push(Step::Route(Route {
        table: PROXY_TABLE_LOCAL,
        dst: any(),
        dev: "lo".to_owned(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Local,
        scope: RouteScope::Host,
    }));
    let local = RuleAction::Lookup(PROXY_TABLE_LOCAL);
    steps.push(rule(20000, Some(MARK_TPROXY), local));
    if flow == Flow::Tunnel {
        for (table, tunnel) in [(PROXY_TABLE_OUT, TUNNEL_OUT), (PROXY_TABLE_IN, TUNNEL_IN)] {
            // As on the node: the outer packet is looked up with the inner one's mark.
            steps.push(on_link(table, facts.host_ip, &facts.device));
            steps.push(default_via(table, tunnel.host_addr, tunnel.proxy, false));
        }
        steps.push(rule(
            20001,
            Some(MARK_SOCKET_OUTBOUND),
            RuleAction::Lookup(PROXY_TABLE_OUT),
        ));
        steps.push(rule(
            20002,
            Some(MARK_SOCKET_INBOUND),
            RuleAction::Lookup(PROXY_TABLE_IN),
        ));
    }
    steps.push(rule(20003, Some(MARK_RETURN), local));
    steps.push(rule(20004, Some(MARK_SAME_NODE), local));
    // Clients' addresses have no route through the tunnels; with a strict filter nothing would be accepted from them.
    steps.push(sysctl(TUNNEL_IN.proxy, "2"));
    steps.push(sysctl(TUNNEL_OUT.proxy, "2"));
    // With either of these on, answers or their checks would follow the TPROXY mark, which is local.
    for key in ["conf/all/src_valid_mark", "tcp_fwmark_accept"] {
        steps.push(Step::Sysctl(Sysctl {
            key: format!("net/ipv4/{key}"),
            value: "0".to_owned(),
        }));
    }
    steps.extend(rules::proxy(facts, flow));
    Plan {
        name: "proxy-node".to_owned(),
        steps,
    }
}

/// One captured pod's objects on the node. The route comes last and leaves first: without the set entry it would send
/// the node's own packets for the pod into the tunnel.
pub fn pod(facts: &PodFacts, phase: Phase) -> Plan {
    let mut plan = Plan::empty(format!("host-pod-{}", facts.uid));
    if phase == Phase::Absent {
        return plan;
    }
    // The proxy's packets with the pod's address, and the pod's answers to it, take different ways.
    plan.steps.push(sysctl(
        &facts.veth,
        reverse_path_filter(facts.main_has_default_route),
    ));
    // What was captured before lives by its connmark, which needs nothing else of the pod's own.
    if phase == Phase::Draining {
        return plan;
    }
    if facts.ipv6 {
        for direction in ["-i", "-o"] {
            plan.steps.push(Step::ChainRule(ChainRule {
                family: Family::V6,
                table: Table::Filter,
                chain: V6_CHAIN.to_owned(),
                rule: format!("{direction} {} -j DROP", facts.veth),
                position: Position::Last,
            }));
        }
    }
    if facts.live {
        plan.steps.push(Step::Member(Member {
            set: LIVE_PODS_SET.to_owned(),
            ip: facts.ip.into(),
            comment: None,
        }));
    }
    plan.steps.extend(dns_exemption(facts));
    plan.steps.push(Step::Member(Member {
        set: PODS_SET.to_owned(),
        ip: facts.ip.into(),
        comment: Some(facts.uid.clone()),
    }));
    plan.steps.push(Step::Route(Route {
        table: TABLE_INBOUND,
        dst: single(facts.ip),
        dev: TUNNEL_IN.host.to_owned(),
        via: Some(IpAddr::V4(TUNNEL_IN.proxy_addr)),
        src: Some(IpAddr::V4(facts.host_ip)),
        onlink: false,
        kind: RouteKind::Unicast,
        scope: RouteScope::Global,
    }));
    // Last: it drops what the capture does not take.
    plan.steps.push(Step::Member(Member {
        set: GUARD_SET.to_owned(),
        ip: facts.ip.into(),
        comment: Some(facts.uid.clone()),
    }));
    plan
}

/// Begins a connection: `--syn` as `iptables-save` prints it.
const SYN: &str = "--tcp-flags FIN,SYN,RST,ACK SYN";

/// One captured pod's objects in the proxy's namespace.
pub fn proxy_pod(facts: &PodFacts, phase: Phase) -> Plan {
    let mut plan = Plan::empty(format!("proxy-pod-{}", facts.uid));
    if phase == Phase::Active {
        plan.steps.extend(dns_exemption(facts));
    }
    plan
}

/// Queries by UDP are exempt on the node, those by TCP where they come out of the tunnel.
fn dns_exemption(facts: &PodFacts) -> Option<Step> {
    facts.dns_exempt.then(|| {
        Step::Member(Member {
            set: DNS_EXEMPT_SET.to_owned(),
            ip: facts.ip.into(),
            comment: None,
        })
    })
}

fn set(name: &str, comments: bool) -> Step {
    Step::Set(Set {
        name: name.to_owned(),
        family: Family::V4,
        comments,
    })
}

fn link(name: &str, vni: u32, overlay: OverlayKind, remote: Ipv4Addr, port: u16, mtu: u32) -> Step {
    Step::Link(Link {
        name: name.to_owned(),
        overlay,
        vni,
        remote,
        port,
        mtu,
    })
}

fn address(dev: &str, addr: Ipv4Addr) -> Step {
    Step::Address(Address {
        dev: dev.to_owned(),
        addr: Ipv4Net::new_assert(addr, TUNNEL_PREFIX).into(),
    })
}

fn rule(priority: u32, fwmark: Option<MarkMatch>, action: RuleAction) -> Step {
    Step::Rule(Rule {
        family: Family::V4,
        priority,
        fwmark,
        action,
    })
}

fn any() -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0))
}

fn single(ip: Ipv4Addr) -> IpNet {
    IpNet::V4(Ipv4Net::from(ip))
}

fn on_link(table: u32, ip: Ipv4Addr, dev: &str) -> Step {
    Step::Route(Route {
        table,
        dst: single(ip),
        dev: dev.to_owned(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Unicast,
        scope: RouteScope::Link,
    })
}

fn default_via(table: u32, via: Ipv4Addr, dev: &str, onlink: bool) -> Step {
    Step::Route(Route {
        table,
        dst: any(),
        dev: dev.to_owned(),
        via: Some(IpAddr::V4(via)),
        src: None,
        onlink,
        kind: RouteKind::Unicast,
        scope: RouteScope::Global,
    })
}

fn reverse_path_filter(main_has_default_route: bool) -> &'static str {
    // The kernel takes the greater of this and `all`, so loose (2) wins over a strict `all`; off (0) does not.
    if main_has_default_route { "2" } else { "0" }
}

fn sysctl(dev: &str, rp_filter: &str) -> Step {
    Step::Sysctl(Sysctl {
        key: format!("net/ipv4/conf/{dev}/rp_filter"),
        value: rp_filter.to_owned(),
    })
}

/// The chain that drops captured pods' IPv6, entered first from wherever their packets pass on the node.
fn v6_gate() -> Vec<Step> {
    let jump = |from: &str| {
        Step::ChainRule(ChainRule {
            family: Family::V6,
            table: Table::Filter,
            chain: from.to_owned(),
            rule: format!("-j {V6_CHAIN}"),
            position: Position::First,
        })
    };
    vec![
        Step::Chain(Chain {
            family: Family::V6,
            table: Table::Filter,
            name: V6_CHAIN.to_owned(),
            rules: Vec::new(),
            jump: Some(Jump {
                from: "FORWARD".to_owned(),
                position: Position::First,
            }),
        }),
        jump("INPUT"),
        jump("OUTPUT"),
    ]
}

#[cfg(test)]
mod tests;
