//! Plans made real: apply, inspect, remove, undo.
//!
//! * [`apply`] moves a place from one plan to another, or leaves it as it was.
//! * [`inspect`] says what of a plan is missing, different, out of order or foreign.
//! * [`adopt`] takes over what a process before this one made, when its journal is lost.
//! * [`read_ahead`] spares a change that is to be quick some of its looks.
//! * [`remove`] takes a plan away and goes on after errors; [`undo`] does so from the journal alone.
//!
//! Changes in one namespace take turns; different namespaces go in parallel. Order: steps are made in the plan's order
//! and removed in the reverse one. Consecutive iptables steps become one `iptables-restore` per family, consecutive
//! entries of one set one message, consecutive routes go out together. Plans that wait for the same turn and have nothing in
//! common are looked at and restored together.

use std::fmt;

use serde::Serialize;

use crate::netns::NetnsId;
use crate::plan::Step;

mod adopt;
mod apply;
mod carrier;
mod firewall;
mod inspect;
mod kernel;
mod line;
mod name;
mod operations;
mod prepare;
mod remembered;
mod remove;
mod survey;
mod tables;
mod together;
mod transition;
mod whereabouts;

pub use adopt::adopt;
pub use apply::{Applied, ApplyError, apply};
pub use inspect::{InspectError, inspect, inspect_among};
pub use kernel::KernelError;
pub(crate) use name::program;
pub use remembered::read_ahead;
pub use remove::{RemoveError, remove, undo};

/// One difference between a plan and the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The object.
    pub step: Step,
    /// What is wrong with it.
    pub problem: Problem,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.step, self.problem)
    }
}

/// What is wrong with an object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "problem", rename_all = "kebab-case")]
pub enum Problem {
    /// It is not there.
    Missing,
    /// It is there with other parameters.
    Different {
        /// What was found instead.
        found: String,
    },
    /// A chain of ours holds rules that are not.
    Foreign {
        /// Those rules.
        found: Vec<String>,
    },
    /// Everything is there, but not in the order that gives it its meaning.
    Order {
        /// What stands where.
        found: String,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Problem::Missing => f.write_str("missing"),
            Problem::Different { found } => write!(f, "different: {found}"),
            Problem::Foreign { found } => {
                write!(
                    f,
                    "{} foreign rule(s): `{}`",
                    found.len(),
                    found.join("`, `")
                )
            }
            Problem::Order { found } => write!(f, "out of order: {found}"),
        }
    }
}

/// Waits for this namespace's turn.
async fn turn(netns: NetnsId) -> line::Turn {
    line::Line::of(netns).turn().await
}
