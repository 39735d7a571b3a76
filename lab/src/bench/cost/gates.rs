//! Limits that were set before anything was measured, and whether what was found keeps them.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::VariantCost;
use crate::bench::variant::Variant;

/// A proxy's memory per tunnel that carries nothing, at each end, in KiB.
pub const IDLE_TUNNEL_KIB: f64 = 24.0;
/// A proxy's memory with this many captured pods that do nothing, in KiB.
pub const IDLE_PODS_KIB: f64 = 30.0 * 1024.0;
/// Pods with which memory and enrolments are judged.
pub const PODS: usize = 200;
/// Idle tunnels with which they are judged.
pub const TUNNELS: u64 = 2_000;
/// From the announcement of a pod to the proxy's acknowledgement at the 99th percentile, in milliseconds.
pub const ADD_TO_ACK_P99_MS: f64 = 10.0;

/// A limit and what was found.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gate {
    /// What is limited; the unit is at its end.
    pub gate: String,
    /// Whose.
    pub variant: Variant,
    /// Most that there may be.
    pub limit: f64,
    /// What there is; none when the order was for less than what the gate is about.
    pub found: Option<f64>,
    /// Whether it is kept.
    pub status: Status,
}

/// Whether a limit is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Status {
    /// It is.
    Met,
    /// It is not.
    Missed,
    /// The order was for fewer pods or connections than the limit is about.
    NotMeasured,
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Met => "met",
            Self::Missed => "missed",
            Self::NotMeasured => "not measured",
        })
    }
}

/// The gates of a variant; none where the proxy is not this project's.
pub fn of(cost: &VariantCost) -> Vec<Gate> {
    if matches!(
        cost.variant,
        Variant::None | Variant::Relay | Variant::External(_)
    ) {
        return Vec::new();
    }
    let tunnels = cost.idle_tunnels.as_ref();
    let tunnel = tunnels.filter(|idle| idle.connections + idle.warm_up >= TUNNELS);
    let enough = cost.pods.iter().find(|at| at.pods >= PODS);
    let enrolment = enough.and_then(|at| at.enrolment.as_ref());
    [
        (
            "rss_per_idle_tunnel_and_end_kib",
            IDLE_TUNNEL_KIB,
            tunnel.map(|idle| idle.unused_kib.client.max(idle.unused_kib.server)),
        ),
        (
            "proxy_rss_at_200_idle_pods_kib",
            IDLE_PODS_KIB,
            enough.map(|at| at.proxy.memory.rss_kib as f64),
        ),
        (
            "add_to_ack_p99_at_200_pods_ms",
            ADD_TO_ACK_P99_MS,
            enrolment.map(|steps| steps.announce_us.p99 / 1e3),
        ),
    ]
    .map(|(gate, limit, found)| Gate {
        gate: gate.to_owned(),
        variant: cost.variant.clone(),
        limit,
        found,
        status: match found {
            None => Status::NotMeasured,
            // A measurement that is not a number keeps no limit.
            Some(found) if found <= limit => Status::Met,
            Some(_) => Status::Missed,
        },
    })
    .to_vec()
}
