//! Events of the CNI plugin: HTTP on `pluginevent.sock`.
//!
//! | request | done when it is answered with 200 |
//! |---|---|
//! | `POST /cmdadd` with a pod | the pod is captured, or is none that this node captures |
//! | `POST /cmddel` with a pod | nothing of it is left; also when it was never there |
//! | `POST /cmdcheck` with a pod | its capture is complete |
//! | `POST /cmdgc` with the sandboxes that exist | pods that are gone are taken away |
//! | `GET /status` | a pod could be captured |
//!
//! Otherwise 400 the request is wrong, 503 try again, 500 anything else, with a sentence.

use std::io;
use std::sync::Arc;

use http::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::admission::pod_of;
use super::api::Subject;
use super::{Agent, EnrolError, Pod, PodState};
use crate::cni::{PodEvent, ValidSandboxes};
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
            Err(why) => {
                return Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n"));
            }
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
            Ok(valid) => {
                collect_garbage(&agent, &valid).await;
                Ok(())
            }
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
    fn answer(&self) -> Answer {
        let status = match self {
            EnrolError::Invalid(_) => StatusCode::BAD_REQUEST,
            EnrolError::NotReady { .. } => StatusCode::SERVICE_UNAVAILABLE,
            EnrolError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Answer::text(status, format!("{self}\n"))
    }
}

fn failed(event: &PodEvent) -> impl Fn(anyhow::Error) -> EnrolError {
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

async fn check(agent: &Agent, event: &PodEvent) -> Result<(), EnrolError> {
    let failed = failed(event);
    let Some(pod) = known(agent, event) else {
        if agent.mode_of(&event.pod_name).is_none() {
            return Ok(());
        }
        return Err(failed(anyhow::anyhow!("this agent has not enrolled it")));
    };
    if pod.state != PodState::Captured {
        return Err(failed(anyhow::anyhow!("it is {}", pod.state)));
    }
    agent.ready().map_err(&failed)?;
    let findings: Vec<String> = agent
        .diff(&Subject::Pod(pod.uid.clone()))
        .await
        .map_err(&failed)?
        .into_iter()
        .flat_map(|place| place.findings)
        .collect();
    if findings.is_empty() {
        return Ok(());
    }
    Err(failed(anyhow::anyhow!(
        "its capture is not effective: {}",
        findings.join("; ")
    )))
}

/// Takes pods away that are neither among the runtime's sandboxes nor still there. A pod that is there stays: the list is
/// that of one network, and a capture is not taken away because another network does not know the pod.
async fn collect_garbage(agent: &Agent, valid: &ValidSandboxes) {
    agent
        .take_away_pods(|pod| {
            !valid.container_ids.contains(&pod.container_id) && pod.open_netns().is_err()
        })
        .await;
}

/// The enrolled pod that an event is about: by UID, else by sandbox.
fn known(agent: &Agent, event: &PodEvent) -> Option<Pod> {
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

/// A pod that got another sandbox is not deleted with the one before, which the runtime may clean up later.
fn same_sandbox(pod: &Pod, event: &PodEvent) -> bool {
    event.container_id.is_empty()
        || pod.container_id.is_empty()
        || pod.container_id == event.container_id
}

/// Starts serving events.
pub fn serve(agent: Arc<Agent>) -> io::Result<tokio::task::JoinHandle<()>> {
    let listener = crate::unix_http::listen(&agent.config.run_dir.plugin_events())?;
    Ok(tokio::spawn(crate::unix_http::serve(
        listener,
        move |method, path, body, caller| answer(Arc::clone(&agent), method, path, body, caller),
    )))
}
