//! The command line's side of the agent's API.

use std::time::Duration;

use anyhow::{Context, anyhow};
use http::{Method, StatusCode};
use serde::de::DeserializeOwned;

use crate::run_dir::RunDir;
use crate::unix_http;

/// How long the agent may take. An undo of a node with hundreds of pods takes seconds.
const TIMEOUT: Duration = Duration::from_secs(60);

/// `GET` a JSON page of the agent of this node.
pub async fn get<T: DeserializeOwned>(uri: &str) -> anyhow::Result<T> {
    call(Method::GET, uri).await
}

/// `POST` to a page of the agent of this node.
pub async fn post<T: DeserializeOwned>(uri: &str) -> anyhow::Result<T> {
    call(Method::POST, uri).await
}

async fn call<T: DeserializeOwned>(method: Method, uri: &str) -> anyhow::Result<T> {
    let socket = RunDir::from_env().agent();
    let (status, body) = unix_http::request(&socket, method, uri, Vec::new(), TIMEOUT).await?;
    if status != StatusCode::OK {
        return Err(anyhow!("{}", String::from_utf8_lossy(&body).trim_end()));
    }
    serde_json::from_slice(&body)
        .with_context(|| format!("the agent's answer to {uri} is not what was expected"))
}
