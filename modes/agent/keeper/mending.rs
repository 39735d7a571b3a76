//! Putting back what is missing, and closing what cannot be put back.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use super::Memory;
use super::found::Found;
use crate::agent::{Agent, Pod};
use crate::options::Capture;

/// Sweeps in a row after which a pod is closed whose capture they found broken.
const CLOSED_AFTER: u32 = 3;
/// What was put back so often within [`RESTLESS_WITHIN`] is taken away by somebody, and counts as broken.
const RESTLESS_AFTER: usize = 8;
/// See [`RESTLESS_AFTER`].
const RESTLESS_WITHIN: Duration = Duration::from_secs(30);
/// Under this name the node's own objects are counted among the pods.
const NODE: &str = "";

/// What is remembered of broken captures.
#[derive(Default)]
pub(super) struct Broken {
    /// Sweeps in a row that found a pod's capture broken, by UID.
    strikes: BTreeMap<String, u32>,
    /// When something of a pod's was put back.
    mends: BTreeMap<String, Vec<Instant>>,
}

impl Broken {
    /// Whether a pod is about to be closed: then sweeps come faster.
    pub(super) fn is_about_to_close(&self) -> bool {
        self.strikes.values().any(|strikes| *strikes < CLOSED_AFTER)
    }

    fn note_mend(&mut self, whose: &str) {
        self.mends
            .entry(whose.to_owned())
            .or_default()
            .push(Instant::now());
    }

    fn is_restless(&self, whose: &str) -> bool {
        self.mends
            .get(whose)
            .is_some_and(|mends| mends.len() >= RESTLESS_AFTER)
    }

    fn forget_old(&mut self, pods: &[Pod]) {
        let known = |uid: &str| pods.iter().any(|pod| pod.uid == uid);
        self.strikes.retain(|uid, _| known(uid));
        for mends in self.mends.values_mut() {
            mends.retain(|at| at.elapsed() < RESTLESS_WITHIN);
        }
        self.mends.retain(|_, mends| !mends.is_empty());
    }
}

impl Agent {
    /// Puts back what is missing, and looks again at what was mended.
    pub(super) async fn mend(&self, memory: &mut Memory, pods: &[Pod], found: &mut Found) {
        if !found.node_objects.is_empty() {
            let lost = std::mem::take(&mut found.node_objects);
            tracing::warn!(
                lost = lost.join("; "),
                "objects of the node are missing or changed; putting them back"
            );
            memory.broken.note_mend(NODE);
            memory.look_again_at(self.host.id());
            if let Err(error) = self.mend_node().await {
                let error = format!("{error:#}");
                tracing::error!(error, "the node's objects cannot be put back");
                for pod in pods.iter().filter(|pod| pod.mode == Capture::Node) {
                    found.unmended.insert(pod.uid.clone());
                    found.add(&pod.uid, vec![error.clone()]);
                }
                found.node.push(error);
                found.node.extend(lost);
            }
        }
        for (uid, lost) in std::mem::take(&mut found.pod_objects) {
            let Some(pod) = pods.iter().find(|pod| pod.uid == uid) else {
                continue;
            };
            let lost = lost.join("; ");
            tracing::warn!(
                pod = pod.qualified_name(),
                lost,
                "objects of a pod's capture are missing or changed; putting them back"
            );
            memory.broken.note_mend(&uid);
            memory.look_again_at(pod.netns_id);
            if let Err(error) = self.mend_pod(pod).await {
                let error = format!("{error:#}");
                tracing::error!(
                    pod = pod.qualified_name(),
                    error,
                    "a pod's capture cannot be put back"
                );
                found.unmended.insert(uid.clone());
                found.add(&uid, vec![lost, error]);
            }
        }
    }

    async fn mend_pod(&self, pod: &Pod) -> anyhow::Result<()> {
        {
            let _alone = self.busy.lock(&pod.uid).await;
            if self.pods.get(&pod.uid).as_ref() != Some(pod) {
                // It was unenrolled or enrolled anew meanwhile.
                return Ok(());
            }
            self.make_redirect(pod).await?;
        }
        if let Some(closed) = self.closings.get(&pod.uid) {
            self.close(pod, closed.findings).await;
        }
        Ok(())
    }

    /// Closes the pods whose capture stays broken, and opens those of which a probe has just come through.
    pub(super) async fn decide(&self, memory: &mut Memory, pods: &[Pod], found: &mut Found) {
        memory.broken.forget_old(pods);
        for pod in pods {
            let (uid, broken) = (&pod.uid, &mut memory.broken);
            let node_is_restless = pod.mode == Capture::Node && broken.is_restless(NODE);
            let restless = node_is_restless || broken.is_restless(uid);
            if restless {
                let again = "somebody takes away again and again what is put back".to_owned();
                found.add(uid, vec![again]);
            }
            if restless || found.unmended.contains(uid) || found.passed_by.contains(uid) {
                let strikes = broken.strikes.entry(uid.clone()).or_default();
                *strikes = strikes.saturating_add(1);
                let due = *strikes >= CLOSED_AFTER || restless;
                let shut = self.closings.get(uid);
                let shut = shut.is_some_and(|closed| !closed.stopped_in.is_empty());
                if due && !shut {
                    let findings = found.pods.get(uid).cloned().unwrap_or_default();
                    self.close(pod, findings).await;
                }
            } else {
                broken.strikes.remove(uid);
            }
            if self.closings.get(uid).is_none() {
                continue;
            }
            if found.proven.contains(uid) && found.is_well(uid) {
                self.reopen(pod).await;
            } else {
                // Its turn does not have to come round.
                memory.turns.suspect(uid);
            }
            if let Some(closed) = self.closings.finding(uid) {
                found.add(uid, vec![closed]);
            }
        }
    }
}
