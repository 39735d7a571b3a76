//! What the node capture asks of a node's network: pods with devices of their own, and a port for its tunnels. What cannot
//! be captured is refused before anything is changed, and what fails halfway is taken back and tried again.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::net::UdpSocket;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use harness::{Scene, assert_same_dump, eventually, own, spec};
use lab::standing::{Background, Captured};
use lab::topology::{Cni, Mode};
use lab::traffic::Check;
use serde_json::Value;

/// Far over what anything here takes.
const SOON: Duration = Duration::from_secs(60);
/// A packet mark of the node capture, and what it would do with a packet that carries it: lead it elsewhere.
const CAPTURES: &str = "\
    iptables -w -t mangle -A PREROUTING -s 10.244.1.10 -p tcp -j MARK --set-xmark 0x100/0x100\n\
    ip rule add pref 101 fwmark 0x100/0x100 blackhole";

/// A lab whose first node gets its daemons by hand.
fn bare(cni: Cni) -> Scene {
    let mut spec = spec(Mode::None);
    spec.cni = cni;
    own(&spec)
}

/// An agent of the first node with more flags.
fn agent(scene: &Scene, label: &str, more: &[&str]) -> Background {
    agent_with_path(scene, label, &std::env::var("PATH").unwrap(), more)
}

fn agent_with_path(scene: &Scene, label: &str, path: &str, more: &[&str]) -> Background {
    let path = format!("PATH={path}");
    let base = [
        "env",
        &path,
        harness::ambidex(),
        "agent",
        "--mode",
        "node",
        "--verify-every",
        "0s",
    ];
    let argv: Vec<&str> = base.iter().chain(more).copied().collect();
    scene.lab.spawn("node1", label, &argv).unwrap()
}

fn proxy(scene: &Scene, target: &str) -> Background {
    let argv = ["ambidex", "proxy"];
    let label = format!("proxy-by-hand-in-{target}");
    scene.lab.spawn(target, &label, &argv).unwrap()
}

/// What the agent says of itself: whether it is ready, and what it waits for.
fn health(scene: &Scene) -> (bool, String) {
    match scene.lab.ask_agent(1, "/healthz") {
        Ok((status, text)) => (status == 200, text),
        Err(error) => (false, format!("{error:#}")),
    }
}

fn until_it_says(scene: &Scene, words: &[&str]) -> String {
    let mut said = String::new();
    eventually(&format!("the agent says {words:?}"), SOON, || {
        said = health(scene).1;
        words.iter().all(|word| said.contains(word))
    });
    said
}

fn until_ready(scene: &Scene) {
    let mut said = String::new();
    let deadline = std::time::Instant::now() + SOON;
    while std::time::Instant::now() < deadline {
        let (ready, text) = health(scene);
        if ready {
            return;
        }
        said = text;
        std::thread::sleep(Duration::from_millis(50));
    }
    panic!("not ready: {said}");
}

fn script(scene: &Scene, target: &str, text: &str) -> Captured {
    let done = scene
        .lab
        .run(target, &["sh", "-ec", text], Duration::from_secs(30));
    done.unwrap().success(text).unwrap()
}

fn dumps(scene: &Scene) -> [String; 2] {
    ["node1", "proxy1"].map(|target| scene.dump(target))
}

