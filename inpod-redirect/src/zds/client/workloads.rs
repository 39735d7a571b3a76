//! What the proxy serves, as the agent's requests change it. Knows no connection.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::{Netns, NetnsId};
use prost::Message;
use tracing::{info, warn};

use super::WorkloadHandler;
use crate::zds::messages::{AddWorkload, CaptureMode, StateReply, WorkloadState, decode_addresses};
use crate::zds::transport::EXTENDED_PACKET;
use crate::zds::{Add, Delays, Mode, NodeConfiguration, Release, WorkloadUid};

/// Room left in a state packet for what surrounds the list.
const STATE_OVERHEAD: usize = 64;

/// Whether the pod is node-captured: the only Add without a descriptor.
pub(super) fn is_node(add: &AddWorkload) -> bool {
    add.capture_mode == i32::from(CaptureMode::Node)
}

/// What makes a second Add of a running pod a repetition rather than a change.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Running {
    mode: Mode,
    netns: Option<NetnsId>,
    addresses: Vec<IpAddr>,
    guests: bool,
}

impl From<&Add> for Running {
    fn from(add: &Add) -> Self {
        Self {
            mode: add.mode,
            netns: add.netns.as_ref().map(Netns::id),
            addresses: add.addresses.clone(),
            guests: add.guests,
        }
    }
}

struct Pending {
    add: Add,
    error: String,
}

pub(super) struct Workloads<H> {
    handler: Arc<H>,
    default_drain: Duration,
    running: BTreeMap<Arc<str>, Running>,
    /// Held pods, with the capture that each has beside its own.
    held: BTreeMap<Arc<str>, Option<Running>>,
    /// Could not be started; tried again and again.
    pending: BTreeMap<Arc<str>, Pending>,
    /// Named in this connection's snapshot.
    named: BTreeSet<Arc<str>>,
    snapshot_received: bool,
    ready: bool,
}

impl<H: WorkloadHandler> Workloads<H> {
    pub(super) fn new(handler: Arc<H>, default_drain: Duration) -> Self {
        Self {
            handler,
            default_drain,
            running: BTreeMap::new(),
            held: BTreeMap::new(),
            pending: BTreeMap::new(),
            named: BTreeSet::new(),
            snapshot_received: false,
            ready: false,
        }
    }

    /// A new agent will tell everything again: forget what the last one said, keep what runs.
    pub(super) fn connected(&mut self) {
        self.pending.clear();
        self.tell_pending();
        self.named.clear();
        self.snapshot_received = false;
    }

    /// Returns whether the connection came to the end of its snapshot.
    pub(super) fn disconnected(&mut self) -> bool {
        self.ready = false;
        self.handler.disconnected();
        std::mem::take(&mut self.snapshot_received)
    }

    pub(super) async fn add(
        &mut self,
        add: AddWorkload,
        fd: Option<OwnedFd>,
    ) -> Result<(), String> {
        let uid: Arc<str> = Arc::from(add.uid.as_str());
        // Also a pod that cannot be started was named: what ran under its UID is not to be stopped for that.
        self.named.insert(Arc::clone(&uid));
        let add = checked(Arc::clone(&uid), add, fd)?;
        let wanted = Running::from(&add);
        if self.held.contains_key(&uid) && !self.snapshot_received {
            self.settle(&uid, &wanted).await;
        }
        if let Some(beside) = self.held.get(&uid) {
            return match beside {
                _ if self.running.get(&uid) == Some(&wanted) => Ok(()),
                Some(beside) if *beside == wanted => Ok(()),
                Some(_) => Err("the pod has two captures already".to_owned()),
                None => self.prepare(add).await,
            };
        }
        if self.running.get(&uid) == Some(&wanted) {
            return Ok(());
        }
        if self.running.remove(&uid).is_some() {
            info!("pod {:?} changed, draining proxy", WorkloadUid(&uid));
            self.handler.del(&uid, self.default_drain).await;
        }
        self.start(add).await
    }

    /// An agent was lost while it held a pod; its successor says how the pod is captured.
    async fn settle(&mut self, uid: &Arc<str>, wanted: &Running) {
        let how = match self.held.get(uid) {
            Some(Some(beside)) if beside == wanted => Release::Changes {
                drain: self.default_drain,
            },
            _ => Release::Stays,
        };
        // It is held, and what it changes to is there: there is nothing to go wrong.
        let _ = self.release(uid, how).await;
    }

    pub(super) async fn hold(&mut self, uid: &str, within: Duration) -> Result<(), String> {
        if !self.running.contains_key(uid) {
            return Err("not served, so nothing of it can be held".to_owned());
        }
        self.handler.hold(uid, within).await?;
        self.held.entry(Arc::from(uid)).or_default();
        Ok(())
    }

    async fn prepare(&mut self, add: Add) -> Result<(), String> {
        let (uid, beside) = (Arc::clone(&add.uid), Running::from(&add));
        let mode = add.mode;
        self.handler.prepare(add).await?;
        info!("pod {:?} can be captured by {mode}, too", WorkloadUid(&uid));
        self.held.insert(uid, Some(beside));
        Ok(())
    }

