//! Enrolling and unenrolling one pod.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, anyhow};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout, timeout_at};

use super::admission::has_address;
use super::plans::announcement;
use super::timings::{EnrolmentTimes, micros};
use super::{Agent, Pod, PodState, narrative, removal};
use crate::unix_http::Caller;

/// How long an enrolment may wait for the proxy and for other events of the pod: so much less than the plugin waits
/// (5 s) that it hears what was wrong.
const ENROL_WITHIN: Duration = Duration::from_millis(4500);
/// Of that, how long it may wait for its turn: what is left is enough for one that is not disturbed.
const TURN_WITHIN: Duration = Duration::from_millis(3500);
/// Enrolments that are worked on at the same time. More of them share the same processors, and where those do not do for
/// all, none would be done in time: so the first ones are, and the rest hears early to try again. Fewer would leave less to
/// be made together in the node's namespace.
const AT_ONCE: usize = 16;
/// How long the proxy may take to confirm that it serves a pod no more. It hears it in any case: if not by this, then by
/// the next snapshot.
pub(super) const CONFIRM_WITHIN: Duration = Duration::from_secs(3);
/// The same after a failed enrolment, whose time is nearly over.
const CONFIRM_FAILED_WITHIN: Duration = Duration::from_millis(100);
/// How long a deleted pod's connections may drain.
const DEL_DRAIN: Duration = Duration::from_secs(5);

/// Why a pod is not enrolled.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// The node cannot capture a pod at the moment.
    #[error("pod {pod} cannot be enrolled yet, and does not start uncaptured: {reason}")]
    NotReady {
        /// `namespace/name`.
        pod: String,
        /// What is missing.
        reason: String,
    },
    /// Something failed; what had been made was taken away again.
    #[error("pod {pod}: {error:#}")]
    Failed {
        /// `namespace/name`.
        pod: String,
        /// Cause.
        error: anyhow::Error,
    },
}

/// One lock per pod, so that two events about the same pod never interleave.
#[derive(Debug, Default)]
pub(super) struct Busy(Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>);

impl Busy {
    pub(super) async fn lock(&self, uid: &str) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self
                .0
                .lock()
                .unwrap_or_else(std::sync::PoisonError::into_inner);
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(locks.entry(uid.to_owned()).or_default())
        };
        lock.lock_owned().await
    }
}

/// Who is enrolled next: first come, first served.
#[derive(Debug)]
pub(super) struct Turns(Semaphore);

impl Default for Turns {
    fn default() -> Self {
        Self(Semaphore::new(AT_ONCE))
    }
}

