//! What was seen, held against what was predicted.

use std::collections::BTreeSet;

use super::connection::{Ends, Observed};
use super::counters::{Counters, RulePlace};
use super::segments::Segment;
use super::tracked::Tracked;
use super::{HopSeen, Trace, TrackedSeen, WalkSeen};
use crate::explain::Explanation;
use crate::explain::hop::{Change, Hop, Kind};
use crate::explain::mesh::Way;
use crate::explain::packet::Tuple;
use crate::explain::story::{Leg, Walk};

/// Index of the leg between two proxies, which may be an open tunnel.
const TUNNEL_LEG: usize = 1;

/// All that was seen.
#[derive(Debug)]
pub(super) struct Evidence {
    /// Names of the namespaces by index.
    pub(super) places: Vec<String>,
    /// Segments by time.
    pub(super) segments: Vec<Segment>,
    /// By how many packets the rules' counters grew.
    pub(super) grown: Counters,
    /// Connection tracking.
    pub(super) tracked: Vec<Tracked>,
}

/// A predicted packet on a device: place, device, phase, ends of the inner packet, whether it is wrapped.
type OnDevice = (String, String, String, String, bool);

/// Judges.
pub(super) fn judge(explanation: Explanation, connection: Observed, evidence: &Evidence) -> Trace {
    let mut predicted = BTreeSet::new();
    let mut seen = Vec::new();
    // What is reset on its way may never carry a byte.
    let arrives = arrives(&explanation);
    let zero = connection
        .legs
        .first()
        .and_then(|ends| {
            let of_client = |it: &&Segment| it.tuple.from == ends.from;
            evidence.segments.iter().find(of_client)
        })
        .map_or(0, |segment| segment.micros);
    for (number, leg) in explanation.legs.iter().enumerate() {
        let later = leg.walks.iter().find(|walk| walk.phase == "later");
        let carried = later.is_some_and(|walk| {
            watched(walk, &walk.phase, evidence).any(|(_, seen)| seen.is_some())
        });
        let mut walks = Vec::new();
        for walk in &leg.walks {
            predicted.extend(
                on_devices(walk).map(|(hop, inner, wrapped)| key(hop, &walk.phase, inner, wrapped)),
            );
            let nothing = watched(walk, &walk.phase, evidence).all(|(_, seen)| seen.is_none());
            let spared = number == TUNNEL_LEG
                && connection.tunnel == Some(true)
                && walk.phase != "later"
                && nothing
                && carried;
            let judged = !spared && (arrives || walk.phase != "later");
            walks.push(WalkSeen {
                spared,
                hops: hops_seen(walk, judged, zero, evidence),
            });
        }
        seen.push(walks);
    }
    let mut contradictions = unpredicted(&predicted, &connection.legs, evidence);
    contradictions.extend(by_tracking(&explanation, &connection.legs, evidence));
    contradictions.extend(by_proxies(&explanation, &connection));
    Trace {
        tracked: tracked(&connection.legs, evidence),
        explanation,
        seen,
        connection,
        contradictions,
    }
}

fn hops_seen(walk: &Walk, judged: bool, zero: i64, evidence: &Evidence) -> Vec<HopSeen> {
    let mut hops = vec![HopSeen::default(); walk.hops.len()];
    for (index, micros) in watched(walk, &walk.phase, evidence) {
        hops[index].micros = micros.map(|micros| micros - zero);
        if micros.is_none() && judged {
            hops[index].disagrees = Some("not seen".to_owned());
        }
    }
    for (hop, seen) in walk.hops.iter().zip(&mut hops) {
        let Some(rule) = &hop.rule else {
            continue;
        };
        let place = evidence.places.iter().position(|place| *place == hop.place);
        let counted = place.and_then(|place| {
            let at = RulePlace {
                place,
                ipv6: hop.packet.starts_with('['),
                table: rule.table.clone(),
                chain: rule.chain.clone(),
                position: rule.position,
            };
            evidence.grown.get(&at).copied()
        });
        seen.counted = counted;
        // A rule that cannot be evaluated was predicted neither way.
        if counted == Some(0) && hop.unknown.is_none() && judged {
            seen.disagrees = Some("the rule's counter did not grow".to_owned());
        }
    }
    hops
}

/// Hops at which the packet is on a device, the ends of what is innermost there, and whether that is wrapped.
fn on_devices(walk: &Walk) -> impl Iterator<Item = (&Hop, &str, bool)> {
    let mut inner: Option<&str> = None;
    walk.hops.iter().filter_map(move |hop| {
        match hop.kind {
            Kind::Wrapped => {
                inner = Some(&hop.packet);
                return Some((hop, hop.packet.as_str(), false));
            }
            Kind::Unwrapped => inner = None,
            Kind::Received | Kind::Transmitted => {}
            _ => return None,
        }
        hop.device.as_ref()?;
        Some((hop, inner.unwrap_or(&hop.packet), inner.is_some()))
    })
}

/// For each hop on a device whose ends are known: its index and when it was seen, if it was.
fn watched<'a>(
    walk: &'a Walk,
    phase: &'a str,
    evidence: &'a Evidence,
) -> impl Iterator<Item = (usize, Option<i64>)> + 'a {
    let known = on_devices(walk).filter(|(_, inner, _)| !inner.contains(":*"));
    known.filter_map(move |(hop, inner, wrapped)| {
        let index = walk.hops.iter().position(|it| std::ptr::eq(it, hop))?;
        let device = hop.device.as_deref();
        let found = evidence.segments.iter().find(|segment| {
            segment.phase == Some(phase)
                && evidence.places[segment.place] == hop.place
                && Some(segment.device.as_str()) == device
                && segment.outer.is_some() == wrapped
                && segment.tuple.to_string() == inner
        });
        Some((index, found.map(|segment| segment.micros)))
    })
}

