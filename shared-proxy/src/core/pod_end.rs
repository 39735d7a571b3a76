//! A pod goes while its scope stays: its connections get time to end, and are ended then.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Core, Failure, Shared};
use crate::capture::LocalWorkload;
use crate::drain::{Drain, Drainer, Signal};
use crate::telemetry::OpenConnections;

/// Time between the first two looks at what is left; each next one is twice as long, up to [`LOOKS_AT_LEAST_EVERY`].
const LOOKS_EVERY: Duration = Duration::from_millis(5);
/// Longest time between two looks: a running pod may drain for hours.
const LOOKS_AT_LEAST_EVERY: Duration = Duration::from_millis(320);
/// How long tasks that were told to end are waited for.
const CUT_WITHIN: Duration = Duration::from_millis(500);

/// A pod's UID and the capture by which tunnels came to it.
type Arrived = (Arc<str>, &'static str);

/// Tunnels that peers have opened.
#[derive(Debug, Default)]
pub(super) struct PodTunnels(Mutex<HashMap<Arrived, Drainer>>);

impl PodTunnels {
    fn all(&self) -> MutexGuard<'_, HashMap<Arrived, Drainer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, uid: &Arc<str>, capture_mode: &'static str) -> Option<Drainer> {
        self.all().remove(&(Arc::clone(uid), capture_mode))
    }
}

impl Shared {
    /// For a tunnel to this pod that came by a capture: tells when the pod leaves that.
    pub(crate) fn tunnel_to(&self, pod: &LocalWorkload, capture_mode: &'static str) -> Signal {
        let mut tunnels = self.pod_tunnels.all();
        let arrived = (Arc::clone(&pod.uid), capture_mode);
        tunnels.entry(arrived).or_default().signal()
    }
}

/// What a pod had by a capture that it leaves. What begins later is not part of it.
#[must_use = "its connections go on until somebody ends them"]
pub struct PodEnding {
    connections: OpenConnections,
    tunnels: Option<Drainer>,
}

impl Core {
    /// Takes leave of a pod's capture: tells peers' tunnels to it to go elsewhere, and opens nothing more in ours.
    pub fn ending(&self, pod: &LocalWorkload, capture_mode: &'static str) -> PodEnding {
        let connections = self
            .shared
            .telemetry
            .connections_of(&pod.addresses, capture_mode);
        let tunnels = self.shared.pod_tunnels.forget(&pod.uid, capture_mode);
        // Nobody else speaks with its addresses by this capture.
        self.shared.pool.forget(|key| {
            key.scope.capture_mode == capture_mode && pod.addresses.contains(&key.source_address)
        });
        if let Some(tunnels) = &tunnels {
            tunnels.drain();
        }
        PodEnding {
            connections,
            tunnels,
        }
    }

    /// Ends what there is of a pod that its scope (of this capture) owns no more: peers' tunnels to it are told to go
    /// elsewhere, its connections end by themselves until the deadline and are reset then. What begins after this call
    /// under the same addresses is another pod's. Returns when everything has ended.
    pub async fn end_pod(&self, pod: &LocalWorkload, capture_mode: &'static str, drain: Drain) {
        self.ending(pod, capture_mode).within(drain).await;
    }
}

impl PodEnding {
    /// Lets the connections end by themselves until the deadline; resets then what is left. Returns when everything has
    /// ended.
    pub async fn within(self, drain: Drain) {
        let Self {
            connections,
            tunnels,
        } = self;
        all_ended(&connections, drain.deadline).await;
        connections.cut(&Failure::Cut.to_string());
        if let Some(tunnels) = &tunnels {
            tunnels.cut();
        }
        all_ended(&connections, CUT_WITHIN).await;
        if let Some(tunnels) = tunnels {
            // An error means that the runtime is busy; they end all the same.
            let _ = timeout(CUT_WITHIN, tunnels.empty()).await;
        }
    }
}

async fn all_ended(connections: &OpenConnections, within: Duration) {
    let deadline = Instant::now() + within;
    let mut pause = LOOKS_EVERY;
    while connections.left() > 0 {
        let time = deadline.saturating_duration_since(Instant::now());
        if time.is_zero() {
            return;
        }
        sleep(pause.min(time)).await;
        pause = (pause * 2).min(LOOKS_AT_LEAST_EVERY);
    }
}
