//! What agent and proxies say of themselves, as far as they live.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use host_net::netns::Netns;
use http::{Method, StatusCode};
use shared_proxy::telemetry::admin::METRICS_PORT;
use tokio::net::UnixStream;

use super::node::dump;
use super::redact::command_line;
use super::{Report, Request, component};
use crate::agent::Pod;
use crate::proxy::local_pages;
use crate::run_dir::RunDir;
use crate::unix_http;

/// How long one page may take.
const ANSWERS_WITHIN: Duration = Duration::from_secs(10);
/// Looking at a node with hundreds of pods takes longer.
const VERIFIES_WITHIN: Duration = Duration::from_secs(60);
/// Largest page: the state of a mesh of 100 000 workloads.
const LARGEST_PAGE: usize = 256 << 20;
/// The agent's metrics, unless it was told another port.
const AGENT_METRICS_PORT: u16 = 15014;

pub(super) async fn gather<F: FnMut(&str, Option<&str>)>(
    request: &Request,
    report: &mut Report<F>,
) {
    of_agent(&request.sources.run_dir, report).await;
    let directory = RunDir::proxies(&request.sources.run_dir.zds("INPOD_UDS"));
    match local_pages::sockets(&directory) {
        Ok(sockets) if sockets.is_empty() => {
            report.add(
                "proxies",
                Err(format!("no proxy has a socket in {}", directory.display())),
            );
        }
        Ok(sockets) => {
            for socket in sockets {
                of_proxy(&socket, report).await;
            }
        }
        Err(error) => report.add("proxies", Err(error)),
    }
}

async fn of_agent<F: FnMut(&str, Option<&str>)>(run_dir: &RunDir, report: &mut Report<F>) {
    let socket = run_dir.agent();
    // One that does not answer at all is asked only once.
    let health = page(&socket, "/healthz", ANSWERS_WITHIN).await;
    let answers = health.is_ok();
    report.add(
        "agent/health.txt",
        health
            .map(|(_, text)| text)
            .map_err(|error| format!("{error:#}")),
    );
    process(&socket, "agent", report).await;
    if !answers {
        return;
    }
    let pods: Vec<Pod> = match page(&socket, "/v1/pods", ANSWERS_WITHIN).await {
        Ok((_, text)) => {
            let pods = serde_json::from_str(&text).unwrap_or_default();
            report.add::<String>("agent/pods.json", Ok(text));
            pods
        }
        Err(error) => {
            report.add("agent/pods.json", Err(format!("{error:#}")));
            Vec::new()
        }
    };
    for (name, uri, within) in [
        ("agent/effects.json", "/v1/effects", ANSWERS_WITHIN),
        ("agent/enrolments.json", "/v1/enrolments", ANSWERS_WITHIN),
        ("agent/plan-node.json", "/v1/plan?node", ANSWERS_WITHIN),
        ("agent/diff-node.json", "/v1/diff?node", ANSWERS_WITHIN),
        ("agent/verify.json", "/v1/verify", VERIFIES_WITHIN),
    ] {
        report.add(name, good_page(&socket, uri, within).await);
    }
    for pod in pods {
        let name = component(&format!("{}_{}", pod.namespace, pod.name));
        for what in ["plan", "diff"] {
            let uri = format!("/v1/{what}?pod={}", pod.uid);
            let part = good_page(&socket, &uri, ANSWERS_WITHIN).await;
            report.add(&format!("pods/{name}/{what}.json"), part);
        }
    }
    let metrics = match Netns::current() {
        Ok(here) => metrics(here, AGENT_METRICS_PORT).await,
        Err(error) => Err(error.into()),
    };
    report.add(
        "agent/metrics.txt",
        metrics.map_err(|error| format!("{error:#}")),
    );
}

