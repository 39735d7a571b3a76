//! Traces as tables, as diagrams, and two of them next to each other.

use std::fmt::Write;

use super::{HopSeen, Trace, WalkSeen};
use crate::explain::hop::{Hop, Kind};
use crate::explain::narrative::{self, Observed};
use crate::explain::render::{columns, decision, mermaid_with, phase, told};

/// Microseconds in a millisecond.
const MILLI: f64 = 1000.0;

/// One row a hop: what was predicted, and what was seen of it.
pub fn table(trace: &Trace, wide: bool) -> String {
    let explanation = &trace.explanation;
    let mut out = String::new();
    let _ = writeln!(out, "{}", explanation.heading());
    for (number, leg) in explanation.legs.iter().enumerate() {
        let _ = writeln!(out, "\n{}", leg.heading(number));
        let walks = trace.seen.get(number).into_iter().flatten();
        for (walk, seen) in leg.walks.iter().zip(walks) {
            let spared = if seen.spared {
                " (not sent: an open tunnel carries it)"
            } else {
                ""
            };
            let _ = writeln!(out, "  {}: {}{spared}", phase(&walk.phase), walk.ends);
            if seen.spared {
                continue;
            }
            let rows: Vec<[String; 6]> = walk
                .hops
                .iter()
                .zip(&seen.hops)
                .filter(|(hop, seen)| wide || !hop.is_idle() || seen.disagrees.is_some())
                .map(|(hop, seen)| row(hop, seen))
                .collect();
            columns(&mut out, &rows);
        }
        let _ = decision(&mut out, leg);
    }
    for note in &explanation.notes {
        let _ = writeln!(out, "\nnote: {note}");
    }
    if !trace.tracked.is_empty() {
        let _ = writeln!(out, "\nconnection tracking:");
        let rows = trace.tracked.iter().map(|entry| {
            let leg = format!("{}", entry.leg + 1);
            [leg, entry.place.clone(), entry.shown()]
        });
        columns(&mut out, &rows.collect::<Vec<_>>());
    }
    let _ = writeln!(out, "\n{}", ends(trace).join("\n"));
    out
}

/// What is to be said of the connection as a whole.
fn ends(trace: &Trace) -> Vec<String> {
    let connection = &trace.connection;
    let observed = match (connection.tunnel, &connection.failed) {
        (_, Some(failed)) => failed.clone(),
        (Some(true), _) => "through a tunnel with mutual TLS".to_owned(),
        (Some(false), _) => "plain, by a proxy".to_owned(),
        (None, _) => "no proxy had it".to_owned(),
    };
    let mut lines = vec![format!("observed: {observed}")];
    for (who, identity) in [
        ("client", &connection.source_identity),
        ("destination", &connection.destination_identity),
    ] {
        lines.extend(identity.iter().map(|it| format!("proven {who}: {it}")));
    }
    let contradictions = trace.contradictions.iter();
    lines.extend(contradictions.map(|it| format!("disagrees: {it}")));
    lines.push(verdict(trace));
    lines
}

/// One line a station, in the words of the tools that an operator would ask, with what was observed.
pub fn story(trace: &Trace) -> String {
    narrative::tell(&trace.explanation, trace)
}

impl Observed for Trace {
    fn spared(&self, leg: usize, walk: usize) -> bool {
        let seen = self.seen.get(leg).and_then(|walks| walks.get(walk));
        seen.is_some_and(|walk| walk.spared)
    }

    fn of(&self, leg: usize, walk: usize, hop: usize) -> Option<String> {
        let seen = self.seen.get(leg)?.get(walk)?.hops.get(hop)?;
        Some(observed(seen))
    }

    fn tracked(&self, leg: usize, place: &str) -> Option<String> {
        let mut entries = self.tracked.iter();
        let entry = entries.find(|it| it.leg == leg && it.place == place)?;
        Some(entry.shown())
    }

    fn ends(&self) -> Vec<String> {
        ends(self)
    }
}

fn verdict(trace: &Trace) -> String {
    let (wrong, differs) = (trace.disagreements(), trace.explanation.differences());
    let observed = match wrong {
        0 => "everything was seen as predicted".to_owned(),
        wrong => format!("{wrong} times what was seen is not what was predicted"),
    };
    match differs {
        0 => observed,
        differs => format!("{observed}; {differs} hops differ from the plans"),
    }
}

fn observed(seen: &HopSeen) -> String {
    if let Some(disagrees) = &seen.disagrees {
        return format!("<<< {disagrees}");
    }
    match (seen.micros, seen.counted) {
        (Some(micros), _) => format!("{:+.3} ms", micros as f64 / MILLI),
        (None, Some(1)) => "1 packet".to_owned(),
        (None, Some(packets)) => format!("{packets} packets"),
        (None, None) => "-".to_owned(),
    }
}

