//! What an operator asks about a pod or the node: its plans, how the kernel differs from them, their removal.

use std::os::fd::AsRawFd;

use anyhow::anyhow;
use futures_util::StreamExt;
use futures_util::stream;
use host_net::engine;
use host_net::netns::Netns;
use host_net::plan::{Place, Plan};

use super::api::{PlacedFindings, PlacedPlan, Subject, Undone};
use super::node::has_ipv6;
use super::{Agent, Pod, removal};

/// Pods that are unenrolled at the same time.
const AT_ONCE: usize = 8;

impl Agent {
    /// The plans of a subject with their places, in the order of making.
    async fn placed(&self, subject: &Subject) -> anyhow::Result<Vec<(Place, Plan)>> {
        match subject {
            Subject::Pod(name) => self.pod_plans(&self.pods.find(name)?).await,
            Subject::Node => {
                self.refuse_after_undo()?;
                let mut placed = Vec::new();
                if self.config.mode.uses_inpod() {
                    placed.push((
                        self.host_place(),
                        inpod_redirect::plan::host(has_ipv6(&self.host)),
                    ));
                }
                if self.config.mode.uses_node() {
                    let setup = self.node_setup().ok_or_else(|| {
                        anyhow!("the node capture is not set up: no proxy has connected since the agent started")
                    })?;
                    let proxy = Place {
                        label: "proxy".to_owned(),
                        netns: setup.proxy.clone(),
                    };
                    placed.push((
                        proxy,
                        node_redirect::plan::proxy(&setup.proxy_facts, self.flow()),
                    ));
                    placed.push((
                        self.host_place(),
                        node_redirect::plan::host(&setup.host_facts, self.flow()),
                    ));
                }
                Ok(placed)
            }
        }
    }

    /// The plans of a subject, for display.
    pub(super) async fn plans(&self, subject: &Subject) -> anyhow::Result<Vec<PlacedPlan>> {
        let mut plans = Vec::new();
        for (place, plan) in self.placed(subject).await? {
            let netns = self
                .journal
                .load(&plan.name)?
                .and_then(|record| record.netns_path);
            plans.push(PlacedPlan {
                // A pod's is closed again when this has been answered.
                descriptor: matches!(subject, Subject::Node)
                    .then(|| place.netns.as_fd().as_raw_fd()),
                place: place.label,
                netns,
                plan,
            });
        }
        Ok(plans)
    }

    /// How the kernel differs from the plans of a subject.
    pub(super) async fn diff(&self, subject: &Subject) -> anyhow::Result<Vec<PlacedFindings>> {
        let mut places = Vec::new();
        for (place, plan) in self.placed(subject).await? {
            let others = self.journal.others_in(place.netns.id(), &plan.name);
            let others: Vec<&Plan> = others.iter().map(|record| &record.plan).collect();
            let findings = engine::inspect_among(&place, &plan, &others).await?;
            places.push(PlacedFindings {
                place: place.label,
                plan: plan.name,
                findings: findings.iter().map(ToString::to_string).collect(),
            });
        }
        Ok(places)
    }

    /// Removes what was made for a subject. For the node that is everything, its pods' redirects first.
    pub(super) async fn undo(&self, subject: &Subject) -> anyhow::Result<Undone> {
        match subject {
            Subject::Pod(name) => Ok(self.undo_pod(&self.pods.find(name)?).await),
            Subject::Node => Ok(self.undo_node().await),
        }
    }

    async fn undo_pod(&self, pod: &Pod) -> Undone {
        let name = format!("pod {}", pod.qualified_name());
        let mut undone = Undone::default();
        match self.unenrol(&pod.uid, |_| true).await {
            Ok(()) => undone.plans.push(name),
            Err(error) => undone.errors.push(format!("{name}: {error:#}")),
        }
        undone
    }

    async fn undo_node(&self) -> Undone {
        // From here on no enrolment makes anything: it looks at this after it has put its pod on the list.
        self.status().undone = true;
        let pods = self.pods.all();
        let undone = stream::iter(pods)
            .map(|pod| async move { self.undo_pod(&pod).await })
            .buffered(AT_ONCE)
            .fold(Undone::default(), |all, one| async { all.and(one) })
            .await;
        let _alone = self.setting_up.lock().await;
        let proxy = self.status().setup.take().map(|setup| setup.proxy);
        let open: Vec<Netns> = std::iter::once(self.host.clone()).chain(proxy).collect();
        // Not those of pods that could not be taken away: they are on the list, and tried again.
        let rest = removal::of_records(&self.journal, &open, |name| {
            removal::pod_of_record(name).is_none_or(|uid| self.pods.get(uid).is_none())
        });
        undone.and(rest.await)
    }
}
