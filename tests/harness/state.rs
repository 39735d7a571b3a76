//! What the proxies know: changed for the time of a scenario.

use std::sync::MutexGuard;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lab::topology::workloads::LocalXds;
use serde_json::{Value, json};

use super::{Stage, eventually};

/// How long a proxy may take to see that the file has changed.
const LOADED_WITHIN: Duration = Duration::from_secs(10);

/// A change that is in force until this is dropped.
pub struct Changed<'a> {
    stage: &'a Stage,
    _alone: MutexGuard<'a, ()>,
}

impl Stage {
    /// Changes what all proxies know and waits until they know it.
    pub fn with_state(&self, change: impl FnOnce(&mut LocalXds)) -> Changed<'_> {
        let changed = Changed {
            stage: self,
            _alone: self.alone(),
        };
        self.change(change);
        changed
    }

    /// As [`Stage::with_state`], where every scenario of a lab makes the state that it wants: nothing is put back.
    pub fn in_state(&self, change: impl FnOnce(&mut LocalXds)) -> MutexGuard<'_, ()> {
        let alone = self.alone();
        self.change(change);
        alone
    }

    fn alone(&self) -> MutexGuard<'_, ()> {
        // A scenario that failed has put back what it changed.
        let quiet = self.quiet.lock();
        quiet.unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut LocalXds)) {
        let mut state = self.lab.topology().local_xds();
        change(&mut state);
        self.publish(state);
    }

    fn publish(&self, mut state: LocalXds) {
        static VERSION: AtomicU32 = AtomicU32::new(0);
        let version = format!("version-{}", VERSION.fetch_add(1, Ordering::Relaxed));
        // A policy that applies to nobody, by which a proxy shows that it has read this version of the file.
        state.policies.push(policy(&version, "Deny", json!([])));
        self.lab.write_state(&state.to_yaml().unwrap()).unwrap();
        for node in [1, 2] {
            let what = format!("proxy{node} has read the changed state");
            eventually(&what, LOADED_WITHIN, || {
                self.page(node, 15000, "/config_dump").contains(&version)
            });
        }
    }
}

impl Drop for Changed<'_> {
    fn drop(&mut self) {
        let original = self.stage.lab.topology().local_xds();
        if std::thread::panicking() {
            // Waiting could panic again; the next change waits for its own version anyway.
            let _ = self.stage.lab.write_state(&original.to_yaml().unwrap());
        } else {
            self.stage.publish(original);
        }
    }
}

/// A policy in LOCAL_XDS form for the workloads that name it (namespace `alpha`).
pub fn policy(name: &str, action: &str, rules: Value) -> Value {
    json!({
        "name": name, "namespace": "alpha", "scope": "WorkloadSelector",
        "action": action, "rules": rules, "dryRun": false,
    })
}

/// Adds a policy to the state and makes a pod name it.
pub fn apply_to(state: &mut LocalXds, pod: &str, action: &str, rules: Value) {
    state.policies.push(policy("tested", action, rules));
    let workload = state.workload_mut(pod).expect("the pod is a workload");
    workload
        .authorization_policies
        .push("alpha/tested".to_owned());
}
