//! A connection as a story, one line a station: what an operator would otherwise ask of `ipset`, `iptables-save`, `ip rule`,
//! `ip route` and `ip address` in each namespace, in the words of these tools.
//!
//! One packet of each leg is followed: the first, or a later one where an open tunnel spares the first.

use std::fmt::Write;
use std::net::SocketAddr;

use super::Explanation;
use super::hop::{Hop, Kind};
use super::render::{columns, decision};
use super::rule::{Match, Rule};
use super::story::{Leg, Walk};

/// What was observed, by the indices of leg, packet and hop.
pub(crate) trait Observed {
    /// Whether nothing of this packet was to be seen.
    fn spared(&self, leg: usize, walk: usize) -> bool;
    /// What was seen of a hop.
    fn of(&self, leg: usize, walk: usize, hop: usize) -> Option<String>;
    /// What connection tracking of a place has of a leg.
    fn tracked(&self, leg: usize, place: &str) -> Option<String>;
    /// What the proxies said of the connection, and what disagrees.
    fn ends(&self) -> Vec<String>;
}

/// Nothing was.
pub(crate) struct Predicted;

impl Observed for Predicted {
    fn spared(&self, _: usize, _: usize) -> bool {
        false
    }

    fn of(&self, _: usize, _: usize, _: usize) -> Option<String> {
        None
    }

    fn tracked(&self, _: usize, _: &str) -> Option<String> {
        None
    }

    fn ends(&self) -> Vec<String> {
        Vec::new()
    }
}

/// A line: place, device, what was observed, what happened.
type Row = [String; 4];

/// Tells it.
pub(crate) fn tell(explanation: &Explanation, observed: &dyn Observed) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", explanation.heading());
    for (number, leg) in explanation.legs.iter().enumerate() {
        let _ = writeln!(out, "\n{}", leg.heading(number));
        let Some((index, walk)) = followed(leg, number, observed) else {
            continue;
        };
        if index > 0 {
            let _ = writeln!(out, "  (an open tunnel carries it: a later packet)");
        }
        columns(&mut out, &rows(walk, (number, index), observed));
        let _ = decision(&mut out, leg);
    }
    for note in &explanation.notes {
        let _ = writeln!(out, "\nnote: {note}");
    }
    let ends = observed.ends();
    if !ends.is_empty() {
        let _ = writeln!(out, "\n{}", ends.join("\n"));
    }
    out
}

/// The packet of a leg that is told of.
fn followed<'a>(leg: &'a Leg, number: usize, observed: &dyn Observed) -> Option<(usize, &'a Walk)> {
    let later = || {
        let walk = leg.walks.iter().position(|walk| walk.phase == "later")?;
        Some((walk, leg.walks.get(walk)?))
    };
    if observed.spared(number, 0) {
        return later();
    }
    leg.walks.first().map(|walk| (0, walk))
}

fn rows(walk: &Walk, (leg, index): (usize, usize), observed: &dyn Observed) -> Vec<Row> {
    let mut rows: Vec<Row> = Vec::new();
    for (number, hop) in walk.hops.iter().enumerate() {
        if hop.is_idle() && hop.differs.is_none() {
            continue;
        }
        let seen = observed.of(leg, index, number);
        let told = lines(hop);
        let last = told.len();
        for (line, text) in told.into_iter().enumerate() {
            let device = hop.device.clone().unwrap_or_else(|| "-".to_owned());
            let seen = seen.clone().filter(|_| line + 1 == last);
            let seen = seen.unwrap_or_else(|| "-".to_owned());
            rows.push([hop.place.clone(), device, seen, text]);
        }
        // Connection tracking is told of where a packet leaves a place for good, or ends there.
        let next = walk.hops.get(number + 1);
        if next.is_none_or(|next| next.place != hop.place)
            && let Some(entry) = observed.tracked(leg, &hop.place)
        {
            let dash = || "-".to_owned();
            rows.push([
                hop.place.clone(),
                dash(),
                dash(),
                format!("conntrack -L: {entry}"),
            ]);
        }
    }
    rows
}

