//! Coming and going: what is left behind, and what never was where it should not be.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Stage, ambidex, assert_same_dump, dump, own};
use host_net::netns::Netns;
use lab::standing::{self, Daemon};
use lab::topology::{Mode, lab_dir, netns_prefix};
use lab::traffic::{Check, ServerOptions, TrafficCommand};
use nix::sys::signal::Signal;
use rstest::rstest;

/// Times that a pod is enrolled and unenrolled: few in the suite of every commit.
fn repetitions() -> u32 {
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    if all { 100 } else { 20 }
}

/// Pod, node and proxy are as before, both without and with the pod (the last one enrolled, because rules in chains that
/// pods share stand in the order of enrolment).
#[rstest]
fn enrolling_and_unenrolling_leaves_nothing(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = own(&variant.spec());
    let places = ["pod1-2", "node1", "proxy1"];
    let state = || places.map(|place| scene.dump(place));
    let captured = state();
    scene.lab.del_pod("pod1-2").unwrap();
    let uncaptured = state();
    assert_ne!(captured, uncaptured, "unenrolling changes something");
    assert_eq!(
        scene.seen("pod1-2", scene.at("plain1")),
        scene.ip("pod1-2"),
        "an unenrolled pod speaks for itself"
    );
    for round in 0..repetitions() {
        scene.lab.add_pod("pod1-2").unwrap();
        if round % 5 == 0 {
            scene.check("pod1-2", scene.at("pod2-1"), Check::Who);
        }
        scene.lab.del_pod("pod1-2").unwrap();
    }
    for (place, (before, after)) in places.iter().zip(uncaptured.iter().zip(&state())) {
        assert_same_dump(place, before, after);
    }
    scene.lab.add_pod("pod1-2").unwrap();
    for (place, (before, after)) in places.iter().zip(captured.iter().zip(&state())) {
        assert_same_dump(place, before, after);
    }
    assert_eq!(scene.seen("pod1-2", scene.at("pod2-1")), scene.ip("pod1-2"));
    assert_eq!(scene.seen("pod2-1", scene.at("pod1-2")), scene.ip("pod2-1"));
}

/// Adding a pod that is there, and deleting one that is not, are fine: runtimes repeat themselves.
#[rstest]
fn adding_and_deleting_twice_is_fine(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let captured = scene.dump("node1") + &scene.dump("pod1-1");
    scene.lab.add_pod("pod1-1").unwrap();
    assert_same_dump(
        "after a second ADD",
        &captured,
        &(scene.dump("node1") + &scene.dump("pod1-1")),
    );
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    scene.lab.del_pod("pod1-1").unwrap();
    let uncaptured = scene.dump("node1") + &scene.dump("pod1-1");
    scene.lab.del_pod("pod1-1").unwrap();
    assert_same_dump(
        "after a second DEL",
        &uncaptured,
        &(scene.dump("node1") + &scene.dump("pod1-1")),
    );
}

/// A lab goes without a trace, also when everything in it was killed before.
#[rstest]
fn removed_lab_leaves_the_machine_as_it_was(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[values(false, true)] killed: bool,
) {
    let spec = variant.spec();
    let name = spec.name.clone();
    let root = Netns::current().unwrap();
    let before = dump(&root);
    assert_eq!(traces(&name), Vec::<String>::new());
    let scene = own(&spec);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let kinds = traces(&name);
    for kind in ["namespace", "process", "directory", "control group"] {
        let found = kinds.iter().any(|trace| trace.starts_with(kind));
        assert!(
            found || (kind == "control group" && !cgroups_writable()),
            "no {kind} of a standing lab: {kinds:#?}"
        );
    }
    if killed {
        for node in [1, 2] {
            for daemon in [Daemon::Agent, Daemon::Proxy] {
                scene
                    .lab
                    .process(node, daemon)
                    .unwrap()
                    .signal(Signal::SIGKILL)
                    .unwrap();
            }
        }
    }
    drop(scene);
    assert_eq!(traces(&name), Vec::<String>::new());
    assert_same_dump("the machine's own namespace", &before, &dump(&root));
}

fn cgroups_writable() -> bool {
    fs::metadata("/sys/fs/cgroup").is_ok_and(|metadata| !metadata.permissions().readonly())
}

/// Everything on this machine that carries the name of a lab.
fn traces(lab: &str) -> Vec<String> {
    let mut traces = Vec::new();
    let prefix = netns_prefix(lab);
    let namespaces = Netns::list_named().unwrap().into_iter();
    traces.extend(
        namespaces
            .filter(|name| name.starts_with(&prefix))
            .map(|name| format!("namespace {name}")),
    );
    let directory = lab_dir(lab);
    traces.extend(
        directory
            .exists()
            .then(|| format!("directory {}", directory.display())),
    );
    let needle = directory.display().to_string();
    for process in fs::read_dir("/proc").unwrap().flatten() {
        let path = process.path();
        let of_a_process = process
            .file_name()
            .to_string_lossy()
            .bytes()
            .all(|byte| byte.is_ascii_digit());
        if !of_a_process || path.ends_with(std::process::id().to_string()) {
            continue;
        }
        let says = |file: &str| {
            String::from_utf8_lossy(&fs::read(path.join(file)).unwrap_or_default()).into_owned()
        };
        if says("cmdline").contains(&needle) || says("environ").contains(&needle) {
            traces.push(format!(
                "process {} {}",
                path.display(),
                says("cmdline").replace('\0', " ")
            ));
        }
    }
    let mut groups = Vec::new();
    find_directories(Path::new("/sys/fs/cgroup"), lab, 6, &mut groups);
    traces.extend(
        groups
            .into_iter()
            .map(|path| format!("control group {}", path.display())),
    );
    traces
}

