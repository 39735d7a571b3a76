//! A change of capture meets an error, the agent's end, the proxy's end or a long wait at each of its steps: the pod ends in
//! a capture that is proven, and nothing of it is ever in the clear. And a pod that is captured twice is no loop.
//!
//! `AMBIDEX_TEST_SUITE=all` goes through all of them; otherwise one fault is tried at one step in each direction.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;
mod talk;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use harness::marked::Marked;
use harness::{Scene, eventually, own, spec};
use lab::standing::Daemon;
use lab::topology::Mode;
use runtime::{Done, ambidex, pods};
use serde_json::Value;
use talk::{Echo, PATIENCE, PORT, Talk, assert_alive};

/// The pod whose capture changes: the node's at first.
const SUBJECT: &str = "pod1-1";
/// Pods of both captures and one without: what these say is not in the clear on a wire between nodes.
const PEERS: [&str; 3] = ["plain1", "pod1-2", "pod2-2"];
/// With whom the subject speaks where it is listened to.
const FAR: &str = "pod2-1";
const STEPS: [&str; 8] = [
    "hold",
    "prepare",
    "node-objects",
    "pod-objects",
    "exclusive",
    "flip",
    "release",
    "drain-end",
];
/// Longer than the proxy holds a pod.
const TOO_LONG: Duration = Duration::from_secs(4);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Error,
    AgentKilled,
    ProxyKilled,
    Stall,
}

const FAULTS: [Fault; 4] = [
    Fault::Error,
    Fault::AgentKilled,
    Fault::ProxyKilled,
    Fault::Stall,
];

/// A lab whose agents have faults when a file says so.
struct Faulty {
    scene: Scene,
    file: PathBuf,
    _directory: tempfile::TempDir,
}

impl Faulty {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("fault");
        let mut spec = spec(Mode::Mixed);
        let path = file.display().to_string();
        spec.daemon_env.insert("AMBIDEX_FAULTS".to_owned(), path);
        Self {
            scene: own(&spec),
            file,
            _directory: directory,
        }
    }

    fn reached(&self) -> PathBuf {
        PathBuf::from(format!("{}.reached", self.file.display()))
    }

    fn subject(&self) -> Value {
        let uid = self.scene.pod(SUBJECT).uid;
        let all = pods(&self.scene.lab);
        let subject = all.into_iter().find(|pod| pod["uid"] == uid.as_str());
        subject.expect("the agent knows the pod")
    }

    fn mode(&self) -> String {
        self.subject()["mode"].as_str().unwrap().to_owned()
    }

    fn set(&self, to: &str, drain: &str) -> Done {
        let namespace = self.scene.pod(SUBJECT).namespace;
        let arguments = format!("mode set {namespace}/{SUBJECT} {to} --drain {drain}");
        ambidex(&self.scene.lab, &arguments)
    }

    /// A change with a fault. Returns the capture that the pod has then.
    fn change(&self, step: &str, fault: Fault) -> String {
        let (scene, lab) = (&self.scene, &self.scene.lab);
        let to = match self.mode().as_str() {
            "node" => "inpod",
            _ => "node",
        };
        let what = format!("to {to}, {fault:?} at {step}");
        eprintln!("{what}");
        let (mut talks, drain) = match step {
            "drain-end" => (Vec::new(), "1s"),
            _ => (talks(scene), "10m"),
        };
        let action = match fault {
            Fault::Error => "fail",
            _ => "stall",
        };
        std::fs::write(&self.file, format!("switch:{step}:{action}")).unwrap();
        std::thread::scope(|scope| {
            let setting = scope.spawn(|| self.set(to, drain));
            eventually(&what, PATIENCE, || self.reached().exists());
            match fault {
                Fault::Error => {}
                Fault::Stall => std::thread::sleep(TOO_LONG),
                Fault::AgentKilled => lab.kill(1, Daemon::Agent).unwrap(),
                Fault::ProxyKilled => {
                    lab.kill(1, Daemon::Proxy).unwrap();
                    lab.start(1, Daemon::Proxy).unwrap();
                }
            }
            std::fs::remove_file(self.reached()).unwrap();
            if fault == Fault::AgentKilled {
                lab.start(1, Daemon::Agent).unwrap();
            }
            setting.join().unwrap();
        });
        lab.wait_ready(1, &|_| {}).unwrap();
        let namespace = scene.pod(SUBJECT).namespace;
        let verify = || ambidex(lab, &format!("verify {namespace}/{SUBJECT}"));
        let mut said = None;
        let proven = |said: &mut Option<Done>| {
            *said = Some(verify());
            said.as_ref().is_some_and(|said| said.code == 0)
        };
        let limit = std::time::Instant::now() + PATIENCE;
        while !proven(&mut said) {
            assert!(std::time::Instant::now() < limit, "{what}: {said:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
        let mode = self.mode();
        if fault == Fault::ProxyKilled {
            talks.clear();
        }
        assert_alive(&what, &talks);
        let since = scene.mark(1);
        scene.seen(SUBJECT, scene.at(FAR));
        scene.seen(FAR, scene.at(SUBJECT));
        let ip = scene.ip(SUBJECT).to_string();
        let mut by = Vec::new();
        eventually(&format!("{what}: in the log"), PATIENCE, || {
            let lines = scene.access_lines(since);
            // Only these two speak with the application of the lab.
            let of_subject = lines.iter().filter(|line| {
                let ends = ["src.addr", "dst.addr"].map(|end| line[end].to_string());
                ends.iter().any(|end| end.contains(&format!("\"{ip}:")))
                    && line.to_string().contains(":8080")
            });
            by = of_subject
                .filter_map(|line| line["capture_mode"].as_str().map(str::to_owned))
                .collect();
            by.len() >= 2
        });
        assert!(by.iter().all(|by| *by == mode), "{what}: {by:?}");
        mode
    }
}

fn talks(scene: &Scene) -> Vec<Talk> {
    let at = |target: &str| SocketAddr::from((scene.ip(target), PORT));
    let both = |peer: &&'static str| {
        [
            Talk::open(&scene.lab, SUBJECT, at(peer), true),
            Talk::open(&scene.lab, peer, at(SUBJECT), false),
        ]
    };
    PEERS.iter().flat_map(both).collect()
}

