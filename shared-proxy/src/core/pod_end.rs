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

/// Tunnels that peers have opened, by the UID of the pod.
#[derive(Debug, Default)]
pub(super) struct PodTunnels(Mutex<HashMap<Arc<str>, Drainer>>);

impl PodTunnels {
    fn by_uid(&self) -> MutexGuard<'_, HashMap<Arc<str>, Drainer>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn forget(&self, uid: &str) -> Option<Drainer> {
        self.by_uid().remove(uid)
    }
}

impl Shared {
    /// For a tunnel to this pod: tells when the pod goes.
    pub(crate) fn tunnel_to(&self, pod: &LocalWorkload) -> Signal {
        let mut tunnels = self.pod_tunnels.by_uid();
        tunnels.entry(Arc::clone(&pod.uid)).or_default().signal()
    }
}

impl Core {
    /// Ends what there is of a pod that its scope (of this capture) owns no more: peers' tunnels to it are told to go
    /// elsewhere, its connections end by themselves until the deadline and are reset then. What begins after this call
    /// under the same addresses is another pod's. Returns when everything has ended.
    pub async fn end_pod(&self, pod: &LocalWorkload, capture_mode: &'static str, drain: Drain) {
        let connections = self
            .shared
            .telemetry
            .connections_of(&pod.addresses, capture_mode);
        let tunnels = self.shared.pod_tunnels.forget(&pod.uid);
        // Nobody else speaks with its addresses.
        self.shared
            .pool
            .forget(|key| pod.addresses.contains(&key.source_address));
        if let Some(tunnels) = &tunnels {
            tunnels.drain();
        }
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
