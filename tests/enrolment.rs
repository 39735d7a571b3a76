//! Running pods come into the mesh and leave it, and their connections do not notice.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;
mod talk;

use std::net::SocketAddr;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Scene, eventually, own};
use host_net::netns::Netns;
use lab::standing::Daemon;
use rstest::rstest;
use runtime::{Sandbox, ambidex, assert_same, dumps, pods, start_agent, state_of};
use serde_json::Value;
use talk::{Echo, PATIENCE, PORT, Talk, assert_alive};

/// The pod that comes and goes.
const SUBJECT: &str = "pod1-2";
/// Connections in each direction.
const EACH_WAY: usize = 20;

/// Connections of the subject: to these pods, and from them.
fn open_both_ways(scene: &Scene, peers: &[&str]) -> Vec<Talk> {
    let mut talks = Vec::new();
    for at in 0..EACH_WAY {
        let peer = peers[at % peers.len()];
        let idle = at % 4 < 2;
        let to = |target: &str| SocketAddr::from((scene.ip(target), PORT));
        talks.push(Talk::open(&scene.lab, SUBJECT, to(peer), idle));
        talks.push(Talk::open(&scene.lab, peer, to(SUBJECT), idle));
    }
    talks
}

fn enrol(scene: &Scene) -> String {
    let sandbox = Sandbox::of(&scene.lab, SUBJECT);
    let arguments = format!(
        "enrol {}/{SUBJECT} --netns {} --uid {} --service-account {}",
        sandbox.namespace,
        sandbox.netns.display(),
        sandbox.uid,
        sandbox.service_account
    );
    ambidex(&scene.lab, &arguments).with_code(0)
}

fn unenrol(scene: &Scene, flags: &str) -> String {
    let namespace = scene.pod(SUBJECT).namespace;
    let arguments = format!("unenrol {namespace}/{SUBJECT}{flags}");
    ambidex(&scene.lab, &arguments).with_code(0)
}

/// Connections of the subject outside the mesh, and through the proxy, as the agent counts them.
fn counted(scene: &Scene) -> (u64, u64) {
    let (status, body) = runtime::request(&scene.lab, "agent.sock", "GET /v1/connections", b"");
    assert_eq!(status, 200, "{body}");
    let all: Vec<Value> = serde_json::from_str(&body).unwrap();
    let uid = scene.pod(SUBJECT).uid;
    let of_pod = all.iter().find(|pod| pod["uid"] == uid.as_str()).unwrap();
    let number = |key: &str| of_pod[key].as_u64().unwrap();
    (number("outside"), number("through"))
}

/// Connections of the subject outside the mesh, as an operator and a scraper are told.
fn told_outside(scene: &Scene) -> (Option<u64>, String, String) {
    let lab = &scene.lab;
    let uid = scene.pod(SUBJECT).uid;
    let pods = pods(lab);
    let of_pod = pods.iter().find(|pod| pod["uid"] == uid.as_str());
    let json = of_pod.and_then(|pod| pod["outside"].as_u64());
    let wide = ambidex(lab, "get pods -o wide").with_code(0);
    let words = |line: &str| {
        let words = line
            .split("  ")
            .map(str::trim)
            .filter(|word| !word.is_empty());
        words.map(str::to_owned).collect::<Vec<_>>()
    };
    let mut lines = wide.lines().map(words);
    let header = lines.next().unwrap();
    let column = header.iter().position(|word| word == "OUTSIDE").unwrap();
    let row = lines.find(|row| row.contains(&uid)).unwrap();
    let url = "http://127.0.0.1:15014/metrics";
    let argv = ["curl", "--silent", "--fail", url];
    let page = lab.run("node1", &argv, PATIENCE).unwrap().stdout;
    let mode = of_pod.unwrap()["mode"].as_str().unwrap();
    let namespace = scene.pod(SUBJECT).namespace;
    let labels = format!("namespace=\"{namespace}\",pod=\"{SUBJECT}\",capture_mode=\"{mode}\"");
    let series = format!("ambidex_outside_connections{{{labels}}} ");
    let value = page.lines().find_map(|line| line.strip_prefix(&series));
    (json, row[column].clone(), value.unwrap_or(&page).to_owned())
}

fn state(scene: &Scene) -> Option<String> {
    state_of(&scene.lab, &scene.pod(SUBJECT).uid)
}