/// What is tried: all, or four of it.
fn table() -> Vec<(&'static str, Fault)> {
    if std::env::var("AMBIDEX_TEST_SUITE").as_deref() != Ok("all") {
        return vec![
            ("exclusive", Fault::AgentKilled),
            ("prepare", Fault::ProxyKilled),
            ("flip", Fault::Stall),
            ("release", Fault::AgentKilled),
        ];
    }
    let faults = |step: &'static str| FAULTS.map(|fault| (step, fault));
    STEPS.into_iter().flat_map(faults).collect()
}

#[test]
fn a_pod_ends_in_a_proven_capture() {
    let faulty = Faulty::new();
    let scene = &faulty.scene;
    let _servers: Vec<_> = [&[SUBJECT][..], &PEERS]
        .concat()
        .iter()
        .map(|target| Echo::start(&scene.lab, target))
        .collect();
    for (step, fault) in table() {
        for from in ["node", "inpod"] {
            if faulty.mode() != from {
                faulty.set(from, "10m").with_code(0);
            }
            let marked = Marked::between(scene, SUBJECT, FAR);
            faulty.change(step, fault);
            let what = format!("from {from}, {fault:?} at {step}");
            marked.flows(&what);
            // What a proxy's end leaves on a wire is no matter of the change: `tests/faults.rs`.
            if fault != Fault::ProxyKilled {
                marked.assert_never_in_the_clear();
            }
        }
    }
}

/// Left in both captures by hand, a pod of the in-pod capture has no connection that goes round: the proxy knows its own.
#[test]
fn a_pod_in_both_captures_is_no_loop() {
    let scene = own(&spec(Mode::Mixed));
    let lab = &scene.lab;
    let twice = || scene.metric(1, "ambidex_captured_twice_total", &[]);
    // The second one of a node is captured in its namespace.
    let (pod, far) = ("pod1-2", scene.at(FAR));
    assert_eq!(twice(), 0.0);
    let ip = scene.ip(pod).to_string();
    let ipset = |verb: &str| {
        let argv = ["ipset", verb, "ztunnel-pods-ips", &ip];
        let done = lab.run("node1", &argv, PATIENCE).unwrap();
        done.success(verb).unwrap();
    };
    ipset("add");
    let mut tried = 0.0;
    eventually("it is counted", PATIENCE, || {
        scene.refused(pod, far);
        tried += 1.0;
        twice() >= 1.0
    });
    let seen = twice();
    assert!(seen <= tried, "{seen} for {tried} connections");
    ipset("del");
    scene.seen(pod, far);
    assert_eq!(twice(), seen);
}
