//! Events of the CNI plugin: HTTP on `pluginevent.sock`.

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use host_net::netns::Netns;
use http::{Method, StatusCode};

use super::api::Subject;
use super::{Agent, EnrolError, Pod, PodState};
use crate::cni::PodEvent;
use crate::unix_http::Answer;

/// Answers one request: 200 done, 400 the request is wrong, 503 try again, 500 anything else.
pub async fn answer(agent: Arc<Agent>, method: Method, path: String, body: Vec<u8>) -> Answer {
    match (method, path.as_str()) {
        (Method::GET, "/status") => match agent.ready() {
            Ok(()) => Answer::text(StatusCode::OK, "ready\n"),
            Err(why) => Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        (Method::POST, "/cmdadd" | "/cmddel" | "/cmdcheck") => {
            let event: PodEvent = match serde_json::from_slice(&body) {
                Ok(event) => event,
                Err(error) => {
                    return Answer::text(
                        StatusCode::BAD_REQUEST,
                        format!("not a pod event: {error}\n"),
                    );
                }
            };
            let outcome = match path.as_str() {
                "/cmdadd" => add(&agent, &event).await,
                "/cmddel" => delete(&agent, &event).await,
                _ => check(&agent, &event).await,
            };
            outcome.unwrap_or_else(|error| error.answer())
        }
        (method, path) => Answer::text(
            StatusCode::NOT_FOUND,
            format!("{method} {path}: no such event\n"),
        ),
    }
}

impl EnrolError {
    fn answer(&self) -> Answer {
        let status = match self {
            EnrolError::Invalid(_) => StatusCode::BAD_REQUEST,
            EnrolError::NoProxy(_) => StatusCode::SERVICE_UNAVAILABLE,
            EnrolError::Failed { .. } => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Answer::text(status, format!("{self}\n"))
    }
}

async fn add(agent: &Agent, event: &PodEvent) -> Result<Answer, EnrolError> {
    if let Some(pod) = pod_of(agent, event)? {
        agent.enrol(pod).await?;
    }
    Ok(Answer::text(StatusCode::OK, ""))
}

async fn delete(agent: &Agent, event: &PodEvent) -> Result<Answer, EnrolError> {
    if let Some(pod) = known(agent, event) {
        agent
            .unenrol(&pod)
            .await
            .map_err(|error| EnrolError::Failed {
                pod: pod.qualified_name(),
                error,
            })?;
    }
    Ok(Answer::text(StatusCode::OK, ""))
}

async fn check(agent: &Agent, event: &PodEvent) -> Result<Answer, EnrolError> {
    let failed = |error| EnrolError::Failed {
        pod: format!("{}/{}", event.pod_namespace, event.pod_name),
        error,
    };
    let Some(pod) = known(agent, event) else {
        if agent.mode_of(&event.pod_name).is_none() {
            return Ok(Answer::text(StatusCode::OK, ""));
        }
        return Err(failed(anyhow::anyhow!("this agent has not enrolled it")));
    };
    let findings: Vec<String> = agent
        .diff(&Subject::Pod(pod.uid.clone()))
        .await
        .map_err(failed)?
        .into_iter()
        .flat_map(|place| place.findings)
        .collect();
    if findings.is_empty() && pod.state == PodState::Captured {
        Ok(Answer::text(StatusCode::OK, ""))
    } else {
        Err(failed(anyhow::anyhow!(
            "its capture is not effective: {}",
            findings.join("; ")
        )))
    }
}

/// The enrolled pod that an event is about: by UID, else by sandbox.
fn known(agent: &Agent, event: &PodEvent) -> Option<Pod> {
    agent.pods.get(&event.pod_uid).or_else(|| {
        agent
            .pods
            .all()
            .into_iter()
            .find(|pod| !event.container_id.is_empty() && pod.container_id == event.container_id)
    })
}

/// The pod to be enrolled, or none if this node does not capture it.
fn pod_of(agent: &Agent, event: &PodEvent) -> Result<Option<Pod>, EnrolError> {
    let invalid = |text: &str| EnrolError::Invalid(text.to_owned());
    for (name, value) in [
        ("PodName", &event.pod_name),
        ("PodNamespace", &event.pod_namespace),
        ("Netns", &event.netns),
    ] {
        if value.is_empty() {
            return Err(EnrolError::Invalid(format!("the event has no {name}")));
        }
    }
    let Some(mode) = agent.mode_of(&event.pod_name) else {
        return Ok(None);
    };
    let uid = if event.pod_uid.is_empty() {
        &event.container_id
    } else {
        &event.pod_uid
    };
    let well_formed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if uid.is_empty() || uid.len() > 128 || !uid.chars().all(well_formed) {
        return Err(EnrolError::Invalid(format!(
            "{uid:?} is not a pod UID: letters, digits, '-', '_' and '.' only"
        )));
    }
    let addresses: Vec<IpAddr> = event.ips.iter().map(|ip| ip.address.addr()).collect();
    if !addresses.iter().any(IpAddr::is_ipv4) {
        return Err(invalid(
            "the pod has no IPv4 address: only IPv4 is captured",
        ));
    }
    let netns_path = PathBuf::from(&event.netns);
    let netns = Netns::open(&netns_path).map_err(|e| EnrolError::Invalid(e.to_string()))?;
    if netns.id() == agent.host.id() {
        return Err(invalid(
            "the pod is in the node's own network namespace (hostNetwork): it cannot be captured",
        ));
    }
    Ok(Some(Pod {
        uid: uid.clone(),
        name: event.pod_name.clone(),
        namespace: event.pod_namespace.clone(),
        service_account: if event.service_account.is_empty() {
            "default".to_owned()
        } else {
            event.service_account.clone()
        },
        addresses,
        netns: netns_path,
        netns_id: netns.id(),
        container_id: event.container_id.clone(),
        mode,
        state: PodState::Pending,
    }))
}

/// Starts serving events.
pub fn serve(agent: Arc<Agent>) -> io::Result<tokio::task::JoinHandle<()>> {
    let listener = crate::unix_http::listen(&agent.config.run_dir.plugin_events())?;
    Ok(tokio::spawn(crate::unix_http::serve(
        listener,
        move |method, path, body| answer(Arc::clone(&agent), method, path, body),
    )))
}
