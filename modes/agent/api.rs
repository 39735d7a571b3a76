//! The agent's API for the command line: HTTP on `agent.sock`, JSON answers.
//!
//! | request | answer |
//! |---|---|
//! | `GET /healthz` | 200 when a pod could be captured: a proxy has its snapshot, the node's own objects stand; else 503 and why |
//! | `GET /v1/pods` | every pod of this node; with `?connections` also how many of its connections are outside the mesh |
//! | `GET /v1/enrolments` | how long the steps of the last enrolments took |
//! | `GET /v1/plan?pod=P` or `?node` | the plans with their places |
//! | `GET /v1/diff?pod=P` or `?node` | what the kernel lacks or has too much |
//! | `GET /v1/verify`, `?pod=P` or `?node` | everything looked at and probed now |
//! | `GET /v1/effects` | what is wrong with each pod's capture, as last looked at |
//! | `POST /v1/undo?pod=P` or `?node` | removes exactly that |
//! | `GET /v1/connections` | how many connections of each pod go through the proxy, and how many do not |
//! | `POST /v1/enrol` with a pod | captures a running pod |
//! | `POST /v1/unenrol?pod=P` | stops capturing it, and lets its connections end by themselves |
//! | `POST /v1/capture?pod=P&to=C` | captures it by the other capture, and lets its connections go on |
//! | `GET /v1/ledger?pod=P` | what became of its connections at each change of its capture; with `&connections` of each of them |

use std::path::PathBuf;
use std::sync::Arc;

use host_net::plan::Plan;
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};

use super::{Agent, NotFound, Pod, running, switching};
use crate::unix_http::{Answer, Caller};

/// One plan and where it is applied.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlacedPlan {
    /// `host`, `proxy` or `pod namespace/name`.
    pub place: String,
    /// Path of the namespace where one is known; the node's and the proxy's are held open by descriptor.
    pub netns: Option<PathBuf>,
    /// The descriptor of the node's or the proxy's in the agent's process: `/proc/PID/fd/N` to others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub descriptor: Option<i32>,
    /// The plan.
    pub plan: Plan,
}

/// A pod, and whether it is closed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ShownPod {
    /// The pod.
    #[serde(flatten)]
    pub pod: Pod,
    /// Why and where its traffic is stopped, of a pod whose capture cannot be put back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub closed: Option<String>,
    /// Connections that go on beside the capture because they are older (of a pod that drains: or younger) than it. Only
    /// where it was asked for, and the pod can be looked into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outside: Option<usize>,
}

/// What differs in one place.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PlacedFindings {
    /// Place.
    pub place: String,
    /// Name of the plan.
    pub plan: String,
    /// One line per object.
    pub findings: Vec<String>,
}

/// Outcome of an undo.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Undone {
    /// Plans that were taken away.
    pub plans: Vec<String>,
    /// What could not be removed; empty when the kernel is as before.
    pub errors: Vec<String>,
}

impl Undone {
    /// Both outcomes.
    pub(super) fn and(mut self, other: Self) -> Self {
        self.plans.extend(other.plans);
        self.errors.extend(other.errors);
        self
    }
}

/// Whom a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Subject {
    /// The node's own objects.
    Node,
    /// One pod, as the operator named it.
    Pod(String),
}

impl Subject {
    /// As a query string.
    pub fn query(&self) -> String {
        match self {
            Subject::Node => "node".to_owned(),
            Subject::Pod(pod) => format!("pod={pod}"),
        }
    }

    fn parse(query: &str) -> Option<Self> {
        match query.split_once('=') {
            None if query == "node" => Some(Subject::Node),
            Some(("pod", pod)) if !pod.is_empty() => Some(Subject::Pod(pod.to_owned())),
            _ => None,
        }
    }
}

/// Answers one request.
pub async fn answer(
    agent: Arc<Agent>,
    method: Method,
    uri: String,
    body: Vec<u8>,
    caller: Caller,
) -> Answer {
    let (path, query) = uri.split_once('?').unwrap_or((uri.as_str(), ""));
    match (method, path) {
        (Method::GET, "/healthz") => match agent.ready() {
            Ok(()) => Answer::text(StatusCode::OK, "ready\n"),
            Err(why) => Answer::text(StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
        },
        (Method::GET, "/v1/pods") => Answer::json(&shown(&agent, query == "connections")),
        (Method::GET, "/v1/enrolments") => Answer::json(&agent.timings.all()),
        (Method::GET, "/v1/connections") => Answer::json(&agent.connections_of_all(|_| true)),
        (Method::POST, "/v1/enrol") => running::enrol(&agent, &body, &caller).await,
        (Method::POST, "/v1/unenrol") => running::unenrol(&agent, query).await,
        (Method::POST, "/v1/capture") => switching::switch(&agent, query).await,
        (Method::GET, "/v1/ledger") => switching::ledger(&agent, query),
        (Method::GET, "/v1/effects") => Answer::json(&agent.effects.all()),
        (Method::GET, "/v1/verify") if query.is_empty() => {
            about(&agent, None, &Method::GET, path).await
        }
        (method, "/v1/verify" | "/v1/plan" | "/v1/diff" | "/v1/undo") => {
            let Some(subject) = Subject::parse(query) else {
                return Answer::text(
                    StatusCode::BAD_REQUEST,
                    "say ?node or ?pod=NAMESPACE/NAME\n",
                );
            };
            about(&agent, Some(&subject), &method, path).await
        }
        (method, path) => Answer::text(
            StatusCode::NOT_FOUND,
            format!("{method} {path}: no such page\n"),
        ),
    }
}

fn shown(agent: &Agent, connections: bool) -> Vec<ShownPod> {
    let shown = |pod: Pod| ShownPod {
        closed: agent.closings.finding(&pod.uid),
        outside: connections
            .then(|| agent.connections_of(&pod).ok())
            .flatten()
            .map(|counted| counted.outside),
        pod,
    };
    agent.pods.all().into_iter().map(shown).collect()
}

async fn about(agent: &Agent, subject: Option<&Subject>, method: &Method, path: &str) -> Answer {
    let verified = (method, path) == (&Method::GET, "/v1/verify");
    let outcome = match (subject, method, path) {
        _ if verified => agent.verify(subject).await.map(|all| Answer::json(&all)),
        (Some(subject), &Method::GET, "/v1/plan") => {
            agent.plans(subject).await.map(|plans| Answer::json(&plans))
        }
        (Some(subject), &Method::GET, "/v1/diff") => agent
            .diff(subject)
            .await
            .map(|findings| Answer::json(&findings)),
        (Some(subject), &Method::POST, "/v1/undo") => agent
            .undo(subject)
            .await
            .map(|undone| Answer::json(&undone)),
        _ => return Answer::text(StatusCode::METHOD_NOT_ALLOWED, "method not allowed\n"),
    };
    outcome.unwrap_or_else(|error| {
        let status = if error.is::<NotFound>() {
            StatusCode::NOT_FOUND
        } else {
            StatusCode::INTERNAL_SERVER_ERROR
        };
        Answer::text(status, format!("{error:#}\n"))
    })
}
