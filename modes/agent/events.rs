//! Events of the CNI plugin: HTTP on `pluginevent.sock`.
//!
//! | request | done when it is answered with 200 |
//! |---|---|
//! | `POST /cmdadd` with a pod | the pod is captured, or is none that this node captures |
//! | `POST /cmddel` with a pod | nothing of it is left; also when it was never there |
//! | `POST /cmdcheck` with a pod | its capture was found complete in the kernel |
//! | `POST /cmdgc` with the attachments to a network | what none of them owns is taken away |
//! | `GET /status` | a pod could be captured |
//!
//! Otherwise 400 the request is wrong, 503 try again, 502 (of `/status`) the same while captured pods have no proxy, 500
//! anything else, with a sentence.

use std::io;
use std::sync::Arc;

use http::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::admission::pod_of;
use super::check::check;
use super::{Agent, EnrolError, Pod};
use crate::cni::{PodEvent, ValidAttachments};
use crate::unix_http::{Answer, Caller};

/// Answers one request.
async fn answer(
    agent: Arc<Agent>,
    method: Method,
    path: String,
    body: Vec<u8>,
    caller: Caller,
) -> Answer {
    let outcome = match (method, path.as_str()) {
        (Method::GET, "/status") => match agent.ready() {
            Ok(()) => return Answer::text(StatusCode::OK, "ready\n"),
            Err(why) => return Answer::text(agent.status_without_add(), format!("{why}\n")),
        },
        (Method::POST, "/cmdadd") => match parse(&body) {
            Ok(event) => add(&agent, &event, &caller).await,
            Err(error) => Err(error),
        },
        (Method::POST, "/cmddel") => match parse(&body) {
            Ok(event) => delete(&agent, &event).await,
            Err(error) => Err(error),
        },
        (Method::POST, "/cmdcheck") => match parse(&body) {
            Ok(event) => check(&agent, &event).await,
            Err(error) => Err(error),
        },
        (Method::POST, "/cmdgc") => match parse(&body) {
            Ok(valid) => collect_garbage(&agent, &valid).await,
            Err(error) => Err(error),
        },
        (method, path) => {
            return Answer::text(
                StatusCode::NOT_FOUND,
                format!("{method} {path}: no such event\n"),
            );
        }
    };
    match outcome {
        Ok(()) => Answer::text(StatusCode::OK, ""),
        Err(error) => error.answer(),
    }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, EnrolError> {
    serde_json::from_slice(body)
        .map_err(|error| EnrolError::Invalid(format!("not an event of the plugin: {error}")))
}

impl EnrolError {
    pub(super) fn answer(&self) -> Answer {
        let status = match self {
            EnrolError::Invalid(_) => StatusCode::BAD_REQUEST,
            EnrolError::NotReady { .. } => StatusCode::SERVICE_UNAVAILABLE,
            EnrolError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Answer::text(status, format!("{self}\n"))
    }
}

pub(super) fn failed(event: &PodEvent) -> impl Fn(anyhow::Error) -> EnrolError {
    let pod = format!("{}/{}", event.pod_namespace, event.pod_name);
    move |error| EnrolError::Failed {
        pod: pod.clone(),
        error,
    }
}

async fn add(agent: &Agent, event: &PodEvent, caller: &Caller) -> Result<(), EnrolError> {
    match pod_of(agent, event).await? {
        Some(pod) => agent.enrol(pod, caller).await,
        None => Ok(()),
    }
}

async fn delete(agent: &Agent, event: &PodEvent) -> Result<(), EnrolError> {
    let Some(pod) = known(agent, event) else {
        return Ok(());
    };
    agent
        .unenrol(&pod.uid, |pod| same_sandbox(pod, event))
        .await
        .map_err(failed(event))
}

/// Takes away what no attachment owns: pods of this network that the runtime does not know, and what was made for pods that
/// nobody knows. Attachments to other networks are not in the list; their pods go when they are gone.
async fn collect_garbage(agent: &Agent, valid: &ValidAttachments) -> Result<(), EnrolError> {
    if valid.network.is_empty() {
        return Err(EnrolError::Invalid("the event has no Network".to_owned()));
    }
    let owned = |pod: &Pod| {
        valid.attachments.iter().any(|attachment| {
            attachment.container_id == pod.container_id
                && (attachment.if_name.is_empty() || attachment.if_name == pod.if_name)
        })
    };
    agent
        .take_away_pods(|pod| {
            if pod.network == valid.network {
                !owned(pod)
            } else {
                pod.open_netns().is_err()
            }
        })
        .await;
    agent.take_away_unknown().await;
    Ok(())
}

/// The enrolled pod that an event is about: by UID, else by sandbox.
pub(super) fn known(agent: &Agent, event: &PodEvent) -> Option<Pod> {
    agent
        .pods
        .get(&event.pod_uid)
        .or_else(|| {
            agent.pods.all().into_iter().find(|pod| {
                !event.container_id.is_empty() && pod.container_id == event.container_id
            })
        })
        .filter(|pod| same_sandbox(pod, event))
}

/// A pod that got another sandbox is not deleted with the one before, which the runtime may clean up later; nor is one with
/// an attachment on which it is not captured.
fn same_sandbox(pod: &Pod, event: &PodEvent) -> bool {
    [
        (&pod.container_id, &event.container_id),
        (&pod.network, &event.network),
        (&pod.if_name, &event.if_name),
    ]
    .iter()
    .all(|(known, said)| known.is_empty() || said.is_empty() || known == said)
}

/// Starts serving events.
pub fn serve(agent: Arc<Agent>) -> io::Result<tokio::task::JoinHandle<()>> {
    let listener = crate::unix_http::listen(&agent.config.run_dir.plugin_events())?;
    Ok(tokio::spawn(crate::unix_http::serve(
        listener,
        move |method, path, body, caller| {
            let agent = Arc::clone(&agent);
            async move {
                let answered = answer(Arc::clone(&agent), method, path, body, caller).await;
                agent.counters.answered(answered.status());
                answered
            }
        },
    )))
}
