//! The machine: versions, checks, kernel state, journal, configurations, logs.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;
use host_net::netns::Netns;
use serde_json::{Value, json};

use super::{Report, Request, component};
use crate::doctor::{self, collect::collect};

/// Programs whose versions matter, and how they tell them.
const TOOLS: [(&str, &str); 6] = [
    ("iptables-nft", "--version"),
    ("iptables-legacy", "--version"),
    ("ipset", "--version"),
    ("nft", "--version"),
    ("ip", "-V"),
    ("containerd", "--version"),
];
/// Logs of pods on a Kubernetes node, by the name of the pod's or container's directory.
const POD_LOGS: &str = "/var/log/pods";
const OUR_PODS: [&str; 2] = ["ambidex", "ztunnel"];
/// Units of systemd.
const UNITS: [&str; 2] = ["ambidex-agent", "ambidex-proxy"];
/// Lines of a unit's journal.
const UNIT_LINES: &str = "20000";

pub(super) async fn gather<F: FnMut(&str, Option<&str>)>(
    request: &Request,
    report: &mut Report<F>,
) {
    report.add_json::<_, String>("versions.json", Ok(versions()));
    let facts = collect(&request.sources).await;
    let findings = doctor::evaluate(&facts);
    let recommended = doctor::recommended(&findings);
    report.add_json::<_, String>(
        "doctor.json",
        Ok(json!({"recommended": recommended, "findings": findings.findings})),
    );
    report.add_json::<_, String>("facts.json", Ok(&facts));
    let here = Netns::current();
    match here {
        Ok(here) => report.add("node/dump.txt", dump(&here).await),
        Err(error) => report.add("node/dump.txt", Err(error)),
    }
    for (directory, name) in [("journal", "state/journal"), ("pods", "state/pods")] {
        for path in files(&request.sources.state_dir.join(directory)) {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            report.add_file(&format!("{name}/{}", component(&file)), &path);
        }
    }
    for (name, netns) in pods(&request.sources.state_dir) {
        let part = match Netns::open(&netns) {
            Ok(netns) => dump(&netns).await,
            Err(error) => Err(error.into()),
        };
        report.add(&format!("pods/{}/dump.txt", component(&name)), part);
    }
    for path in files(&request.sources.cni_conf_dir) {
        let file = path.file_name().unwrap_or_default().to_string_lossy();
        report.add_file(&format!("cni/{}", component(&file)), &path);
    }
    for path in files(&request.ca_dir) {
        let certificates = fs::read_to_string(&path).map(|text| certificates(&text));
        if let Ok(certificates) = certificates
            && !certificates.is_empty()
        {
            let file = path.file_name().unwrap_or_default().to_string_lossy();
            report.add::<String>(
                &format!("certificates/{}", component(&file)),
                Ok(certificates),
            );
        }
    }
    logs(request, report);
}

/// The canonical state of a namespace.
pub(super) async fn dump(netns: &Netns) -> anyhow::Result<String> {
    Ok(host_net::dump::dump(netns).await?.to_string())
}

fn versions() -> Value {
    let read = |path: &str| {
        fs::read_to_string(path)
            .unwrap_or_default()
            .trim()
            .to_owned()
    };
    let tool = |(program, flag): &(&str, &str)| {
        let said = Command::new(program).arg(flag).output().ok()?;
        let text = String::from_utf8_lossy(&said.stdout).trim().to_owned();
        Some(((*program).to_owned(), Value::String(text)))
    };
    let tools: serde_json::Map<String, Value> = TOOLS.iter().filter_map(tool).collect();
    json!({
        "ambidex": env!("CARGO_PKG_VERSION"),
        "architecture": std::env::consts::ARCH,
        "kernel": read("/proc/version"),
        "commandLine": read("/proc/cmdline"),
        "system": read("/etc/os-release"),
        "tools": tools,
    })
}

/// The files of a directory, sorted; none where there is no such directory.
fn files(directory: &Path) -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten();
    entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| path.is_file())
        .collect()
}

/// Pods that an agent wrote down, with the paths of their namespaces: known also when the agent is dead.
fn pods(state_dir: &Path) -> Vec<(String, PathBuf)> {
    let pod = |path: &PathBuf| {
        let stored: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let text = |key: &str| stored["pod"][key].as_str();
        let name = format!("{}_{}", text("namespace")?, text("name")?);
        Some((name, PathBuf::from(text("netns")?)))
    };
    files(&state_dir.join("pods"))
        .iter()
        .filter_map(pod)
        .collect()
}

/// Only the certificates of a PEM text.
fn certificates(text: &str) -> String {
    let mut out = String::new();
    let mut inside = false;
    for line in text.lines() {
        inside |= line.starts_with("-----BEGIN CERTIFICATE-----");
        if inside {
            out.push_str(line);
            out.push('\n');
        }
        inside &= !line.starts_with("-----END ");
    }
    out
}

fn logs<F: FnMut(&str, Option<&str>)>(request: &Request, report: &mut Report<F>) {
    for path in &request.logs {
        let name = component(&path.display().to_string());
        report.add_file(&format!("logs/{name}"), path);
    }
    let ours = |path: &Path| {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        OUR_PODS.iter().any(|part| name.contains(part))
    };
    let pods = fs::read_dir(POD_LOGS).into_iter().flatten();
    for pod in pods
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| ours(path))
    {
        let containers = fs::read_dir(&pod).into_iter().flatten();
        for container in containers.filter_map(|entry| Some(entry.ok()?.path())) {
            for path in files(&container) {
                let name = path
                    .strip_prefix(POD_LOGS)
                    .unwrap_or(&path)
                    .display()
                    .to_string();
                report.add_file(&format!("logs/pods/{}", component(&name)), &path);
            }
        }
    }
    for unit in UNITS {
        if let Ok(Some(text)) = unit_log(unit) {
            report.add::<String>(&format!("logs/{unit}.log"), Ok(text));
        }
    }
}

/// The journal of a unit, if systemd has one with something in it.
fn unit_log(unit: &str) -> anyhow::Result<Option<String>> {
    let arguments = [
        "--unit",
        unit,
        "--lines",
        UNIT_LINES,
        "--no-pager",
        "--quiet",
        "--output",
        "short-iso",
    ];
    let said = match Command::new("journalctl").args(arguments).output() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        said => said.context("journalctl")?,
    };
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    Ok((said.status.success() && !text.trim().is_empty()).then_some(text))
}
