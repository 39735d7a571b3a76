//! The in-pod capture as kernel objects: in the pod's namespace, and on the node what exempts probes.
//!
//! The field's chains are the field's, rule for rule, in each [`Style`]; what we add stands in chains of our own. What the
//! proxy sends carries its mark and is let through; what it sends to the application with the client's address comes over
//! `lo`, marks its connection, and the application's answers follow that mark back to `lo` instead of leaving the pod.

use std::net::{IpAddr, Ipv4Addr};

use host_net::plan::{
    Chain, Family, Jump, Member, Phase, Plan, Position, Route, RouteKind, RouteScope, Rule,
    RuleAction, Set, Step, Table,
};
use ipnet::{IpNet, Ipv4Net};
use shared_proxy::capture::{HBONE_PORT, INBOUND_PLAINTEXT_PORT};

use crate::extent::Extent;
use crate::facts::*;

mod guard;
mod iptables;
mod ipv6;
mod nftables;

/// Which rules capture inside a pod. All lead to the same sockets, so a pod can go from one to another while it is
/// captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Style {
    /// iptables, nat REDIRECT in both directions (Istio since 1.24).
    Redirect,
    /// iptables, TPROXY for what comes in and nat REDIRECT for what goes out (Istio 1.21 to 1.23).
    Tproxy,
    /// nftables, redirection in both directions (Istio since 1.28).
    Nftables,
}

/// What a captured pod's plans have to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Pod UID.
    pub uid: String,
    /// The pod's addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether the pod's namespace has IPv6, which is dropped when the pod has no IPv6 address.
    pub ipv6: bool,
    /// Whether its DNS queries are captured.
    pub dns: bool,
    /// Whether it has connections that are older than its capture, and go on uncaptured.
    pub live: bool,
    /// Which rules.
    pub style: Style,
    /// How far they reach. Names of interfaces are those of [`Extent::check`].
    pub extent: Extent,
}

impl PodFacts {
    /// Whether the pod's IPv6 goes through the proxy.
    pub fn captures_ipv6(&self) -> bool {
        self.ipv6 && self.addresses.iter().any(IpAddr::is_ipv6)
    }
}

/// Objects in the pod's namespace.
pub fn pod(facts: &PodFacts, phase: Phase) -> Plan {
    let mut plan = Plan::empty(format!("pod-{}", facts.uid));
    if phase == Phase::Absent {
        return plan;
    }
    plan.steps.push(all_local(TABLE_LOCAL));
    plan.steps.push(return_rule(RULE_RETURN, TABLE_LOCAL));
    plan.steps.extend(guard::spare_way_back());
    match facts.style {
        Style::Nftables => plan.steps.extend(nftables::tables(facts, phase)),
        Style::Redirect | Style::Tproxy => {
            if facts.ipv6 && !facts.captures_ipv6() && phase == Phase::Active {
                plan.steps.extend(without_ipv6(&facts.extent));
            }
            if phase == Phase::Active {
                plan.steps.push(guard::input(&facts.extent));
                plan.steps.push(guard::output(facts.live));
                plan.steps.extend(guard::forward(&facts.extent, facts.live));
            }
            plan.steps.extend(iptables::chains(facts, phase));
        }
    }
    if facts.captures_ipv6() {
        let twins = ipv6::twins(&plan.steps);
        plan.steps.extend(twins);
    }
    plan
}

/// What has to stand between a plan and one of another writer: the rules of both, so that at no moment there are none. Both
/// lead to the same sockets, and what one of them has redirected, the other does not touch. None if there is nothing between
/// them.
pub fn between(old: &Plan, to: &Plan) -> Option<Plan> {
    let by_iptables = |plan: &Plan| plan.steps.iter().any(Step::is_firewall);
    let by_nftables = |plan: &Plan| {
        plan.steps
            .iter()
            .any(|step| matches!(step, Step::NftTable(_)))
    };
    let changes = by_iptables(old) && by_nftables(to) || by_nftables(old) && by_iptables(to);
    if !changes {
        return None;
    }
    let mut both = to.clone();
    let replaced = |step: &&Step| match step {
        Step::NftTable(_) => !by_nftables(to),
        step => step.is_firewall() && !by_iptables(to),
    };
    both.steps
        .extend(old.steps.iter().filter(replaced).cloned());
    Some(both)
}

