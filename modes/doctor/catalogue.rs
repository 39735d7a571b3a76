//! All checks.

use std::fmt::Write;

use super::facts::Facts;
use super::findings::Severity;
use super::{clashes, daemons, filters, kernel, machine, network};
use crate::options::Capture;

/// Both captures.
pub(super) const BOTH: &[Capture] = &[Capture::Node, Capture::Inpod];
/// The node capture only.
pub(super) const NODE: &[Capture] = &[Capture::Node];
/// The in-pod capture only.
pub(super) const INPOD: &[Capture] = &[Capture::Inpod];

/// Something that is looked at.
#[derive(Debug)]
pub struct Check {
    /// Stable identifier: the capture that it concerns (`host` for both) and a name.
    pub id: &'static str,
    /// A sentence that is true when nothing is wrong.
    pub title: &'static str,
    /// The captures that it concerns.
    pub modes: &'static [Capture],
    /// Why it matters, in one sentence.
    pub why: &'static str,
    /// What mends it; `OBJECT` stands for the object that was found.
    pub fix: &'static str,
    /// Finds what is wrong.
    pub(super) look: fn(&Facts) -> Vec<Found>,
}

/// What a check found.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) object: String,
    pub(super) severity: Severity,
    pub(super) what: String,
    /// If not all captures of the check.
    pub(super) modes: Option<&'static [Capture]>,
}

impl Found {
    /// A capture does not work.
    pub(super) fn fail(object: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            object: object.into(),
            severity: Severity::Fail,
            what: what.into(),
            modes: None,
        }
    }

    /// It works, with a reservation.
    pub(super) fn warn(object: impl Into<String>, what: impl Into<String>) -> Self {
        Self {
            severity: Severity::Warn,
            ..Self::fail(object, what)
        }
    }

    /// Concerns fewer captures than the check does.
    pub(super) fn only(mut self, modes: &'static [Capture]) -> Self {
        self.modes = Some(modes);
        self
    }
}

/// All checks in the order in which they are told.
pub fn all() -> impl Iterator<Item = &'static Check> {
    let areas: [&[Check]; 6] = [
        &kernel::CHECKS,
        &filters::CHECKS,
        &clashes::CHECKS,
        &network::CHECKS,
        &machine::CHECKS,
        &daemons::CHECKS,
    ];
    areas.into_iter().flatten()
}

/// The catalogue as a table in Markdown.
pub fn explained() -> String {
    let mut out =
        "| id | breaks | true when all is well | why | fix |\n|---|---|---|---|---|\n".to_owned();
    for check in all() {
        let modes: Vec<String> = check.modes.iter().map(ToString::to_string).collect();
        let cell = |text: &str| text.replace('|', "\\|");
        let _ = writeln!(
            out,
            "| `{}` | {} | {} | {} | {} |",
            check.id,
            modes.join(", "),
            cell(check.title),
            cell(check.why),
            cell(check.fix)
        );
    }
    out
}
