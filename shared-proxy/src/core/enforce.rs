//! Policies on connections that stand: a change of the mesh's state ends those that it denies.
//!
//! A verdict depends on what a connection is - which never changes - and on the policies that apply to its destination.
//! Those are remembered for each destination, so a change that leaves them as they are asks about no connection, however
//! many stand. The peer's own workload does not matter: policies see the identity that it proved, not its record.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use tracing::Level;

use super::{Failure, Shared};
use crate::capture::ClientAddr;
use crate::drain::Cutter;
use crate::identity::Identity;
use crate::state::policy::{Peer, Verdict};
use crate::state::{Policy, Snapshot, Store, Workload, authorize};

/// The inbound connections that were admitted and stand.
#[derive(Debug, Default)]
pub(super) struct Admissions {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    /// By the address of the workload that they go to.
    destinations: HashMap<IpAddr, Destination>,
}

/// A workload with connections.
#[derive(Debug)]
struct Destination {
    /// The policies that its connections were last held against.
    policies: Vec<Arc<Policy>>,
    standing: HashMap<u64, Arc<Admission>>,
}

#[derive(Debug)]
struct Admission {
    client: ClientAddr,
    peer: Option<Identity>,
    target: SocketAddr,
    cutter: Cutter,
    denied: OnceLock<Verdict>,
    /// Verdicts are logged at INFO, not at DEBUG.
    logged_as_info: bool,
}

/// Keeps a connection under the policies; dropped when it ends.
pub(crate) struct Admitted {
    core: Arc<Shared>,
    number: u64,
    admission: Arc<Admission>,
}

impl Admissions {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enters a connection and returns its number, with the state to hold it against. A state that comes later finds the
    /// connection entered.
    fn enter(
        &self,
        store: &Store,
        workload: &Arc<Workload>,
        admission: &Arc<Admission>,
    ) -> (u64, Arc<Snapshot>, Arc<Workload>) {
        let address = admission.target.ip();
        let mut state = self.state();
        state.next += 1;
        let number = state.next;
        // Loaded under the lock: what a destination was last held against is never later than what is loaded next.
        let snapshot = store.load();
        let workload = snapshot
            .workload_by_ip(address)
            .filter(|current| current.uid == workload.uid)
            .unwrap_or_else(|| Arc::clone(workload));
        state
            .destinations
            .entry(address)
            .or_insert_with(|| Destination {
                policies: snapshot.policies_for(&workload).cloned().collect(),
                standing: HashMap::new(),
            })
            .standing
            .insert(number, Arc::clone(admission));
        drop(state);
        (number, snapshot, workload)
    }

    fn leave(&self, number: u64, address: IpAddr) {
        let mut state = self.state();
        if let Some(destination) = state.destinations.get_mut(&address) {
            destination.standing.remove(&number);
            if destination.standing.is_empty() {
                state.destinations.remove(&address);
            }
        }
    }

    /// Holds the connections to those destinations whose policies have changed against the state in force, and ends those
    /// that it denies. Returns how many it asked about. A workload that has gone denies nothing: its capture ends by
    /// itself.
    fn ask_again(&self, store: &Store) -> usize {
        let mut affected = Vec::new();
        let snapshot = {
            let mut state = self.state();
            let snapshot = store.load();
            for (address, destination) in &mut state.destinations {
                let Some(workload) = snapshot.workload_by_ip(*address) else {
                    continue;
                };
                if snapshot
                    .policies_for(&workload)
                    .eq(destination.policies.iter())
                {
                    continue;
                }
                destination.policies = snapshot.policies_for(&workload).cloned().collect();
                let standing = destination.standing.values().cloned().collect::<Vec<_>>();
                affected.push((workload, standing));
            }
            snapshot
        };
        let mut asked = 0;
        for (workload, standing) in affected {
            for admission in &standing {
                admission.ask_again(&snapshot, &workload);
            }
            asked += standing.len();
        }
        asked
    }
}

impl Shared {
    /// Asks the policies about a connection, and keeps asking whenever they change. `cutter` ends it.
    pub(crate) fn admit(
        self: &Arc<Self>,
        workload: &Arc<Workload>,
        client: ClientAddr,
        peer: Option<&Identity>,
        target: SocketAddr,
        cutter: Cutter,
    ) -> Result<Admitted, Failure> {
        let admission = Arc::new(Admission {
            client,
            peer: peer.cloned(),
            target,
            cutter,
            denied: OnceLock::new(),
            logged_as_info: self.config.policy_info_logging,
        });
        let (number, snapshot, workload) = self.admissions.enter(&self.store, workload, &admission);
        let admitted = Admitted {
            core: self.clone(),
            number,
            admission,
        };
        match admitted.admission.ask(&snapshot, &workload) {
            Verdict::Allow => Ok(admitted),
            denied => Err(Failure::Denied(denied)),
        }
    }
}

impl Admission {
    fn ask(&self, snapshot: &Snapshot, workload: &Workload) -> Verdict {
        let peer = Peer {
            identity: self.peer.as_ref(),
            source: self.client.0.ip(),
            destination: self.target,
        };
        let verdict = authorize(snapshot, workload, &peer);
        self.log(workload, &verdict);
        verdict
    }

    fn log(&self, workload: &Workload, verdict: &Verdict) {
        macro_rules! decided {
            ($level:expr) => {
                tracing::event!(
                    $level,
                    src.addr = %self.client.0,
                    src.identity = self.peer.as_ref().map(tracing::field::display),
                    dst.addr = %self.target,
                    dst.workload = %workload.name,
                    dst.namespace = %workload.namespace,
                    allowed = verdict.is_allowed(),
                    "authorization policies: {verdict}"
                )
            };
        }
        if self.logged_as_info {
            decided!(Level::INFO);
        } else {
            decided!(Level::DEBUG);
        }
    }

    fn ask_again(&self, snapshot: &Snapshot, workload: &Workload) {
        let verdict = self.ask(snapshot, workload);
        if !verdict.is_allowed() && self.denied.set(verdict).is_ok() {
            self.cutter.cut();
        }
    }
}

impl Admitted {
    /// Why the connection was cut.
    pub(crate) fn cut(&self) -> Failure {
        match self.admission.denied.get() {
            Some(verdict) => Failure::Denied(verdict.clone()),
            None => Failure::Cut,
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.core
            .admissions
            .leave(self.number, self.admission.target.ip());
    }
}

/// Asks about standing connections after each change of what applies to them, as long as the core lives.
pub(super) async fn enforce(core: Weak<Shared>) {
    let Some(mut changes) = core.upgrade().map(|core| core.store.subscribe()) else {
        return;
    };
    while changes.changed().await.is_ok() {
        let Some(core) = core.upgrade() else { return };
        core.admissions.ask_again(&core.store);
    }
}

#[cfg(test)]
mod tests;
