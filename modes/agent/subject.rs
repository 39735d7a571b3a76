//! What an operator asks about a pod or the node: its plans, how the kernel differs from them, their removal.

use anyhow::anyhow;
use host_net::engine;
use host_net::plan::{Place, Plan};

use super::api::{PlacedFindings, PlacedPlan, Subject, Undone};
use super::{Agent, Pod};

impl Agent {
    fn pod(&self, name: &str) -> anyhow::Result<Pod> {
        self.pods.find(name).ok_or_else(|| {
            anyhow!("no pod {name:?} is captured on this node (or the name is not unique): `ambidex get pods` lists them")
        })
    }

    /// The plans of a subject with their places, in the order of making.
    async fn placed(&self, subject: &Subject) -> anyhow::Result<Vec<(Place, Plan)>> {
        match subject {
            Subject::Pod(name) => self.pod_plans(&self.pod(name)?).await,
            Subject::Node => {
                let mut placed = Vec::new();
                if self.config.mode.uses_inpod() {
                    placed.push((self.host_place(), inpod_redirect::plan::host()));
                }
                if let Some(setup) = self.node_setup() {
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
            let others = self.journal.others_in(place.netns.id(), &plan.name)?;
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
        let mut undone = Undone::default();
        let pods = match subject {
            Subject::Pod(name) => vec![self.pod(name)?],
            Subject::Node => self.pods.all(),
        };
        for pod in pods {
            match self.unenrol(&pod).await {
                Ok(()) => undone.plans.push(format!("pod {}", pod.qualified_name())),
                Err(error) => undone
                    .errors
                    .push(format!("pod {}: {error:#}", pod.qualified_name())),
            }
        }
        if *subject == Subject::Node {
            for (place, plan) in self.placed(subject).await?.into_iter().rev() {
                let errors = engine::undo(&plan.name, Some(&place.netns), &self.journal).await;
                undone.errors.extend(errors.iter().map(ToString::to_string));
                undone.plans.push(plan.name);
            }
            self.forget_node_setup();
        }
        Ok(undone)
    }
}
