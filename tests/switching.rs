//! Running pods change their capture, and neither their connections nor those who open new ones notice.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;
mod talk;

use std::net::{SocketAddr, TcpStream};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Scene, eventually, own, spec};
use lab::topology::{InpodRules, LabSpec, Mode, NodeFlow};
use rstest::rstest;
use runtime::{ambidex, assert_same, dumps, pods};
use serde_json::Value;
use talk::{Echo, PATIENCE, PORT, Talk, assert_alive, message};

/// The pod whose capture changes: the node's at first.
const SUBJECT: &str = "pod1-1";
/// Of both captures, on both nodes, and one without any.
const PEERS: [&str; 4] = ["plain1", "pod1-2", "pod2-1", "pod2-2"];
/// Long-lived connections with each peer, in each direction.
const EACH: usize = 4;

fn at(scene: &Scene, target: &str) -> SocketAddr {
    (scene.ip(target), PORT).into()
}

fn open_both_ways(scene: &Scene) -> Vec<Talk> {
    let mut talks = Vec::new();
    for number in 0..EACH * PEERS.len() {
        let peer = PEERS[number % PEERS.len()];
        let idle = (number / PEERS.len()).is_multiple_of(2);
        talks.push(Talk::open(&scene.lab, SUBJECT, at(scene, peer), idle));
        talks.push(Talk::open(&scene.lab, peer, at(scene, SUBJECT), idle));
    }
    talks
}

fn subject(scene: &Scene) -> Value {
    let uid = scene.pod(SUBJECT).uid;
    let all = pods(&scene.lab);
    let subject = all.into_iter().find(|pod| pod["uid"] == uid.as_str());
    subject.expect("the agent knows the pod")
}

fn switch(scene: &Scene, to: &str) -> String {
    let namespace = scene.pod(SUBJECT).namespace;
    let arguments = format!("mode set {namespace}/{SUBJECT} {to} --drain 10m");
    ambidex(&scene.lab, &arguments).with_code(0)
}

/// What became of the connections that began while something else was going on.
#[derive(Default)]
struct Storm {
    times: Vec<Duration>,
    failures: Vec<String>,
}

/// Opens connections one after the other, each with a message there and back, until it is told to end.
fn storm(scene: &Scene, from: &str, to: SocketAddr, ends: &AtomicBool, all: &Mutex<Storm>) {
    let netns = scene.lab.netns(from).unwrap();
    let mut number = 0;
    while !ends.load(Ordering::Relaxed) {
        let begun = Instant::now();
        number += 1;
        let made = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE));
        let done = made.unwrap().and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            message(&mut stream, number)
        });
        let mut all = all.lock().unwrap();
        match done {
            Ok(()) => all.times.push(begun.elapsed()),
            Err(error) => all.failures.push(format!("{from} to {to}: {error}")),
        }
        drop(all);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The captures of a connection from the subject to another pod and of one to it, as the subject's proxy names them.
fn captured_by(scene: &Scene) -> Vec<String> {
    let mark = || scene.mark(scene.node_of(SUBJECT));
    let since = mark();
    scene.seen(SUBJECT, scene.at("pod2-2"));
    scene.seen("pod2-2", scene.at(SUBJECT));
    let mut modes = Vec::new();
    eventually("both are in the log", PATIENCE, || {
        let lines = scene.access_lines(since);
        let modes_of = lines
            .iter()
            .filter_map(|line| line["capture_mode"].as_str());
        modes = modes_of.map(str::to_owned).collect();
        modes.len() >= 2
    });
    modes
}

