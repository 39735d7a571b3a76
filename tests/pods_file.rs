//! A file names the running pods that are captured.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;
mod talk;

use std::fs;
use std::path::Path;

use harness::{Scene, eventually, own, spec};
use lab::standing::Daemon;
use lab::topology::Mode;
use runtime::{Sandbox, assert_same, dumps, pods, start_agent};
use serde_json::Value;
use talk::{Echo, PATIENCE, PORT, Talk, assert_alive};

/// The pod that the file names.
const SUBJECT: &str = "pod1-1";

/// Writes the file anew, as a whole.
fn write(file: &Path, text: &str) {
    let beside = file.with_extension("new");
    fs::write(&beside, text).unwrap();
    fs::rename(&beside, file).unwrap();
}

fn naming(scene: &Scene, capture: &str) -> String {
    let sandbox = Sandbox::of(&scene.lab, SUBJECT);
    format!(
        "pods:\n- namespace: {}\n  name: {SUBJECT}\n  netns: {}\n  uid: {}\n  serviceAccount: {}\n  capture: {capture}\n",
        sandbox.namespace,
        sandbox.netns.display(),
        sandbox.uid,
        sandbox.service_account
    )
}

fn subject(scene: &Scene) -> Option<Value> {
    let uid = scene.pod(SUBJECT).uid;
    let all = pods(&scene.lab);
    all.into_iter().find(|pod| pod["uid"] == uid.as_str())
}

#[track_caller]
fn becomes(scene: &Scene, state: &str, mode: &str) {
    eventually(&format!("{state} by {mode}"), PATIENCE, || {
        subject(scene).is_some_and(|pod| pod["state"] == state && pod["mode"] == mode)
    });
}

fn logged(scene: &Scene, words: &str) -> usize {
    let path = scene.lab.log_path(1, Daemon::Agent);
    fs::read_to_string(path).unwrap().matches(words).count()
}

/// Named, named with another capture, not named any more: its open connections go on. A file that is wrong changes nothing,
/// and an agent that starts does what the file says by then.
#[test]
fn a_pod_is_what_the_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("pods.yaml");
    fs::write(&file, "pods: []\n").unwrap();
    let mut spec = spec(Mode::Mixed);
    let path = file.display().to_string();
    spec.daemon_env.insert("AMBIDEX_PODS_FILE".to_owned(), path);
    let scene = own(&spec);
    let lab = &scene.lab;
    // It has the same file, and sees the pod's namespace, but the pod is not its own.
    lab.kill(2, Daemon::Agent).unwrap();
    lab.del_pod(SUBJECT).unwrap();
    let places = [SUBJECT, "node1", "proxy1"];
    let apart = dumps(lab, &places);
    let _servers = ["plain1", "pod2-1", "pod2-2"].map(|target| Echo::start(&scene.lab, target));
    let to = |target: &str| (scene.ip(target), PORT).into();
    let open = |target: &str| Talk::open(&scene.lab, SUBJECT, to(target), false);
    let before = [open("plain1")];

    write(&file, &naming(&scene, "inpod"));
    becomes(&scene, "captured", "inpod");
    let mut captured = vec![open("pod2-1"), open("pod2-2")];
    assert_eq!(subject(&scene).unwrap()["from_file"], true);

    write(&file, &naming(&scene, "both"));
    eventually("said", PATIENCE, || logged(&scene, "changes nothing") == 1);
    write(&file, &naming(&scene, "node"));
    becomes(&scene, "captured", "node");
    captured.push(open("pod2-2"));
    assert_alive("captured by node", &captured);

    // Whoever is told by nobody else says where the namespace is; a wrong place is said once, and captures nobody.
    let wrong = naming(&scene, "node").replace("netns: ", "netns: /nowhere");
    lab.kill(1, Daemon::Agent).unwrap();
    write(&file, &naming(&scene, "inpod"));
    start_agent(lab);
    becomes(&scene, "captured", "inpod");
    write(&file, &wrong);
    eventually("said", PATIENCE, || {
        logged(&scene, "a pod is not captured as the file says") == 1
    });
    becomes(&scene, "captured", "inpod");

    write(&file, "pods: []\n");
    becomes(&scene, "draining", "inpod");
    assert_alive("not named any more", &captured);
    assert_alive("older than all", &before);
    drop(captured);
    eventually("nothing is left", PATIENCE, || subject(&scene).is_none());
    assert_same("not captured", &apart, &dumps(lab, &places));
    assert_alive("older than all", &before);
}
