//! ZDS: the protocol between the node agent and the node proxy, one protobuf message per SEQPACKET packet.
//!
//! The agent listens ([`server`]), the proxy connects ([`client`]). The agent tells the proxy which pods to serve and
//! hands over each pod's network namespace as a file descriptor; the proxy acknowledges when the pod's listeners
//! accept. [`messages`] has the wire format, [`transport`] packets and descriptors.
//!
//! Between our own two ends an extension is used: fields numbered from 1000, which others skip as unknown. The proxy
//! offers it in its Hello; the agent accepts by making `get_netns` its first request. Without it not a byte differs from
//! the field's protocol.

pub mod client;
mod delays;
pub mod messages;
pub mod server;
pub mod transport;

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::Netns;

pub use delays::{Delayed, Delays};
pub use messages::{WorkloadInfo, WorkloadState};

/// How a pod is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// On the node.
    Node,
    /// Inside the pod.
    Inpod,
}

impl Mode {
    /// The word used in flags, logs and the metrics label `capture_mode`.
    pub fn as_str(self) -> &'static str {
        match self {
            Mode::Node => "node",
            Mode::Inpod => "inpod",
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl From<Mode> for messages::CaptureMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Node => messages::CaptureMode::Node,
            Mode::Inpod => messages::CaptureMode::Inpod,
        }
    }
}

/// A pod that the proxy is to serve.
#[derive(Debug, Clone)]
pub struct Add {
    /// Pod UID.
    pub uid: Arc<str>,
    /// Name, namespace and service account.
    pub info: WorkloadInfo,
    /// How the pod is captured.
    pub mode: Mode,
    /// The pod's addresses. Empty when the agent does not tell (without the extension).
    pub addresses: Vec<IpAddr>,
    /// Whether what the pod sends may come from other addresses: guests inside the pod are captured with it.
    pub guests: bool,
    /// The pod's namespace: always there for [`Mode::Inpod`], never sent for [`Mode::Node`].
    pub netns: Option<Netns>,
}

/// How node-captured pods are served on this node; sent to a proxy that speaks the extension before any pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeConfiguration {
    /// `hybrid` or `tunnel`.
    pub flow: String,
    /// `hbone` or `direct`.
    pub same_node: String,
    /// Addresses that are local to the node: the proxy never speaks with them.
    pub node_addresses: Vec<IpAddr>,
}

/// What becomes of a held pod that has two captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Release {
    /// It keeps the one that it had; the other one goes.
    Stays,
    /// It has the one that was added; connections that came by the other one may go on so long.
    Changes {
        /// Until they are cut.
        drain: Duration,
    },
}

/// Prints a UID the way the field's proxy logs it: `WorkloadUid("…")`.
#[derive(Clone, Copy)]
struct WorkloadUid<'a>(&'a str);

impl fmt::Debug for WorkloadUid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("WorkloadUid").field(&self.0).finish()
    }
}

/// How long either end waits for the other within one request.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