/// A pod that talks with pods of both captures, and with one without, on both nodes, changes its capture again and again.
#[test]
fn a_pod_changes_its_capture_under_load() {
    let scene = own(&spec(Mode::Mixed));
    let lab = &scene.lab;
    let places = [SUBJECT, "node1", "proxy1"];
    let at_first = dumps(lab, &places);
    let everybody = [&[SUBJECT][..], &PEERS[..]].concat();
    let _servers: Vec<_> = everybody
        .iter()
        .map(|target| Echo::start(&scene.lab, target))
        .collect();
    let mut talks = open_both_ways(&scene);
    let ends = AtomicBool::new(false);
    let all = Mutex::new(Storm::default());
    std::thread::scope(|scope| {
        let _ends = End(&ends);
        for peer in PEERS {
            let (scene, ends, all) = (&scene, &ends, &all);
            scope.spawn(move || storm(scene, peer, at(scene, SUBJECT), ends, all));
            scope.spawn(move || storm(scene, SUBJECT, at(scene, peer), ends, all));
        }
        for to in ["inpod", "node", "inpod", "node"] {
            std::thread::sleep(Duration::from_millis(700));
            let said = switch(&scene, to);
            assert!(
                said.contains(&format!("is captured by {to} instead of")),
                "{said}"
            );
            assert_alive(&format!("captured by {to}"), &talks);
            assert_eq!(subject(&scene)["mode"], to);
            assert_ne!(subject(&scene)["leaving"]["capture"], to);
            talks.extend(open_both_ways(&scene));
        }
        std::thread::sleep(Duration::from_millis(700));
    });
    let storm = all.into_inner().unwrap();
    assert_eq!(storm.failures, [""; 0], "of {}", storm.times.len());
    assert!(storm.times.len() > 100, "{}", storm.times.len());
    assert_alive("at the end", &talks);
    drop(talks);
    eventually("nothing is left of the other capture", PATIENCE, || {
        subject(&scene)["leaving"].is_null()
    });
    // One thing differs: the pod was running when the node captured it.
    let live = format!("ipset mesh-live-pods member {}", scene.ip(SUBJECT));
    let mut at_last = dumps(lab, &places);
    for (_, dump) in &mut at_last {
        *dump = dump
            .lines()
            .filter(|line| *line != live)
            .fold(String::new(), |text, line| text + line + "\n");
    }
    assert_same("captured by node", &at_first, &at_last);
}

/// Raises a flag when it is dropped, also by a panic.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What begins after a change is captured by the other capture, in both directions; an idle pod keeps nothing of the one
/// that it had.
#[test]
fn what_is_new_goes_by_the_new_capture() {
    let scene = own(&spec(Mode::Mixed));
    for to in ["inpod", "node"] {
        switch(&scene, to);
        let modes = captured_by(&scene);
        assert!(modes.iter().all(|mode| mode == to), "{to}: {modes:?}");
        eventually("nothing is left of the other capture", PATIENCE, || {
            subject(&scene)["leaving"].is_null()
        });
        let namespace = scene.pod(SUBJECT).namespace;
        ambidex(&scene.lab, &format!("verify {namespace}/{SUBJECT}")).with_code(0);
    }
}

/// Where it is not proven that open connections survive, the change is refused with the way out, and nothing is changed.
#[rstest]
#[case::only_one_capture(Mode::Node, NodeFlow::Hybrid, InpodRules::Redirect, "--mode mixed")]
#[case::tunnel(
    Mode::Mixed,
    NodeFlow::Tunnel,
    InpodRules::Redirect,
    "--node-flow hybrid"
)]
#[case::tproxy(
    Mode::Mixed,
    NodeFlow::Hybrid,
    InpodRules::Tproxy,
    "--inpod-rules redirect"
)]
#[case::nftables(
    Mode::Mixed,
    NodeFlow::Hybrid,
    InpodRules::Nftables,
    "--inpod-rules redirect"
)]
fn what_is_not_proven_is_refused(
    #[case] mode: Mode,
    #[case] node_flow: NodeFlow,
    #[case] inpod_rules: InpodRules,
    #[case] way_out: &str,
) {
    let scene = own(&LabSpec {
        node_flow,
        inpod_rules,
        ..spec(mode)
    });
    let places = [SUBJECT, "node1", "proxy1"];
    let before = dumps(&scene.lab, &places);
    let pod = scene.pod(SUBJECT);
    let command = format!("mode set {}/{SUBJECT} inpod", pod.namespace);
    let said = ambidex(&scene.lab, &command);
    assert_eq!(said.code, 1, "{}{}", said.stdout, said.stderr);
    assert!(said.stderr.contains(way_out), "{}", said.stderr);
    assert_same(
        "the change was refused",
        &before,
        &dumps(&scene.lab, &places),
    );
    assert_eq!(subject(&scene)["mode"], "node");
}
