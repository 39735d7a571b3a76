//! Explanations as tables and as diagrams.

use std::fmt::Write;

use super::hop::{Hop, Kind};
use super::narrative;
use super::{Explanation, story::Leg};

/// One row a hop. Rules without effect are left out unless it may be `wide`.
pub fn table(explanation: &Explanation, wide: bool) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{}", explanation.heading());
    for (number, leg) in explanation.legs.iter().enumerate() {
        let _ = writeln!(out, "\n{}", leg.heading(number));
        for walk in &leg.walks {
            let _ = writeln!(out, "  {}: {}", phase(&walk.phase), walk.ends);
            let rows: Vec<[String; 6]> = walk
                .hops
                .iter()
                .filter(|hop| wide || !hop.is_idle() || hop.differs.is_some())
                .map(row)
                .collect();
            columns(&mut out, &rows);
        }
        let _ = decision(&mut out, leg);
    }
    for note in &explanation.notes {
        let _ = writeln!(out, "\nnote: {note}");
    }
    let count = explanation.differences();
    if count > 0 {
        let _ = writeln!(out, "\n{count} hops differ from the plans");
    }
    out
}

/// One line a station, in the words of the tools that an operator would ask.
pub fn story(explanation: &Explanation) -> String {
    narrative::tell(explanation, &narrative::Predicted)
}

/// Who accepted a leg, and what he decides.
pub(crate) fn decision(out: &mut String, leg: &Leg) -> std::fmt::Result {
    match (&leg.accepted_by, &leg.decision) {
        (Some(who), Some(decision)) => {
            writeln!(out, "  {who} decides: {}", decision.text)?;
            if let Some(identity) = &decision.source_identity {
                writeln!(out, "    client: {identity}")?;
            }
            if let Some(identity) = &decision.destination_identity {
                writeln!(out, "    destination: {identity}")?;
            }
            Ok(())
        }
        (Some(who), None) => writeln!(out, "  accepted by {who}"),
        (None, _) => writeln!(out, "  not accepted"),
    }
}

/// What a phase is called.
pub(crate) fn phase(name: &str) -> &str {
    match name {
        "first" => "first packet",
        "answer" => "answer",
        "later" => "later packets",
        other => other,
    }
}

/// A hop in words, with its rule and all that is to be said of it.
pub(crate) fn told(hop: &Hop) -> String {
    let mut what = hop.text.clone();
    if let Some(rule) = &hop.rule {
        let _ = write!(what, ": {}", rule.text);
        if rule.foreign {
            what.push_str("  (foreign rule)");
        }
    }
    if let Some(unknown) = &hop.unknown {
        let _ = write!(what, "  (unknown: {unknown})");
    }
    if let Some(differs) = &hop.differs {
        let _ = write!(what, "  <<< differs: {differs}");
    }
    what
}

fn row(hop: &Hop) -> [String; 6] {
    let marks = |change: &super::hop::Change| match change.after.as_str() {
        "0" if change.before == "0" => "-".to_owned(),
        _ => change.shown(),
    };
    [
        hop.place.clone(),
        hop.device.clone().unwrap_or_else(|| "-".to_owned()),
        marks(&hop.mark),
        marks(&hop.connmark),
        hop.packet.clone(),
        told(hop),
    ]
}

/// Columns as wide as their longest text, the last one as it is.
pub(crate) fn columns<const N: usize>(out: &mut String, rows: &[[String; N]]) {
    let mut widths = [0; N];
    for row in rows {
        for (width, text) in widths.iter_mut().zip(row) {
            *width = text.chars().count().max(*width);
        }
    }
    for row in rows {
        let mut line = String::from("    ");
        for (index, (text, width)) in row.iter().zip(widths).enumerate() {
            if index + 1 == N {
                line.push_str(text);
            } else {
                let _ = write!(line, "{text:width$}  ");
            }
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
}

/// A sequence diagram for Mermaid: namespaces as participants, packets between them as arrows, rules as notes.
pub fn mermaid(explanation: &Explanation) -> String {
    mermaid_with(explanation, &|_, _, _| None)
}

/// What is said of a hop besides, by the indices of leg, packet and hop.
pub(crate) type Besides<'a> = &'a dyn Fn(usize, usize, usize) -> Option<String>;

/// As [`mermaid`], with something more at the packets.
pub(crate) fn mermaid_with(explanation: &Explanation, besides: Besides<'_>) -> String {
    let mut out = String::from("sequenceDiagram\n");
    let mut places: Vec<&str> = Vec::new();
    for hop in explanation.hops() {
        if !places.contains(&hop.place.as_str()) {
            places.push(&hop.place);
        }
    }
    for (index, place) in places.iter().enumerate() {
        let _ = writeln!(out, "  participant p{index} as {}", plain(place));
    }
    let id = |place: &str| places.iter().position(|it| *it == place).unwrap_or(0);
    for (number, leg) in explanation.legs.iter().enumerate() {
        let over = match places.len() {
            0 | 1 => "p0".to_owned(),
            count => format!("p0,p{}", count - 1),
        };
        let _ = writeln!(out, "  Note over {over}: {}", plain(&leg.title));
        for (index, walk) in leg.walks.iter().enumerate() {
            let more = |hop| besides(number, index, hop);
            arrows(&mut out, &walk.hops, phase(&walk.phase), &id, &more);
        }
        if let (Some(decision), Some(hop)) = (
            &leg.decision,
            leg.walks.first().and_then(|walk| walk.hops.last()),
        ) {
            let _ = writeln!(
                out,
                "  Note over p{}: {}",
                id(&hop.place),
                plain(&decision.text)
            );
        }
    }
    out
}

/// Every hop that matters: packets between namespaces and over loopback as arrows, everything else as a note.
fn arrows(
    out: &mut String,
    hops: &[Hop],
    phase: &str,
    id: &dyn Fn(&str) -> usize,
    more: &dyn Fn(usize) -> Option<String>,
) {
    let mut arrived = None;
    for (index, hop) in hops.iter().enumerate() {
        let at = id(&hop.place);
        if let Some(differs) = &hop.differs {
            let _ = writeln!(out, "  Note over p{at}: differs: {}", plain(differs));
        }
        if hop.is_idle() || arrived == Some(index) {
            continue;
        }
        let more = more(index).map_or_else(String::new, |more| format!(" ({more})"));
        let received = |hop: &&Hop| hop.kind == Kind::Received;
        let next = hops.get(index + 1).filter(received);
        let line = match (hop.kind, next, &hop.rule) {
            (Kind::Transmitted, Some(next), _) => {
                arrived = Some(index + 1);
                let devices = format!("{}, {}", hop.text, next.text);
                let to = id(&next.place);
                format!(
                    "p{at}->>p{to}: {}",
                    plain(&format!("{phase} {devices}: {}{more}", hop.packet))
                )
            }
            (Kind::Received, ..) => {
                let text = format!("{phase} {}: {}{more}", hop.text, hop.packet);
                format!("p{at}->>p{at}: {}", plain(&text))
            }
            (_, _, Some(rule)) => {
                let text = format!("{}: {}{more}", hop.text, rule.text);
                format!("Note over p{at}: {}", plain(&text))
            }
            _ => format!("Note over p{at}: {}", plain(&format!("{}{more}", hop.text))),
        };
        let _ = writeln!(out, "  {line}");
    }
}

/// Without what ends a statement in Mermaid, or begins an entity.
pub fn plain(text: &str) -> String {
    let text = text.replace(" #", " ").replace("; ", ", ");
    text.replace(['#', ';', '\n'], " ")
}
