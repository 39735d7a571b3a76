//! Connections that are older than a pod's capture need rules of their own; when the last of them has ended, those rules go,
//! and the pod has what it would have if it had been captured before it ran.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use host_net::sockets::Connection;
use tokio::time::sleep;

use super::{Agent, Pod, PodState};
use crate::options::Capture;

/// Time between two looks at what is left of older connections.
const LOOKS_EVERY: Duration = Duration::from_secs(2);
/// Looks in a row that must find none: one that was just beginning when the pod was captured is not open yet.
const LOOKS: u32 = 2;

/// What is known of a pod's older connections.
struct Older {
    /// Those of the first look that are still there. What comes later from the node itself is not older.
    left: BTreeSet<Connection>,
    /// Looks in a row that found none of them.
    without: u32,
}

impl Agent {
    /// Does so for ever.
    pub(super) async fn attend_older_connections(self: Arc<Self>) {
        let mut known: BTreeMap<String, Older> = BTreeMap::new();
        loop {
            sleep(LOOKS_EVERY).await;
            let mut pods = self.pods.all();
            pods.retain(has_older);
            known.retain(|uid, _| pods.iter().any(|pod| pod.uid == *uid));
            for pod in pods {
                let Ok(present) = self.outside(&pod) else {
                    // Whoever keeps captures true says what is wrong with it.
                    known.remove(&pod.uid);
                    continue;
                };
                let older = known.entry(pod.uid.clone()).or_insert_with(|| Older {
                    left: present.clone(),
                    without: 0,
                });
                older.left.retain(|end| present.contains(end));
                older.without = match older.left.is_empty() {
                    true => older.without + 1,
                    false => 0,
                };
                if older.without >= LOOKS {
                    known.remove(&pod.uid);
                    self.settle(&pod).await;
                }
            }
        }
    }

    async fn settle(&self, pod: &Pod) {
        let _alone = self.busy.lock(&pod.uid).await;
        // Whoever enrolled or drained it anew meanwhile has changed its entry.
        if self.pods.get(&pod.uid).as_ref() != Some(pod) {
            return;
        }
        let settled = Pod {
            settled: true,
            ..pod.clone()
        };
        // The rules first: an agent that ends in between looks again.
        let done = match self.make_redirect(&settled).await {
            Ok(()) => self.pods.put(settled).map_err(Into::into),
            Err(error) => Err(error),
        };
        let name = pod.qualified_name();
        match done {
            Ok(()) => tracing::info!(
                pod = name,
                "connections older than the capture have ended; their rules are gone"
            ),
            Err(error) => tracing::warn!(
                pod = name,
                error = format!("{error:#}"),
                "rules for connections older than the capture stay"
            ),
        }
    }
}

/// Connections of a capture that the pod had need these rules as well, and are none of those that are outside the mesh.
fn has_older(pod: &Pod) -> bool {
    let in_pod = pod.state == PodState::Captured && pod.mode == Capture::Inpod;
    in_pod && pod.live && !pod.settled && pod.leaving.is_none()
}
