//! What the field's node agent offers around itself: health on port 8000, metrics on port 15014, and a socket to which the
//! plugin sends its log lines.
//!
//! | page | answer |
//! |---|---|
//! | `GET /healthz` (8000) | 200: the process answers |
//! | `GET /readyz` (8000) | 200 once events of the plugin are taken and Kubernetes, if it is the source, has listed all pods, until an undo of the node; else 503 and why |
//! | `GET /metrics` (15014) | the field's names where they apply, and `ambidex_agent_pods` |
//! | `POST /log` (`log.sock`) | a JSON array of JSON lines, which become lines of the agent's own log |

use std::collections::BTreeMap;
use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use super::{Agent, Pod, PodState};
use crate::unix_http::{self, Answer};

/// Lines of one delivery that are logged; what a plugin has to say about one pod is a few.
const LINE_LIMIT: usize = 1000;
/// Bytes of a delivered line that are logged.
const LINE_LENGTH: usize = 4096;

/// What is counted for the metrics.
#[derive(Debug, Default)]
pub(super) struct Counters {
    /// Answers to the plugin, by status.
    answers: Mutex<BTreeMap<u16, u64>>,
    /// Whether events of the plugin are taken.
    serving: AtomicBool,
}

impl Counters {
    pub(super) fn answered(&self, status: StatusCode) {
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        *answers.entry(status.as_u16()).or_default() += 1;
    }

    pub(super) fn serves(&self) {
        self.serving.store(true, Ordering::Release);
    }
}

/// Listeners of the health and the metrics pages.
pub(super) struct Listeners {
    health: TcpListener,
    metrics: TcpListener,
}

impl Listeners {
    /// Binds both.
    ///
    /// # Errors
    /// Names the address and the flag that chooses another.
    pub(super) async fn bind(health: SocketAddr, metrics: SocketAddr) -> anyhow::Result<Self> {
        #[allow(
            clippy::disallowed_methods,
            reason = "pages about the agent, in its own namespace: no captured connection"
        )]
        let bind = |address: SocketAddr, flag: &'static str| async move {
            TcpListener::bind(address).await.with_context(|| {
                format!("{address}: it is chosen with {flag}, and port 0 takes any")
            })
        };
        Ok(Self {
            health: bind(health, "--health").await?,
            metrics: bind(metrics, "--metrics").await?,
        })
    }

    /// Serves both until the tasks are dropped.
    pub(super) fn serve(self, agent: &Arc<Agent>) -> [JoinHandle<()>; 2] {
        [
            tokio::spawn(accept(self.health, Arc::clone(agent), health)),
            tokio::spawn(accept(self.metrics, Arc::clone(agent), metrics)),
        ]
    }
}

type Page = fn(&Agent, &Request<Incoming>) -> (StatusCode, String);

