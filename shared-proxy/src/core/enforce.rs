//! Policies on connections that stand: a change of the mesh's state ends those that it denies.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::{Failure, Shared};
use crate::capture::ClientAddr;
use crate::drain::Cutter;
use crate::identity::Identity;
use crate::state::policy::{Peer, Verdict};
use crate::state::{Snapshot, Workload, authorize};

/// The inbound connections that were admitted and stand.
#[derive(Debug, Default)]
pub(super) struct Admissions {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    next: u64,
    standing: HashMap<u64, Arc<Admission>>,
}

#[derive(Debug)]
struct Admission {
    client: ClientAddr,
    peer: Option<Identity>,
    target: SocketAddr,
    cutter: Cutter,
    denied: OnceLock<Verdict>,
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
}

impl Shared {
    /// Asks the policies about a connection, and keeps asking whenever they change. `cutter` ends it.
    pub(crate) fn admit(
        self: &Arc<Self>,
        workload: &Workload,
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
        });
        let number = {
            let mut state = self.admissions.state();
            state.next += 1;
            let number = state.next;
            state.standing.insert(number, admission.clone());
            number
        };
        let admitted = Admitted {
            core: self.clone(),
            number,
            admission,
        };
        // Loaded after the connection was entered: a state that comes later finds it there.
        let snapshot = self.store.load();
        match admitted.admission.ask(&snapshot, workload) {
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
        authorize(snapshot, workload, &peer)
    }

    /// Ends the connection if it is denied. A workload that has gone denies nothing: its capture ends by itself.
    fn ask_again(&self, snapshot: &Snapshot) {
        let Some(workload) = snapshot.workload_by_ip(self.target.ip()) else {
            return;
        };
        let verdict = self.ask(snapshot, &workload);
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
        self.core.admissions.state().standing.remove(&self.number);
    }
}

/// Asks about every standing connection after each change, as long as the core lives.
pub(super) async fn enforce(core: Weak<Shared>) {
    let Some(mut changes) = core.upgrade().map(|core| core.store.subscribe()) else {
        return;
    };
    while changes.changed().await.is_ok() {
        let Some(core) = core.upgrade() else { return };
        let snapshot = core.store.load();
        let standing: Vec<_> = core.admissions.state().standing.values().cloned().collect();
        for admission in standing {
            admission.ask_again(&snapshot);
        }
    }
}
