//! The in-pod capture as kernel objects: in the pod's namespace, and on the node what exempts probes.
//!
//! Only connections that begin (`SYN`) are redirected, so those that are open when the pod is enrolled go on. What the
//! proxy sends carries its mark and is let through; what it sends to the application with the client's address comes over
//! `lo`, marks its connection, and the application's answers follow that mark back to `lo` instead of leaving the pod.

use std::net::Ipv4Addr;

use host_net::plan::{
    Chain, Family, Jump, Member, Phase, Plan, Position, Route, RouteKind, RouteScope, Rule,
    RuleAction, Set, Step, Table,
};
use ipnet::{IpNet, Ipv4Net};
use shared_proxy::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};

use crate::facts::*;

mod guard;

/// What a captured pod's plans have to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFacts {
    /// Pod UID.
    pub uid: String,
    /// The pod's IPv4 address.
    pub ip: Ipv4Addr,
    /// Whether the pod's namespace has IPv6, and so something to drop.
    pub ipv6: bool,
    /// Whether its DNS queries are captured.
    pub dns: bool,
    /// Whether the pod was running when it was enrolled: then it has connections that go on uncaptured.
    pub live: bool,
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
    if facts.ipv6 && phase == Phase::Active {
        plan.steps
            .push(v6_chain(V6_INPUT_CHAIN, "INPUT", "! -i lo -j DROP"));
        plan.steps
            .push(v6_chain(V6_OUTPUT_CHAIN, "OUTPUT", "! -o lo -j DROP"));
    }
    if phase == Phase::Active {
        plan.steps.extend(guard::chains(facts.live));
    }
    plan.steps.push(chain(
        Table::Mangle,
        PREROUTING_CHAIN,
        "PREROUTING",
        vec![format!(
            "-m mark --mark {MARK_PROXY} -j CONNMARK --set-xmark {MARK_RETURN}"
        )],
    ));
    plan.steps.push(chain(
        Table::Mangle,
        OUTPUT_CHAIN,
        "OUTPUT",
        vec![format!(
            "-m connmark --mark {MARK_RETURN} -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
        )],
    ));
    // While draining, the chains stay without what redirects: connections that were redirected need the table's hooks.
    plan.steps.push(chain(
        Table::Nat,
        PREROUTING_CHAIN,
        "PREROUTING",
        nat_prerouting(phase),
    ));
    plan.steps.push(chain(
        Table::Nat,
        OUTPUT_CHAIN,
        "OUTPUT",
        nat_output(facts, phase),
    ));
    if facts.dns {
        plan.steps.extend(dns_zone());
    }
    plan
}

/// The proxy's own queries are tracked apart from the pod's. A pod's query stays known as redirected for half a minute
/// after its answer; the proxy's next query from the same port would be taken for one more of it, and be redirected too.
fn dns_zone() -> [Step; 2] {
    let zone = format!("-j CT --zone {DNS_ZONE}");
    [
        chain(
            Table::Raw,
            PREROUTING_CHAIN,
            "PREROUTING",
            vec![format!(
                "-p udp -m udp --sport 53 -m mark ! --mark {MARK_PROXY} {zone}"
            )],
        ),
        chain(
            Table::Raw,
            OUTPUT_CHAIN,
            "OUTPUT",
            vec![format!(
                "-p udp -m udp --dport 53 -m mark --mark {MARK_PROXY} {zone}"
            )],
        ),
    ]
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

fn nat_prerouting(phase: Phase) -> Vec<String> {
    let mut rules = vec![format!("-s {PROBE_ADDRESS}/32 -p tcp -m tcp -j ACCEPT")];
    if phase == Phase::Active {
        rules.push(format!(
            "! -d 127.0.0.1/32 -p tcp -m tcp ! --dport {HBONE_PORT} {SYN} -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {INBOUND_PLAINTEXT_PORT}"
        ));
    }
    rules
}

fn nat_output(facts: &PodFacts, phase: Phase) -> Vec<String> {
    let mut rules = vec![format!("-d {PROBE_ADDRESS}/32 -p tcp -m tcp -j ACCEPT")];
    if facts.dns && phase == Phase::Active {
        rules.extend([
            format!(
                "! -o lo -p udp -m udp --dport 53 -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {DNS_PORT}"
            ),
            format!(
                "! -d 127.0.0.1/32 -p tcp -m tcp --dport 53 {SYN} -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {DNS_PORT}"
            ),
        ]);
    }
    rules.extend([
        format!("-p tcp -m mark --mark {MARK_RETURN} -j ACCEPT"),
        "! -d 127.0.0.1/32 -o lo -j ACCEPT".to_owned(),
    ]);
    if phase == Phase::Active {
        rules.push(format!(
            "! -d 127.0.0.1/32 -p tcp -m tcp {SYN} -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {OUTBOUND_PORT}"
        ));
    }
    rules
}

/// Objects on the node, shared by all captured pods: the node's own connections to them get the probe address.
pub fn host() -> Plan {
    Plan {
        name: "host-inpod".to_owned(),
        steps: vec![
            Step::Set(Set {
                name: PROBES_SET.to_owned(),
                family: Family::V4,
                comments: true,
            }),
            Step::Chain(Chain {
                family: Family::V4,
                table: Table::Nat,
                name: POSTROUTING_CHAIN.to_owned(),
                // Only what begins: where nothing tracked connections before, those that are open would be picked up in
                // mid-stream, get another source address and break.
                rules: vec![format!(
                    "-p tcp -m tcp {SYN} -m owner --socket-exists -m set --match-set {PROBES_SET} dst -j SNAT --to-source {PROBE_ADDRESS}"
                )],
                // Before any masquerading of the network plugin.
                jump: Some(Jump {
                    from: "POSTROUTING".to_owned(),
                    position: Position::First,
                }),
            }),
        ],
    }
}

/// One captured pod's objects on the node. What was translated before is translated to its end without them.
pub fn host_pod(facts: &PodFacts, phase: Phase) -> Plan {
    let mut plan = Plan::empty(format!("host-pod-{}", facts.uid));
    if phase == Phase::Active {
        plan.steps.push(Step::Member(Member {
            set: PROBES_SET.to_owned(),
            ip: facts.ip.into(),
            comment: Some(facts.uid.clone()),
        }));
    }
    plan
}

fn chain(table: Table, name: &str, from: &str, rules: Vec<String>) -> Step {
    Step::Chain(Chain {
        family: Family::V4,
        table,
        name: name.to_owned(),
        rules,
        jump: Some(Jump {
            from: from.to_owned(),
            position: Position::Last,
        }),
    })
}

fn v6_chain(name: &str, from: &str, rule: &str) -> Step {
    Step::Chain(Chain {
        family: Family::V6,
        table: Table::Filter,
        name: name.to_owned(),
        rules: vec![rule.to_owned()],
        jump: Some(Jump {
            from: from.to_owned(),
            position: Position::First,
        }),
    })
}

#[cfg(test)]
mod tests;
