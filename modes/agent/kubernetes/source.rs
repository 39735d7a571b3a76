//! The source itself: what all its parts share, and its tasks.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use super::super::Agent;
use super::client::client;
use super::eligibility::Rules;
use super::known::{Key, Known};
use super::queue::Queue;
use super::reconcile::Scan;
use super::{Settings, watch as watching};
use crate::options::Mode;

/// Pods that are worked on at the same time.
const WORKERS: usize = 8;
/// Time between two looks at what the agent found of its pods' captures.
const EFFECTS_EVERY: Duration = Duration::from_secs(1);
/// Name of this program in events.
const REPORTER: &str = "ambidex.io/agent";

/// Pods from Kubernetes.
pub(in crate::agent) struct Source {
    pub(super) settings: Settings,
    pub(super) rules: Rules,
    client: Client,
    recorder: Recorder,
    known: Known,
    pub(super) queue: Queue<Key>,
    /// Whether everything was listed once.
    synced: watch::Sender<bool>,
    /// Why each watch does not stand, by what it watches; empty while all do.
    pub(super) lost: Mutex<BTreeMap<&'static str, String>>,
    /// UIDs of pods whose capture was proven since the agent started or it was last found broken.
    pub(super) proven: Mutex<BTreeSet<String>>,
    /// Last failure of a pod that an event was made of, by UID.
    pub(super) failures: Mutex<BTreeMap<String, String>>,
    pub(super) scan: tokio::sync::Mutex<Option<Scan>>,
    complaints: Mutex<BTreeSet<String>>,
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Source {
    /// A source that has not asked anything yet.
    pub(in crate::agent) async fn new(settings: &Settings, mode: Mode) -> anyhow::Result<Self> {
        let client = client(settings).await?;
        let reporter = Reporter {
            controller: REPORTER.to_owned(),
            instance: Some(settings.own_pod.clone()),
        };
        Ok(Self {
            settings: settings.clone(),
            rules: Rules {
                mode,
                exclude_namespaces: settings.exclude_namespaces.clone(),
                own_namespace: settings.own_namespace.clone(),
            },
            recorder: Recorder::new(client.clone(), reporter),
            client,
            known: Known::default(),
            queue: Queue::default(),
            synced: watch::Sender::new(false),
            lost: Mutex::default(),
            proven: Mutex::default(),
            failures: Mutex::default(),
            scan: tokio::sync::Mutex::default(),
            complaints: Mutex::default(),
        })
    }

    pub(super) fn client(&self) -> Client {
        self.client.clone()
    }

    pub(super) fn recorder(&self) -> &Recorder {
        &self.recorder
    }

    pub(super) fn known(&self) -> &Known {
        &self.known
    }

    /// Starts what goes on as long as the agent runs.
    pub(in crate::agent) fn start(&self, agent: &Arc<Agent>) -> Vec<JoinHandle<()>> {
        let mut tasks = vec![
            tokio::spawn(watching::pods(Arc::clone(agent))),
            tokio::spawn(watching::namespaces(Arc::clone(agent))),
            tokio::spawn(follow_effects(Arc::clone(agent))),
            tokio::spawn(follow_list(Arc::clone(agent))),
        ];
        tasks.extend((0..WORKERS).map(|_| tokio::spawn(work(Arc::clone(agent)))));
        tracing::info!(node = self.settings.node_name, "pods come from Kubernetes");
        tasks
    }

    /// Whether all was listed once; else what is in the way.
    pub(in crate::agent) fn ready(&self) -> Result<(), String> {
        if *self.synced.borrow() {
            return Ok(());
        }
        let lost = lock(&self.lost).values().next().cloned();
        Err(match lost {
            Some(why) => format!("the API server has not listed the pods of this node yet: {why}"),
            None => "the API server has not listed the pods of this node yet".to_owned(),
        })
    }

    /// Whether all watches stand.
    pub(in crate::agent) fn is_connected(&self) -> bool {
        *self.synced.borrow() && lock(&self.lost).is_empty()
    }

    /// Something was listed anew: all pods are looked at, also those that are on the agent's list only.
    pub(super) fn listed(&self, agent: &Agent) {
        if !self.known.is_synced() {
            return;
        }
        self.synced.send_replace(true);
        let of_agent = agent.pods.all().into_iter();
        let of_agent = of_agent.map(|pod| Key::new(&pod.namespace, &pod.name));
        let all: BTreeSet<Key> = self.known.keys().into_iter().chain(of_agent).collect();
        all.into_iter().for_each(|key| self.queue.push(key));
    }

    /// Logs what an administrator has to mend, once.
    pub(super) fn complain(&self, why: &str) {
        if lock(&self.complaints).insert(why.to_owned()) {
            tracing::error!(
                why,
                "the API server refuses; pods are captured all the same"
            );
        }
    }
}

/// Brings one pod after the other to what it should be.
async fn work(agent: Arc<Agent>) {
    let Some(source) = &agent.kubernetes else {
        return;
    };
    let mut synced = source.synced.subscribe();
    if synced.wait_for(|synced| *synced).await.is_err() {
        return;
    }
    loop {
        let key = source.queue.next().await;
        let outcome = source.reconcile(&agent, &key).await;
        if let Err(error) = &outcome {
            let error = format!("{error:#}");
            tracing::warn!(pod = %key, error, "pod is not as it should be yet");
        }
        source.queue.done(&key, outcome.is_ok());
    }
}

/// Hears of pods that a runtime or an operator enrolled or took away.
async fn follow_list(agent: Arc<Agent>) {
    let Some(source) = &agent.kubernetes else {
        return;
    };
    let mut changes = agent.pods.follow();
    while let Some(pod) = changes.recv().await {
        source.queue.remind(Key::new(&pod.namespace, &pod.name));
    }
}

/// Hears from the agent's own sweep whose capture broke or came back.
async fn follow_effects(agent: Arc<Agent>) {
    let Some(source) = &agent.kubernetes else {
        return;
    };
    let mut before: BTreeMap<String, Vec<String>> = BTreeMap::new();
    loop {
        tokio::time::sleep(EFFECTS_EVERY).await;
        let effects = agent.effects.all();
        for (uid, wrong) in &effects {
            if before.get(uid).is_none_or(Vec::is_empty) != wrong.is_empty()
                && let Some(pod) = agent.pods.get(uid)
            {
                source.queue.push(Key::new(&pod.namespace, &pod.name));
            }
        }
        before = effects;
    }
}
