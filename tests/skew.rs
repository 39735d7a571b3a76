//! Neighbouring versions: what an older build left on disk and said on its sockets is understood, and agent, proxy and plugin of
//! both builds work together and replace each other.
//!
//! `skew/recorded` is what a build of the commit in its `version` had in its state directory with two captured pods, and what it
//! sent (traced); names of the lab, identities of namespaces and the boot are placeholders. The full suite runs the real
//! programs of the commit in `skew/previous`, which it builds, or those in `AMBIDEX_PREVIOUS`.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "a client of a test, no part of the proxy"
)]

mod harness;
mod runtime;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::marked::Marked;
use harness::{Stage, eventually, own};
use host_net::commands::as_commands;
use host_net::journal::{Record, boot_id};
use host_net::netns::Netns;
use inpod_redirect::zds::messages::{
    Request, Response, WorkloadRequest, WorkloadResponse, ZdsHello,
};
use lab::standing::{Daemon, Lab};
use lab::topology::Programs;
use lab::traffic::Check;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use prost::Message;
use rstest::rstest;
use runtime::{Sandbox, ambidex, assert_same, dumps, pods, request, start_agent, state_of};
use serde::Deserialize;
use serde_json::{Value, json};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);
/// What an agent changes.
const PLACES: [&str; 4] = ["node1", "proxy1", "pod1-1", "pod1-2"];
/// Connections that may be in an old proxy's hands when the node goes over to another one, or wait too long for it.
const FEW: u64 = 8;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// What an older build left and sent.
#[derive(Deserialize)]
struct Recorded {
    journal: BTreeMap<String, Value>,
    pods: BTreeMap<String, Value>,
    events: Vec<Event>,
    from_proxy: Vec<String>,
    from_agent: Vec<String>,
}

/// A request of the plugin.
#[derive(Deserialize)]
struct Event {
    request: String,
    body: Value,
}

impl Recorded {
    fn of(variant: Variant) -> Self {
        let name = format!("tests/skew/recorded/{}.json", variant.capture());
        serde_json::from_slice(&fs::read(root().join(name)).unwrap()).unwrap()
    }

    fn packets(hex: &[String]) -> Vec<Vec<u8>> {
        let byte = |text: &str, at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
        let packet = |text: &String| {
            (0..text.len())
                .step_by(2)
                .map(|at| byte(text, at))
                .collect()
        };
        hex.iter().map(packet).collect()
    }
}

/// Puts a lab's names and numbers in the placeholders' places.
fn fill(lab: &Lab, value: &Value) -> Value {
    match value {
        Value::String(text) => {
            if let Some(place) = text.strip_prefix("NETNS(") {
                let id = lab.netns(place.trim_end_matches(')')).unwrap().id();
                return json!({"dev": id.dev, "ino": id.ino});
            }
            fill_text(lab, text).into()
        }
        Value::Array(values) => values.iter().map(|value| fill(lab, value)).collect(),
        Value::Object(object) => object
            .iter()
            .map(|(key, value)| (fill_text(lab, key), fill(lab, value)))
            .collect(),
        other => other.clone(),
    }
}

fn fill_text(lab: &Lab, text: &str) -> String {
    let mut text = text
        .replace("adx-LAB-", &lab::topology::netns_prefix(&lab.name()))
        .replace("-LAB", &format!("-{}", lab.name()));
    if text == "BOOT" {
        text = boot_id();
    }
    for (_, pod) in lab.topology().pods() {
        text = text
            .replace(&format!("UID({})", pod.name), &pod.uid)
            .replace(&format!("CONTAINER({})", pod.name), &pod.container_id);
    }
    text
}

/// Makes what a record says that its agent had made.
fn make(lab: &Lab, record: &Record) {
    let place = PLACES
        .iter()
        .find(|place| lab.netns(place).unwrap().id() == record.netns);
    let script = format!(
        "set -e\niptables() {{ iptables-nft \"$@\"; }}\nip6tables() {{ ip6tables-nft \"$@\"; }}\n{}",
        as_commands(&record.plan).join("\n")
    );
    let netns = lab.netns(place.unwrap()).unwrap();
    let done = netns.run(|| Command::new("sh").args(["-c", &script]).output());
    let done = done.unwrap().unwrap();
    assert!(done.status.success(), "{}: {done:?}", record.plan.name);
}

