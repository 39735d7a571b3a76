//! A plan as the commands that an operator would have typed.
//!
//! [`as_commands`] makes the same kernel state as [`crate::engine::apply`] on an empty namespace, to the byte of a
//! dump; [`as_removal_commands`] takes it away again. They are for reading, for documentation and for emergencies:
//! unlike the engine they have no journal, so a jump is doubled when they are run twice, and a sysctl's previous
//! value is not put back.

use crate::engine::program;
use crate::netlink::ROUTE_PROTOCOL;
use crate::nft;
use crate::plan::{
    Address, Chain, ChainRule, Family, Link, Member, OverlayKind, Plan, Position, Route, RouteKind,
    RouteScope, Rule, RuleAction, Set, Step, Sysctl,
};

/// Commands that make the plan, one per line, for `sh` as root inside the plan's namespace.
pub fn as_commands(plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    let mut steps = plan.steps.as_slice();
    while let Some(first) = steps.first() {
        let run = steps.iter().take_while(|step| step.is_firewall()).count();
        if run == 0 {
            lines.extend(make(first));
            steps = &steps[1..];
        } else {
            lines.extend(make_firewall(&steps[..run]));
            steps = &steps[run..];
        }
    }
    lines
}

/// Commands that take the plan away, in the reverse order. Lines that restore a sysctl are comments, because the
/// previous value is known to the journal only.
pub fn as_removal_commands(plan: &Plan) -> Vec<String> {
    let mut lines = Vec::new();
    let mut steps = plan.steps.as_slice();
    while let Some(last) = steps.last() {
        let run = steps
            .iter()
            .rev()
            .take_while(|step| step.is_firewall())
            .count();
        let rest = if run == 0 {
            lines.push(unmake(last));
            steps.len() - 1
        } else {
            lines.extend(unmake_firewall(&steps[steps.len() - run..]));
            steps.len() - run
        };
        steps = &steps[..rest];
    }
    lines
}

fn make(step: &Step) -> Vec<String> {
    match step {
        Step::Link(link) => vec![
            format!("ip link add {}", link_words(link)),
            format!("ip link set {} up", link.name),
        ],
        Step::Address(a) => {
            // Usable at once, without a second of duplicate address detection.
            let nodad = if a.addr.addr().is_ipv6() {
                " nodad"
            } else {
                ""
            };
            vec![format!("ip addr add {}{nodad}", address_words(a))]
        }
        Step::Rule(r) => vec![format!(
            "{} add {} protocol {ROUTE_PROTOCOL}",
            rule_program(r),
            rule_words(r)
        )],
        Step::Route(r) => vec![format!(
            "ip route add {} proto {ROUTE_PROTOCOL}",
            route_words(r)
        )],
        Step::Sysctl(Sysctl { key, value }) => {
            vec![format!("echo {} > /proc/sys/{key}", quoted(value))]
        }
        Step::Set(Set {
            name,
            family,
            comments,
        }) => {
            let family = match family {
                Family::V4 => "inet",
                Family::V6 => "inet6",
            };
            let comment = if *comments { " comment" } else { "" };
            vec![format!(
                "ipset create {name} hash:ip family {family}{comment}"
            )]
        }
        Step::Member(Member { set, ip, comment }) => vec![match comment {
            Some(comment) => format!("ipset add {set} {ip} comment {}", quoted(comment)),
            None => format!("ipset add {set} {ip}"),
        }],
        Step::NftTable(table) => nft::commands(table)
            .iter()
            .map(|command| format!("nft {}", quoted(command)))
            .collect(),
        Step::Chain(_) | Step::ChainRule(_) => Vec::new(),
    }
}

fn unmake(step: &Step) -> String {
    match step {
        Step::Link(link) => format!("ip link del {}", link.name),
        Step::Address(a) => format!("ip addr del {}", address_words(a)),
        Step::Rule(r) => format!(
            "{} del {} protocol {ROUTE_PROTOCOL}",
            rule_program(r),
            rule_words(r)
        ),
        Step::Route(r) => format!("ip route del {} proto {ROUTE_PROTOCOL}", route_words(r)),
        Step::Sysctl(s) => format!("# put back the previous value of /proc/sys/{}", s.key),
        Step::NftTable(table) => format!("nft delete table inet {}", table.name),
        Step::Set(set) => format!("ipset destroy {}", set.name),
        Step::Member(m) => format!("ipset del {} {}", m.set, m.ip),
        Step::Chain(_) | Step::ChainRule(_) => String::new(),
    }
}