fn row(hop: &Hop, seen: &HopSeen) -> [String; 6] {
    let marks = |change: &crate::explain::hop::Change| match change.after.as_str() {
        "0" if change.before == "0" => "-".to_owned(),
        _ => change.shown(),
    };
    [
        hop.place.clone(),
        hop.device.clone().unwrap_or_else(|| "-".to_owned()),
        observed(seen),
        marks(&hop.mark),
        marks(&hop.connmark),
        told(hop),
    ]
}

/// A sequence diagram for Mermaid, with the time of each packet.
pub fn mermaid(trace: &Trace) -> String {
    mermaid_with(&trace.explanation, &|leg, walk, hop| {
        let seen = trace.seen.get(leg)?.get(walk)?.hops.get(hop)?;
        (seen.micros.is_some() || seen.disagrees.is_some()).then(|| observed(seen))
    })
}

/// Two traces in two columns: devices and rules of each leg, and when the packet was there; with `wide` routes, too.
pub fn side_by_side(left: &Trace, right: &Trace, wide: bool) -> String {
    let mut out = String::new();
    let title = |trace: &Trace| trace.explanation.heading();
    columns(&mut out, &[[title(left), title(right)]]);
    let legs = left
        .explanation
        .legs
        .len()
        .max(right.explanation.legs.len());
    for number in 0..legs {
        for name in ["first", "answer", "later"] {
            let of = |trace| steps(trace, number, name, wide);
            let (here, there) = (of(left), of(right));
            if here.is_empty() && there.is_empty() {
                continue;
            }
            let _ = writeln!(out, "\nleg {}, {}", number + 1, phase(name));
            let rows: Vec<[String; 2]> = (0..here.len().max(there.len()))
                .map(|index| {
                    let of = |steps: &[String]| steps.get(index).cloned().unwrap_or_default();
                    [of(&here), of(&there)]
                })
                .collect();
            columns(&mut out, &rows);
        }
    }
    out.push('\n');
    let decided = |trace: &Trace, number: usize| {
        let leg = trace.explanation.legs.get(number)?;
        let who = leg.accepted_by.as_deref().unwrap_or("nobody");
        let text = leg.decision.as_ref().map_or("", |decision| &decision.text);
        Some(format!("{who} {text}").trim_end().to_owned())
    };
    let mut rows: Vec<[String; 2]> = (0..legs)
        .map(|number| [left, right].map(|trace| decided(trace, number).unwrap_or_default()))
        .collect();
    rows.push([verdict(left), verdict(right)]);
    columns(&mut out, &rows);
    out
}

/// What matters of a packet, one line each.
fn steps(trace: &Trace, leg: usize, name: &str, wide: bool) -> Vec<String> {
    let Some(walks) = trace.explanation.legs.get(leg).map(|leg| &leg.walks) else {
        return Vec::new();
    };
    let Some(index) = walks.iter().position(|walk| walk.phase == name) else {
        return Vec::new();
    };
    let seen: Option<&WalkSeen> = trace.seen.get(leg).and_then(|walks| walks.get(index));
    let Some(seen) = seen.filter(|seen| !seen.spared) else {
        return vec!["(an open tunnel)".to_owned()];
    };
    let mut steps = Vec::new();
    for (hop, seen) in walks[index].hops.iter().zip(&seen.hops) {
        let device = hop.device.as_deref().unwrap_or("-");
        let what = match (hop.kind, &hop.rule) {
            (Kind::Rule | Kind::Dropped, Some(rule)) if !hop.is_idle() => {
                format!("  {} {}", hop.text, mark_or_target(hop, &rule.text))
            }
            (Kind::Received | Kind::Transmitted | Kind::Wrapped | Kind::Unwrapped, _) => {
                format!("{} {device} {}", hop.place, observed(seen))
            }
            (Kind::Delivered | Kind::Dropped | Kind::Left, _) => {
                format!("{} {}", hop.place, hop.text)
            }
            (Kind::Routed, _) if wide => match &hop.route {
                Some(route) => format!("  table {}: {}", route.table, route.route),
                None => format!("  {}", hop.text),
            },
            (Kind::Translated, _) if wide => format!("  {}", hop.text),
            _ => continue,
        };
        steps.push(what);
    }
    steps
}

fn mark_or_target(hop: &Hop, rule: &str) -> String {
    if hop.mark.before != hop.mark.after {
        return format!("mark {}", hop.mark.shown());
    }
    if hop.connmark.before != hop.connmark.after {
        return format!("connmark {}", hop.connmark.shown());
    }
    let target = rule.rsplit_once("-j ").map_or(rule, |(_, target)| target);
    target.to_owned()
}