impl Agent {
    /// Enrols a pod: announcement and acknowledgement first, redirect last. On an error everything is taken back; so it
    /// is when the plugin gave up meanwhile, because the runtime takes the sandbox down then.
    pub(super) async fn enrol(&self, pod: Pod, caller: &Caller) -> Result<(), EnrolError> {
        let begun = Instant::now();
        let deadline = begun + ENROL_WITHIN;
        let name = pod.qualified_name();
        let failed = |error| EnrolError::Failed {
            pod: name.clone(),
            error,
        };
        let _alone = timeout_at(deadline, self.busy.lock(&pod.uid))
            .await
            .map_err(|_| failed(anyhow!("another event of this pod is not finished")))?;
        self.ready().map_err(|reason| EnrolError::NotReady {
            pod: name.clone(),
            reason: reason.to_string(),
        })?;
        let known = self.pods.get(&pod.uid);
        let known = known.filter(|known| known.netns_id == pod.netns_id);
        // Whoever repeats it need not know whether it was running the first time: a pod that is captured since before it ran
        // has no connection from outside the mesh.
        let live = match &known {
            Some(known) if known.state == PodState::Captured && known.mode == pod.mode => {
                known.live
            }
            known => pod.live || known.as_ref().is_some_and(|known| known.live),
        };
        let pod = Pod {
            live,
            settled: known
                .as_ref()
                .is_some_and(|known| known.settled && known.state == PodState::Captured),
            ..pod
        };
        let captured = Pod {
            state: PodState::Captured,
            ..pod.clone()
        };
        if self.pods.get(&pod.uid).as_ref() == Some(&captured) {
            // A repetition. A capture that stands is not taken away because it cannot be confirmed.
            let repeated = self.capture(&captured, deadline).await;
            return repeated.map(drop).map_err(failed);
        }
        let Ok(_turn) = timeout_at(begun + TURN_WITHIN, self.turns.0.acquire()).await else {
            return Err(EnrolError::NotReady {
                pod: name,
                reason: format!("other pods were first for {TURN_WITHIN:?}"),
            });
        };
        // Its plugin has said to come again later: whoever still waits has the turn.
        if caller.has_left() {
            return Err(failed(anyhow!("the plugin gave up waiting")));
        }
        self.make_room(&pod, deadline).await.map_err(failed)?;
        self.refuse_strangers_in_pod(&pod).await.map_err(failed)?;
        let put = self.put_in_place(pod.clone(), deadline, caller).await;
        let times = match put {
            Ok(times) => times,
            Err(error) => {
                let taken_back = match pod.live {
                    // It has connections, perhaps through the proxy.
                    true => self
                        .drain(&pod, self.drain_time(known.as_ref()))
                        .await
                        .map(drop),
                    false => self.take_away(&pod, CONFIRM_FAILED_WITHIN).await,
                };
                if let Err(left) = taken_back {
                    tracing::error!(
                        pod = name,
                        error = format!("{left:#}"),
                        "a failed enrolment left something behind"
                    );
                }
                tracing::error!(pod = name, error = format!("{error:#}"), "enrolment failed");
                return Err(failed(error));
            }
        };
        self.timings.note(EnrolmentTimes {
            total_us: micros(begun.elapsed()),
            ..times
        });
        tracing::info!(pod = name, mode = %pod.mode, "pod is captured");
        Ok(())
    }

    /// Takes away what a pod that is gone left in the way of this one: the same UID in another namespace, another UID in
    /// the same namespace, or its address. An address that a living pod has is an error.
    async fn make_room(&self, pod: &Pod, deadline: Instant) -> anyhow::Result<()> {
        for other in self.pods.all() {
            let shared = other
                .addresses
                .iter()
                .find(|address| pod.addresses.contains(address));
            let replaced = match (other.uid == pod.uid, other.netns_id == pod.netns_id) {
                (true, true) => continue,
                (true, false) | (false, true) => true,
                (false, false) => match shared {
                    Some(address) => !still_has(&other, *address).await,
                    None => continue,
                },
            };
            if !replaced {
                return Err(anyhow!(
                    "pod {} ({}) has one of its addresses and is still there: `ambidex undo {}`",
                    other.qualified_name(),
                    other.uid,
                    other.uid
                ));
            }
            tracing::info!(
                pod = other.qualified_name(),
                uid = other.uid,
                by = pod.uid,
                "a pod was replaced without having been deleted"
            );
            let _alone = if other.uid == pod.uid {
                None
            } else {
                let alone = timeout_at(deadline, self.busy.lock(&other.uid)).await;
                Some(alone.map_err(|_| {
                    anyhow!("pod {} is in the way and busy", other.qualified_name())
                })?)
            };
            if self.pods.get(&other.uid).as_ref() == Some(&other) {
                self.take_away(&other, CONFIRM_WITHIN).await?;
            }
        }
        Ok(())
    }

