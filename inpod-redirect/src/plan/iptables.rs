//! The capture in iptables: the field's chains, and the chains that keep older connections out of them.

use shared_proxy::capture::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};

use super::*;

/// Everything but the guards, in the order of making.
pub(super) fn chains(facts: &PodFacts, phase: Phase) -> Vec<Step> {
    let active = phase == Phase::Active;
    let mut steps = Vec::new();
    if facts.live && active {
        steps.extend(older_connections(facts));
    }
    steps.push(chain(
        Table::Mangle,
        PREROUTING_CHAIN,
        "PREROUTING",
        mangle_prerouting(facts, active),
    ));
    steps.push(chain(
        Table::Mangle,
        OUTPUT_CHAIN,
        "OUTPUT",
        vec![format!(
            "-m connmark --mark {MARK_RETURN} -j CONNMARK --restore-mark --nfmask 0xffffffff --ctmask 0xffffffff"
        )],
    ));
    // While draining, the chains stay without what redirects: connections that were redirected need the table's hooks.
    if facts.style != Style::Tproxy || facts.extent.has_guests() {
        steps.push(chain(
            Table::Nat,
            PREROUTING_CHAIN,
            "PREROUTING",
            nat_prerouting(facts, active),
        ));
    }
    steps.push(chain(
        Table::Nat,
        OUTPUT_CHAIN,
        "OUTPUT",
        nat_output(facts.dns, active),
    ));
    if facts.dns {
        steps.extend(dns_zone());
    }
    steps
}

/// The rules of the field would take a connection that connection tracking hears of in mid-stream for one that begins, and
/// redirect it; so these come before them.
fn older_connections(facts: &PodFacts) -> Vec<Step> {
    let rule = format!("-p tcp -m tcp ! {SYN} -m mark ! --mark {MARK_PROXY} -j ACCEPT");
    let first = |table, name: &str, from: &str| {
        Step::Chain(Chain {
            family: Family::V4,
            table,
            name: name.to_owned(),
            rules: vec![rule.clone()],
            jump: Some(Jump {
                from: from.to_owned(),
                position: Position::First,
            }),
        })
    };
    let ways_in: &[Table] = match facts.style {
        // Guests are redirected in every style.
        Style::Tproxy if facts.extent.has_guests() => &[Table::Mangle, Table::Nat],
        Style::Tproxy => &[Table::Mangle],
        _ => &[Table::Nat],
    };
    let ways_in = ways_in.iter();
    let mut steps: Vec<Step> = ways_in
        .map(|table| first(*table, OLDER_INPUT_CHAIN, "PREROUTING"))
        .collect();
    steps.push(first(Table::Nat, OLDER_OUTPUT_CHAIN, "OUTPUT"));
    steps
}

fn mangle_prerouting(facts: &PodFacts, active: bool) -> Vec<String> {
    let mut rules = vec![format!(
        "-m mark --mark {MARK_PROXY} -j CONNMARK --set-xmark {MARK_RETURN}"
    )];
    if facts.style != Style::Tproxy {
        return rules;
    }
    let takes_all = !facts.extent.bypass_inbound;
    // They are redirected as what the pod itself sends.
    let guests = facts.extent.virtual_interfaces.iter();
    rules.extend(guests.map(|interface| format!("-i {interface} -p tcp -j ACCEPT")));
    if takes_all {
        rules.push(format!("-s {PROBE_ADDRESS}/32 -p tcp -m tcp -j ACCEPT"));
    }
    rules.push("! -d 127.0.0.1/32 -i lo -p tcp -j ACCEPT".to_owned());
    let to_port = |port: u16| {
        format!(
            "-m mark ! --mark {MARK_PROXY} -j TPROXY --on-port {port} --on-ip 0.0.0.0 --tproxy-mark {MARK_RETURN}"
        )
    };
    if active {
        rules.push(format!(
            "-p tcp -m tcp --dport {HBONE_PORT} {}",
            to_port(HBONE_PORT)
        ));
    }
    rules.push("-p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT".to_owned());
    if active && takes_all {
        rules.push(format!(
            "! -d 127.0.0.1/32 -p tcp {}",
            to_port(INBOUND_PLAINTEXT_PORT)
        ));
    }
    rules
}

fn nat_prerouting(facts: &PodFacts, active: bool) -> Vec<String> {
    let mut rules = Vec::new();
    if active {
        rules.extend(
            facts
                .extent
                .virtual_interfaces
                .iter()
                .flat_map(|interface| {
                    [
                        format!("-i {interface} -p tcp -j REDIRECT --to-ports {OUTBOUND_PORT}"),
                        format!("-i {interface} -p tcp -j RETURN"),
                    ]
                }),
        );
    }
    if facts.style == Style::Tproxy || facts.extent.bypass_inbound {
        return rules;
    }
    rules.push(format!("-s {PROBE_ADDRESS}/32 -p tcp -m tcp -j ACCEPT"));
    if active {
        rules.push(format!(
            "! -d 127.0.0.1/32 -p tcp -m tcp ! --dport {HBONE_PORT} -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {INBOUND_PLAINTEXT_PORT}"
        ));
    }
    rules
}

fn nat_output(dns: bool, active: bool) -> Vec<String> {
    let mut rules = vec![format!("-d {PROBE_ADDRESS}/32 -p tcp -m tcp -j ACCEPT")];
    if dns && active {
        rules.extend([
            format!(
                "! -o lo -p udp -m udp --dport 53 -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {DNS_PORT}"
            ),
            format!(
                "! -d 127.0.0.1/32 -p tcp -m tcp --dport 53 -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {DNS_PORT}"
            ),
        ]);
    }
    rules.extend([
        format!("-p tcp -m mark --mark {MARK_RETURN} -j ACCEPT"),
        "! -d 127.0.0.1/32 -o lo -j ACCEPT".to_owned(),
    ]);
    if active {
        rules.push(format!(
            "! -d 127.0.0.1/32 -p tcp -m mark ! --mark {MARK_PROXY} -j REDIRECT --to-ports {OUTBOUND_PORT}"
        ));
    }
    rules
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
