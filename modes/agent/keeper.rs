//! Keeping captures true: the agent hears of changes in the namespaces that it made objects in, looks at what it does not
//! hear of every few seconds, puts back what is missing, and says which pods are captured in effect.
//!
//! Heard of: links, routes, policy routing rules, and rules written through nf_tables. Looked at: members of sets, sysctls,
//! legacy iptables, listeners, the identity of pods' namespaces, what the proxy says; and now and then everything, because
//! a message of the kernel's may be lost. Live probes go round at a rate that does not grow with the number of pods.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use host_net::engine::{self, Finding};
use host_net::iptables::{Variant, choose};
use host_net::netns::{Netns, NetnsId};
use host_net::plan::{Family, Place, Plan, Step};
use host_net::sockets::Listeners;
use host_net::watch::Watch;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::verify::{self, live};
use super::{Agent, Pod, PodState, removal};
use crate::options::Capture;

/// How long changes may go on before they are looked at: one command of an operator's makes many messages.
const SETTLE: Duration = Duration::from_millis(200);
/// How often rules are looked at of whose changes the kernel tells.
const TOLD_EVERY: Duration = Duration::from_secs(300);
/// How often those of whose changes it does not.
const UNTOLD_EVERY: Duration = Duration::from_secs(5);
/// Live probes in a sweep.
const PROBES: usize = 15;
/// Failures of a pod's probe in a row before it counts: one may have met a proxy that was just being replaced.
const PROBE_FAILURES: u32 = 2;

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

/// One namespace in which there are objects of ours.
struct Kept {
    netns: Netns,
    dirty: Arc<AtomicBool>,
    /// Hears of changes; none where the kernel does not tell.
    ear: Option<AbortHandle>,
    /// When its rules were last looked at.
    looked: Option<Instant>,
    every: Duration,
    listeners: Option<Listeners>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(ear) = &self.ear {
            ear.abort();
        }
    }
}

/// What the loop remembers between two rounds.
#[derive(Default)]
struct Memory {
    places: BTreeMap<NetnsId, Kept>,
    /// Failures in a row of each pod's probe, by UID.
    probes: BTreeMap<String, u32>,
    /// UID of the pod that was probed last.
    probed: String,
}

