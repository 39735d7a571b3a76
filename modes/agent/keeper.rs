//! Keeping captures true: the agent hears of changes in the namespaces that it made objects in, looks at what it does not
//! hear of every few seconds, puts back what is missing, and says which pods are captured in effect.
//!
//! Heard of: links, routes, policy routing rules, and rules written through nf_tables. Looked at: members of sets, sysctls,
//! legacy iptables, listeners, the identity of pods' namespaces, what the proxy says; and now and then everything, because
//! a message of the kernel's may be lost. Live probes go round at a rate that does not grow with the number of pods.

mod found;
mod mending;
mod places;
mod probing;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use host_net::engine::{self, Finding};
use host_net::netns::{Netns, NetnsId};
use host_net::plan::{Place, Plan, Step};
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};

use super::{Agent, Pod, PodState, verify};
use crate::options::Capture;
use found::Found;
use places::{Kept, Namespaces, TOLD_EVERY};

/// How long changes may go on before they are looked at: one command of an operator's makes many messages.
const SETTLE: Duration = Duration::from_millis(200);
/// Time to the next sweep while it is in doubt whether a pod is captured.
const IN_DOUBT: Duration = Duration::from_secs(1);
/// Time between two searches for pods whose deletion nobody reported, where captures are not looked at.
const LEFTOVERS_EVERY: Duration = Duration::from_secs(30);
/// Pods' namespaces whose rules are looked at in one sweep without anything having changed, at least.
const LOOKS: usize = 8;

/// What is known of each pod's capture, for the metric and for whoever asks.
#[derive(Debug, Default)]
pub(super) struct Effects(Mutex<BTreeMap<String, Vec<String>>>);

