//! The command line's side of the agent's API.

use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use http::{Method, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::run_dir::RunDir;
use crate::unix_http;

/// How long the agent may take to tell something. The state of a whole node is read in less than a second.
const TELLS_WITHIN: Duration = Duration::from_secs(10);
/// How long it may take to do something. An undo of a node with hundreds of pods takes many seconds.
const DOES_WITHIN: Duration = Duration::from_secs(120);

/// How long a living agent may take to say anything at all.
const SIGN_OF_LIFE_WITHIN: Duration = Duration::from_secs(2);
/// Time between two questions to one that is ending.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Whether there is an agent.
#[derive(Debug)]
pub enum Life {
    /// It answers.
    Answers,
    /// Nobody listens.
    Nobody,
    /// Somebody listens and does not answer.
    Hung(anyhow::Error),
}

/// Whether the agent of this node lives. One that is just ending still takes connections, and drops them.
pub async fn life() -> Life {
    let socket = RunDir::from_env().agent();
    let deadline = Instant::now() + SIGN_OF_LIFE_WITHIN;
    loop {
        let asked = unix_http::request(
            &socket,
            Method::GET,
            "/healthz",
            Vec::new(),
            SIGN_OF_LIFE_WITHIN,
        );
        match asked.await {
            Ok(_) => return Life::Answers,
            Err(error) if error.is_nobody() => return Life::Nobody,
            Err(unix_http::RequestError::Http(..)) if Instant::now() < deadline => {
                tokio::time::sleep(ASK_EVERY).await;
            }
            Err(error) => return Life::Hung(error.into()),
        }
    }
}

/// Number of the process that listens on the agent's socket, as this process sees it.
pub async fn pid(run_dir: &RunDir) -> Option<i32> {
    let connected = tokio::time::timeout(
        SIGN_OF_LIFE_WITHIN,
        tokio::net::UnixStream::connect(run_dir.agent()),
    );
    let stream = connected.await.ok()?.ok()?;
    stream.peer_cred().ok()?.pid().filter(|pid| *pid > 0)
}

/// `GET` a JSON page of the agent of this node.
pub async fn get<T: DeserializeOwned>(uri: &str) -> anyhow::Result<T> {
    call(Method::GET, uri, TELLS_WITHIN).await
}

/// `GET` a JSON page of the agent of any node whose run directory is at hand.
pub async fn get_of<T: DeserializeOwned>(run_dir: &RunDir, uri: &str) -> anyhow::Result<T> {
    exchange_with(run_dir, Method::GET, uri, Vec::new(), TELLS_WITHIN).await
}

/// `POST` to a page of the agent of this node.
pub async fn post<T: DeserializeOwned>(uri: &str) -> anyhow::Result<T> {
    call(Method::POST, uri, DOES_WITHIN).await
}

/// `POST` of something to a page of the agent of this node.
pub async fn send<T: DeserializeOwned>(uri: &str, what: &impl Serialize) -> anyhow::Result<T> {
    let body = serde_json::to_vec(what)?;
    exchange(Method::POST, uri, body, DOES_WITHIN).await
}

async fn call<T: DeserializeOwned>(
    method: Method,
    uri: &str,
    within: Duration,
) -> anyhow::Result<T> {
    exchange(method, uri, Vec::new(), within).await
}

async fn exchange<T: DeserializeOwned>(
    method: Method,
    uri: &str,
    body: Vec<u8>,
    within: Duration,
) -> anyhow::Result<T> {
    exchange_with(&RunDir::from_env(), method, uri, body, within).await
}

async fn exchange_with<T: DeserializeOwned>(
    run_dir: &RunDir,
    method: Method,
    uri: &str,
    body: Vec<u8>,
    within: Duration,
) -> anyhow::Result<T> {
    let socket = run_dir.agent();
    let (status, body) = unix_http::request(&socket, method, uri, body, within).await?;
    if status != StatusCode::OK {
        return Err(anyhow!("{}", String::from_utf8_lossy(&body).trim_end()));
    }
    serde_json::from_slice(&body)
        .with_context(|| format!("the agent's answer to {uri} is not what was expected"))
}
