//! Bringing the pods of this node to what they should be: after a start, and now and then.

use futures_util::StreamExt;
use futures_util::stream;

use super::plans::announcement;
use super::{Agent, Pod, PodState, removal};
use crate::options::Capture;

/// Pods whose redirects are looked at at the same time.
const AT_ONCE: usize = 8;

impl Agent {
    /// Makes the pods of an earlier agent known again.
    ///
    /// Those that it was enrolling or unenrolling when it ended are taken away: the enrolment was never confirmed, so the
    /// sandbox does not start; the removal was wanted. So are those whose namespace is gone: they were deleted meanwhile;
    /// and what the journal has of pods that nobody knows.
    pub(super) async fn restore_pods(&self) -> anyhow::Result<()> {
        self.take_away_unknown().await;
        self.resume_draining()?;
        self.take_away_pods(|pod| {
            !matches!(pod.state, PodState::Captured | PodState::Draining)
                || pod.open_netns().is_err()
        })
        .await;
        for pod in self.pods.all() {
            let possible = match pod.mode {
                Capture::Node => self.config.mode.uses_node(),
                Capture::Inpod => self.config.mode.uses_inpod(),
            };
            match pod.state {
                PodState::Captured => {}
                // The proxy may not have heard of it.
                PodState::Draining => {
                    self.tell_later_that_it_drains(&pod.uid);
                    continue;
                }
                // What could not be taken away stays on the list, without listeners.
                PodState::Pending | PodState::Leaving => continue,
            }
            anyhow::ensure!(
                possible,
                "pod {} is captured with --mode {} and cannot be with --mode {}: start the agent with --mode mixed, or \
                 take the captures away first (`ambidex undo --node`)",
                pod.qualified_name(),
                pod.mode,
                self.config.mode
            );
            self.zds.register(announcement(&pod)?)?;
        }
        Ok(())
    }

    /// Takes away what the journal has of pods that nobody knows.
    pub(super) async fn take_away_unknown(&self) {
        let unknown = |name: &str| {
            removal::pod_of_record(name).is_some_and(|uid| self.pods.get(uid).is_none())
        };
        let undone =
            removal::of_records(&self.journal, std::slice::from_ref(&self.host), unknown).await;
        for plan in undone.plans {
            tracing::warn!(plan, "took away what belonged to no pod");
        }
        for error in undone.errors {
            tracing::error!(error, "could not take away what belongs to no pod");
        }
    }

    /// Takes away the pods that are not to be: whose namespace is gone, or that are half-way out.
    pub(super) async fn take_away_leftovers(&self) {
        for pod in self.pods.all() {
            if pod.open_netns().is_err() {
                self.follow(&pod).await;
            }
        }
        self.take_away_pods(|pod| pod.state == PodState::Leaving || pod.open_netns().is_err())
            .await;
    }

    /// Unenrols all pods that `unwanted` means, at the same time, and logs what fails.
    pub(super) async fn take_away_pods(&self, unwanted: impl Fn(&Pod) -> bool + Copy) {
        let pods = self.pods.all().into_iter().filter(unwanted);
        stream::iter(pods)
            .for_each_concurrent(AT_ONCE, |pod| async move {
                if let Err(error) = self.unenrol(&pod.uid, unwanted).await {
                    tracing::error!(
                        pod = pod.qualified_name(),
                        error = format!("{error:#}"),
                        "a pod that is gone left something behind"
                    );
                }
            })
            .await;
    }

    /// Puts the redirects of the pods captured in this mode in place again: an earlier agent may have been killed half-way
    /// through a change, and the node capture's are functions of where the proxy is.
    pub(super) async fn converge_pods(&self, mode: Capture) {
        // A pod that is being enrolled is not waited for: its enrolment may wait for this.
        let wanted = |pod: &Pod| {
            // A change of capture may have ended half-way: the one that it leaves is to take nothing more.
            pod.captures().any(|capture| capture == mode)
                && matches!(pod.state, PodState::Captured | PodState::Draining)
        };
        stream::iter(self.pods.all().into_iter().filter(wanted))
            .for_each_concurrent(AT_ONCE, |pod| async move {
                let _alone = self.busy.lock(&pod.uid).await;
                let Some(pod) = self.pods.get(&pod.uid).filter(wanted) else {
                    return;
                };
                if let Err(error) = self.make_redirect(&pod).await {
                    tracing::error!(
                        pod = pod.qualified_name(),
                        error = format!("{error:#}"),
                        "redirect not restored"
                    );
                }
            })
            .await;
    }
}
