//! Containers of real runtimes, with the CNI plugins of the distribution and ours chained behind them: podman on one node,
//! containerd on the other.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod containers;
mod harness;
mod runtime;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use containers::{BRIDGE, Containerd, IDENTITY, Podman, Wiring};
use harness::{Stage, own};
use lab::standing::{Daemon, Lab};
use lab::topology::Mode;
use lab::topology::workloads::{LocalXds, Workload};
use rstest::rstest;
use runtime::{assert_same, dumps};
use serde_json::Value;

/// Everywhere that the agents and the runtimes make something.
const PLACES: [&str; 4] = ["node1", "proxy1", "node2", "proxy2"];

/// Address of a container, if the agent of the node has captured it.
fn address_of(lab: &Lab, node: u8, container: &str) -> Option<Ipv4Addr> {
    let argv = ["ambidex", "get", "pods", "-o", "json"];
    let done = lab
        .run(&format!("node{node}"), &argv, Duration::from_secs(20))
        .unwrap();
    let pods: Vec<Value> = serde_json::from_str(&done.success("get pods").unwrap().stdout).unwrap();
    let named = |pod: &&Value| pod["name"] == container && pod["namespace"] == IDENTITY.0;
    let pod = pods.iter().find(named)?;
    assert_eq!(pod["state"], "captured", "{pod}");
    assert_eq!(pod["service_account"], IDENTITY.1, "{pod}");
    Some(pod["addresses"][0].as_str().unwrap().parse().unwrap())
}

/// Tells the mesh about a container.
fn add_workload(state: &mut LocalXds, node: u8, name: &str, address: Ipv4Addr) {
    state.workloads.push(Workload {
        uid: format!("Kubernetes//Pod/{}/{name}", IDENTITY.0),
        name: name.to_owned(),
        namespace: IDENTITY.0.to_owned(),
        service_account: IDENTITY.1.to_owned(),
        workload_ips: vec![address.to_string()],
        protocol: "HBONE".to_owned(),
        node: format!("node{node}"),
        cluster_id: "Kubernetes".to_owned(),
        authorization_policies: Vec::new(),
        services: BTreeMap::new(),
        more: BTreeMap::new(),
    });
}