/// Why a bridge is refused: what it hands from port to port is not routed, whatever its rules say of it. With br_netfilter
/// the rules do see it, and marking it changes nothing; without, they do not even see it.
#[test]
fn what_a_bridge_hands_on_cannot_be_led_to_a_proxy() {
    let scene = bare(Cni::Bridge);
    script(&scene, "node1", CAPTURES);
    for (filtered, seen) in [("0", false), ("1", true)] {
        script(
            &scene,
            "node1",
            &format!(
                "echo {filtered} > /proc/sys/net/bridge/bridge-nf-call-iptables; iptables -w -t mangle -Z"
            ),
        );
        assert_eq!(scene.seen("pod1-1", scene.at("pod1-2")), scene.ip("pod1-1"));
        let listed = script(&scene, "node1", "iptables -w -t mangle -nvxL PREROUTING").stdout;
        let rule = listed.lines().find(|line| line.contains("MARK")).unwrap();
        let packets: u64 = rule.split_whitespace().next().unwrap().parse().unwrap();
        assert_eq!(
            packets > 0,
            seen,
            "bridge-nf-call-iptables={filtered}: {rule}"
        );
    }
    // The same rule holds what is routed.
    let to_other_node = scene.attempt(
        "pod1-1",
        scene.at("pod2-1"),
        Check::Who,
        Duration::from_secs(2),
    );
    assert!(!to_other_node.ok, "{to_other_node:?}");
}

#[test]
fn node_capture_is_refused_on_a_bridge_and_nothing_is_changed() {
    let scene = bare(Cni::Bridge);
    let before = dumps(&scene);
    let _agent = agent(&scene, "agent-by-hand", &[]);
    let proxy = proxy(&scene, "proxy1");
    let said = until_it_says(&scene, &["the bridge cni0", "--mode inpod"]);
    assert!(said.contains("10.244.1.2"), "{said}");
    for (before, after) in before.iter().zip(dumps(&scene)) {
        assert_same_dump("what stands", before, &after);
    }

    // Whoever would start a pod hears it, and starts none.
    let refused = format!("{:#}", scene.lab.add_pod("pod1-1").unwrap_err());
    assert!(refused.contains("the bridge cni0"), "{refused}");
    drop(proxy);

    let doctor = ["ambidex", "doctor", "--mode", "node", "-o", "json"];
    let report = scene.lab.run("node1", &doctor, SOON).unwrap().stdout;
    let report: Value = serde_json::from_str(&report).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let about = |finding: &&Value| finding["id"] == "node/pod-routes";
    let found = findings.iter().find(about).expect("doctor names it");
    assert_eq!(
        (&found["severity"], &found["object"]),
        (&"fail".into(), &"cni0".into())
    );
}

/// A host route does not help where it leads to a bridge.
#[test]
fn a_pod_behind_a_bridge_is_refused_where_the_proxy_is_not() {
    let mut spec = spec(Mode::Node);
    spec.leaves_pods = true;
    let scene = own(&spec);
    script(
        &scene,
        "node1",
        "ip link add br9 type bridge; ip link set br9 up; ip link set vethp1 master br9; \
         ip route replace 10.244.1.10/32 dev br9 scope link",
    );
    let before = scene.dump("node1");
    let refused = format!("{:#}", scene.lab.add_pod("pod1-1").unwrap_err());
    assert!(
        refused.contains("the pod 10.244.1.10 is behind the bridge br9"),
        "{refused}"
    );
    assert_same_dump("node1", &before, &scene.dump("node1"));
    scene.lab.add_pod("pod1-2").unwrap();
}

#[test]
fn a_taken_port_is_named_and_another_one_works() {
    let scene = bare(Cni::Routed);
    let before = dumps(&scene);
    let node = scene.lab.netns("node1").unwrap();
    let taken = node.run(|| UdpSocket::bind("0.0.0.0:6081")).unwrap();
    let _taken = taken.unwrap();
    let agent_6081 = agent(&scene, "agent-6081", &[]);
    let _proxy = proxy(&scene, "proxy1");
    let said = until_it_says(&scene, &["UDP port 6081", "the node"]);
    assert!(said.contains("--geneve-port"), "{said}");
    for (before, after) in before.iter().zip(dumps(&scene)) {
        assert_same_dump("what stands", before, &after);
    }
    drop(agent_6081);

    let _agent = agent(&scene, "agent-6091", &["--geneve-port", "6091"]);
    until_ready(&scene);
    for target in ["node1", "proxy1"] {
        let dump = scene.dump(target);
        assert!(dump.contains("dstport 6091"), "{dump}");
        assert!(!dump.contains("dstport 6081"), "{dump}");
    }
    scene.lab.add_pod("pod1-1").unwrap();
    let before = counted(&scene, "proxy1", "pistioout");
    assert_eq!(scene.seen("pod1-1", scene.at("plain1")), scene.ip("pod1-1"));
    assert!(
        counted(&scene, "proxy1", "pistioout") > before,
        "not through the tunnel"
    );
}

