//! What became of each connection of a running pod whose capture changed: one account per change, kept on disk, so that an
//! agent that starts later goes on with it.
//!
//! The connections are the pod's sockets, asked of the kernel: every one that leaves the pod is in exactly one [`Class`].
//! Connection tracking, which has some that ended long ago and may have forgotten some that are open, must agree with that;
//! it is what the test compares with.

mod classes;
mod metrics;
mod store;

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::options::Capture;

pub(super) use store::Ledgers;

/// How a pod was captured, or is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// Not at all.
    None,
    /// On the node.
    Node,
    /// Inside the pod.
    Inpod,
}

impl From<Capture> for Way {
    fn from(capture: Capture) -> Self {
        match capture {
            Capture::Node => Self::Node,
            Capture::Inpod => Self::Inpod,
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "none",
            Self::Node => "node",
            Self::Inpod => "inpod",
        })
    }
}

/// How a change ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// The pod has the capture that it was to have.
    Done,
    /// It was taken back: the pod has the one that it had.
    Failed,
}

/// What a connection is to a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Was open, goes through the proxy, and goes on by the capture that it came by.
    Kept,
    /// Began while the pod was held, and waited.
    Delayed,
    /// Began when the change was made, by the capture that the pod has since; without one: beside the proxy.
    New,
    /// Goes beside the proxy: it is older than the capture.
    Outside,
    /// Of the node itself, its probes above all, which no capture takes.
    Node,
    /// By IPv6 where IPv6 is not captured: dropped.
    Cut,
    /// The proxy's own, for one of the others or for many: tunnels, and what it opens or takes in a pod's name. Counted
    /// with those that it carries.
    Proxy,
}

/// One connection, with the addresses that the pod's application sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Line {
    /// What it is.
    pub class: Class,
    /// The pod's end.
    pub local: SocketAddr,
    /// The other end; for one that came through a tunnel, the address that the proxy speaks with.
    pub peer: SocketAddr,
    /// The capture that carries it, if one does.
    pub by: Way,
    /// Whether it has ended since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ended: bool,
}

/// Connections that waited because the pod was held.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Delay {
    /// How many, as the proxy says.
    pub count: u64,
    /// Median of their waits, in microseconds.
    pub median_us: u64,
    /// The longest wait, in microseconds.
    pub longest_us: u64,
}

/// The account of one change. At every moment `kept` is `open` and `drained` and `reset` together.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ledger {
    /// `namespace/name`.
    pub pod: String,
    /// UID of the pod.
    pub uid: String,
    /// The capture that it had.
    pub from: Way,
    /// The capture that it was to have.
    pub to: Way,
    /// How that ended.
    pub result: Outcome,
    /// Why it was taken back; empty if it was not.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub reason: String,
    /// When it began, in milliseconds since 1970.
    pub at: u64,
    /// How long the pod was held, in microseconds.
    pub held_us: u64,
    /// Connections through the proxy that were open.
    pub kept: usize,
    /// Those of them that are open still.
    pub open: usize,
    /// Those of them that have ended by themselves, as was seen once a second.
    pub drained: usize,
    /// Those of them that were open when their time was over, and were reset.
    pub reset: usize,
    /// Those that began meanwhile and waited.
    pub delayed: Delay,
    /// Those that were open and go beside the proxy.
    pub outside: usize,
    /// Those of the node itself.
    pub node: usize,
    /// Those by IPv6 where it is not captured.
    pub cut: usize,
    /// Those that began right after the change, when the account was made.
    pub new: usize,
    /// Until when kept ones may go on, in seconds since 1970; none if there is nothing that ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub until: Option<u64>,
    /// Whether nothing of this changes any more.
    pub over: bool,
    /// Each of them: of a pod's last change only, and the proxy's own at the moment of the change only.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub connections: Vec<Line>,
}

impl Ledger {
    /// Of a change that was begun.
    pub(super) fn begun(pod: &super::Pod, from: Way, to: Way) -> Self {
        Self {
            pod: pod.qualified_name(),
            uid: pod.uid.clone(),
            from,
            to,
            result: Outcome::Done,
            reason: String::new(),
            at: store::millis_now(),
            held_us: 0,
            kept: 0,
            open: 0,
            drained: 0,
            reset: 0,
            delayed: Delay::default(),
            outside: 0,
            node: 0,
            cut: 0,
            new: 0,
            until: None,
            over: false,
            connections: Vec::new(),
        }
    }

    /// With these connections.
    pub(super) fn with(mut self, connections: Vec<Line>) -> Self {
        let count = |class| {
            let of = connections.iter().filter(|line| line.class == class);
            of.count()
        };
        self.kept = count(Class::Kept);
        self.open = self.kept;
        self.outside = count(Class::Outside);
        self.node = count(Class::Node);
        self.cut = count(Class::Cut);
        self.new = count(Class::New);
        self.connections = connections;
        self
    }
}
