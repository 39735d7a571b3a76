//! What the state of a namespace would be if it were as the plans say.

use std::collections::BTreeMap;

use host_net::plan::{self, Plan, Position, RuleAction, Step};

use super::nft::{self, Ruleset};
use super::rule::Rule;
use super::state::{Chain, Device, Overlay, Route, State, policy_rule, route};
use super::world::OwnRules;

/// A chain of a table of a family (0: IPv4, 1: IPv6).
type ChainKey = (usize, String, String);

/// The planned tables of nftables, as nft lists them.
///
/// # Errors
/// When nft cannot be run.
pub fn ruleset(plans: &[Plan]) -> anyhow::Result<Ruleset> {
    let steps = plans.iter().flat_map(|plan| &plan.steps);
    let tables: Vec<plan::NftTable> = steps
        .filter_map(|step| match step {
            Step::NftTable(table) => Some(table.clone()),
            _ => None,
        })
        .collect();
    match tables.is_empty() {
        true => Ok(Ruleset::default()),
        false => nft::as_listed(&tables),
    }
}

/// The rules of all plans of a namespace, `ruleset` being those of nftables.
pub fn own_rules(plans: &[Plan], ruleset: &Ruleset) -> OwnRules {
    let mut own = OwnRules::default();
    for (table, chains) in ruleset.tables.iter().flatten() {
        for (name, chain) in chains {
            let rules = chain.rules.iter();
            own.0
                .extend(rules.map(|rule| (table.clone(), name.clone(), rule.text.clone())));
        }
    }
    let mut add = |table: plan::Table, chain: &str, rule: String| {
        own.0
            .insert((table.as_str().to_owned(), chain.to_owned(), rule));
    };
    for step in plans.iter().flat_map(|plan| &plan.steps) {
        match step {
            Step::Chain(chain) => {
                for rule in &chain.rules {
                    add(chain.table, &chain.name, rule.clone());
                }
                if let Some(jump) = &chain.jump {
                    add(chain.table, &jump.from, format!("-j {}", chain.name));
                }
            }
            Step::ChainRule(rule) => add(rule.table, &rule.chain, rule.rule.clone()),
            _ => {}
        }
    }
    own
}

/// The state with every object of the plans as it should be. What is not in a plan stays; in a namespace that nobody else
/// has rules in (`exclusive`), foreign rules go.
pub fn as_planned(live: &State, plans: &[Plan], ruleset: &Ruleset, exclusive: bool) -> State {
    let mut state = live.clone();
    if plans.is_empty() {
        return state;
    }
    let own = own_rules(plans, ruleset);
    state.put(ruleset);
    // Rules in chains that others use too, by chain and position.
    let mut shared: BTreeMap<ChainKey, Vec<(Position, String)>> = BTreeMap::new();
    for step in plans.iter().flat_map(|plan| &plan.steps) {
        match step {
            Step::Chain(chain) => {
                let key = (of_family(chain.family), chain.table.as_str().to_owned());
                let into = chain_mut(&mut state, &(key.0, key.1.clone(), chain.name.clone()));
                into.rules = chain.rules.iter().map(|rule| Rule::parse(rule)).collect();
                if let Some(jump) = &chain.jump {
                    let rule = format!("-j {}", chain.name);
                    shared
                        .entry((key.0, key.1, jump.from.clone()))
                        .or_default()
                        .push((jump.position, rule));
                }
            }
            Step::ChainRule(rule) => {
                let table = rule.table.as_str().to_owned();
                shared
                    .entry((of_family(rule.family), table, rule.chain.clone()))
                    .or_default()
                    .push((rule.position, rule.rule.clone()));
            }
            other => object(&mut state, other),
        }
    }
    for (key, rules) in &shared {
        put(chain_mut(&mut state, key), rules);
    }
    if exclusive {
        for tables in &mut state.tables {
            for (table, chains) in tables.iter_mut() {
                for (name, chain) in chains.iter_mut() {
                    chain
                        .rules
                        .retain(|rule| own.contains(table, name, &rule.text));
                }
            }
        }
    }
    state
}

fn of_family(family: plan::Family) -> usize {
    usize::from(family == plan::Family::V6)
}

fn chain_mut<'a>(state: &'a mut State, key: &ChainKey) -> &'a mut Chain {
    let (family, table, name) = key;
    let chains = state.tables[*family].entry(table.clone()).or_default();
    chains.entry(name.clone()).or_insert_with(|| Chain {
        // Only built-in chains are made by being used.
        policy: name
            .chars()
            .all(|c| c.is_ascii_uppercase())
            .then(|| "ACCEPT".to_owned()),
        rules: Vec::new(),
    })
}