    pub(super) async fn release(&mut self, uid: &str, release: Release) -> Result<Delays, String> {
        let Some((uid, beside)) = self.held.remove_entry(uid) else {
            return Err("it is not held".to_owned());
        };
        match (release, beside) {
            (Release::Changes { .. }, None) => {
                self.handler.release(&uid, Release::Stays).await;
                Err("it has no other capture to change to".to_owned())
            }
            (Release::Changes { drain }, Some(beside)) => {
                info!(
                    "pod {:?} is captured by {} from here on, draining what came before",
                    WorkloadUid(&uid),
                    beside.mode
                );
                let delays = self.handler.release(&uid, Release::Changes { drain }).await;
                self.running.insert(uid, beside);
                Ok(delays)
            }
            (Release::Stays, _) => Ok(self.handler.release(&uid, Release::Stays).await),
        }
    }

    async fn start(&mut self, add: Add) -> Result<(), String> {
        let uid = Arc::clone(&add.uid);
        match add.mode {
            Mode::Inpod => {
                info!("pod {:?} received netns, starting proxy", WorkloadUid(&uid));
            }
            Mode::Node => info!("pod {:?} announced, node capture", WorkloadUid(&uid)),
        }
        match self.handler.add(add.clone()).await {
            Ok(()) => {
                self.pending.remove(&uid);
                self.tell_pending();
                self.running.insert(uid, Running::from(&add));
                Ok(())
            }
            Err(error) => {
                let error = format!("failure to start proxy: {error}");
                warn!("pod {:?}: {error}", WorkloadUid(&uid));
                let pending = Pending {
                    add,
                    error: error.clone(),
                };
                self.pending.insert(uid, pending);
                self.tell_pending();
                self.ready = false;
                Err(error)
            }
        }
    }

    fn tell_pending(&self) {
        self.handler.pending(self.pending.len());
    }

    /// Tries the pending pods again.
    pub(super) async fn retry_pending(&mut self) {
        let adds: Vec<Add> = self.pending.values().map(|p| p.add.clone()).collect();
        for add in adds {
            let _ = self.start(add).await;
        }
        self.announce_readiness().await;
    }

    /// False when the snapshot is over.
    pub(super) async fn keep(&mut self, uid: String) -> bool {
        if self.snapshot_received {
            return false;
        }
        self.handler.keep(&uid).await;
        self.named.insert(Arc::from(uid));
        true
    }

    pub(super) async fn del(&mut self, uid: &str, drain: Option<Duration>) {
        self.pending.remove(uid);
        self.tell_pending();
        self.named.remove(uid);
        // Before, the end of the snapshot stops what is no longer named.
        if self.snapshot_received {
            self.stop(uid, drain.unwrap_or(self.default_drain)).await;
        }
        self.announce_readiness().await;
    }

    async fn stop(&mut self, uid: &str, drain: Duration) {
        self.held.remove(uid);
        if self.running.remove(uid).is_some() {
            info!("pod delete request, draining proxy");
            self.handler.del(uid, drain).await;
        }
    }

    /// False when the snapshot is over already.
    pub(super) async fn snapshot_sent(&mut self) -> bool {
        if self.snapshot_received {
            return false;
        }
        self.snapshot_received = true;
        info!("pod received snapshot sent");
        let gone: Vec<_> = self
            .running
            .keys()
            .filter(|uid| !self.named.contains(*uid))
            .cloned()
            .collect();
        for uid in gone {
            self.stop(&uid, self.default_drain).await;
        }
        self.announce_readiness().await;
        true
    }

    async fn announce_readiness(&mut self) {
        if self.snapshot_received && self.pending.is_empty() && !self.ready {
            self.ready = true;
            self.handler.snapshot_sent().await;
        }
    }

    pub(super) async fn configure(&self, configuration: NodeConfiguration) -> Result<(), String> {
        self.handler.configure_node(configuration).await
    }

    /// What runs and what waits, as much as fits into one packet.
    pub(super) fn state(&self) -> StateReply {
        let running = self.running.iter().map(|(uid, running)| WorkloadState {
            uid: uid.to_string(),
            capture_mode: CaptureMode::from(running.mode).into(),
            up: true,
            connections: self.handler.connections(uid),
            error: String::new(),
        });
        let pending = self.pending.iter().map(|(uid, pending)| WorkloadState {
            uid: uid.to_string(),
            capture_mode: CaptureMode::from(pending.add.mode).into(),
            up: false,
            connections: 0,
            error: pending.error.clone(),
        });
        let mut all: Vec<WorkloadState> = running.chain(pending).collect();
        let total = all.len() as u64;
        all.sort_by(|a, b| a.uid.cmp(&b.uid));
        let mut size = STATE_OVERHEAD;
        let fitting = all
            .iter()
            .take_while(|workload| {
                // Tag and length of an element are at most 1 + 3 bytes.
                size += workload.encoded_len() + 4;
                size <= EXTENDED_PACKET
            })
            .count();
        all.truncate(fitting);
        StateReply {
            workloads: all,
            total,
        }
    }
}

fn checked(uid: Arc<str>, add: AddWorkload, fd: Option<OwnedFd>) -> Result<Add, String> {
    if uid.is_empty() {
        return Err("add without a pod UID".to_owned());
    }
    let mode = match is_node(&add) {
        true => Mode::Node,
        false => Mode::Inpod,
    };
    let addresses = decode_addresses(&add.addresses)
        .map_err(|length| format!("a pod address of {length} bytes"))?;
    let info = add
        .workload_info
        .ok_or("add without workload_info: this proxy needs the pod's service account")?;
    let netns = fd
        .map(Netns::from_fd)
        .transpose()
        .map_err(|error| format!("the file descriptor is not a network namespace: {error}"))?;
    Ok(Add {
        uid,
        info,
        mode,
        addresses,
        guests: add.guests,
        netns,
    })
}
