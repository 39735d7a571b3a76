//! Who is captured, and how: a function of what Kubernetes says of a pod and its namespace, and of how this agent is set.
//!
//! Whether a pod is in the mesh is said by the field's label `istio.io/dataplane-mode`; how it is captured, by ours,
//! `ambidex.io/capture-mode`. The pod's word counts before its namespace's, and that before the agent's `--mode`; only
//! `none` in our label wins wherever it stands. What asks for a capture that this agent cannot make is refused and not
//! captured in some other way, so that nobody believes in a mode that is not there.

use std::collections::BTreeMap;
use std::fmt;

use crate::options::{Capture, Mode};

/// Whether a pod, or the pods of a namespace, are in the mesh: `ambient` or `none`.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// How they are captured: `node`, `inpod`, `none`, or `auto`, which leaves it to the agent.
pub const CAPTURE_MODE: &str = "ambidex.io/capture-mode";
/// On a pod that has a sidecar.
pub const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// Labels by which the mesh's own pods are told apart.
pub const APP: [&str; 2] = ["app", "app.kubernetes.io/name"];
/// Its values on pods that carry others' traffic, in the agent's own namespace.
const OWN_APPS: [&str; 4] = [
    "ztunnel",
    "istio-cni-node",
    "ambidex-proxy",
    "ambidex-agent",
];

/// Labels or annotations.
pub type Words = BTreeMap<String, String>;

/// What counts of a pod and its namespace.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Namespace of the pod.
    pub namespace: &'a str,
    /// Its name, which a `mixed` agent chooses the capture by.
    pub name: &'a str,
    /// Labels of the namespace.
    pub namespace_labels: &'a Words,
    /// Labels of the pod.
    pub labels: &'a Words,
    /// Annotations of the pod.
    pub annotations: &'a Words,
    /// Whether it is in the node's own network namespace.
    pub host_network: bool,
    /// Whether all its containers have ended for good (phase `Succeeded` or `Failed`).
    pub ended: bool,
}

/// How this agent is set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rules {
    /// Which captures it makes, and which one where no label says.
    pub mode: Mode,
    /// Namespaces that are never captured.
    pub exclude_namespaces: Vec<String>,
    /// Namespace of the agent and the proxy.
    pub own_namespace: String,
}

/// What becomes of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// It is captured so.
    Captured(Capture),
    /// It is not in the mesh.
    NotCaptured(Reason),
    /// It is to be in the mesh in a way that this agent cannot make. It does not start uncaptured.
    Refused(Refusal),
}

/// Why a pod is not in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// It has no network namespace of its own.
    HostNetwork,
    /// It has ended; its address may be another pod's soon.
    Ended,
    /// Its namespace is excluded.
    ExcludedNamespace,
    /// It is the agent's or the proxy's own.
    OwnPod,
    /// It has a sidecar.
    Sidecar,
    /// Its own label says none.
    PodSaysNone,
    /// Its namespace's label says none.
    NamespaceSaysNone,
    /// No label says that it is in the mesh.
    NotSelected,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Reason::HostNetwork => "it is in the node's own network namespace (hostNetwork)",
            Reason::Ended => "it has ended",
            Reason::ExcludedNamespace => "its namespace is excluded (EXCLUDE_NAMESPACES)",
            Reason::OwnPod => "it is a pod of the agent or the proxy itself",
            Reason::Sidecar => "it has a sidecar",
            Reason::PodSaysNone => "a label of the pod says none",
            Reason::NamespaceSaysNone => {
                "the label ambidex.io/capture-mode of its namespace says none"
            }
            Reason::NotSelected => {
                "neither it nor its namespace has the label istio.io/dataplane-mode=ambient"
            }
        })
    }
}