/// Rules that share a chain with others. Where they already stand as they should, nothing is moved.
fn put(chain: &mut Chain, wanted: &[(Position, String)]) {
    let is_wanted = |text: &str| wanted.iter().any(|(_, rule)| rule == text);
    let of = |position: Position| {
        let rules = wanted.iter().filter(move |(at, _)| *at == position);
        rules.map(|(_, rule)| rule.clone()).collect::<Vec<_>>()
    };
    for position in [Position::First, Position::Last] {
        let rules = of(position);
        let found: Vec<usize> = rules
            .iter()
            .filter_map(|rule| chain.rules.iter().position(|there| there.text == *rule))
            .collect();
        let complete = found.len() == rules.len();
        let in_place = match position {
            // Whatever stands before them is one of ours, too.
            Position::First => found
                .iter()
                .all(|at| chain.rules[..*at].iter().all(|rule| is_wanted(&rule.text))),
            Position::Last => found.is_sorted(),
        };
        if complete && in_place {
            continue;
        }
        chain.rules.retain(|rule| !rules.contains(&rule.text));
        let parsed = rules.iter().map(|rule| Rule::parse(rule));
        match position {
            Position::First => {
                chain.rules.splice(0..0, parsed);
            }
            Position::Last => chain.rules.extend(parsed),
        }
    }
}

/// Anything but rules of iptables.
fn object(state: &mut State, step: &Step) {
    match step {
        Step::Link(link) => {
            let overlay = Overlay {
                kind: link.overlay.to_string(),
                vni: link.vni,
                remote: link.remote.into(),
                port: link.port,
            };
            state.devices.retain(|device| device.name != link.name);
            state.devices.push(Device {
                name: link.name.clone(),
                overlay: Some(overlay),
                mtu: Some(link.mtu),
                ..Device::default()
            });
        }
        Step::Address(address) => {
            let wanted = (address.dev.clone(), address.addr.addr());
            if !state.addresses.contains(&wanted) {
                state.addresses.push(wanted);
                state.networks.push((address.dev.clone(), address.addr));
            }
        }
        Step::Rule(rule) => add_rule(state, rule),
        Step::Route(wanted) => add_route(state, wanted),
        Step::Sysctl(sysctl) => {
            state
                .sysctls
                .insert(sysctl.key.clone(), sysctl.value.clone());
        }
        Step::Set(set) => {
            state.sets.entry(set.name.clone()).or_default();
        }
        Step::Member(member) => {
            let members = state.sets.entry(member.set.clone()).or_default();
            members.insert(member.ip);
        }
        // Tables of nftables are put in as a whole.
        Step::Chain(_) | Step::ChainRule(_) | Step::NftTable(_) => {}
    }
}

fn add_rule(state: &mut State, rule: &plan::Rule) {
    let mark = rule
        .fwmark
        .map_or_else(String::new, |mark| format!("fwmark {mark} "));
    let action = match rule.action {
        RuleAction::Lookup(table) => format!("lookup {table}"),
        RuleAction::Goto(priority) => format!("goto {priority}"),
    };
    let text = format!("rule {}: {mark}{action}", rule.priority);
    let Some(wanted) = policy_rule(&text) else {
        return;
    };
    let rules = &mut state.rules[of_family(rule.family)];
    if !rules.contains(&wanted) {
        let at = rules
            .iter()
            .position(|there| there.priority > wanted.priority);
        rules.insert(at.unwrap_or(rules.len()), wanted);
    }
}

fn add_route(state: &mut State, wanted: &plan::Route) {
    let mut words = Vec::new();
    if wanted.kind == plan::RouteKind::Local {
        words.push("local".to_owned());
    }
    words.push(wanted.dst.to_string());
    words.extend(wanted.via.map(|via| format!("via {via}")));
    words.push(format!("dev {} table {}", wanted.dev, wanted.table));
    words.extend(match wanted.scope {
        plan::RouteScope::Global => None,
        plan::RouteScope::Link => Some("scope link".to_owned()),
        plan::RouteScope::Host => Some("scope host".to_owned()),
    });
    words.extend(wanted.src.map(|src| format!("src {src}")));
    words.extend(wanted.onlink.then(|| "onlink".to_owned()));
    let Some(planned) = route(&format!("route4 {}", words.join(" "))) else {
        return;
    };
    // The kernel gives routes of IPv6 a metric, and takes their scope.
    let is_it = |there: &Route| {
        let of = |route: &Route| (route.table, route.destination, route.kind.clone());
        let by = |route: &Route| (route.via, route.device.clone(), route.source);
        (of(there), by(there)) == (of(&planned), by(&planned))
    };
    if !state.routes.iter().any(is_it) {
        state.routes.retain(|there| {
            there.table != planned.table
                || there.destination != planned.destination
                || there.kind != planned.kind
        });
        state.routes.push(planned);
    }
}