/// An agent of today finds the state directory of an older one and the objects that it made: it goes on with the pods, serves,
/// verifies, understands the older plugin, and takes everything away.
#[rstest]
fn state_of_an_older_agent_is_taken_up(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let recorded = Recorded::of(variant);
    let mut spec = variant.spec();
    spec.leaves_pods = true;
    let scene = own(&spec);
    let lab = &scene.lab;
    lab.add_pod("pod2-1").unwrap();
    ambidex(lab, "undo --node").with_code(0);
    lab.stop(1, Daemon::Agent).unwrap();
    let before = dumps(lab, &PLACES);

    let state = lab.state_dir(1);
    // Made first is what others refer to.
    let rank = |name: &str| {
        ["proxy-", "host-node", "host-inpod", "host-pod-", "pod-"]
            .iter()
            .position(|start| name.starts_with(start))
    };
    let mut names: Vec<&String> = recorded.journal.keys().collect();
    names.sort_by_key(|name| rank(name));
    for name in names {
        let record = fill(lab, &recorded.journal[name]);
        make(lab, &serde_json::from_value(record.clone()).unwrap());
        let file = format!("journal/{}.json", fill_text(lab, name));
        fs::write(state.join(file), record.to_string()).unwrap();
    }
    for pod in recorded.pods.values() {
        let pod = fill(lab, pod);
        let file = format!("pods/{}.json", pod["pod"]["uid"].as_str().unwrap());
        fs::write(state.join(file), pod.to_string()).unwrap();
    }
    fs::write(lab.log_path(1, Daemon::Agent), "").unwrap();
    start_agent(lab);

    assert_eq!(pods(lab).len(), 2);
    let log = fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
    for bad in ["\"WARN\"", "\"ERROR\""] {
        assert!(!log.contains(bad), "{log}");
    }
    eventually("the older agent's pods are captured", LIMIT, || {
        ambidex(lab, "verify").code == 0
    });
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    scene.check("pod2-1", scene.at("pod1-2"), Check::Who);

    for event in &recorded.events {
        let head = event.request.trim_end_matches(" HTTP/1.1");
        let body = fill(lab, &event.body).to_string();
        let (status, answer) = request(lab, "pluginevent.sock", head, body.as_bytes());
        assert_eq!((status, answer.as_str()), (200, ""), "{body}");
        let there = state_of(lab, &scene.pod("pod1-2").uid).is_some();
        assert_eq!(there, head.ends_with("/cmdadd"), "{head}");
    }
    ambidex(lab, "undo --node").with_code(0);
    assert_same("undone", &before, &dumps(lab, &PLACES));
}

/// Every packet of the older build is read whole, and would be written to the byte.
#[rstest]
fn packets_of_an_older_build_are_understood(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let recorded = Recorded::of(variant);
    let from_proxy = Recorded::packets(&recorded.from_proxy);
    let (hello, answers) = from_proxy.split_first().unwrap();
    let read = ZdsHello::decode(&hello[..]).unwrap();
    assert_eq!((read.version, read.extension_version), (1, 1));
    assert_eq!(read.encode_to_vec(), *hello);
    let mut kinds = [0; 3];
    for packet in answers {
        let read = WorkloadResponse::decode(&packet[..]).unwrap();
        assert_eq!(read.encode_to_vec(), *packet, "{read:?}");
        match read.payload.unwrap() {
            Response::Ack(ack) => {
                assert_eq!(ack.error, "");
                kinds[0] += 1;
            }
            Response::Netns(_) => kinds[1] += 1,
            Response::State(state) => {
                assert!(state.workloads.iter().all(|workload| workload.up));
                assert_eq!(state.total, state.workloads.len() as u64);
                kinds[2] += 1;
            }
        }
    }
    assert!(kinds.iter().all(|kind| *kind > 0), "{kinds:?}");

    let mut added = 0;
    let mut deleted = 0;
    for packet in Recorded::packets(&recorded.from_agent) {
        let read = WorkloadRequest::decode(&packet[..]).unwrap();
        assert_eq!(read.encode_to_vec(), packet, "{read:?}");
        match read.payload.unwrap() {
            Request::Add(add) => {
                let info = add.workload_info.unwrap();
                assert!(info.name.starts_with("pod1-") && !info.service_account.is_empty());
                assert_eq!(add.addresses.len(), 1);
                added += 1;
            }
            Request::Del(del) => {
                assert_eq!(del.drain_millis, Some(5000));
                deleted += 1;
            }
            Request::ConfigureNode(node) => assert_eq!(node.flow, "hybrid"),
            _ => {}
        }
    }
    assert_eq!((added, deleted), (2, 1));
}