/// A hop in the words of the tools that show it.
fn lines(hop: &Hop) -> Vec<String> {
    let mut lines = Vec::new();
    let sent = |what: &str| format!("{what}: {}", hop.packet);
    match (&hop.rule, &hop.route) {
        (Some(rule), _) => {
            let ends = ends(&hop.packet);
            for (name, direction) in sets(&rule.text) {
                let end = ends.map(|(from, to)| if direction == "src" { from } else { to });
                let ip = end.map_or_else(String::new, |end| format!(" {}", end.ip()));
                lines.push(format!("ipset {name}:{ip}"));
            }
            let mut line = match rule.table.contains(' ') {
                true => format!("nft {} {}: {}", rule.table, rule.chain, rule.text),
                false => format!(
                    "iptables -t {}: -A {} {}",
                    rule.table, rule.chain, rule.text
                ),
            };
            for (what, change) in [("mark", &hop.mark), ("connmark", &hop.connmark)] {
                if change.before != change.after {
                    let _ = write!(line, "  [{what} {}]", change.shown());
                }
            }
            if hop.kind == Kind::Dropped {
                line.push_str("  [dropped]");
            }
            if rule.foreign {
                line.push_str("  (foreign rule)");
            }
            lines.push(line);
        }
        (_, Some(route)) => {
            let table = super::state::table_name(&route.table.to_string()).to_owned();
            lines.push(format!("ip rule: {}", route.rule));
            lines.push(format!("ip r show table {table}: {}", route.route));
            if let Some((_, to)) = ends(&hop.packet)
                && route.route.contains(" via ")
            {
                let mark = match hop.mark.after.as_str() {
                    "0" => String::new(),
                    mark => format!(" mark {mark}"),
                };
                let way = got(&route.route, &table);
                lines.push(format!("ip r get {}{mark}: {} {way}", to.ip(), to.ip()));
            }
        }
        _ => lines.push(match hop.kind {
            Kind::Sent | Kind::Received => sent(&hop.text),
            Kind::Delivered => format!("{} ({})", hop.text, hop.packet),
            _ => hop.text.clone(),
        }),
    }
    if let Some(last) = lines.last_mut() {
        if let Some(unknown) = &hop.unknown {
            let _ = write!(last, "  (unknown: {unknown})");
        }
        if let Some(differs) = &hop.differs {
            let _ = write!(last, "  <<< differs: {differs}");
        }
    }
    lines
}

/// What `ip route get` says of a route behind the address: the table unless it is the main one, and no scope.
fn got(route: &str, table: &str) -> String {
    let (_, rest) = route.split_once(" via ").unwrap_or(("", route));
    let words: Vec<&str> = rest.split(' ').collect();
    let value = |key: &str| {
        let at = words.iter().position(|word| *word == key)?;
        words.get(at + 1)
    };
    let mut said = format!("via {}", words.first().unwrap_or(&""));
    for key in ["dev", "table", "src"] {
        let value = match key {
            "table" => Some(&table).filter(|table| **table != "main"),
            _ => value(key),
        };
        if let Some(value) = value {
            let _ = write!(said, " {key} {value}");
        }
    }
    said
}

/// Sets that a rule asks, and of which end.
fn sets(rule: &str) -> Vec<(String, String)> {
    let conditions = Rule::parse(rule).matches;
    let sets = conditions
        .into_iter()
        .filter_map(|condition| match condition {
            (false, Match::Set(name, direction)) => Some((name, direction)),
            _ => None,
        });
    sets.collect()
}

/// Ends of a packet as it is printed.
fn ends(packet: &str) -> Option<(SocketAddr, SocketAddr)> {
    let (from, to) = packet.split_once(" > ")?;
    let end = |text: &str| text.replace(":*", ":0").parse().ok();
    Some((end(from)?, end(to)?))
}
