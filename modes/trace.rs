//! The way of one real connection, observed beside the prediction.
//!
//! The prediction is made from the state before the connection ([`crate::explain`]). Then every device on the predicted way
//! is listened on (`taps`), rules are counted (`counters`), the connection is made ([`connection`]), and each predicted hop is
//! held against what was seen of it ([`judge`]).

pub mod connection;
mod counters;
pub mod judge;
pub mod render;
mod segments;
mod taps;
mod tracked;

use std::time::Duration;

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::explain::{Asked, Explanation, Prepared, prepare};
use connection::Observed;
use taps::Taps;

/// What an operator wants to see.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Whose connection and where to.
    pub asked: Asked,
    /// Bytes that the client sends.
    pub bytes: usize,
    /// Make no connection: wait so long for the next one.
    pub follow: Option<Duration>,
}

/// What was predicted and what was seen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Trace {
    /// The prediction, with the ports that were really used.
    pub explanation: Explanation,
    /// What was seen of each hop: for each leg and each of its packets, in the order of the prediction's hops.
    pub seen: Vec<Vec<WalkSeen>>,
    /// What the proxies said of the connection.
    pub connection: Observed,
    /// What connection tracking of each place has of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tracked: Vec<TrackedSeen>,
    /// Packets of the connection where none were predicted, connection tracking that says something else, a decision that was
    /// another one.
    pub contradictions: Vec<String>,
}

/// An entry of connection tracking.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct TrackedSeen {
    /// Index of the leg.
    pub leg: usize,
    /// Namespace.
    pub place: String,
    /// Ends of its first packet.
    pub original: String,
    /// Ends of an answer.
    pub reply: String,
    /// Its mark.
    pub mark: String,
}

impl TrackedSeen {
    /// The same in a line.
    pub fn shown(&self) -> String {
        let Self {
            original,
            reply,
            mark,
            ..
        } = self;
        format!("{original}, answers {reply}, mark {mark}")
    }
}

/// What was seen of one packet of a leg.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct WalkSeen {
    /// Nothing was sent because an open tunnel carries the leg.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub spared: bool,
    /// Of each hop.
    pub hops: Vec<HopSeen>,
}

/// What was seen of a hop.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct HopSeen {
    /// Microseconds from the first packet of the connection, at the hop's device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub micros: Option<i64>,
    /// Packets by which the rule's counter grew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub counted: Option<u64>,
    /// What is not as predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disagrees: Option<String>,
}

impl Trace {
    /// How often what was seen is not what was predicted.
    pub fn disagreements(&self) -> usize {
        let hops = self.seen.iter().flatten().flat_map(|walk| &walk.hops);
        hops.filter(|hop| hop.disagrees.is_some()).count() + self.contradictions.len()
    }
}

/// Makes or awaits a connection and watches it.
///
/// # Errors
/// As [`prepare`]; when a device cannot be listened on, or no connection came.
pub async fn trace(wanted: &Wanted) -> anyhow::Result<Trace> {
    let prepared = prepare(&wanted.asked).await?;
    let devices = devices(&prepared);
    let before = counters::read(&prepared.stage)?;
    let taps = Taps::start(&prepared.stage, &devices)?;
    let made = match wanted.follow {
        None => connection::make(&prepared, wanted.bytes).await,
        Some(limit) => connection::follow(&prepared, limit).await,
    };
    let tracked = tracked::read(&prepared.stage);
    let segments = taps.finish().context("what was heard on the devices")?;
    let after = counters::read(&prepared.stage)?;
    let observed = made?;
    let mut question = prepared.question.clone();
    question.client = observed
        .legs
        .first()
        .map_or(question.client, |leg| leg.from.ip());
    question.ports = observed
        .legs
        .iter()
        .map(|leg| Some(leg.from.port()))
        .collect();
    question.endpoint = observed.endpoint.or(question.endpoint);
    let explanation = prepared.explain(&question);
    let places = prepared.stage.live.places.iter();
    Ok(judge::judge(
        explanation,
        observed,
        &judge::Evidence {
            places: places.map(|place| place.name.clone()).collect(),
            segments,
            grown: counters::grown(&before, &after),
            tracked,
        },
    ))
}

/// Devices of the way, whichever endpoint is chosen, and those by which something could leave it.
fn devices(prepared: &Prepared) -> Vec<(usize, String)> {
    let mut devices = std::collections::BTreeSet::new();
    let mut note = |explanation: &Explanation| {
        for hop in explanation.hops() {
            let place = prepared
                .stage
                .live
                .places
                .iter()
                .position(|it| it.name == hop.place);
            devices.extend(place.zip(hop.device.clone()));
        }
    };
    let first = prepared.explain(&prepared.question);
    note(&first);
    let among = first.legs.iter().filter_map(|leg| leg.decision.as_ref());
    for endpoint in among.flat_map(|decision| &decision.among) {
        let mut question = prepared.question.clone();
        question.endpoint = Some(*endpoint);
        note(&prepared.explain(&question));
    }
    for (index, place) in prepared.stage.live.places.iter().enumerate() {
        for device in &place.state.devices {
            if device.overlay.is_some() || device.name.starts_with("eth") {
                devices.insert((index, device.name.clone()));
            }
        }
    }
    devices.into_iter().collect()
}