/// Directory of the older programs; none where the older build is not asked for.
fn previous() -> Option<PathBuf> {
    if let Some(given) = std::env::var_os("AMBIDEX_PREVIOUS") {
        let given = PathBuf::from(given);
        let dir = match given.is_dir() {
            true => given,
            false => given.parent().unwrap().to_path_buf(),
        };
        return Some(dir);
    }
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    all.then(build_previous)
}

/// Builds the commit of `skew/previous` in a working tree and with a target directory of its own, once.
fn build_previous() -> PathBuf {
    static BUILT: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    let built = BUILT.get_or_init(|| {
        let commit = fs::read_to_string(root().join("tests/skew/previous")).unwrap();
        let commit = commit.trim();
        let target = root().join("target/previous");
        let tree = tempfile::tempdir().unwrap();
        let path = tree.path().join("tree");
        let run = |program: &str, arguments: &[&str], dir: &Path| {
            let mut command = Command::new(program);
            command.args(arguments).current_dir(dir);
            command.env("CARGO_TARGET_DIR", &target);
            let done = command.stdin(Stdio::null()).output().unwrap();
            let errors = String::from_utf8_lossy(&done.stderr).into_owned();
            assert!(done.status.success(), "{program} {arguments:?}: {errors}");
        };
        let text = path.display().to_string();
        run(
            "git",
            &["worktree", "add", "--detach", &text, commit],
            &root(),
        );
        let built = std::panic::catch_unwind(|| run("cargo", &["build", "--bins"], &path));
        run("git", &["worktree", "remove", "--force", &text], &root());
        built.unwrap();
        target.join("debug")
    });
    built.clone()
}

/// Programs of a lab of which each can be the older or today's.
struct Versions {
    dir: tempfile::TempDir,
    previous: PathBuf,
}

/// One of the programs.
#[derive(Clone, Copy)]
enum Program {
    Agent,
    Proxy,
    Plugin,
}

impl Program {
    fn link(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Proxy => "proxy",
            Self::Plugin => "ambidex-cni",
        }
    }
}

impl Versions {
    /// All of them older.
    fn all_older(previous: PathBuf) -> Self {
        let dir = tempfile::tempdir().unwrap();
        // Written by another process than those that start it: a script that a child holds open cannot be run.
        let script = "#!/bin/sh\ncase $1 in agent | proxy) exec \"${0%/*}/$1\" \"$@\" ;; esac\nexec \"${0%/*}/today\" \"$@\"\n";
        let path = dir.path().join("ambidex").display().to_string();
        let write = format!("printf '%s' \"$1\" > {path} && chmod 755 {path}");
        let status = Command::new("sh")
            .args(["-c", &write, "sh", script])
            .status();
        assert!(status.unwrap().success());
        symlink(harness::ambidex(), dir.path().join("today")).unwrap();
        let versions = Self { dir, previous };
        for program in [Program::Agent, Program::Proxy, Program::Plugin] {
            versions.choose(program, false);
        }
        versions
    }

    fn path(&self, program: Program, today: bool) -> PathBuf {
        let dir = match today {
            true => Path::new(harness::ambidex()).parent().unwrap(),
            false => &self.previous,
        };
        dir.join(match program {
            Program::Plugin => "ambidex-cni",
            _ => "ambidex",
        })
    }

    /// Fails unless a daemon of the lab is of this version.
    #[track_caller]
    fn assert_runs(&self, lab: &Lab, node: u8, daemon: Daemon, today: bool) {
        let pid = lab.process(node, daemon).unwrap().pid;
        let runs = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
        let wanted = self.path(Program::Agent, today);
        assert_eq!(
            runs,
            wanted.canonicalize().unwrap(),
            "{daemon:?} of node{node}"
        );
    }

    /// What the next start of a program runs.
    fn choose(&self, program: Program, today: bool) {
        let (link, aside) = (
            self.dir.path().join(program.link()),
            self.dir.path().join("aside"),
        );
        symlink(self.path(program, today), &aside).unwrap();
        fs::rename(aside, link).unwrap();
    }

    fn programs(&self) -> Programs {
        Programs::beside(&self.dir.path().join("ambidex"))
    }
}

/// A proxy that takes over on node1, killed when it goes.
struct Successor(Child);

