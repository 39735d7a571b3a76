//! One step of a packet's way, as it is printed.

use serde::{Deserialize, Serialize};

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A socket sent the packet.
    Sent,
    /// It came in by a device.
    Received,
    /// A rule of iptables met it.
    Rule,
    /// Connection tracking put another address on it, as an earlier packet's rule says.
    Translated,
    /// A route was chosen.
    Routed,
    /// It left by a device.
    Transmitted,
    /// It was put into an overlay's outer packet.
    Wrapped,
    /// It was taken out of one.
    Unwrapped,
    /// A socket has it.
    Delivered,
    /// It goes no further.
    Dropped,
    /// It went where nothing is known from here.
    Left,
}

/// A value before and after a step, in hexadecimal.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Change {
    /// Before.
    pub before: String,
    /// After.
    pub after: String,
}

impl Change {
    /// Of two marks.
    pub fn of(before: u32, after: u32) -> Self {
        let hex = |mark: u32| {
            if mark == 0 {
                "0".to_owned()
            } else {
                format!("{mark:#x}")
            }
        };
        Self {
            before: hex(before),
            after: hex(after),
        }
    }

    /// `0 → 0x100`, or one value when nothing changed.
    pub fn shown(&self) -> String {
        if self.before == self.after {
            self.after.clone()
        } else {
            format!("{} → {}", self.before, self.after)
        }
    }
}

/// A rule that met the packet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleHit {
    /// Table.
    pub table: String,
    /// Chain.
    pub chain: String,
    /// Position in the chain, from 1.
    pub position: usize,
    /// As `iptables-save` prints it, without `-A CHAIN`.
    pub text: String,
    /// Whether it is in no plan.
    pub foreign: bool,
}

/// A route that was chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTaken {
    /// The policy rule that led to the table.
    pub rule: String,
    /// Table.
    pub table: u32,
    /// The route.
    pub route: String,
}

/// One step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Hop {
    /// Namespace: `node1`, `proxy1`, `pod alpha/pod1-1`.
    pub place: String,
    /// Device, where one is involved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// What happened.
    pub kind: Kind,
    /// The same in words.
    pub text: String,
    /// Ends of the packet after the step. Ports that the kernel chooses are `*`.
    pub packet: String,
    /// The packet's mark.
    pub mark: Change,
    /// The mark of its connection in this namespace.
    pub connmark: Change,
    /// The rule.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rule: Option<RuleHit>,
    /// The route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub route: Option<RouteTaken>,
    /// Without effect on the packet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub detail: bool,
    /// What could not be evaluated: the prediction holds only if it does not match.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unknown: Option<String>,
    /// How the kernel's state differs here from what the plans say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub differs: Option<String>,
}

impl Hop {
    /// Whether a rule of somebody else met the packet.
    pub fn is_foreign(&self) -> bool {
        self.rule.as_ref().is_some_and(|rule| rule.foreign)
    }

    /// Whether the packet is the same as before, and goes on as it would have.
    pub fn is_idle(&self) -> bool {
        self.detail
    }
}
