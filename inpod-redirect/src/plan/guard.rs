//! What stops a captured pod's traffic when a part of its capture is gone: in another table than what it guards, so that
//! no single flush takes both away, and a second way for the packets that a mark leads.
//!
//! While the capture is whole, nothing meets these rules.

use shared_proxy::capture::OUTBOUND_PORT;

use super::*;

/// The way back to `lo` once more, below the first: without either of the first route and the first rule, what the
/// application answers would leave the pod as it is.
pub(super) fn spare_way_back() -> [Step; 2] {
    [
        all_local(SPARE_TABLE_LOCAL),
        return_rule(SPARE_RULE_RETURN, SPARE_TABLE_LOCAL),
    ]
}

/// Drops connections that would come in past the proxy: what begins and is neither led to one of the proxy's ports nor
/// handed to one of its sockets. It fits every style, so that a pod has it while it goes from one to another.
///
/// Where what comes in is not captured, only the proxy's own ports are kept from others: nothing is led to one from outside.
pub(super) fn input(extent: &Extent) -> Step {
    let mut rules = Vec::new();
    if !extent.bypass_inbound {
        rules.push(format!("-s {PROBE_ADDRESS}/32 -j RETURN"));
    }
    let guests = extent.virtual_interfaces.iter();
    rules.extend(guests.map(|interface| {
        format!("-i {interface} -p tcp -m tcp --dport {OUTBOUND_PORT} -j RETURN")
    }));
    rules.push(match extent.bypass_inbound {
        false => format!(
            "! -i lo -p tcp -m tcp {SYN} -m multiport ! --dports {INBOUND_PLAINTEXT_PORT},{HBONE_PORT} -m mark ! --mark {MARK_RETURN} -j DROP"
        ),
        true => format!(
            "! -i lo -p tcp -m tcp {SYN} -m multiport --dports {OUTBOUND_PORT},{INBOUND_PLAINTEXT_PORT} -j DROP"
        ),
    });
    chain(GUARD_INPUT_CHAIN, "INPUT", rules)
}

/// Drops connections of guests that would be routed on instead of being led to the proxy. Those that are older than the
/// capture go on.
pub(super) fn forward(extent: &Extent, live: bool) -> Option<Step> {
    let mut rules = Vec::new();
    for interface in &extent.virtual_interfaces {
        rules.push(format!("-i {interface} -p tcp -m tcp {SYN} -j DROP"));
        if !live {
            rules.push(format!(
                "-i {interface} -p tcp -m tcp ! {SYN} -m conntrack --ctstate NEW -j DROP"
            ));
        }
    }
    (!rules.is_empty()).then(|| chain(GUARD_FORWARD_CHAIN, "FORWARD", rules))
}

/// Drops connections that begin past the proxy, and answers that would leave past it. Connections that are older than the
/// capture go on.
///
/// What goes on without an entry in connection tracking is either older than the capture or has lost its entry (a flush, a
/// timeout), and with it the way to the proxy. Where nothing is older any more (not `live`) there is only the latter.
pub(super) fn output(live: bool) -> Step {
    let mut rules = vec![
        // The output device is the one before anything was redirected or led back.
        format!("! -o lo -m connmark --mark {MARK_RETURN} -m mark ! --mark {MARK_RETURN} -j DROP"),
        format!("-d {PROBE_ADDRESS}/32 -j RETURN"),
        format!(
            "! -d 127.0.0.0/8 ! -o lo -p tcp -m tcp {SYN} -m mark ! --mark {MARK_PROXY} -j DROP"
        ),
    ];
    if !live {
        rules.push(format!(
            "! -o lo -p tcp -m tcp ! {SYN} -m conntrack --ctstate NEW -m mark ! --mark {MARK_PROXY} -j DROP"
        ));
    }
    chain(GUARD_OUTPUT_CHAIN, "OUTPUT", rules)
}

fn chain(name: &str, from: &str, rules: Vec<String>) -> Step {
    Step::Chain(Chain {
        family: Family::V4,
        table: Table::Filter,
        name: name.to_owned(),
        rules,
        // Before whatever accepts.
        jump: Some(Jump {
            from: from.to_owned(),
            position: Position::First,
        }),
    })
}
