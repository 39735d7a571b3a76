//! Where a packet's way through the kernel's state leaves the way through the planned one.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::hop::{Hop, Kind};
use super::rule::{Match, Rule};
use super::world::World;

/// What tells one hop from another. Positions in a chain, and the addresses of packets, follow from earlier hops.
type Key<'a> = (&'a str, Kind, Option<&'a str>, String);

fn key(hop: &Hop) -> Key<'_> {
    let what = match (&hop.rule, &hop.route) {
        (Some(rule), _) => format!("{} {} {}", rule.table, rule.chain, rule.text),
        (_, Some(route)) => format!("{} {}", route.rule, route.route),
        _ => hop.text.clone(),
    };
    (&hop.place, hop.kind, hop.device.as_deref(), what)
}

/// Flags the first hop at which `live` is not as `planned`; what comes after it follows from it.
pub(super) fn flag(live: &mut [Hop], planned: &[Hop], now: &World, wanted: &World) {
    let mut expected = planned.iter().filter(|hop| !hop.is_idle()).peekable();
    let mut different = None;
    for index in 0..live.len() {
        if live[index].is_idle() {
            continue;
        }
        let same = |index: usize| {
            expected
                .clone()
                .next()
                .is_some_and(|hop| key(hop) == key(&live[index]))
        };
        if same(index) {
            expected.next();
            continue;
        }
        // Somebody else's rule that the packet passes without leaving its way.
        let next = (index + 1..live.len())
            .find(|next| !live[*next].is_idle() && !live[*next].is_foreign());
        if live[index].is_foreign() && next.is_some_and(same) {
            continue;
        }
        different = Some(index);
        break;
    }
    let at = match different {
        Some(at) => at,
        None if expected.peek().is_some() && !live.is_empty() => live.len() - 1,
        None => return,
    };
    let text = match expected.peek() {
        Some(hop) => format!("the plans say: {}", described(hop, now, wanted)),
        None => "the plans say that it ends before this".to_owned(),
    };
    live[at].differs = Some(text);
}

/// A planned hop, and what of it the kernel does not have.
fn described(hop: &Hop, now: &World, wanted: &World) -> String {
    let rule = hop.rule.as_ref();
    let mut text = match rule {
        Some(rule) => format!(
            "in {}: {} {}: {}",
            hop.place, rule.table, rule.chain, rule.text
        ),
        None => format!("in {}: {}", hop.place, hop.text),
    };
    let places = now.find(&hop.place).zip(wanted.find(&hop.place));
    let Some((now, wanted)) = places.map(|(a, b)| (&now.places[a].state, &wanted.places[b].state))
    else {
        return text;
    };
    if let Some(rule) = rule {
        let there = now.tables.iter().any(|tables| {
            let chain = tables
                .get(&rule.table)
                .and_then(|chains| chains.get(&rule.chain));
            chain.is_some_and(|chain| chain.rules.iter().any(|it| it.text == rule.text))
        });
        if !there {
            text.push_str(" (this rule is missing)");
        }
        for name in sets_of(&rule.text) {
            let members = |state: &super::state::State| -> BTreeSet<IpAddr> {
                state.sets.get(&name).cloned().unwrap_or_default()
            };
            let (has, should) = (members(now), members(wanted));
            for missing in should.difference(&has) {
                text.push_str(&format!(" (set {name} lacks {missing})"));
            }
        }
    }
    if let Some(route) = &hop.route {
        if !now.routes.iter().any(|it| it.text == route.route) {
            text.push_str(" (this route is missing)");
        }
        let rules = now.rules.iter().flatten();
        if !rules.into_iter().any(|it| it.text == route.rule) {
            text.push_str(" (this ip rule is missing)");
        }
    }
    text
}

fn sets_of(rule: &str) -> Vec<String> {
    let conditions = Rule::parse(rule).matches;
    let sets = conditions.into_iter().filter_map(|(_, it)| match it {
        Match::Set(name, _) => Some(name),
        _ => None,
    });
    sets.collect()
}
