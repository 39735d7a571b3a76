//! The node capture as kernel objects: on the node, in the proxy's namespace, and per pod on the node.
//!
//! Two flows. *Hybrid* (Istio 1.18 to 1.20): only the first packet of a connection goes through the overlay; the proxy
//! answers through its own interface, and the connection's mark leads the rest there. *Tunnel* (1.15): the proxy's
//! listeners mark their sockets, so its answers go back through the overlay, and the whole connection stays in it both
//! ways. In both, what the proxy sends with somebody else's address leaves through its own interface and comes back there
//! by connmark.
//!
//! IPv6 goes the same way beside IPv4: other addresses on the same tunnels, whose outer packets stay IPv4, and the same
//! marks, preferences and tables of its own family. It needs a proxy with an IPv6 address; without one, the IPv6 of
//! captured pods is dropped.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use host_net::plan::{
    Address, Chain, ChainRule, Family, Jump, Link, MarkMatch, Member, OverlayKind, Phase, Plan,
    Position, Route, RouteKind, RouteScope, Rule, RuleAction, Set, Step, Sysctl, Table,
};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
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

/// The IPv6 addresses between which captured IPv6 travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends6 {
    /// The proxy's.
    pub proxy_ip: Ipv6Addr,
    /// The node's, as pods see it.
    pub host_ip: Ipv6Addr,
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
    /// Where captured IPv6 goes; none: that of captured pods is dropped.
    pub ends6: Option<Ends6>,
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
    /// As [`HostFacts::ends6`].
    pub ends6: Option<Ends6>,
    /// Whether the pods' DNS queries are captured.
    pub dns: bool,
}

/// What a captured pod's plan on the node has to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Pod UID.
    pub uid: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// The node's end of the pod's veth pair.
    pub veth: String,
    /// The node's address as pods see it.
    pub host_ip: Ipv4Addr,
    /// As [`HostFacts::ends6`].
    pub ends6: Option<Ends6>,
    /// See [`HostFacts::main_has_default_route`].
    pub main_has_default_route: bool,
    /// Whether the pod was running when it was enrolled: then it has connections that go on uncaptured.
    pub live: bool,
    /// Whether the node has IPv6, and so something to drop.
    pub ipv6: bool,
    /// Whether its DNS queries are not captured while those of others are.
    pub dns_exempt: bool,
}

impl PodFacts {
    /// Those of its addresses whose packets are captured.
    pub fn captured(&self) -> impl Iterator<Item = IpAddr> {
        let addresses = self.addresses.iter().copied();
        addresses.filter(|ip| ip.is_ipv4() || self.ends6.is_some())
    }

    fn captures(&self, family: Family) -> bool {
        self.captured().any(|ip| Family::of(ip) == family)
    }
}

/// Objects on the node, shared by all captured pods.
pub fn host(facts: &HostFacts, flow: Flow) -> Plan {
    let mut steps = sets(Family::V4, facts.dns);
    for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
        steps.push(link(
            tunnel.host,
            tunnel.vni,
            facts.overlay,
            facts.proxy_ip,
            facts.port,
            facts.mtu,
        ));
        steps.push(address(tunnel.host, tunnel.host_addr.into()));
    }
    // The outer packet keeps the inner one's mark during its own route lookup: every table must lead it to the proxy.
    for table in [
        TABLE_INBOUND,
        TABLE_OUTBOUND,
        TABLE_PROXY_RETURN,
        TABLE_STAYS_IN,
    ] {
        steps.push(on_link(table, facts.proxy_ip.into(), &facts.proxy_veth));
    }
    steps.extend(host_ways(Family::V4, facts.proxy_ip.into(), facts));
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
    steps.extend(rules::host(facts, Family::V4, facts.proxy_ip.into(), flow));
    if let Some(ends) = facts.ends6 {
        steps.extend(sets(Family::V6, facts.dns));
        for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
            steps.push(with_ipv6(tunnel.host));
            steps.push(address(tunnel.host, tunnel.host_addr6.into()));
        }
        // Nothing outer is IPv6, but the proxy itself is reached without the proxy in either family.
        let proxy = ends.proxy_ip.into();
        steps.push(on_link(TABLE_OUTBOUND, proxy, &facts.proxy_veth));
        steps.extend(host_ways(Family::V6, ends.proxy_ip.into(), facts));
        steps.extend(rules::host(facts, Family::V6, ends.proxy_ip.into(), flow));
    }
    Plan {
        name: "host-node".to_owned(),
        steps,
    }
}