impl Agent {
    /// Does so for ever.
    pub(super) async fn keep(self: Arc<Self>, every: Duration) {
        let heard = Arc::new(tokio::sync::Notify::new());
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
            self.round(&mut memory, &heard, sweep).await;
        }
    }

    async fn round(&self, memory: &mut Memory, heard: &Arc<tokio::sync::Notify>, sweep: bool) {
        let captured = |pod: &Pod| pod.state == PodState::Captured;
        let pods: Vec<Pod> = self.pods.all().into_iter().filter(captured).collect();
        self.attend(memory, heard, &pods);
        let mut found = self.look_at_objects(memory, sweep).await;
        if sweep {
            self.look_at_pods(memory, &pods, &mut found).await;
            self.probe_some(memory, &pods, &mut found).await;
        }
        self.mend(memory, &pods, &mut found).await;
        self.note(&pods, found, sweep);
    }

    /// Opens an ear in every namespace that has objects of ours, and closes those of namespaces that are gone.
    fn attend(&self, memory: &mut Memory, heard: &Arc<tokio::sync::Notify>, pods: &[Pod]) {
        let mut places = vec![self.host.clone()];
        places.extend(self.node_setup().map(|setup| setup.proxy));
        let inpod = pods.iter().filter(|pod| pod.mode == Capture::Inpod);
        places.extend(inpod.filter_map(|pod| pod.open_netns().ok()));
        let wanted: BTreeSet<NetnsId> = places.iter().map(Netns::id).collect();
        memory.places.retain(|id, _| wanted.contains(id));
        for netns in places {
            memory
                .places
                .entry(netns.id())
                .or_insert_with(|| Kept::new(netns, heard));
        }
    }

    /// Compares the kernel with what was made: rules where something has changed, the rest in each sweep.
    async fn look_at_objects(&self, memory: &mut Memory, sweep: bool) -> Found {
        let mut found = Found::default();
        for kept in memory.places.values_mut() {
            let changed = kept.dirty.swap(false, Ordering::AcqRel);
            let due = sweep
                && kept
                    .looked
                    .is_none_or(|looked| looked.elapsed() >= kept.every);
            if !(changed || sweep) {
                continue;
            }
            let is_pods = kept.netns.id() != self.host.id()
                && self
                    .node_setup()
                    .is_none_or(|setup| setup.proxy.id() != kept.netns.id());
            if is_pods && !changed && !due {
                continue;
            }
            let rules = changed || due;
            if rules {
                kept.looked = Some(Instant::now());
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
        let records = self.journal.others_in(netns.id(), "")?;
        let wanted = |step: &&Step| rules || !step.is_firewall();
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
    async fn look_at_pods(&self, memory: &mut Memory, pods: &[Pod], found: &mut Found) {
        if let Err(error) = self.ready() {
            found.node.push(format!("{error:#}"));
        }
        let told = self.proxy_tells().await;
        let node_listeners = match self.config.mode.uses_node() {
            true => self.node_listeners(),
            false => Vec::new(),
        };
        for pod in pods {
            let mut wrong = verify::proxy_findings(pod, &told);
            match (pod.open_netns(), pod.mode) {
                (Err(error), _) => wrong.push(error.to_string()),
                (Ok(_), Capture::Node) => wrong.extend(node_listeners.iter().cloned()),
                (Ok(netns), Capture::Inpod) => {
                    if let Some(kept) = memory.places.get_mut(&netns.id()) {
                        wrong.extend(kept.lacking_listeners(&self.pod_ports()));
                    }
                }
            }
            found.add(&pod.uid, wrong);
        }
        found.node.extend(node_listeners);
    }

    /// Probes the next pods in turn, those that failed last time first.
    async fn probe_some(&self, memory: &mut Memory, pods: &[Pod], found: &mut Found) {
        memory
            .probes
            .retain(|uid, _| pods.iter().any(|pod| pod.uid == *uid));
        let (after, before): (Vec<&Pod>, Vec<&Pod>) =
            pods.iter().partition(|pod| pod.uid > memory.probed);
        let suspect = |pod: &&Pod| memory.probes.contains_key(&pod.uid);
        let mut turn: Vec<&Pod> = pods.iter().filter(suspect).take(PROBES / 2).collect();
        let suspects = turn.len();
        let mut others: Vec<&Pod> = after.into_iter().chain(before).collect();
        others.retain(|pod| !turn.iter().any(|other| other.uid == pod.uid));
        others.truncate(PROBES - suspects);
        if let Some(last) = others.iter().map(|pod| &pod.uid).next_back() {
            memory.probed.clone_from(last);
        }
        turn.extend(others);
        let asked = turn.into_iter().map(|pod| async move {
            let netns = pod.open_netns().ok()?;
            Some((pod.uid.clone(), live::findings(pod, &netns).await))
        });
        for (uid, wrong) in futures_util::future::join_all(asked)
            .await
            .into_iter()
            .flatten()
        {
            if wrong.is_empty() {
                memory.probes.remove(&uid);
                continue;
            }
            let failures = memory.probes.entry(uid.clone()).or_default();
            *failures += 1;
            if *failures >= PROBE_FAILURES {
                found.add(&uid, wrong);
            }
        }
    }

    /// Puts back what is missing, and looks again at what was mended.
    async fn mend(&self, memory: &mut Memory, pods: &[Pod], found: &mut Found) {
        if !found.node_objects.is_empty() {
            let lost = std::mem::take(&mut found.node_objects);
            tracing::warn!(
                lost = lost.join("; "),
                "objects of the node are missing or changed; putting them back"
            );
            if let Err(error) = self.mend_node().await {
                tracing::error!(
                    error = format!("{error:#}"),
                    "the node's objects cannot be put back"
                );
                found.node.extend(lost);
            }
        }
        for (uid, lost) in std::mem::take(&mut found.pod_objects) {
            let Some(pod) = pods.iter().find(|pod| pod.uid == uid) else {
                continue;
            };
            tracing::warn!(
                pod = pod.qualified_name(),
                lost = lost.join("; "),
                "objects of a pod's capture are missing or changed; putting them back"
            );
            if let Err(error) = self.mend_pod(pod).await {
                tracing::error!(
                    pod = pod.qualified_name(),
                    error = format!("{error:#}"),
                    "a pod's capture cannot be put back"
                );
                found.add(&uid, lost);
            } else {
                found.mended.insert(uid);
            }
        }
        if !found.mended.is_empty() {
            // Whatever happened may have happened to other objects of the namespace as well.
            memory
                .places
                .values_mut()
                .for_each(|kept| kept.looked = None);
        }
    }

    async fn mend_pod(&self, pod: &Pod) -> anyhow::Result<()> {
        let _alone = self.busy.lock(&pod.uid).await;
        if self.pods.get(&pod.uid).as_ref() != Some(pod) {
            // It was unenrolled or enrolled anew meanwhile.
            return Ok(());
        }
        self.make_redirect(pod).await
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

/// What a round found.
#[derive(Default)]
struct Found {
    node: Vec<String>,
    node_objects: Vec<String>,
    pods: BTreeMap<String, Vec<String>>,
    pod_objects: BTreeMap<String, Vec<String>>,
    mended: BTreeSet<String>,
}

impl Found {
    fn add(&mut self, uid: &str, findings: Vec<String>) {
        if !findings.is_empty() {
            self.pods
                .entry(uid.to_owned())
                .or_default()
                .extend(findings);
        }
    }

    fn add_object(&mut self, record: &str, finding: &Finding) {
        let text = finding.to_string();
        match removal::pod_of_record(record) {
            Some(uid) => self
                .pod_objects
                .entry(uid.to_owned())
                .or_default()
                .push(text),
            None => self.node_objects.push(text),
        }
    }
}

impl Kept {
    fn new(netns: Netns, heard: &Arc<tokio::sync::Notify>) -> Self {
        let dirty = Arc::new(AtomicBool::new(false));
        let told = matches!(choose(&netns, Family::V4), Ok(Variant::Nft));
        let ear = match Watch::new(&netns) {
            Ok(mut watch) => {
                let (dirty, heard) = (Arc::clone(&dirty), Arc::clone(heard));
                let task = tokio::spawn(async move {
                    while watch.changed().await.is_ok() {
                        dirty.store(true, Ordering::Release);
                        heard.notify_one();
                        // A namespace in which something changes all the time is looked at now and then.
                        sleep(SETTLE * 5).await;
                    }
                });
                Some(task.abort_handle())
            }
            Err(error) => {
                tracing::warn!(netns = %netns.id(), %error, "changes in a namespace cannot be listened for; it is looked at more often");
                None
            }
        };
        Self {
            every: if told && ear.is_some() {
                TOLD_EVERY
            } else {
                UNTOLD_EVERY
            },
            netns,
            dirty,
            ear,
            looked: None,
            listeners: None,
        }
    }

    fn lacking_listeners(&mut self, wanted: &[u16]) -> Vec<String> {
        if self.listeners.is_none() {
            self.listeners = Listeners::of(&self.netns).ok();
        }
        match self.listeners.as_ref().map(Listeners::now) {
            Some(Ok(listening)) => verify::lacking(&listening, wanted, verify::POD_PLACE),
            Some(Err(error)) => {
                self.listeners = None;
                vec![error.to_string()]
            }
            None => vec!["the kernel cannot be asked who listens".to_owned()],
        }
    }
}