fn key(hop: &Hop, phase: &str, inner: &str, wrapped: bool) -> OnDevice {
    (
        hop.place.clone(),
        hop.device.clone().unwrap_or_default(),
        phase.to_owned(),
        inner.to_owned(),
        wrapped,
    )
}

/// Packets of the legs on devices where they were not predicted.
fn unpredicted(predicted: &BTreeSet<OnDevice>, legs: &[Ends], evidence: &Evidence) -> Vec<String> {
    let mut found = BTreeSet::new();
    for segment in &evidence.segments {
        let Some(phase) = segment.phase else {
            continue;
        };
        let ours = legs.iter().any(|leg| {
            let ends = tuple(leg);
            segment.tuple
                == if phase == "answer" {
                    ends.reversed()
                } else {
                    ends
                }
        });
        let place = &evidence.places[segment.place];
        let key = (
            place.clone(),
            segment.device.clone(),
            phase.to_owned(),
            segment.tuple.to_string(),
            segment.outer.is_some(),
        );
        if ours && !predicted.contains(&key) {
            let what = crate::explain::render::phase(phase);
            found.insert(format!(
                "{place}, {}: {what} {} was seen and not predicted",
                segment.device, segment.tuple
            ));
        }
    }
    found.into_iter().collect()
}

/// What connection tracking has of each leg, in the order of places.
fn tracked(legs: &[Ends], evidence: &Evidence) -> Vec<TrackedSeen> {
    let mut seen = Vec::new();
    for (leg, ends) in legs.iter().enumerate() {
        let of_leg = |entry: &&Tracked| entry.original == tuple(ends);
        seen.extend(
            evidence
                .tracked
                .iter()
                .filter(of_leg)
                .map(|entry| TrackedSeen {
                    leg,
                    place: evidence.places[entry.place].clone(),
                    original: entry.original.to_string(),
                    reply: entry.reply.to_string(),
                    mark: Change::of(entry.mark, entry.mark).after,
                }),
        );
    }
    seen
}

fn tuple(ends: &Ends) -> Tuple {
    Tuple {
        from: ends.from,
        to: ends.to,
    }
}

/// Marks of connections that are not as predicted.
fn by_tracking(explanation: &Explanation, legs: &[Ends], evidence: &Evidence) -> Vec<String> {
    let mut found = Vec::new();
    for (leg, ends) in explanation.legs.iter().zip(legs) {
        for entry in &evidence.tracked {
            let place = &evidence.places[entry.place];
            if entry.original != tuple(ends) {
                continue;
            }
            let Some(predicted) = last_connmark(leg, place) else {
                continue;
            };
            let mark = Change::of(entry.mark, entry.mark).after;
            if mark != predicted {
                found.push(format!(
                    "{place}: connection tracking has mark {mark} for {}, predicted was {predicted}",
                    entry.original
                ));
            }
        }
    }
    found
}

/// The mark of a leg's connection in a place after all of its packets.
fn last_connmark(leg: &Leg, place: &str) -> Option<String> {
    let mut last = None;
    for walk in &leg.walks {
        let mut wrapped = false;
        for hop in &walk.hops {
            match hop.kind {
                Kind::Wrapped => wrapped = true,
                Kind::Unwrapped => wrapped = false,
                // Before its connection is looked up a packet has no mark of it.
                Kind::Sent | Kind::Received => {}
                _ if !wrapped && hop.place == place => last = Some(hop.connmark.after.clone()),
                _ => {}
            }
        }
    }
    last
}

/// Whether the application is predicted to accept it.
fn arrives(explanation: &Explanation) -> bool {
    let last = explanation.legs.last();
    last.and_then(|leg| leg.accepted_by.as_ref())
        .is_some_and(|who| who.starts_with("application"))
}

/// Decisions and ends that were others.
fn by_proxies(explanation: &Explanation, connection: &Observed) -> Vec<String> {
    let mut found = Vec::new();
    if let Some(failed) = connection.failed.as_ref().filter(|_| arrives(explanation)) {
        found.push(format!("it came to nothing: {failed}"));
    }
    let by_proxy = explanation.legs.iter().filter(|leg| {
        let who = leg.accepted_by.as_deref().unwrap_or_default();
        who.starts_with("proxy")
    });
    let mut decisions = by_proxy.filter_map(|leg| leg.decision.as_ref());
    let Some(first) = decisions.next() else {
        return found;
    };
    match (first.way, connection.tunnel) {
        (Way::Hbone, Some(false)) => {
            found.push("no tunnel with mutual TLS, and one was predicted".to_owned());
        }
        (Way::Plain, Some(true)) => {
            found.push("a tunnel, and plain TCP was predicted".to_owned());
        }
        (Way::Hbone | Way::Plain | Way::HandOver, None) => {
            found.push("no proxy had the connection".to_owned());
        }
        _ => {}
    }
    let mut compare = |what: &str, predicted: Option<&String>, observed: Option<&String>| {
        if let (Some(predicted), Some(observed)) = (predicted, observed)
            && predicted != observed
        {
            found.push(format!("{what} is {observed}, predicted was {predicted}"));
        }
    };
    compare(
        "the destination's identity",
        first.destination_identity.as_ref(),
        connection.destination_identity.as_ref(),
    );
    let second = decisions.next();
    compare(
        "the client's identity",
        second.and_then(|decision| decision.source_identity.as_ref()),
        connection.source_identity.as_ref(),
    );
    found
}