/// Chains first, because rules may jump from one to another; then their content; what leads into them last.
fn make_firewall(steps: &[Step]) -> Vec<String> {
    let chains = || {
        steps.iter().filter_map(|step| match step {
            Step::Chain(chain) => Some(chain),
            _ => None,
        })
    };
    let mut lines: Vec<String> = chains()
        .map(|c| format!("{} -N {}", table_words(c), c.name))
        .collect();
    for chain in chains() {
        let start = format!("{} -A {}", table_words(chain), chain.name);
        lines.extend(chain.rules.iter().map(|rule| format!("{start} {rule}")));
    }
    for step in steps {
        match step {
            Step::Chain(chain) => {
                if let Some(jump) = &chain.jump {
                    lines.push(format!(
                        "{} {} -j {}",
                        table_words(chain),
                        place_words(&jump.from, jump.position),
                        chain.name
                    ));
                }
            }
            Step::ChainRule(r) => lines.push(format!(
                "{} {} {}",
                rule_table_words(r),
                place_words(&r.chain, r.position),
                r.rule
            )),
            _ => {}
        }
    }
    lines
}

fn unmake_firewall(steps: &[Step]) -> Vec<String> {
    let mut lines = Vec::new();
    for step in steps.iter().rev() {
        match step {
            Step::Chain(chain) => {
                if let Some(jump) = &chain.jump {
                    lines.push(format!(
                        "{} -D {} -j {}",
                        table_words(chain),
                        jump.from,
                        chain.name
                    ));
                }
            }
            Step::ChainRule(r) => {
                lines.push(format!("{} -D {} {}", rule_table_words(r), r.chain, r.rule))
            }
            _ => {}
        }
    }
    for verb in ["-F", "-X"] {
        for step in steps.iter().rev() {
            if let Step::Chain(chain) = step {
                lines.push(format!("{} {verb} {}", table_words(chain), chain.name));
            }
        }
    }
    lines
}

fn table_words(chain: &Chain) -> String {
    format!("{} -w -t {}", program(chain.family), chain.table.as_str())
}

fn rule_table_words(rule: &ChainRule) -> String {
    format!("{} -w -t {}", program(rule.family), rule.table.as_str())
}

fn place_words(chain: &str, position: Position) -> String {
    match position {
        Position::First => format!("-I {chain} 1"),
        Position::Last => format!("-A {chain}"),
    }
}

fn link_words(link: &Link) -> String {
    let Link {
        name,
        overlay,
        vni,
        remote,
        port,
        mtu,
    } = link;
    // A point-to-point vxlan device has one remote for everything; it has nothing to learn.
    let learning = match overlay {
        OverlayKind::Geneve => "",
        OverlayKind::Vxlan => " nolearning",
    };
    format!("{name} mtu {mtu} type {overlay} id {vni} remote {remote} dstport {port}{learning}")
}

fn address_words(address: &Address) -> String {
    format!("{} dev {}", address.addr, address.dev)
}

fn rule_program(rule: &Rule) -> &'static str {
    match rule.family {
        Family::V4 => "ip rule",
        Family::V6 => "ip -6 rule",
    }
}

fn rule_words(rule: &Rule) -> String {
    let mut words = format!("pref {}", rule.priority);
    if let Some(mark) = rule.fwmark {
        words += &format!(" fwmark {mark}");
    }
    match rule.action {
        RuleAction::Lookup(table) => words += &format!(" lookup {table}"),
        RuleAction::Goto(priority) => words += &format!(" goto {priority}"),
    }
    words
}

fn route_words(route: &Route) -> String {
    let mut words = String::new();
    if route.kind == RouteKind::Local {
        words += "local ";
    }
    words += &route.dst.to_string();
    if let Some(via) = route.via {
        words += &format!(" via {via}");
    }
    words += &format!(" dev {}", route.dev);
    if route.onlink {
        words += " onlink";
    }
    if let Some(src) = route.src {
        words += &format!(" src {src}");
    }
    let scope = match route.scope {
        RouteScope::Global => "global",
        RouteScope::Link => "link",
        RouteScope::Host => "host",
    };
    words + &format!(" table {} scope {scope}", route.table)
}

/// `text` as one word of a POSIX shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests;