/// Connections from before the capture stay outside the mesh, captured ones go on when it ends, and all of them when it
/// comes again; an agent that is killed meanwhile changes nothing. What is left of the capture goes with the last of them.
#[rstest]
fn connections_of_a_running_pod_go_on(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let places = [SUBJECT, "node1", "proxy1"];
    lab.del_pod(SUBJECT).unwrap();
    let apart = dumps(lab, &places);
    let all = ["plain1", "plain2", "pod2-1", SUBJECT];
    let _servers = all.map(|target| Echo::start(&scene.lab, target));
    let each = 2 * EACH_WAY as u64;

    let before = open_both_ways(&scene, &["plain1", "plain2"]);
    let said = enrol(&scene);
    assert!(
        said.contains(&format!("{each} open connection(s) kept outside")),
        "{said}"
    );
    assert_alive("enrolled", &before);
    assert_eq!(counted(&scene), (each, 0));
    // A probe of the node's is none of them.
    let node = scene.node_of(SUBJECT);
    let probe = Talk::open(
        &scene.lab,
        &format!("node{node}"),
        (scene.ip(SUBJECT), PORT).into(),
        true,
    );
    let told = (Some(each), each.to_string(), each.to_string());
    assert_eq!(told_outside(&scene), told);
    drop(probe);
    let captured = open_both_ways(&scene, &["plain2", "pod2-1"]);
    assert_eq!(counted(&scene), (each, each), "new ones are captured");

    let said = unenrol(&scene, " --drain 10m");
    assert!(
        said.contains(&format!("{each} connection(s) through the proxy go on")),
        "{said}"
    );
    assert_eq!(state(&scene).as_deref(), Some("draining"));
    let between = open_both_ways(&scene, &["plain1", "plain2"]);
    for (when, talks) in [
        ("before", &before),
        ("captured", &captured),
        ("between", &between),
    ] {
        assert_alive(&format!("unenrolled, {when}"), talks);
    }
    assert_eq!(counted(&scene), (2 * each, each), "nothing new is captured");
    lab.kill(1, Daemon::Agent).unwrap();
    start_agent(lab);
    assert_eq!(state(&scene).as_deref(), Some("draining"));
    // A proxy that took the agent for another one would end what it serves, and give it five seconds.
    std::thread::sleep(Duration::from_secs(6));
    assert_alive("another agent", &captured);

    let said = enrol(&scene);
    assert!(
        said.contains(&format!("{} open connection(s)", 2 * each)),
        "{said}"
    );
    assert_eq!(scene.seen(SUBJECT, scene.at("pod2-1")), scene.ip(SUBJECT));
    for (when, talks) in [
        ("before", &before),
        ("captured", &captured),
        ("between", &between),
    ] {
        assert_alive(&format!("enrolled again, {when}"), talks);
    }
    assert_eq!(counted(&scene), (2 * each, each));

    unenrol(&scene, " --drain 10m");
    assert_alive("unenrolled again", &captured);
    drop(captured);
    eventually("nothing is left of the capture", PATIENCE, || {
        state(&scene).is_none()
    });
    assert_same("drained", &apart, &dumps(lab, &places));
    assert_alive("nobody cares any more", &before);
    assert_alive("nobody cares any more", &between);
}

/// The time to drain is over: captured connections are reset, others are not touched, and nothing is left. So does a
/// removal without drain, which shows that these tests see connections break.
#[rstest]
fn draining_ends(
    #[values(NodeHybrid, Inpod)] variant: Variant,
    #[values(" --drain 2s --wait", " --drain 0s --wait")] flags: &str,
) {
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let places = [SUBJECT, "node1", "proxy1"];
    lab.del_pod(SUBJECT).unwrap();
    let apart = dumps(lab, &places);
    let _servers = ["plain2", SUBJECT].map(|target| Echo::start(&scene.lab, target));
    let before = open_both_ways(&scene, &["plain2"]);
    enrol(&scene);
    let captured = open_both_ways(&scene, &["plain2"]);
    unenrol(&scene, flags);
    assert_eq!(state(&scene), None);
    assert_same("drained", &apart, &dumps(lab, &places));
    for talk in &captured {
        talk.wanted.store(u64::MAX, Ordering::Relaxed);
    }
    eventually("captured connections are cut", PATIENCE, || {
        captured.iter().all(|talk| talk.broken().is_some())
    });
    assert_alive("older than the capture", &before);
}