/// Everything is delivered here.
fn all_local(table: u32) -> Step {
    Step::Route(Route {
        table,
        dst: IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::UNSPECIFIED, 0)),
        dev: "lo".to_owned(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Local,
        scope: RouteScope::Host,
    })
}

/// Answers to the proxy's sockets are looked up in this table.
fn return_rule(priority: u32, table: u32) -> Step {
    Step::Rule(Rule {
        family: Family::V4,
        priority,
        fwmark: Some(MARK_RETURN),
        action: RuleAction::Lookup(table),
    })
}

/// Begins a connection: `--syn` as `iptables-save` prints it.
const SYN: &str = "--tcp-flags FIN,SYN,RST,ACK SYN";

/// Objects on the node, shared by all captured pods: the node's own connections to them get the probe address. `ipv6`: whether
/// the node has IPv6.
pub fn host(ipv6: bool) -> Plan {
    // Only what begins: where nothing tracked connections before, those that are open would be picked up in mid-stream, get
    // another source address and break.
    let rule = format!(
        "-p tcp -m tcp {SYN} -m owner --socket-exists -m set --match-set {PROBES_SET} dst -j SNAT --to-source {PROBE_ADDRESS}"
    );
    let in_family = |family, set: &str, rule| {
        [
            Step::Set(Set {
                name: set.to_owned(),
                family,
                comments: true,
            }),
            Step::Chain(Chain {
                family,
                table: Table::Nat,
                name: POSTROUTING_CHAIN.to_owned(),
                rules: vec![rule],
                // Before any masquerading of the network plugin.
                jump: Some(Jump {
                    from: "POSTROUTING".to_owned(),
                    position: Position::First,
                }),
            }),
        ]
    };
    let mut steps = Vec::new();
    let translated = ipv6::translated(&rule);
    steps.extend(in_family(Family::V4, PROBES_SET, rule));
    if ipv6 {
        steps.extend(in_family(Family::V6, PROBES_SET6, translated));
    }
    Plan {
        name: "host-inpod".to_owned(),
        steps,
    }
}

/// One captured pod's objects on the node. What was translated before is translated to its end without them.
pub fn host_pod(facts: &PodFacts, phase: Phase) -> Plan {
    let mut plan = Plan::empty(format!("host-pod-{}", facts.uid));
    if phase == Phase::Active {
        let addresses = facts.addresses.iter().copied();
        let captured = addresses.filter(|ip| ip.is_ipv4() || facts.captures_ipv6());
        plan.steps.extend(captured.map(|ip| {
            let set = match ip {
                IpAddr::V4(_) => PROBES_SET,
                IpAddr::V6(_) => PROBES_SET6,
            };
            Step::Member(Member {
                set: set.to_owned(),
                ip,
                comment: Some(facts.uid.clone()),
            })
        }));
    }
    plan
}

/// Drops the IPv6 of a pod that has no IPv6 address.
fn without_ipv6(extent: &Extent) -> Vec<Step> {
    let all = |rule: &str| vec![rule.to_owned()];
    let mut steps = vec![
        v6_chain(V6_INPUT_CHAIN, "INPUT", all("! -i lo -j DROP")),
        v6_chain(V6_OUTPUT_CHAIN, "OUTPUT", all("! -o lo -j DROP")),
    ];
    if extent.has_guests() {
        let interfaces = extent.virtual_interfaces.iter();
        let dropped = interfaces.map(|interface| format!("-i {interface} -j DROP"));
        steps.push(v6_chain(V6_FORWARD_CHAIN, "FORWARD", dropped.collect()));
    }
    steps
}

fn v6_chain(name: &str, from: &str, rules: Vec<String>) -> Step {
    Step::Chain(Chain {
        family: Family::V6,
        table: Table::Filter,
        name: name.to_owned(),
        rules,
        jump: Some(Jump {
            from: from.to_owned(),
            position: Position::First,
        }),
    })
}

#[cfg(test)]
mod tests;