/// Directories whose name has `part` as one of its words.
fn find_directories(under: &Path, part: &str, depth: u32, found: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(under) else {
        return;
    };
    for entry in entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        if name
            .split(|c: char| !c.is_ascii_alphanumeric())
            .any(|word| word == part)
        {
            found.push(entry.path());
        }
        if depth > 0 {
            find_directories(&entry.path(), part, depth - 1, found);
        }
    }
}

/// Until it is captured, too, the IPv6 of a captured pod does not pass beside the proxy, in either direction.
#[rstest]
fn ipv6_of_a_captured_pod_is_dropped(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    const PORT: u16 = 8066;
    let scene = own(&variant.spec());
    let pods = ["pod1-1", "plain1"];
    let addresses: [Ipv6Addr; 2] = ["fd00:a::2".parse().unwrap(), "fd00:b::2".parse().unwrap()];
    run(
        &scene,
        "node1",
        &["sysctl", "-qw", "net.ipv6.conf.all.forwarding=1"],
    );
    let mut servers = Vec::new();
    for (pod, address) in pods.iter().zip(addresses) {
        let gateway = Ipv6Addr::from(u128::from(address) - 1).to_string();
        let veth = scene.pod(pod).veth;
        run(
            &scene,
            "node1",
            &[
                "ip",
                "address",
                "add",
                &format!("{gateway}/64"),
                "dev",
                &veth,
                "nodad",
            ],
        );
        run(
            &scene,
            pod,
            &[
                "ip",
                "address",
                "add",
                &format!("{address}/64"),
                "dev",
                "eth0",
                "nodad",
            ],
        );
        run(
            &scene,
            pod,
            &["ip", "-6", "route", "add", "default", "via", &gateway],
        );
        let server = TrafficCommand::Server(ServerOptions {
            listen: (Ipv6Addr::UNSPECIFIED, PORT).into(),
            timeout_ms: 20_000,
        });
        let argv = [ambidex(), "lab", "traffic", &server.to_json().unwrap()];
        let mut server = scene.lab.spawn(pod, &format!("v6-{pod}"), &argv).unwrap();
        server
            .wait_for("listening", Duration::from_secs(10))
            .unwrap();
        servers.push(server);
    }
    let at = |index: usize| SocketAddr::from((addresses[index], PORT));
    let passes = || {
        let attempt = |from: &str, to| {
            scene
                .attempt(from, to, Check::Who, Duration::from_secs(2))
                .ok
        };
        [attempt("pod1-1", at(1)), attempt("plain1", at(0))]
    };
    assert_eq!(passes(), [false, false], "captured");
    assert_eq!(
        scene.seen("pod1-1", scene.at("plain1")),
        scene.ip("pod1-1"),
        "IPv4 passes"
    );
    scene.lab.del_pod("pod1-1").unwrap();
    assert_eq!(passes(), [true, true], "not captured");
    scene.lab.add_pod("pod1-1").unwrap();
    assert_eq!(passes(), [false, false], "captured again");
}

fn run(scene: &Stage, target: &str, argv: &[&str]) {
    let done = scene
        .lab
        .run(target, argv, Duration::from_secs(10))
        .unwrap();
    done.success(&format!("{target}: {argv:?}")).unwrap();
}

/// Agent and proxy see neither each other's processes nor mounts, as on a cluster; ZDS is all that they have.
#[rstest]
fn agent_and_proxy_share_no_proc_and_no_mounts(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let spec = variant.spec();
    assert!(spec.isolate);
    let scene = own(&spec);
    assert!(
        scene.lab.spec().isolate,
        "this kernel gives no namespaces of their own to processes"
    );
    let link =
        |pid: &str, namespace: &str| fs::read_link(format!("/proc/{pid}/ns/{namespace}")).unwrap();
    for namespace in ["mnt", "pid", "net"] {
        let of = |daemon| {
            let process = scene.lab.process(1, daemon).unwrap();
            link(&process.pid.to_string(), namespace)
        };
        let (agent, proxy, own) = (
            of(Daemon::Agent),
            of(Daemon::Proxy),
            link("self", namespace),
        );
        assert!(
            agent != proxy && agent != own && proxy != own,
            "{namespace}: {agent:?} {proxy:?} {own:?}"
        );
    }
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-1")), scene.ip("pod1-1"));
    // A pod whose namespace did not exist when the daemons started.
    scene.recreate("pod1-1");
    scene.lab.add_pod("pod1-1").unwrap();
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-1")), scene.ip("pod1-1"));
}

/// Without isolation nothing is different.
#[rstest]
fn works_without_isolation(#[values(Mode::Node, Mode::Inpod, Mode::Mixed)] mode: Mode) {
    let mut spec = harness::spec(mode);
    spec.isolate = false;
    let scene = own(&spec);
    for (from, to) in [("pod1-1", "pod2-2"), ("pod2-1", "pod1-2")] {
        assert_eq!(scene.seen(from, scene.at(to)), scene.ip(from));
    }
    assert!(
        standing::status(&spec.name)
            .unwrap()
            .first_broken()
            .is_none()
    );
}