async fn accept(listener: TcpListener, agent: Arc<Agent>, page: Page) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            continue;
        };
        let agent = Arc::clone(&agent);
        tokio::spawn(async move {
            let service = service_fn(|request: Request<Incoming>| {
                let (status, text) = if request.method() == Method::GET {
                    page(&agent, &request)
                } else {
                    (StatusCode::METHOD_NOT_ALLOWED, "GET only\n".to_owned())
                };
                std::future::ready(
                    Response::builder()
                        .status(status)
                        .header(http::header::CONTENT_TYPE, "text/plain; version=0.0.4")
                        .body(Full::new(Bytes::from(text))),
                )
            });
            let connection = hyper::server::conn::http1::Builder::new();
            // A client that goes away is its own affair.
            let _ = connection
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn health(agent: &Agent, request: &Request<Incoming>) -> (StatusCode, String) {
    let unavailable = |why: String| (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n"));
    match request.uri().path() {
        "/healthz" => (StatusCode::OK, "ok\n".to_owned()),
        "/readyz" if !agent.counters.serving.load(Ordering::Acquire) => {
            unavailable("the agent is still restoring what an earlier one left".to_owned())
        }
        "/readyz" => match agent.refuse_after_undo().and_then(|()| agent.knows_pods()) {
            Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
            Err(why) => unavailable(why.to_string()),
        },
        _ => (StatusCode::NOT_FOUND, "/healthz or /readyz\n".to_owned()),
    }
}

fn metrics(agent: &Agent, request: &Request<Incoming>) -> (StatusCode, String) {
    if request.uri().path() != "/metrics" {
        return (StatusCode::NOT_FOUND, "/metrics\n".to_owned());
    }
    let mut pods: BTreeMap<(String, String), u64> = BTreeMap::new();
    for pod in agent.pods.all() {
        let of = (pod.mode.to_string(), pod.state.to_string());
        *pods.entry(of).or_default() += 1;
    }
    let answers = agent.counters.answers.lock();
    let answers = answers.unwrap_or_else(PoisonError::into_inner).clone();
    let connected = u8::from(agent.status().proxy_ready);
    let mut text = String::new();
    // Writing to a String does not fail.
    let mut series = |name: &str, kind: &str, help: &str, values: Vec<(String, u64)>| {
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in values {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    series(
        "istio_cni_plugin_requests_total",
        "counter",
        "Events of the CNI plugin, by the status that they were answered with.",
        answers
            .iter()
            .map(|(status, count)| (format!("{{response_code=\"{status}\"}}"), *count))
            .collect(),
    );
    series(
        "ztunnel_connected",
        "gauge",
        "Whether a proxy is connected and has its snapshot.",
        vec![(String::new(), u64::from(connected))],
    );
    series(
        "ambidex_agent_pods",
        "gauge",
        "Pods that this agent is responsible for.",
        pods.into_iter()
            .map(|((mode, state), count)| {
                let labels = format!("{{capture_mode=\"{mode}\",state=\"{state}\"}}");
                (labels, count)
            })
            .collect(),
    );
    if let Some(source) = &agent.kubernetes {
        series(
            "ambidex_kubernetes_connected",
            "gauge",
            "Whether the API server tells of pods and namespaces.",
            vec![(String::new(), u64::from(source.is_connected()))],
        );
    }
    let effects = agent.effects.all();
    series(
        "ambidex_capture_effective",
        "gauge",
        "Whether a pod's capture was found to work when it was last looked at.",
        agent
            .pods
            .all()
            .iter()
            .filter_map(|pod| {
                let wrong = effects.get(&pod.uid)?;
                // Names have no character that would have to be escaped: enrolment refuses them.
                let labels = format!(
                    "{{namespace=\"{}\",pod=\"{}\",capture_mode=\"{}\"}}",
                    pod.namespace, pod.name, pod.mode
                );
                Some((labels, u64::from(wrong.is_empty())))
            })
            .collect(),
    );
    // Only a pod that was running when it was enrolled, or that drains, has any. Asked of the kernel at this moment.
    let known = |pod: &Pod| pod.live || pod.state == PodState::Draining;
    let outside = agent.connections_of_all(known);
    series(
        "ambidex_outside_connections",
        "gauge",
        "Open connections of a pod that go beside its capture because they are older.",
        outside
            .iter()
            .filter_map(|counted| {
                let pod = agent.pods.get(&counted.uid)?;
                let labels = format!(
                    "{{namespace=\"{}\",pod=\"{}\",capture_mode=\"{}\"}}",
                    pod.namespace, pod.name, pod.mode
                );
                Some((labels, counted.outside as u64))
            })
            .collect(),
    );
    text.push_str(&agent.ledgers.metrics());
    (StatusCode::OK, text)
}

/// Starts taking log lines of the plugin.
pub(super) fn take_logs(agent: &Agent) -> std::io::Result<JoinHandle<()>> {
    let listener = unix_http::listen(&agent.config.run_dir.plugin_log())?;
    Ok(tokio::spawn(unix_http::serve(
        listener,
        |method, path, body, _caller| async move { log(&method, &path, &body) },
    )))
}

fn log(method: &Method, path: &str, body: &[u8]) -> Answer {
    if (method, path) != (&Method::POST, "/log") {
        return Answer::text(StatusCode::NOT_FOUND, "POST /log\n");
    }
    let lines: Vec<String> = match serde_json::from_slice(body) {
        Ok(lines) => lines,
        Err(error) => {
            return Answer::text(
                StatusCode::BAD_REQUEST,
                format!("not a list of log lines: {error}\n"),
            );
        }
    };
    for line in lines.iter().take(LINE_LIMIT) {
        let (level, message) = level_and_message(line);
        match level.as_str() {
            "error" | "fatal" => tracing::error!(target: "cni", "{message}"),
            "warn" => tracing::warn!(target: "cni", "{message}"),
            "debug" => tracing::debug!(target: "cni", "{message}"),
            _ => tracing::info!(target: "cni", "{message}"),
        }
    }
    Answer::text(StatusCode::OK, "")
}

/// Level and text of a line of a plugin: an object with `level` and `msg`, or any text. Without control characters, which
/// could pass for further lines.
fn level_and_message(line: &str) -> (String, String) {
    let object: Option<Value> = serde_json::from_str(line).ok();
    let field = |name: &str| Some(object.as_ref()?.get(name)?.as_str()?.to_owned());
    let message = field("msg").unwrap_or_else(|| line.to_owned());
    let message = message.chars().filter(|c| !c.is_control());
    (
        field("level").unwrap_or_default(),
        message.take(LINE_LENGTH).collect(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_any_kind_become_one_line() {
        let line = r#"{"level":"error","time":"t","msg":"no\nroute"}"#;
        let both = level_and_message(line);
        assert_eq!((both.0.as_str(), both.1.as_str()), ("error", "noroute"));
        assert_eq!(level_and_message("plain\u{1b}[31m").1, "plain[31m");
        assert_eq!(level_and_message(&"x".repeat(10_000)).1.len(), LINE_LENGTH);
    }

    #[test]
    fn what_is_no_list_of_lines_is_refused() {
        let status = |body: &str| log(&Method::POST, "/log", body.as_bytes()).status();
        assert_eq!(status("{}"), StatusCode::BAD_REQUEST);
        assert_eq!(status("[1]"), StatusCode::BAD_REQUEST);
        assert_eq!(status(r#"["a"]"#), StatusCode::OK);
        assert_eq!(
            log(&Method::GET, "/log", b"[]").status(),
            StatusCode::NOT_FOUND
        );
    }
}
