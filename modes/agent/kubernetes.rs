//! Pods from Kubernetes: who is captured is read from labels, pods that run already are enrolled and unenrolled as these
//! change, and what was proven is told back.
//!
//! | part | what it does |
//! |---|---|
//! | [`eligibility`] | labels → verdict, a pure function |
//! | [`netns`] | finds the network namespace of a pod that runs |
//! | `known` | what the API server said last; kept while it does not answer |
//! | `watch` | follows pods of this node and namespaces |
//! | `queue` | pods whose state may be another one than is wanted, one entry each, with backoff |
//! | `reconcile` | brings one pod from what it is to what it should be |
//! | `tell` | annotation, condition and events of a pod |
//! | `admission` | answers for a pod that a runtime adds |
//!
//! The API server is asked and told; nothing depends on its answer that holds already. Without it captured pods stay
//! captured, and pods that are added wait.

pub mod eligibility;
pub mod netns;

#[cfg(feature = "kubernetes")]
mod admission;
#[cfg(feature = "kubernetes")]
mod client;
#[cfg(feature = "kubernetes")]
mod known;
#[cfg(feature = "kubernetes")]
mod queue;
#[cfg(feature = "kubernetes")]
mod reconcile;
#[cfg(feature = "kubernetes")]
mod source;
#[cfg(feature = "kubernetes")]
mod tell;
#[cfg(feature = "kubernetes")]
mod watch;

#[cfg(not(feature = "kubernetes"))]
mod absent;

use std::path::PathBuf;

use inpod_redirect::extent::Extent;

use crate::options::Capture;

#[cfg(not(feature = "kubernetes"))]
pub(super) use absent::Source;
#[cfg(feature = "kubernetes")]
pub(super) use source::Source;

/// What the Kubernetes source is started with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Name of this node in Kubernetes.
    pub node_name: String,
    /// File that says where the API server is; none: as for every program in a pod, or what `KUBECONFIG` names.
    pub kubeconfig: Option<PathBuf>,
    /// Namespaces whose pods are never captured.
    pub exclude_namespaces: Vec<String>,
    /// Namespace of the agent and the proxy.
    pub own_namespace: String,
    /// Name of the agent's own pod, which events are signed with; the node's name where it is not known.
    pub own_pod: String,
    /// The node's `/proc`.
    pub host_proc: PathBuf,
}

/// What Kubernetes says of a pod that a runtime adds and that is to be captured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) mode: Capture,
    /// UID and service account, where Kubernetes is the one to ask.
    pub(super) identity: Option<Identity>,
}

/// Who a pod is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) uid: String,
    pub(super) service_account: String,
    /// Whether its DNS queries are captured, where it says so itself.
    pub(super) dns_capture: Option<bool>,
    /// How far its capture reaches.
    pub(super) extent: Extent,
}