/// Why a pod cannot be captured as it is to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The label has a word that is none of ours.
    #[error(
        "the label ambidex.io/capture-mode of the {place} is {word:?}: want node, inpod, none or auto"
    )]
    UnknownWord {
        /// `pod` or `namespace`.
        place: &'static str,
        /// The word.
        word: String,
    },
    /// The agent does not make this capture.
    #[error(
        "the label ambidex.io/capture-mode asks for {wanted}, but the agent of this node runs with --mode {mode}: start it \
         with --mode mixed, or take the label away"
    )]
    NotOffered {
        /// What the label asks for.
        wanted: Capture,
        /// What the agent was started with.
        mode: Mode,
    },
}

/// A value of our label.
enum Word {
    Mode(Capture),
    None,
    Auto,
}

/// What our label says in one place; an empty value says nothing.
fn word(labels: &Words, place: &'static str) -> Result<Option<Word>, Refusal> {
    Ok(Some(match labels.get(CAPTURE_MODE).map(String::as_str) {
        None | Some("") => return Ok(None),
        Some("node") => Word::Mode(Capture::Node),
        Some("inpod") => Word::Mode(Capture::Inpod),
        Some("none") => Word::None,
        Some("auto") => Word::Auto,
        Some(other) => {
            return Err(Refusal::UnknownWord {
                place,
                word: other.chars().take(63).collect(),
            });
        }
    }))
}

/// What becomes of a pod.
pub fn judge(candidate: &Candidate<'_>, rules: &Rules) -> Verdict {
    match excluded(candidate, rules) {
        Some(reason) => Verdict::NotCaptured(reason),
        None => match capture(candidate, rules) {
            Ok(capture) => Verdict::Captured(capture),
            Err(refusal) => Verdict::Refused(refusal),
        },
    }
}

/// Why it is not in the mesh, if it is not.
fn excluded(candidate: &Candidate<'_>, rules: &Rules) -> Option<Reason> {
    let says = |labels: &Words, label: &str, value: &str| {
        labels.get(label).is_some_and(|found| found == value)
    };
    let (pod, namespace) = (candidate.labels, candidate.namespace_labels);
    let named = |app: &str| APP.iter().any(|label| says(pod, label, app));
    let own_app = || OWN_APPS.iter().any(|app| named(app));
    let in_mesh =
        says(pod, DATAPLANE_MODE, "ambient") || says(namespace, DATAPLANE_MODE, "ambient");
    Some(match () {
        () if candidate.host_network => Reason::HostNetwork,
        () if candidate.ended => Reason::Ended,
        () if rules
            .exclude_namespaces
            .iter()
            .any(|excluded| excluded == candidate.namespace) =>
        {
            Reason::ExcludedNamespace
        }
        () if candidate.namespace == rules.own_namespace && own_app() => Reason::OwnPod,
        () if candidate.annotations.contains_key(SIDECAR_STATUS) => Reason::Sidecar,
        () if says(pod, CAPTURE_MODE, "none") || says(pod, DATAPLANE_MODE, "none") => {
            Reason::PodSaysNone
        }
        () if says(namespace, CAPTURE_MODE, "none") => Reason::NamespaceSaysNone,
        () if !in_mesh => Reason::NotSelected,
        () => return None,
    })
}

/// How a pod of the mesh is captured.
fn capture(candidate: &Candidate<'_>, rules: &Rules) -> Result<Capture, Refusal> {
    let (pod, namespace) = (
        word(candidate.labels, "pod")?,
        word(candidate.namespace_labels, "namespace")?,
    );
    let Some(Word::Mode(wanted)) = pod.or(namespace) else {
        // An agent that captures nothing is not started with this source.
        let offered = rules.mode.of_pod(candidate.name);
        return offered.ok_or(Refusal::NotOffered {
            wanted: Capture::Inpod,
            mode: rules.mode,
        });
    };
    let offered = match wanted {
        Capture::Node => rules.mode.uses_node(),
        Capture::Inpod => rules.mode.uses_inpod(),
    };
    if offered {
        Ok(wanted)
    } else {
        Err(Refusal::NotOffered {
            wanted,
            mode: rules.mode,
        })
    }
}

#[cfg(test)]
mod tests;