/// The system's programs of iptables, which change nothing in one namespace as long as a file names it.
struct Refusing {
    directory: tempfile::TempDir,
}

impl Refusing {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let named = directory.path().join("refuses");
        for program in ["iptables", "iptables-nft", "iptables-legacy"] {
            let path = directory.path().join(format!("{program}-restore"));
            let text = format!(
                "#!/bin/sh\n\
                 if [ \"$(readlink /proc/self/ns/net)\" = \"$(cat {} 2>/dev/null)\" ]; then echo not today >&2; exit 4; fi\n\
                 exec /usr/sbin/{program}-restore \"$@\"\n",
                named.display()
            );
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        Self { directory }
    }

    fn path(&self) -> String {
        format!(
            "{}:{}",
            self.directory.path().display(),
            std::env::var("PATH").unwrap()
        )
    }

    fn refuse_in(&self, scene: &Scene, target: &str) {
        let named = script(scene, target, "readlink /proc/self/ns/net").stdout;
        std::fs::write(self.directory.path().join("refuses"), named).unwrap();
    }

    fn refuse_nowhere(&self) {
        std::fs::remove_file(self.directory.path().join("refuses")).unwrap();
    }
}

#[test]
fn what_fails_in_the_middle_is_taken_back_and_tried_until_it_works() {
    let scene = bare(Cni::Routed);
    let before = dumps(&scene);
    let iptables = Refusing::new();
    iptables.refuse_in(&scene, "node1");
    let agent = agent_with_path(&scene, "agent-by-hand", &iptables.path(), &[]);
    let proxy = proxy(&scene, "proxy1");
    // Sets, tunnels, routes and the proxy's own rules were made by then.
    until_it_says(&scene, &["setting up the node capture", "not today"]);
    let untouched = || dumps(&scene) == before;
    eventually("both namespaces are as they were", SOON, untouched);

    iptables.refuse_nowhere();
    until_ready(&scene);
    scene.lab.add_pod("pod1-1").unwrap();
    let captured = || counted(&scene, "proxy1", "pistioout");
    let seen = captured();
    assert_eq!(scene.seen("pod1-1", scene.at("plain1")), scene.ip("pod1-1"));
    assert!(captured() > seen, "not through the proxy");

    // Another proxy comes, in a pod of its own, and the node cannot be led to it: it goes on leading to this one.
    iptables.refuse_in(&scene, "node1");
    let mark = agent.output().matches("not today").count();
    let other = self::proxy(&scene, "plain1");
    let refused = || agent.output().matches("not today").count() > mark;
    eventually(
        "the agent says why the other one gets nothing",
        SOON,
        refused,
    );
    drop(other);
    iptables.refuse_nowhere();
    let seen = captured();
    // Its own connections may have to be tried again, as long as the node is between two proxies.
    let passes = || {
        let outcome = scene.attempt(
            "pod1-1",
            scene.at("pod1-2"),
            Check::Who,
            Duration::from_secs(5),
        );
        outcome.ok && outcome.seen.unwrap().ip() == scene.ip("pod1-1")
    };
    eventually("the pod is served by the first one", SOON, passes);
    assert!(captured() > seen, "not through the proxy");
    let clean = || !scene.dump("plain1").contains("istio");
    eventually("nothing is left in the other one", SOON, clean);
    drop(proxy);
}

fn counted(scene: &Scene, target: &str, device: &str) -> u64 {
    let netns = scene.lab.netns(target).unwrap();
    lab::bench::proof::counters(&netns, device)
        .unwrap()
        .rx_packets
}