/// Fails unless these namespaces become what they were: the kernel takes a dead namespace's devices down in its own time.
#[track_caller]
fn assert_becomes(what: &str, lab: &Lab, before: &[(String, String)]) {
    let targets: Vec<&str> = before.iter().map(|(target, _)| target.as_str()).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let after = dumps(lab, &targets);
        if after == before || Instant::now() > deadline {
            return assert_same(what, before, &after);
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// A container of each runtime, on two nodes: captured before its first process, in a tunnel with the other's, in clear
/// nowhere; and when they are gone, nothing is left. Without an agent none starts.
#[rstest]
fn containers_are_captured(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let page = format!("page-of-{}", lab.name());
    let podman = Podman::new(lab, 1, &page);
    let containerd = Containerd::new(lab, 2, &podman.save());
    let before = dumps(lab, &PLACES);

    podman.run("box1", Wiring::Ptp, true).with_code(0);
    let box2 = containerd.run("box2");
    containerd.wait_running(&box2);
    podman.run("open", Wiring::Ptp, false).with_code(0);
    let first = address_of(lab, 1, "box1").expect("podman's container is captured");
    // `ctr` names no pod: the name is the sandbox's.
    let second = address_of(lab, 2, "default-box2").expect("containerd's container is captured");
    assert_eq!(address_of(lab, 1, "open"), None);
    {
        let _known = scene.with_state(|state| {
            add_workload(state, 1, "box1", first);
            add_workload(state, 2, "default-box2", second);
        });
        talk(&scene, &page, &podman, &containerd, first, second);
    }
    podman.remove("open");
    podman.remove("box1");
    containerd.remove(&box2);
    assert_eq!(address_of(lab, 1, "box1"), None);
    assert_becomes("all gone", lab, &before);

    on_a_bridge(&scene, mode, &page, &podman);

    without_agent(lab, &podman, &containerd);
}

/// Requests in both directions, and one from a container that is not captured, which shows that the tap would show them.
fn talk(
    scene: &Stage,
    page: &str,
    podman: &Podman<'_>,
    containerd: &Containerd<'_>,
    first: Ipv4Addr,
    second: Ipv4Addr,
) {
    let marks = [scene.mark(1), scene.mark(2)];
    let tap = scene.tap("node1", "eth0", "");
    let there = podman.fetch("box1", second, "/page?question-of-box1");
    assert!(there.stdout.ends_with(page), "{there:?}");
    let back = containerd.fetch("box2", first, "/page?question-of-box2");
    assert!(back.stdout.ends_with(page), "{back:?}");
    let wire = tap.finish();
    wire.assert_encrypted(&["question-of-box1", "question-of-box2", page]);
    assert_eq!(wire.tunnel_clients(second), [first]);
    assert_eq!(wire.tunnel_clients(first), [second]);
    let identity = format!("spiffe://cluster.local/ns/{}/sa/{}", IDENTITY.0, IDENTITY.1);
    for mark in marks {
        let wanted = [
            ("direction", "inbound"),
            ("src.identity", identity.as_str()),
        ];
        scene.access_line(mark, &wanted);
    }

    let tap = scene.tap("node1", "eth0", "");
    let open = podman.fetch("open", second, "/page?question-in-clear");
    assert!(open.stdout.ends_with(page), "{open:?}");
    let wire = tap.finish();
    assert!(wire.shows("question-in-clear") && wire.shows(page));
}

/// On a bridge the in-pod capture works as everywhere; the node capture needs a route for each pod and says so.
fn on_a_bridge(scene: &Stage, mode: Mode, page: &str, podman: &Podman<'_>) {
    let lab = &scene.lab;
    // The bridge itself stays: it is the other plugin's.
    podman.run("bridged", Wiring::Bridge, false).with_code(0);
    podman.remove("bridged");
    let before = dumps(lab, &["node1", "proxy1"]);
    let bridged = podman.run("bridged", Wiring::Bridge, true);
    if mode == Mode::Node {
        assert_ne!(bridged.code, 0, "{bridged:?}");
        assert!(bridged.stderr.contains("needs a routed CNI"), "{bridged:?}");
        assert_eq!(running(podman), "");
    } else {
        bridged.with_code(0);
        podman.run("peer", Wiring::Bridge, true).with_code(0);
        let address = |name| address_of(lab, 1, name).expect("captured");
        let (bridged, peer) = (address("bridged"), address("peer"));
        let _known = scene.with_state(|state| {
            add_workload(state, 1, "bridged", bridged);
            add_workload(state, 1, "peer", peer);
        });
        let argv = ["bridge", "-json", "link", "show", "master", BRIDGE];
        let links = lab.run("node1", &argv, Duration::from_secs(10)).unwrap();
        let links: Vec<Value> = serde_json::from_str(&links.stdout).unwrap();
        let tap = scene.tap("node1", links[0]["ifname"].as_str().unwrap(), "");
        let answer = podman.fetch("bridged", peer, "/page?question-on-bridge");
        assert!(answer.stdout.ends_with(page), "{answer:?}");
        let wire = tap.finish();
        wire.assert_encrypted(&["question-on-bridge", page]);
        assert_eq!(wire.tunnel_clients(peer), [bridged]);
        podman.remove("peer");
    }
    podman.remove("bridged");
    assert_becomes("bridge", lab, &before);
}

fn running(podman: &Podman<'_>) -> String {
    podman.call(&["ps", "--quiet"]).with_code(0)
}

/// What cannot be captured does not start, and leaves nothing.
fn without_agent(lab: &Lab, podman: &Podman<'_>, containerd: &Containerd<'_>) {
    for node in [1, 2] {
        lab.kill(node, Daemon::Agent).unwrap();
    }
    let before = dumps(lab, &["node1", "node2"]);
    let refused = podman.run("box1", Wiring::Ptp, true);
    assert_ne!(refused.code, 0, "{refused:?}");
    assert!(refused.stderr.contains("pluginevent.sock"), "{refused:?}");
    assert_eq!(running(podman), "");
    podman.remove("box1");
    let failure = containerd.run("box2").failure();
    assert!(failure.contains("pluginevent.sock"), "{failure}");
    assert_eq!(containerd.running(), [""; 0]);
    containerd.forget("box2");
    assert_becomes("refused", lab, &before);
}
