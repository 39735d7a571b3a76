//! What came out: findings, what they break, and the capture to choose.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::options::Capture;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// Works, until something else happens, or not for all pods.
    Warn,
    /// A capture does not work like this.
    Fail,
}

/// What one check found in one object; with severity ok, that it found nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// Identifier of the check; it never changes its meaning.
    pub id: String,
    /// What is checked, as a sentence that is true when nothing is wrong.
    pub check: String,
    /// How bad.
    pub severity: Severity,
    /// The captures that it concerns.
    pub modes: Vec<Capture>,
    /// The object that is wrong.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub object: String,
    /// What was found there.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub found: String,
    /// Why that matters.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// The command or setting that mends it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub fix: String,
}

/// Everything that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Findings {
    /// In the order of the catalogue.
    pub findings: Vec<Finding>,
}

impl Findings {
    /// Those that concern one of these captures.
    #[must_use]
    pub fn of(mut self, modes: &[Capture]) -> Self {
        self.findings
            .retain(|finding| finding.modes.iter().any(|mode| modes.contains(mode)));
        self
    }

    /// What keeps a capture from working.
    pub fn that_break(&self, mode: Capture) -> impl Iterator<Item = &Finding> {
        self.findings
            .iter()
            .filter(move |one| one.severity == Severity::Fail && one.modes.contains(&mode))
    }

    /// How many warnings there are.
    pub fn warnings(&self) -> usize {
        let warnings = self.findings.iter();
        warnings
            .filter(|finding| finding.severity == Severity::Warn)
            .count()
    }
}

/// The capture to choose on this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Recommendation {
    /// None works as the machine is.
    pub mode: Option<Capture>,
    /// Why this one.
    pub reason: String,
}

impl fmt::Display for Recommendation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.mode {
            Some(mode) => write!(f, "{mode}: {}", self.reason),
            None => write!(f, "none: {}", self.reason),
        }
    }
}

/// Chooses a capture: the one that nothing breaks; of both, the in-pod one, because it leaves the node's packet path to
/// the network plugin. Wants findings about both.
pub fn recommended(findings: &Findings) -> Recommendation {
    let ids = |mode| {
        let mut ids: Vec<&str> = findings.that_break(mode).map(|f| f.id.as_str()).collect();
        ids.dedup();
        ids.join(", ")
    };
    let (node, inpod) = (ids(Capture::Node), ids(Capture::Inpod));
    let (mode, reason) = match (node.is_empty(), inpod.is_empty()) {
        (true, true) => (
            Some(Capture::Inpod),
            "nothing breaks either capture, and this one leaves the node's packet path to the network plugin".to_owned(),
        ),
        (false, true) => (Some(Capture::Inpod), format!("node capture is broken by {node}")),
        (true, false) => (Some(Capture::Node), format!("in-pod capture is broken by {inpod}")),
        (false, false) => (
            None,
            format!("node capture is broken by {node}; in-pod capture by {inpod}"),
        ),
    };
    Recommendation { mode, reason }
}