async fn of_proxy<F: FnMut(&str, Option<&str>)>(socket: &Path, report: &mut Report<F>) {
    let name = component(&socket.file_stem().unwrap_or_default().to_string_lossy());
    let name = format!("proxies/{name}");
    report.add(
        &format!("{name}/config_dump.json"),
        good_page(socket, "/config_dump", ANSWERS_WITHIN).await,
    );
    if let Some(netns) = process(socket, &name, report).await {
        let part = dump(&netns).await.map_err(|error| format!("{error:#}"));
        report.add(&format!("{name}/dump.txt"), part);
        let part = metrics(netns, METRICS_PORT)
            .await
            .map_err(|error| format!("{error:#}"));
        report.add(&format!("{name}/metrics.txt"), part);
    }
}

/// How a daemon was started, what it wrote where this machine keeps it in a file, and the namespace that it is in.
async fn process<F: FnMut(&str, Option<&str>)>(
    socket: &Path,
    name: &str,
    report: &mut Report<F>,
) -> Option<Netns> {
    let connected = tokio::time::timeout(ANSWERS_WITHIN, UnixStream::connect(socket)).await;
    let pid = connected
        .ok()?
        .ok()?
        .peer_cred()
        .ok()?
        .pid()
        .filter(|pid| *pid > 0)?;
    let arguments = fs::read(format!("/proc/{pid}/cmdline")).map(|bytes| {
        let arguments = bytes
            .split(|byte| *byte == 0)
            .filter(|argument| !argument.is_empty());
        let arguments = arguments.map(|argument| String::from_utf8_lossy(argument).into_owned());
        command_line(&arguments.collect::<Vec<_>>()) + "\n"
    });
    report.add(&format!("{name}/command.txt"), arguments);
    report.add_file(
        &format!("{name}/status.txt"),
        Path::new(&format!("/proc/{pid}/status")),
    );
    report.add_file(
        &format!("{name}/limits.txt"),
        Path::new(&format!("/proc/{pid}/limits")),
    );
    let output = fs::read_link(format!("/proc/{pid}/fd/2")).ok();
    // A terminal, a pipe or the journal has no past that could be read here.
    if let Some(path) = output.filter(|path| path.is_absolute() && path.is_file()) {
        report.add_file(&format!("{name}/log.txt"), &path);
    }
    match Netns::open(format!("/proc/{pid}/ns/net")) {
        Ok(netns) => Some(netns),
        Err(error) => {
            report.add(&format!("{name}/dump.txt"), Err(error));
            None
        }
    }
}

async fn page(socket: &Path, uri: &str, within: Duration) -> anyhow::Result<(StatusCode, String)> {
    let asked =
        unix_http::request_up_to(socket, Method::GET, uri, Vec::new(), within, LARGEST_PAGE);
    let (status, body) = asked.await?;
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

async fn good_page(socket: &Path, uri: &str, within: Duration) -> Result<String, String> {
    match page(socket, uri, within).await {
        Ok((StatusCode::OK, text)) => Ok(text),
        Ok((status, text)) => Err(format!("{status}: {}", text.trim())),
        Err(error) => Err(format!("{error:#}")),
    }
}

/// The metrics page on a port of loopback in a namespace.
async fn metrics(netns: Netns, port: u16) -> anyhow::Result<String> {
    let read = tokio::task::spawn_blocking(move || netns.run(|| read_metrics(port)));
    read.await?.context("entering the namespace")?
}

fn read_metrics(port: u16) -> anyhow::Result<String> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let mut stream = TcpStream::connect_timeout(&address, ANSWERS_WITHIN)
        .with_context(|| address.to_string())?;
    stream.set_read_timeout(Some(ANSWERS_WITHIN))?;
    stream.write_all(b"GET /metrics HTTP/1.0\r\nHost: localhost\r\nConnection: close\r\n\r\n")?;
    let mut answer = Vec::new();
    stream.take(LARGEST_PAGE as u64).read_to_end(&mut answer)?;
    let answer = String::from_utf8_lossy(&answer);
    let (head, body) = answer
        .split_once("\r\n\r\n")
        .ok_or_else(|| anyhow!("{address} does not speak HTTP"))?;
    if head.split(' ').nth(1) != Some("200") {
        bail!("{address}: {}", head.lines().next().unwrap_or_default());
    }
    Ok(body.to_owned())
}