/// The sets of captured pods.
fn sets(family: Family, dns: bool) -> Vec<Step> {
    let mut sets = vec![(PODS_SET, true), (GUARD_SET, true), (LIVE_PODS_SET, false)];
    if dns {
        sets.push((DNS_EXEMPT_SET, false));
    }
    let set = |(name, comments)| set(name, family, comments);
    sets.into_iter().map(set).collect()
}

/// The tables' default routes and the rules that lead to the tables.
fn host_ways(family: Family, proxy_ip: IpAddr, facts: &HostFacts) -> Vec<Step> {
    let (to_in, to_out) = match family {
        Family::V4 => (
            TUNNEL_IN.proxy_addr.into(),
            IpAddr::from(TUNNEL_OUT.proxy_addr),
        ),
        Family::V6 => (TUNNEL_IN.proxy_addr6.into(), TUNNEL_OUT.proxy_addr6.into()),
    };
    let rule = |priority, mark, action| rule(family, priority, mark, action);
    vec![
        default_via(TABLE_OUTBOUND, to_out, TUNNEL_OUT.host, false),
        default_via(TABLE_PROXY_RETURN, proxy_ip, &facts.proxy_veth, true),
        default_via(TABLE_STAYS_IN, to_in, TUNNEL_IN.host, false),
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
    ]
}

/// Objects in the proxy's namespace.
pub fn proxy(facts: &ProxyFacts, flow: Flow) -> Plan {
    let mut steps = Vec::new();
    if facts.dns {
        steps.push(set(DNS_EXEMPT_SET, Family::V4, false));
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
        steps.push(address(tunnel.proxy, tunnel.proxy_addr.into()));
    }
    if flow == Flow::Tunnel {
        for table in [PROXY_TABLE_OUT, PROXY_TABLE_IN] {
            // As on the node: the outer packet is looked up with the inner one's mark.
            steps.push(on_link(table, facts.host_ip.into(), &facts.device));
        }
    }
    steps.extend(proxy_ways(Family::V4, flow));
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
    steps.extend(rules::proxy(facts, Family::V4, facts.proxy_ip.into(), flow));
    if let Some(ends) = facts.ends6 {
        if facts.dns {
            steps.push(set(DNS_EXEMPT_SET, Family::V6, false));
        }
        for tunnel in [TUNNEL_IN, TUNNEL_OUT] {
            steps.push(with_ipv6(tunnel.proxy));
            steps.push(address(tunnel.proxy, tunnel.proxy_addr6.into()));
        }
        steps.extend(proxy_ways(Family::V6, flow));
        steps.extend(rules::proxy(facts, Family::V6, ends.proxy_ip.into(), flow));
    }
    Plan {
        name: "proxy-node".to_owned(),
        steps,
    }
}

