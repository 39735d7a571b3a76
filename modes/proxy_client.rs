//! The command line's side of the proxies' admin pages, through their sockets in the run directory.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use http::{Method, StatusCode};
use serde::de::DeserializeOwned;

use crate::proxy::local_pages;
use crate::run_dir::RunDir;
use crate::unix_http;

/// How long a page may take. The workloads of a mesh of 100 000 are written in a few seconds.
const TELLS_WITHIN: Duration = Duration::from_secs(30);
/// Largest page: ten times the state of such a mesh.
const PAGE_LIMIT: usize = 1 << 30;

/// A proxy that answers.
#[derive(Debug, Clone)]
pub struct Proxy {
    socket: PathBuf,
}

impl Proxy {
    /// Its name among the proxies of its node.
    pub fn name(&self) -> String {
        let name = self.socket.file_stem().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    /// A page of it.
    pub async fn get<T: DeserializeOwned>(&self, uri: &str) -> anyhow::Result<T> {
        let (status, body) = unix_http::request_up_to(
            &self.socket,
            Method::GET,
            uri,
            Vec::new(),
            TELLS_WITHIN,
            PAGE_LIMIT,
        )
        .await?;
        if status != StatusCode::OK {
            bail!("{}", String::from_utf8_lossy(&body).trim_end());
        }
        serde_json::from_slice(&body)
            .with_context(|| format!("the proxy's answer to {uri} is not what was expected"))
    }
}

/// The proxies of a node, the newest last: two while one replaces the other.
///
/// # Errors
/// When none answers.
pub async fn all(run_dir: &RunDir) -> anyhow::Result<Vec<Proxy>> {
    let directory = RunDir::proxies(&run_dir.zds("INPOD_UDS"));
    answering(&directory).await
}

/// As [`all`], of a run directory that the environment says nothing about.
pub async fn all_in(run_dir: &Path) -> anyhow::Result<Vec<Proxy>> {
    answering(&run_dir.join("proxies")).await
}

async fn answering(directory: &Path) -> anyhow::Result<Vec<Proxy>> {
    let mut proxies = Vec::new();
    for socket in local_pages::sockets(directory)
        .with_context(|| format!("sockets of proxies in {}", directory.display()))?
    {
        // One that was killed leaves its socket until the next one starts.
        if tokio::net::UnixStream::connect(&socket).await.is_ok() {
            proxies.push(Proxy { socket });
        }
    }
    if proxies.is_empty() {
        bail!(
            "no proxy answers in {}: is the proxy of this node running? (`ambidex proxy`, or AMBIDEX_RUN_DIR names another node)",
            directory.display()
        );
    }
    Ok(proxies)
}

/// The newest proxy of a node: the one that gets what is new.
pub async fn newest(run_dir: &RunDir) -> anyhow::Result<Proxy> {
    let mut all = all(run_dir).await?;
    all.pop().context("no proxy")
}
