//! What stops a captured pod's traffic when a part of its capture is gone: in another table than what it guards, so that
//! no single flush takes both away, and a second way for the packets that a mark leads.
//!
//! While the capture is whole, nothing meets these rules.

use super::*;

/// The way back to `lo` once more, below the first: without either of the first route and the first rule, what the
/// application answers would leave the pod as it is.
pub(super) fn spare_way_back() -> [Step; 2] {
    [
        all_local(SPARE_TABLE_LOCAL),
        return_rule(SPARE_RULE_RETURN, SPARE_TABLE_LOCAL),
    ]
}

/// Drops connections that begin past the proxy, in either direction, and answers that would leave past it. Connections
/// that are older than the capture go on.
///
/// What goes on without an entry in connection tracking is either older than the capture or has lost its entry (a flush, a
/// timeout), and with it the way to the proxy. A pod that was captured before it ran (not `live`) has only the latter.
pub(super) fn chains(live: bool) -> [Step; 2] {
    let chain = |name: &str, from: &str, rules: Vec<String>| {
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
    };
    let mut out = vec![
        // The output device is the one before anything was redirected or led back.
        format!("! -o lo -m connmark --mark {MARK_RETURN} -m mark ! --mark {MARK_RETURN} -j DROP"),
        format!("-d {PROBE_ADDRESS}/32 -j RETURN"),
        format!(
            "! -d 127.0.0.0/8 ! -o lo -p tcp -m tcp {SYN} -m mark ! --mark {MARK_PROXY} -j DROP"
        ),
    ];
    if !live {
        out.push(format!(
            "! -o lo -p tcp -m tcp ! {SYN} -m conntrack --ctstate NEW -m mark ! --mark {MARK_PROXY} -j DROP"
        ));
    }
    [
        chain(
            GUARD_INPUT_CHAIN,
            "INPUT",
            vec![
                format!("-s {PROBE_ADDRESS}/32 -j RETURN"),
                format!(
                    "! -i lo -p tcp -m tcp {SYN} -m multiport ! --dports {INBOUND_PLAINTEXT_PORT},{HBONE_PORT} -j DROP"
                ),
            ],
        ),
        chain(GUARD_OUTPUT_CHAIN, "OUTPUT", out),
    ]
}