    async fn put_in_place(
        &self,
        mut pod: Pod,
        deadline: Instant,
        caller: &Caller,
    ) -> anyhow::Result<EnrolmentTimes> {
        let begun = Instant::now();
        // An undo of the node says so first and lists the pods then; so one of the two sees the other.
        self.pods.put(pod.clone())?;
        let recorded = begun.elapsed();
        self.refuse_after_undo()?;
        let times = self.capture(&pod, deadline).await?;
        if caller.has_left() {
            return Err(anyhow!("the plugin gave up waiting"));
        }
        pod.state = PodState::Captured;
        let captured = Instant::now();
        self.pods.put(pod)?;
        Ok(EnrolmentTimes {
            record_us: micros(recorded + captured.elapsed()),
            ..times
        })
    }

    async fn capture(&self, pod: &Pod, deadline: Instant) -> anyhow::Result<EnrolmentTimes> {
        let begun = Instant::now();
        timeout_at(deadline, self.zds.add(announcement(pod)?))
            .await
            .map_err(|_| anyhow!("the proxy did not answer within {ENROL_WITHIN:?}"))?
            .context("the proxy did not take it")?;
        let announced = Instant::now();
        // Not cut short: what the kernel was told half of would have to be taken back while it is still being told.
        let plans = self.pod_plans(pod).await?;
        let planned = Instant::now();
        for (place, plan) in plans {
            if pod.state == PodState::Pending {
                narrative::tell(pod, &plan);
            }
            self.converge(&place, &plan).await?;
        }
        Ok(EnrolmentTimes {
            uid: pod.uid.clone(),
            announce_us: micros(announced - begun),
            plan_us: micros(planned - announced),
            apply_us: micros(planned.elapsed()),
            ..EnrolmentTimes::default()
        })
    }

    /// Unenrols the pod with this UID if it is (still) one that `unwanted` means: redirect first, then its listeners,
    /// whose connections drain.
    pub(super) async fn unenrol(
        &self,
        uid: &str,
        unwanted: impl Fn(&Pod) -> bool,
    ) -> anyhow::Result<()> {
        let _alone = self.busy.lock(uid).await;
        let Some(pod) = self.pods.get(uid).filter(unwanted) else {
            return Ok(());
        };
        self.take_away(&pod, CONFIRM_WITHIN).await?;
        tracing::info!(pod = pod.qualified_name(), "pod is no longer captured");
        Ok(())
    }

    /// Takes a pod's redirect away and tells the proxy. A pod that could not be taken away whole stays on the list, as
    /// leaving.
    async fn take_away(&self, pod: &Pod, confirm_within: Duration) -> anyhow::Result<()> {
        let leaving = Pod {
            state: PodState::Leaving,
            ..pod.clone()
        };
        // A full disk keeps no pod from leaving.
        if let Err(error) = self.pods.put(leaving) {
            tracing::warn!(pod = pod.qualified_name(), %error, "that a pod leaves is not on disk");
        }
        let undone = removal::of_pod(pod, Some(&self.host), &self.journal).await;
        match timeout(confirm_within, self.zds.del(&pod.uid, DEL_DRAIN)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(pod = pod.qualified_name(), %error, "the proxy did not confirm a removal");
            }
            Err(_) => {
                tracing::warn!(
                    pod = pod.qualified_name(),
                    "the proxy did not confirm a removal within {confirm_within:?}"
                );
            }
        }
        if !undone.errors.is_empty() {
            return Err(anyhow!(undone.errors.join("; ")));
        }
        self.pods.remove(&pod.uid)?;
        self.forget_closed(&pod.uid);
        Ok(())
    }

    pub(super) async fn make_redirect(&self, pod: &Pod) -> anyhow::Result<()> {
        for (place, plan) in self.pod_plans(pod).await? {
            self.converge(&place, &plan).await?;
        }
        Ok(())
    }
}

/// Whether a pod's namespace is there and has this address. One that cannot be asked counts as there: a capture is not
/// taken away on a guess.
async fn still_has(pod: &Pod, address: IpAddr) -> bool {
    match pod.open_netns() {
        Ok(netns) => has_address(&netns, address).await.unwrap_or(true),
        Err(_) => false,
    }
}
