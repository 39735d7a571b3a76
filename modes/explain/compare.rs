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
        (_, Some(route)) => format!("{} {} {}", route.rule, route.table, route.route),
        _ => hop.text.clone(),
    };
    (&hop.place, hop.kind, hop.device.as_deref(), what)
}

/// Flags the first hop at which `live` is not as `planned`; what comes after it follows from it. Rules of others do not
/// count by themselves: one of them is flagged when the way is another one right after it.
pub(super) fn flag(live: &mut [Hop], planned: &[Hop], now: &World, wanted: &World) {
    let counts = |hop: &&Hop| !hop.is_idle() && !hop.is_foreign();
    let expected: Vec<(usize, &Hop)> = planned
        .iter()
        .enumerate()
        .filter(|(_, hop)| counts(hop))
        .collect();
    let found: Vec<usize> = (0..live.len())
        .filter(|index| counts(&&live[*index]))
        .collect();
    let same = found
        .iter()
        .zip(&expected)
        .take_while(|(index, (_, hop))| key(&live[**index]) == key(hop))
        .count();
    let next = expected.get(same).copied();
    let at = match (found.get(same), next) {
        (None, None) => return,
        (Some(at), _) => *at,
        (None, Some(_)) => live.len(),
    };
    // Planned hops up to there.
    let before = &planned[..next.map_or(planned.len(), |(index, _)| index)];
    let foreign = (0..at)
        .rev()
        .take_while(|index| !counts(&&live[*index]))
        .find(|index| {
            live[*index].is_foreign() && !before.iter().any(|hop| key(hop) == key(&live[*index]))
        });
    let text = match next {
        Some((_, hop)) => format!("the plans say: {}", described(hop, now, wanted)),
        None => "the plans say that it ends before this".to_owned(),
    };
    let at = foreign.unwrap_or(at).min(live.len().saturating_sub(1));
    if let Some(hop) = live.get_mut(at) {
        hop.differs = Some(text);
    }
}

/// A planned hop, and what of it the kernel does not have.
fn described(hop: &Hop, now: &World, wanted: &World) -> String {
    let rule = hop.rule.as_ref();
    // Both families have rules of the same words.
    let family = usize::from(hop.packet.starts_with('['));
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
        let chain = now.tables[family]
            .get(&rule.table)
            .and_then(|chains| chains.get(&rule.chain));
        let there = chain.is_some_and(|chain| chain.rules.iter().any(|it| it.text == rule.text));
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
        let is_it = |it: &super::state::Route| {
            let of_family = it.destination.addr().is_ipv6() == (family == 1);
            of_family && (it.table, &it.text) == (route.table, &route.route)
        };
        if !now.routes.iter().any(is_it) {
            text.push_str(" (this route is missing)");
        }
        if !now.rules[family].iter().any(|it| it.text == route.rule) {
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