/// An agent that is killed while it lets a pod go, at any step, is followed by one that goes on from there: the pod is still
/// captured, or drains, and no connection notices. The last step is the one between the record and whatever follows it.
#[rstest]
fn killed_while_it_lets_a_pod_go(#[values(NodeHybrid, Inpod)] variant: Variant) {
    const MOMENTS: [u64; 5] = [0, 6, 15, 40, 120];
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let places = [SUBJECT, "node1", "proxy1"];
    lab.del_pod(SUBJECT).unwrap();
    let apart = dumps(lab, &places);
    let _servers = ["pod2-1", "plain2", SUBJECT].map(|target| Echo::start(&scene.lab, target));
    let uid = scene.pod(SUBJECT).uid;
    let namespace = scene.pod(SUBJECT).namespace;
    let both_ways = |peer| {
        [(SUBJECT, peer), (peer, SUBJECT)]
            .map(|(from, to)| Talk::open(&scene.lab, from, (scene.ip(to), PORT).into(), false))
    };
    let mut captured = Vec::new();
    let mut ends = [0, 0];
    for moment in MOMENTS.map(Some).into_iter().chain([None]) {
        enrol(&scene);
        captured.extend(both_ways("pod2-1"));
        match moment.map(Duration::from_millis) {
            Some(moment) => std::thread::scope(|scope| {
                let arguments = format!("unenrol {namespace}/{SUBJECT} --drain 10m");
                scope.spawn(move || ambidex(lab, &arguments));
                std::thread::sleep(moment);
                lab.kill(1, Daemon::Agent).unwrap();
            }),
            None => {
                lab.kill(1, Daemon::Agent).unwrap();
                let file = lab.state_dir(1).join(format!("pods/{uid}.json"));
                let mut stored: Value =
                    serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
                stored["pod"]["state"] = "draining".into();
                let until = SystemTime::now() + Duration::from_secs(600);
                let until = until.duration_since(UNIX_EPOCH).unwrap().as_secs();
                stored["pod"]["drains_until"] = until.into();
                std::fs::write(&file, stored.to_string()).unwrap();
            }
        }
        start_agent(lab);
        match (state(&scene).as_deref(), moment) {
            (Some("captured"), Some(_)) => ends[0] += 1,
            (Some("draining"), _) => ends[1] += 1,
            other => panic!("{other:?}"),
        }
        runtime::diff_is_empty(lab, &format!("{namespace}/{SUBJECT}"));
        assert_alive(&format!("killed after {moment:?}"), &captured);
    }
    eprintln!("captured {}, draining {}", ends[0], ends[1]);
    let outside = counted(&scene).0;
    let new = both_ways("plain2");
    assert_eq!(counted(&scene).0, outside + 2, "nothing new is captured");
    // A proxy that was not told that it may take its time would have cut them by then.
    std::thread::sleep(Duration::from_secs(6));
    assert_alive("some time later", &captured);
    eventually("the proxy lets it go", PATIENCE, || {
        ambidex(lab, &format!("verify {namespace}/{SUBJECT}")).code == 0
    });
    drop(captured);
    eventually("nothing is left of the capture", PATIENCE, || {
        state(&scene).is_none()
    });
    assert_same("drained", &apart, &dumps(lab, &places));
    assert_alive("nobody cares any more", &new);
}

/// A namespace that has come to the path of a captured pod's, and has the pod's address, is the pod's: it is captured there.
#[rstest]
fn a_pod_whose_namespace_was_replaced_is_captured_again(
    #[values(NodeHybrid, Inpod)] variant: Variant,
) {
    let mut spec = variant.spec();
    spec.mends = true;
    let scene = own(&spec);
    let lab = &scene.lab;
    let moved = Sandbox::wired(lab, "moved1", [10, 244, 1, 103].into());
    moved.add(lab);
    moved.destroy(lab);
    Netns::create_named(moved.netns.file_name().unwrap().to_str().unwrap()).unwrap();
    moved.wire(lab);
    let now = Netns::open(&moved.netns).unwrap().id();
    eventually("it is captured where it is", 3 * PATIENCE, || {
        let pods = pods(lab);
        let pod = pods.iter().find(|pod| pod["uid"] == moved.uid.as_str());
        pod.is_some_and(|pod| {
            pod["netns_id"]["ino"].as_u64() == Some(now.ino) && pod["state"] == "captured"
        })
    });
    runtime::diff_is_empty(lab, "gamma/moved1");
    eventually("its capture is proven", PATIENCE, || {
        ambidex(lab, "verify gamma/moved1").code == 0
    });
}
