//! Policy rules and routes, as the kernel looks them up.

use std::net::IpAddr;

use super::hop::RouteTaken;
use super::state::{Action, Route, State, family};

/// Most policy rules that are looked at: `goto` can only lead forward, so this is never met.
const LIMIT: usize = 10_000;

/// What a lookup came to.
#[derive(Debug, Clone)]
pub(super) struct Chosen {
    /// The route, unless none leads there.
    pub(super) route: Option<Route>,
    /// The same for printing.
    pub(super) taken: Option<RouteTaken>,
    /// Selectors of rules on the way that are not evaluated.
    pub(super) unknown: Option<String>,
}

/// Looks up where a packet with this mark goes.
pub(super) fn look_up(state: &State, to: IpAddr, mark: u32) -> Chosen {
    let rules = &state.rules[family(to)];
    let mut unknown = None;
    let mut at = 0;
    for _ in 0..LIMIT {
        let Some(rule) = rules.get(at) else {
            break;
        };
        at += 1;
        if rule.mark.is_some_and(|(value, mask)| mark & mask != value) {
            continue;
        }
        if let Some(what) = &rule.unknown {
            unknown.get_or_insert_with(|| format!("ip rule {}: {what}", rule.priority));
            continue;
        }
        match rule.action {
            Action::Goto(priority) => {
                at = rules
                    .iter()
                    .position(|target| target.priority >= priority)
                    .unwrap_or(rules.len());
            }
            Action::Other => {
                unknown.get_or_insert_with(|| format!("ip rule {}", rule.text));
            }
            Action::Lookup(table) => {
                if let Some(route) = in_table(state, table, to) {
                    let taken = RouteTaken {
                        rule: rule.text.clone(),
                        table,
                        route: route.text.clone(),
                    };
                    return Chosen {
                        route: Some(route.clone()),
                        taken: Some(taken),
                        unknown,
                    };
                }
            }
        }
    }
    Chosen {
        route: None,
        taken: None,
        unknown,
    }
}

/// The longest prefix that holds the address, by the smallest metric.
fn in_table(state: &State, table: u32, to: IpAddr) -> Option<&Route> {
    state
        .routes
        .iter()
        .filter(|route| {
            route.table == table && route.kind != "throw" && route.destination.contains(&to)
        })
        .max_by_key(|route| {
            (
                route.destination.prefix_len(),
                std::cmp::Reverse(route.metric),
            )
        })
}

/// Why the reverse path filter would drop what comes from this address by this device.
pub(super) fn refused_source(
    state: &State,
    from: IpAddr,
    device: &str,
    mark: u32,
) -> Option<String> {
    if device == "lo" || from.is_ipv6() {
        return None;
    }
    let setting = |name: &str| {
        let of = |scope: &str| state.sysctl(&format!("net/ipv4/conf/{scope}/{name}"));
        of("all").max(of(device))
    };
    let chosen = look_up(
        state,
        from,
        if setting("src_valid_mark") > 0 {
            mark
        } else {
            0
        },
    );
    let back = chosen.route.as_ref();
    if back.is_some_and(|route| route.kind == "local") {
        return (setting("accept_local") == 0)
            .then(|| format!("the source {from} is an address of this namespace"));
    }
    match setting("rp_filter") {
        1 if back.is_none_or(|route| route.device != device) => Some(format!(
            "rp_filter of {device} is strict, and {from} is not reached by it"
        )),
        2 if back.is_none_or(|route| route.kind != "unicast") => Some(format!(
            "rp_filter of {device} is loose, and nothing leads to {from}"
        )),
        _ => None,
    }
}