impl Effects {
    /// What is wrong, by UID; a pod without an entry has not been looked at yet.
    pub(super) fn all(&self) -> BTreeMap<String, Vec<String>> {
        self.lock().clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Vec<String>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the loop remembers between two rounds.
#[derive(Default)]
struct Memory {
    places: BTreeMap<NetnsId, Kept>,
    namespaces: Namespaces,
    turns: probing::Turns,
    broken: mending::Broken,
}

impl Memory {
    /// Has a namespace looked at in the next round: whatever happened may have happened to other objects in it, too.
    fn look_again_at(&mut self, netns: NetnsId) {
        if let Some(kept) = self.places.get(&netns) {
            kept.soil();
        }
    }
}

impl Agent {
    /// Does so for ever. Without `every` only pods are looked for whose deletion nobody reported: a runtime may delete a pod
    /// while no agent runs to hear of it.
    pub(super) async fn keep(self: Arc<Self>, every: Option<Duration>) {
        let Some(every) = every else {
            loop {
                sleep(LEFTOVERS_EVERY).await;
                self.take_away_leftovers().await;
            }
        };
        let heard = Arc::new(Notify::new());
        let mut memory = Memory::default();
        let mut next = Instant::now();
        loop {
            let sweep = tokio::select! {
                () = tokio::time::sleep_until(next) => true,
                () = heard.notified() => false,
            };
            if sweep {
                next = Instant::now() + every;
            } else {
                sleep(SETTLE).await;
            }
            self.round(&mut memory, &heard, sweep.then_some(every))
                .await;
            if memory.turns.are_in_doubt() || memory.broken.is_about_to_close() {
                next = next.min(Instant::now() + IN_DOUBT);
            }
        }
    }

    /// Looks at what has changed, and in a sweep at everything else, too.
    async fn round(&self, memory: &mut Memory, heard: &Arc<Notify>, sweep: Option<Duration>) {
        let (pods, others): (Vec<Pod>, Vec<Pod>) = self
            .pods
            .all()
            .into_iter()
            .partition(|pod| pod.state == PodState::Captured);
        let namespaces = self.attend(memory, heard, &pods);
        let mut found = self.look_at_objects(memory, &pods, sweep).await;
        if sweep.is_some() {
            self.look_at_pods(memory, &pods, &namespaces, &mut found)
                .await;
            let there: Vec<(&Pod, &Netns)> = pods
                .iter()
                .zip(&namespaces)
                .filter_map(|(pod, netns)| Some((pod, netns.as_ref().ok()?)))
                .collect();
            self.probe_some(&mut memory.turns, &there, &mut found).await;
        }
        self.mend(memory, &pods, &mut found).await;
        if sweep.is_some() {
            self.decide(memory, &pods, &mut found).await;
        }
        let leaving = others.iter().any(|pod| pod.state == PodState::Leaving);
        let leftovers = found.leftovers || leaving;
        self.note(&pods, found, sweep.is_some());
        if sweep.is_some() && leftovers {
            self.take_away_leftovers().await;
        }
    }

    /// Opens an ear in every namespace that has objects of ours, and closes those of namespaces that are gone. Returns the
    /// pods' namespaces, in their order.
    fn attend(
        &self,
        memory: &mut Memory,
        heard: &Arc<Notify>,
        pods: &[Pod],
    ) -> Vec<std::io::Result<Netns>> {
        memory.namespaces.retain(pods);
        let namespaces: Vec<_> = pods.iter().map(|pod| memory.namespaces.of(pod)).collect();
        let mut places = vec![self.host.clone()];
        places.extend(self.node_setup().map(|setup| setup.proxy));
        let inpod = pods.iter().zip(&namespaces);
        let inpod =
            inpod.filter(|(pod, _)| pod.captures().any(|capture| capture == Capture::Inpod));
        places.extend(inpod.filter_map(|(_, netns)| netns.as_ref().ok().cloned()));
        let wanted: BTreeSet<NetnsId> = places.iter().map(Netns::id).collect();
        memory.places.retain(|id, _| wanted.contains(id));
        for netns in places {
            memory
                .places
                .entry(netns.id())
                .or_insert_with(|| Kept::new(netns, heard));
        }
        namespaces
    }

    /// Compares the kernel with what was made: rules where something has changed or was not looked at for long, the rest in
    /// each sweep.
    async fn look_at_objects(
        &self,
        memory: &mut Memory,
        pods: &[Pod],
        sweep: Option<Duration>,
    ) -> Found {
        let mut found = Found::default();
        let own = [
            Some(self.host.id()),
            self.node_setup().map(|setup| setup.proxy.id()),
        ];
        let due = match sweep {
            Some(every) => due(&memory.places, &own, every),
            None => BTreeSet::new(),
        };
        for (id, kept) in &mut memory.places {
            let is_own = own.contains(&Some(*id));
            let rules = kept.take_dirty() || due.contains(id);
            if !(rules || is_own && sweep.is_some()) {
                continue;
            }
            if rules {
                kept.looked = Some(Instant::now());
                let here = |pod: &&Pod| match is_own {
                    true => pod.mode == Capture::Node,
                    false => pod.netns_id == *id,
                };
                for pod in pods.iter().filter(here) {
                    memory.turns.suspect(&pod.uid);
                }
            }
            match self.compare(&kept.netns, rules).await {
                Ok(findings) => findings
                    .into_iter()
                    .for_each(|(record, finding)| found.add_object(&record, &finding)),
                Err(error) => {
                    tracing::warn!(netns = %kept.netns.id(), error = format!("{error:#}"), "a namespace cannot be looked at");
                    kept.looked = None;
                }
            }
        }
        found
    }

    /// What differs in one namespace from what the journal says was made there, with the record that each belongs to.
    async fn compare(&self, netns: &Netns, rules: bool) -> anyhow::Result<Vec<(String, Finding)>> {
        let records = self.journal.others_in(netns.id(), "");
        let wanted = |step: &&Step| rules || !step.is_rules();
        let steps: Vec<Step> = records
            .iter()
            .flat_map(|record| record.plan.steps.iter().filter(wanted).cloned())
            .collect();
        let place = Place {
            label: netns.id().to_string(),
            netns: netns.clone(),
        };
        let all = Plan {
            name: "all".to_owned(),
            steps,
        };
        let findings = engine::inspect_among(&place, &all, &[]).await?;
        let owned = findings.into_iter().filter_map(|finding| {
            let owner = records
                .iter()
                .find(|record| record.plan.steps.contains(&finding.step))?;
            Some((owner.plan.name.clone(), finding))
        });
        Ok(owned.collect())
    }

    /// What no message of the kernel's tells: whose namespace it is, who listens, what the proxy knows.
    async fn look_at_pods(
        &self,
        memory: &mut Memory,
        pods: &[Pod],
        namespaces: &[std::io::Result<Netns>],
        found: &mut Found,
    ) {
        if let Err(error) = self.ready() {
            found.node.push(format!("{error:#}"));
        }
        let told = self.proxy_tells().await;
        let node_listeners = match self.config.mode.uses_node() {
            true => self.node_listeners(),
            false => Vec::new(),
        };
        for (pod, netns) in pods.iter().zip(namespaces) {
            let mut wrong = verify::proxy_findings(pod, &told);
            match (netns, pod.mode) {
                (Err(error), _) => {
                    found.leftovers = true;
                    wrong.push(error.to_string());
                }
                (Ok(_), Capture::Node) => wrong.extend(node_listeners.iter().cloned()),
                (Ok(netns), Capture::Inpod) => {
                    if let Some(kept) = memory.places.get_mut(&netns.id()) {
                        wrong.extend(
                            kept.lacking_listeners(
                                &self.pod_ports(pod),
                                &self.captured_families(pod),
                            ),
                        );
                    }
                }
            }
            found.add(&pod.uid, wrong);
        }
        found.node.extend(node_listeners);
    }

    /// Says what has changed, and remembers it.
    fn note(&self, pods: &[Pod], found: Found, sweep: bool) {
        let mut effects = self.effects.lock();
        effects.retain(|uid, _| pods.iter().any(|pod| pod.uid == *uid));
        for pod in pods {
            let wrong = found.pods.get(&pod.uid).cloned().unwrap_or_default();
            let before = effects.get(&pod.uid).cloned();
            // What only a sweep looks at is not known to be right again before the next one.
            if !sweep && wrong.is_empty() && before.is_some() {
                continue;
            }
            let was_effective = before.as_ref().is_none_or(Vec::is_empty);
            match (was_effective, wrong.is_empty()) {
                (true, false) => {
                    tracing::error!(
                        pod = pod.qualified_name(),
                        uid = pod.uid,
                        findings = wrong.join("; "),
                        "pod is not captured as it should be"
                    );
                }
                (false, true) => {
                    tracing::info!(
                        pod = pod.qualified_name(),
                        uid = pod.uid,
                        "pod is captured as it should be again"
                    );
                }
                _ => {}
            }
            effects.insert(pod.uid.clone(), wrong);
        }
    }
}

/// The namespaces whose rules are looked at in this sweep although nothing is known to have changed: those of whose changes
/// the kernel does not tell, and of the others so many that each is looked at once in [`TOLD_EVERY`].
fn due(
    places: &BTreeMap<NetnsId, Kept>,
    own: &[Option<NetnsId>],
    every: Duration,
) -> BTreeSet<NetnsId> {
    let (own, mut pods): (Vec<_>, Vec<_>) = places
        .iter()
        .filter(|(_, kept)| kept.is_due())
        .partition(|(id, _)| own.contains(&Some(**id)));
    let share = places.len() as f64 * every.as_secs_f64() / TOLD_EVERY.as_secs_f64();
    pods.sort_by_key(|(_, kept)| kept.looked);
    pods.truncate(LOOKS.max(share.ceil() as usize));
    own.into_iter().chain(pods).map(|(id, _)| *id).collect()
}