/// What is delivered to the proxy's sockets, and by which way their answers leave.
fn proxy_ways(family: Family, flow: Flow) -> Vec<Step> {
    let rule = |priority, mark, action| rule(family, priority, Some(mark), action);
    let local = RuleAction::Lookup(PROXY_TABLE_LOCAL);
    let mut steps = vec![
        Step::Route(Route {
            table: PROXY_TABLE_LOCAL,
            dst: any(family),
            dev: "lo".to_owned(),
            via: None,
            src: None,
            onlink: false,
            kind: RouteKind::Local,
            scope: RouteScope::Host,
        }),
        rule(20000, MARK_TPROXY, local),
    ];
    if flow == Flow::Tunnel {
        for (table, tunnel) in [(PROXY_TABLE_OUT, TUNNEL_OUT), (PROXY_TABLE_IN, TUNNEL_IN)] {
            let host = match family {
                Family::V4 => tunnel.host_addr.into(),
                Family::V6 => tunnel.host_addr6.into(),
            };
            steps.push(default_via(table, host, tunnel.proxy, false));
        }
        let (out, into) = (PROXY_TABLE_OUT, PROXY_TABLE_IN);
        steps.push(rule(20001, MARK_SOCKET_OUTBOUND, RuleAction::Lookup(out)));
        steps.push(rule(20002, MARK_SOCKET_INBOUND, RuleAction::Lookup(into)));
    }
    steps.push(rule(20003, MARK_RETURN, local));
    steps.push(rule(20004, MARK_SAME_NODE, local));
    steps
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
    let v6_captured = facts.captures(Family::V6);
    if facts.ipv6 && !v6_captured {
        for direction in ["-i", "-o"] {
            plan.steps
                .push(v6_rule(format!("{direction} {} -j DROP", facts.veth)));
        }
    }
    if facts.live {
        plan.steps.extend(members(facts, LIVE_PODS_SET, None));
    }
    plan.steps.extend(dns_exemption(facts));
    let owner = Some(facts.uid.as_str());
    plan.steps.extend(members(facts, PODS_SET, owner));
    plan.steps.extend(facts.captured().map(|ip| {
        let (via, src) = match (ip, facts.ends6) {
            (IpAddr::V6(_), Some(ends)) => (TUNNEL_IN.proxy_addr6.into(), ends.host_ip.into()),
            _ => (IpAddr::from(TUNNEL_IN.proxy_addr), facts.host_ip.into()),
        };
        Step::Route(Route {
            table: TABLE_INBOUND,
            dst: IpNet::from(ip),
            dev: TUNNEL_IN.host.to_owned(),
            via: Some(via),
            src: Some(src),
            onlink: false,
            kind: RouteKind::Unicast,
            scope: RouteScope::Global,
        })
    }));
    // Last: it drops what the capture does not take.
    plan.steps.extend(members(facts, GUARD_SET, owner));
    if facts.ipv6 && v6_captured {
        // Whatever else the pod calls itself. Neighbours are found by addresses of the link.
        let known = set_of(PODS_SET, Family::V6);
        for (device, address) in [("-i", "src"), ("-o", "dst")] {
            plan.steps.push(v6_rule(format!(
                "{device} {} ! -p ipv6-icmp -m set ! --match-set {known} {address} -j DROP",
                facts.veth
            )));
        }
    }
    plan
}

fn v6_rule(rule: String) -> Step {
    Step::ChainRule(ChainRule {
        family: Family::V6,
        table: Table::Filter,
        chain: V6_CHAIN.to_owned(),
        rule,
        position: Position::Last,
    })
}

/// The pod's addresses in one of the sets.
fn members(facts: &PodFacts, set: &str, comment: Option<&str>) -> Vec<Step> {
    let member = |ip| {
        Step::Member(Member {
            set: set_of(set, Family::of(ip)),
            ip,
            comment: comment.map(str::to_owned),
        })
    };
    facts.captured().map(member).collect()
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
fn dns_exemption(facts: &PodFacts) -> Vec<Step> {
    match facts.dns_exempt {
        true => members(facts, DNS_EXEMPT_SET, None),
        false => Vec::new(),
    }
}

fn set(name: &str, family: Family, comments: bool) -> Step {
    Step::Set(Set {
        name: set_of(name, family),
        family,
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

fn address(dev: &str, addr: IpAddr) -> Step {
    Step::Address(Address {
        dev: dev.to_owned(),
        addr: match addr {
            IpAddr::V4(ip) => Ipv4Net::new_assert(ip, TUNNEL_PREFIX).into(),
            IpAddr::V6(ip) => Ipv6Net::new_assert(ip, TUNNEL_PREFIX6).into(),
        },
    })
}

/// A device gets no IPv6 address where runtimes switch it off for devices that come later.
fn with_ipv6(dev: &str) -> Step {
    Step::Sysctl(Sysctl {
        key: format!("net/ipv6/conf/{dev}/disable_ipv6"),
        value: "0".to_owned(),
    })
}

fn rule(family: Family, priority: u32, fwmark: Option<MarkMatch>, action: RuleAction) -> Step {
    Step::Rule(Rule {
        family,
        priority,
        fwmark,
        action,
    })
}

fn any(family: Family) -> IpNet {
    match family {
        Family::V4 => Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0).into(),
        Family::V6 => Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 0).into(),
    }
}

fn on_link(table: u32, ip: IpAddr, dev: &str) -> Step {
    Step::Route(Route {
        table,
        dst: IpNet::from(ip),
        dev: dev.to_owned(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Unicast,
        scope: RouteScope::Link,
    })
}

fn default_via(table: u32, via: IpAddr, dev: &str, onlink: bool) -> Step {
    Step::Route(Route {
        table,
        dst: any(Family::of(via)),
        dev: dev.to_owned(),
        via: Some(via),
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

/// The chain that drops what is not captured of captured pods' IPv6, entered first from wherever their packets pass on the node.
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