impl Drop for Successor {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = kill(pid, Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Starts today's proxy of node1 in another namespace, waits until it serves, and ends the older one.
fn replace_proxy(lab: &Lab) -> Successor {
    let place = Sandbox::wired(lab, "other1", [10, 244, 1, 105].into());
    let place = Netns::open(&place.netns).unwrap();
    let log = fs::File::create(lab.dir().join("log/successor.log")).unwrap();
    let mut command = Command::new(harness::ambidex());
    command
        .args(["proxy", "--drain-seconds", "1"])
        .envs(lab.environment(1))
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    let successor = Successor(place.run(|| command.spawn()).unwrap().unwrap());
    let ready = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 15021))?;
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: proxy\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    eventually("the successor serves", LIMIT, || {
        let answer = place.run(ready).unwrap();
        answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    });
    let old = lab.process(1, Daemon::Proxy).unwrap();
    old.signal(Signal::SIGTERM).unwrap();
    assert!(old.wait_gone(LIMIT));
    successor
}

/// The plugin adds and deletes a pod, and all that are captured prove to be.
fn works(scene: &Stage, plugin: &Path, what: &str) {
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    for verb in ["DEL", "ADD"] {
        let mut command = Command::new(plugin);
        let asked = sandbox.command(verb);
        command.env_clear();
        for (key, value) in asked.get_envs() {
            command.env(key, value.unwrap_or_default());
        }
        let done = runtime::Done::of(&mut command, sandbox.config(lab).to_string().as_bytes());
        assert_eq!(done.code, 0, "{what}: {verb}: {done:?}");
    }
    eventually(what, LIMIT, || ambidex(lab, "verify").code == 0);
    scene.check("pod1-2", scene.at("pod2-2"), Check::Who);
}

/// Old and new agents, proxies and plugins in all neighbourhoods that an upgrade passes, under load: on node1 the agent goes
/// first, on node2 the proxy.
#[rstest]
fn each_is_upgraded_by_itself(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let Some(previous) = previous() else {
        eprintln!("no older programs: neither the full suite nor AMBIDEX_PREVIOUS");
        return;
    };
    let versions = Versions::all_older(previous);
    let mut spec = variant.spec();
    spec.programs = versions.programs();
    let scene = own(&spec);
    let lab = &scene.lab;
    let older_plugin = versions.path(Program::Plugin, false);
    let plugin = versions.path(Program::Plugin, true);

    for daemon in [Daemon::Agent, Daemon::Proxy] {
        versions.assert_runs(lab, 1, daemon, false);
    }
    // Another agent, with the older proxy and the older plugin.
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    versions.choose(Program::Agent, true);
    lab.stop(1, Daemon::Agent).unwrap();
    start_agent(lab);
    versions.assert_runs(lab, 1, Daemon::Agent, true);
    marked.flows("after the agent's upgrade");
    assert_eq!(marked.failed(), 0, "an agent's upgrade fails no connection");
    works(
        &scene,
        &older_plugin,
        "agent of today, older proxy and plugin",
    );
    versions.choose(Program::Plugin, true);
    works(&scene, &plugin, "agent and plugin of today, older proxy");
    let failed = marked.failed();
    let successor = replace_proxy(lab);
    marked.flows("after the proxy's upgrade");
    let cut = marked.failed() - failed;
    eprintln!("{variant:?}: the proxy's upgrade failed {cut} connections");
    assert!(failed == 0 && cut <= if variant.is_node() { FEW } else { 0 });
    works(&scene, &plugin, "all of today");
    marked.assert_never_in_the_clear();

    // The other way round, without load: today's proxy with the older agent.
    versions.choose(Program::Agent, false);
    versions.choose(Program::Proxy, true);
    lab.stop(2, Daemon::Proxy).unwrap();
    lab.start(2, Daemon::Proxy).unwrap();
    lab.wait_ready(2, &|_| {}).unwrap();
    versions.assert_runs(lab, 2, Daemon::Agent, false);
    versions.assert_runs(lab, 2, Daemon::Proxy, true);
    scene.check("pod2-1", scene.at("pod1-1"), Check::Who);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    lab.del_pod("pod2-2").unwrap();
    lab.add_pod("pod2-2").unwrap();
    scene.check("pod2-2", scene.at("pod1-2"), Check::Who);
    versions.choose(Program::Agent, true);
    lab.stop(2, Daemon::Agent).unwrap();
    lab.start(2, Daemon::Agent).unwrap();
    lab.wait_ready(2, &|_| {}).unwrap();
    scene.check("pod2-2", scene.at("pod1-2"), Check::Who);
    drop(successor);
}
