//! A pod's capture changes: held, served by both, released by the one that it has afterwards.

use std::sync::Arc;
use std::time::Duration;

use inpod_redirect::zds::{self, Add, Mode, Release};
use shared_proxy::capture::Scope;
use shared_proxy::core::{Attached, Delays, Hold};
use shared_proxy::drain::Drain;
use tokio::task::JoinHandle;

use super::{Workloads, lock};

/// How long a hold waits for connections that are being made. Their first packets have been sent by then.
const MADE_WITHIN: Duration = Duration::from_millis(200);

/// A pod whose capture changes.
pub(super) struct Switch {
    /// Keeps its connections waiting, until it is dropped or the task is over.
    hold: JoinHandle<()>,
    /// Its capture to be, once that is there.
    to: Option<To>,
    /// What waits for it, or did.
    delays: Vec<Delays>,
}

enum To {
    Node,
    Inpod(Attached),
}

impl Switch {
    /// Holds until `within` is over: an agent that is gone keeps nobody waiting.
    fn new(hold: Hold, within: Duration) -> Self {
        let delays = vec![hold.delays()];
        let hold = tokio::spawn(async move {
            let _hold = hold;
            tokio::time::sleep(within).await;
        });
        Self {
            hold,
            to: None,
            delays,
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        self.hold.abort();
    }
}

impl Workloads {
    pub(super) async fn begin_switch(&self, uid: &str, within: Duration) -> Result<(), String> {
        let workload = {
            let served = lock(&self.served);
            let pod = served.get(uid).ok_or("this pod is not served")?;
            pod.workload.clone()
        };
        let hold = self.core.hold(&workload, MADE_WITHIN.min(within)).await;
        let mut served = lock(&self.served);
        let pod = served.get_mut(uid).ok_or("the pod has gone")?;
        match &mut pod.switch {
            Some(switch) => {
                let renewed = Switch::new(hold, within);
                let before = std::mem::replace(switch, renewed);
                switch.keep(before);
            }
            none => *none = Some(Switch::new(hold, within)),
        }
        Ok(())
    }

    pub(super) async fn prepare_switch(&self, add: Add) -> Result<(), String> {
        let (uid, mode) = (Arc::clone(&add.uid), add.mode);
        let workload = {
            let served = lock(&self.served);
            let pod = served.get(&uid).ok_or("this pod is not served")?;
            let has = pod.scope.as_ref().map_or(Mode::Node, |_| Mode::Inpod);
            if pod.workload.addresses[..] != add.addresses[..] {
                return Err("its addresses are others than it was announced with".to_owned());
            }
            if has == mode {
                return Err(format!("{mode} capture is what it has"));
            }
            pod.workload.clone()
        };
        let to = match (mode, add.netns) {
            (Mode::Inpod, Some(netns)) => {
                To::Inpod(self.attach(&workload, netns, add.guests).await?)
            }
            (Mode::Inpod, None) => {
                return Err("in-pod capture needs the pod's network namespace".to_owned());
            }
            (Mode::Node, _) => {
                let node = lock(&self.node);
                let node = node.as_ref();
                let node = node.ok_or("the agent has not configured node capture")?;
                node.scope.announce(workload);
                To::Node
            }
        };
        let mut served = lock(&self.served);
        let switch = served.get_mut(&uid).and_then(|pod| pod.switch.as_mut());
        switch.ok_or("the pod is not held")?.to = Some(to);
        Ok(())
    }

    /// Returns what has waited for this.
    pub(super) async fn end_switch(&self, uid: &str, release: Release) -> zds::Delays {
        let (workload, mut switch, scope) = {
            let mut served = lock(&self.served);
            let Some(pod) = served.get_mut(uid) else {
                return zds::Delays::default();
            };
            let Some(switch) = pod.switch.take() else {
                return zds::Delays::default();
            };
            (pod.workload.clone(), switch, pod.scope.take())
        };
        let scope = match (release, switch.to.take(), scope) {
            (Release::Changes { drain }, Some(To::Inpod(to)), None) => {
                self.core.captured_by(&workload, &to);
                let leaving = lock(&self.node).as_ref().map(|node| {
                    node.scope.depart(&workload.uid);
                    let mode = node.scope.id().capture_mode;
                    (Arc::clone(&node.scope), self.core.ending(&workload, mode))
                });
                let core = self.core.clone();
                tokio::spawn(async move {
                    if let Some((scope, leaving)) = leaving {
                        leaving.within(Drain::within(drain)).await;
                        scope.withdraw_departed(&workload.uid);
                    }
                    core.captured_as_accepted(&workload);
                });
                Some(to)
            }
            (Release::Changes { drain }, Some(To::Node), Some(mut from)) => {
                if let Some(node) = lock(&self.node).as_ref() {
                    self.core.captured_by(&workload, &node.attached);
                }
                // What waits in its queues is taken, and goes by the node.
                from.stop_accepting().await;
                let core = self.core.clone();
                tokio::spawn(async move {
                    from.detach(Drain::within(drain)).await;
                    core.captured_as_accepted(&workload);
                });
                None
            }
            (_, Some(To::Inpod(mut to)), scope) => {
                to.stop_accepting().await;
                tokio::spawn(to.detach(Drain::within(self.drain)));
                scope
            }
            (_, Some(To::Node), scope) => {
                if let Some(node) = lock(&self.node).as_ref() {
                    node.scope.withdraw(&workload.uid);
                }
                scope
            }
            (_, None, scope) => scope,
        };
        if let Some(pod) = lock(&self.served).get_mut(uid) {
            pod.scope = scope;
        }
        // Here the pod's connections go on.
        let cost = switch.cost();
        drop(switch);
        cost
    }
}

impl Switch {
    /// What was prepared under an earlier hold is still there, and what that has cost is not forgotten.
    fn keep(&mut self, mut before: Switch) {
        self.to = before.to.take();
        self.delays.append(&mut before.delays);
    }

    /// What has waited until here.
    fn cost(&self) -> zds::Delays {
        let ones = self.delays.iter().flat_map(Delays::ones);
        let named = ones.map(|one| zds::Delayed {
            client: one.client,
            destination: one.destination,
            waited: one.waited,
        });
        let count = self.delays.iter().map(Delays::count).sum();
        zds::Delays::new(named.collect(), count)
    }
}
