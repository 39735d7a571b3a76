//! Following the API server: list, watch, and list again when the watch cannot go on. While nobody answers what is known
//! stays.

use std::fmt::Debug;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use k8s_openapi::api::core::v1::{Namespace, Pod as PodObject};
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Resource};
use rand::Rng;
use serde::de::DeserializeOwned;

use super::super::Agent;
use super::known::{Change, KubernetesPod};
use super::source::{Source, lock};

/// Wait after the first failure.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// Longest wait: how late a node learns that the API server is back.
const LONGEST_RETRY: Duration = Duration::from_secs(5);

/// Follows the pods of this node.
pub(super) async fn pods(agent: Arc<Agent>) {
    let Some(source) = &agent.kubernetes else {
        return;
    };
    let of_node = format!("spec.nodeName={}", source.settings.node_name);
    let config = watcher::Config::default().fields(&of_node);
    let api: Api<PodObject> = Api::all(source.client());
    follow(source, "pods", api, config, |event| match event {
        Event::Init => source.known().begin_pods(),
        Event::InitApply(object) => {
            KubernetesPod::of(&object)
                .into_iter()
                .for_each(|pod| source.known().list_pod(pod));
        }
        Event::InitDone => {
            source.known().end_pods();
            source.listed(&agent);
        }
        Event::Apply(object) => {
            let Some(pod) = KubernetesPod::of(&object) else {
                return;
            };
            let key = pod.key.clone();
            match source.known().put_pod(pod) {
                Change::None => {}
                Change::Echo => source.queue.remind(key),
                Change::Real => source.queue.push(key),
            }
        }
        Event::Delete(object) => {
            if let Some(pod) = KubernetesPod::of(&object) {
                source.known().drop_pod(&pod.key, &pod.uid);
                source.queue.push(pod.key);
            }
        }
    })
    .await;
}

/// Follows all namespaces.
pub(super) async fn namespaces(agent: Arc<Agent>) {
    let Some(source) = &agent.kubernetes else {
        return;
    };
    let api: Api<Namespace> = Api::all(source.client());
    let named = |object: Namespace| {
        let labels = object.metadata.labels.unwrap_or_default();
        object.metadata.name.map(|name| (name, labels))
    };
    follow(
        source,
        "namespaces",
        api,
        watcher::Config::default(),
        |event| match event {
            Event::Init => source.known().begin_namespaces(),
            Event::InitApply(object) => {
                if let Some((name, labels)) = named(object) {
                    source.known().list_namespace(&name, labels);
                }
            }
            Event::InitDone => {
                source.known().end_namespaces();
                source.listed(&agent);
            }
            Event::Apply(object) => {
                if let Some((name, labels)) = named(object)
                    && source.known().put_namespace(&name, labels)
                {
                    let keys = source.known().keys_in(&name);
                    keys.into_iter().for_each(|key| source.queue.push(key));
                }
            }
            Event::Delete(object) => {
                if let Some((name, _)) = named(object) {
                    source.known().drop_namespace(&name);
                }
            }
        },
    )
    .await;
}

/// Hands on all events of a watch, for ever.
async fn follow<K>(
    source: &Source,
    what: &'static str,
    api: Api<K>,
    config: watcher::Config,
    mut take: impl FnMut(Event<K>),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut events = pin!(watcher(api, config));
    let mut wait = FIRST_RETRY;
    while let Some(event) = events.next().await {
        match event {
            Ok(event) => {
                // Said before the list is asked for.
                if !matches!(event, Event::Init) {
                    wait = FIRST_RETRY;
                    if lock(&source.lost).remove(what).is_some() {
                        tracing::info!(what, "the API server answers again");
                    }
                }
                take(event);
            }
            Err(error) => {
                let why = describe(&error);
                let before = lock(&source.lost).insert(what, why.clone());
                if before.is_none() {
                    tracing::warn!(
                        what,
                        why,
                        "the API server cannot be followed; what it said last holds"
                    );
                }
                // The watcher goes on at once when it is asked for the next event. Not all nodes at the same moment.
                let spread = rand::rng().random_range(0.5..1.5);
                tokio::time::sleep(wait.mul_f64(spread)).await;
                wait = (wait * 2).min(LONGEST_RETRY);
            }
        }
    }
}

/// An error with its causes.
fn describe(error: &watcher::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text = format!("{text}: {inner_text}");
        }
        cause = inner.source();
    }
    text
}
