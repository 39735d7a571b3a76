//! Proof of capture, and captures that are put back.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use ambidex::agent::api::PlacedPlan;
use ambidex::agent::verify::{Aspect, Verified};
use harness::own;
use host_net::engine;
use host_net::journal::Journal;
use host_net::plan::{Place, Plan, Step};
use lab::standing::{Daemon, Lab};
use lab::topology::{Mode, NodeFlow};
use nix::sys::signal::Signal;
use rstest::rstest;
use runtime::ambidex;

/// How long the agent may take to find and mend something, on a busy machine: six sweeps.
const MENDED_WITHIN: Duration = Duration::from_secs(30);

fn verified(lab: &Lab, what: &str) -> (i32, Vec<Verified>) {
    let said = ambidex(lab, format!("verify -o json {what}").trim());
    let all = serde_json::from_str(&said.stdout);
    (
        said.code,
        all.unwrap_or_else(|error| panic!("{error}: {said:?}")),
    )
}

/// What is wrong in one aspect of the only subject.
fn findings(all: &[Verified], aspect: Aspect) -> String {
    let [one] = all else {
        panic!("several subjects: {all:#?}");
    };
    let checks = one.checks.iter().filter(|check| check.aspect == aspect);
    checks
        .flat_map(|check| check.findings.iter())
        .fold(String::new(), |text, finding| text + finding + "\n")
}

/// The objects of a subject, each alone in a plan, with the namespace that it is in.
fn objects(lab: &Lab, what: &str) -> Vec<(String, Step)> {
    let plans = ambidex(lab, &format!("plan {what}")).with_code(0);
    let plans: Vec<PlacedPlan> = serde_json::from_str(&plans).unwrap();
    let target = |place: &str| match place.strip_prefix("pod ") {
        Some(pod) => pod.rsplit('/').next().unwrap().to_owned(),
        None => format!("{place}1"),
    };
    let each = plans.into_iter().flat_map(|placed| {
        let target = target(&placed.place);
        let steps = placed.plan.steps.into_iter();
        steps.map(move |step| (target.clone(), step))
    });
    each.collect()
}

fn engine_makes(runtime: &tokio::runtime::Runtime, place: &Place, plan: &Plan, journal: &Journal) {
    let nothing = Plan::empty(&plan.name);
    let applied = engine::apply(place, &nothing, plan, journal);
    runtime.block_on(applied).unwrap();
    journal.forget(&plan.name).unwrap();
}

/// Everything is as it should be; then each object of the plans is taken away by itself, and verify names it.
#[rstest]
#[case::node_hybrid(Mode::Node, NodeFlow::Hybrid)]
#[case::node_tunnel(Mode::Node, NodeFlow::Tunnel)]
#[case::inpod(Mode::Inpod, NodeFlow::Hybrid)]
fn each_object_that_is_taken_away_is_named(#[case] mode: Mode, #[case] flow: NodeFlow) {
    let mut spec = harness::spec(mode);
    spec.node_flow = flow;
    let scene = own(&spec);
    let lab = &scene.lab;
    let (code, all) = verified(lab, "");
    assert_eq!(code, 0, "{all:#?}");
    assert_eq!(all.len(), 3, "the node and two pods: {all:#?}");
    assert!(all.iter().all(Verified::is_effective));
    for what in ["--node", "alpha/pod1-1"] {
        each_is_named(lab, what);
    }
}

/// Takes each object of a subject's plans away by itself, and puts it back.
fn each_is_named(lab: &Lab, what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    for (target, step) in objects(lab, what) {
        let place = Place {
            label: target.clone(),
            netns: lab.netns(&target).unwrap(),
        };
        let alone = Plan {
            name: "damage".to_owned(),
            steps: vec![step.clone()],
        };
        let broken = match &step {
            // Its value, not itself.
            Step::Sysctl(sysctl) => {
                let path = format!("/proc/sys/{}", sysctl.key);
                let before = place
                    .netns
                    .run(|| std::fs::read_to_string(&path))
                    .unwrap()
                    .unwrap();
                place
                    .netns
                    .run(|| std::fs::write(&path, "1"))
                    .unwrap()
                    .unwrap();
                Some((path, before))
            }
            _ => {
                let errors = runtime.block_on(engine::remove(&place, &alone, &journal));
                // What others stand in or lead to does not go away alone.
                if matches!(step, Step::Set(_) | Step::Chain(_)) && !errors.is_empty() {
                    journal.forget("damage").unwrap();
                    continue;
                }
                assert!(errors.is_empty(), "{step}: {errors:?}");
                None
            }
        };
        let (code, all) = verified(lab, what);
        let found = findings(&all, Aspect::Objects);
        assert!(
            code == 3 && found.contains(&step.to_string()),
            "{what}: {step} is gone from {target}, and verify says {code}: {found}"
        );
        match broken {
            Some((path, before)) => place
                .netns
                .run(|| std::fs::write(&path, before))
                .unwrap()
                .unwrap(),
            None => engine_makes(&runtime, &place, &alone, &journal),
        }
    }
}

/// A pod that drains is no fault: what its connections need is looked at, and each of that is named when it is gone.
#[rstest]
fn what_a_pod_that_drains_needs_is_looked_at(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    const POD: &str = "alpha/pod1-1";
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let to = (scene.ip("pod2-1"), 8098);
    #[allow(
        clippy::disallowed_methods,
        reason = "applications of a test, no part of the proxy"
    )]
    let (listener, connect) = (TcpListener::bind, TcpStream::connect);
    let server = lab.netns("pod2-1").unwrap();
    let server = server.run(|| listener(to)).unwrap().unwrap();
    let client = lab.netns("pod1-1").unwrap();
    let mut client = client.run(|| connect(to)).unwrap().unwrap();
    let (mut server, _) = server.accept().unwrap();
    ambidex(lab, &format!("unenrol {POD} --drain 10m")).with_code(0);

    let (code, all) = verified(lab, "");
    assert_eq!(code, 0, "{all:#?}");
    let one = all.iter().find(|one| one.subject == POD).unwrap();
    assert!(one.drains() && one.is_effective(), "{one:#?}");
    let asked = |aspect| one.checks.iter().any(|check| check.aspect == aspect);
    assert!(asked(Aspect::Objects) && !asked(Aspect::Probe), "{one:#?}");
    let text = ambidex(lab, "verify").with_code(0);
    assert!(text.contains(&format!("; draining: {POD}")), "{text}");
    each_is_named(lab, POD);
    let (code, all) = verified(lab, POD);
    assert_eq!(code, 0, "{all:#?}");

    // All the while its connection goes on; with it the pod goes.
    client.write_all(b"x").unwrap();
    server.read_exact(&mut [0]).unwrap();
    drop((client, server));
    harness::eventually("nothing is left to look at", MENDED_WITHIN, || {
        verified(lab, "").1.len() == 2
    });
}

/// What is no object: a listener, the proxy, the namespace, and the way as a whole.
#[rstest]
fn what_is_no_object_is_looked_at_too(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    // A proxy that hangs listens and answers nothing.
    let proxy = lab.process(1, Daemon::Proxy).unwrap();
    proxy.signal(Signal::SIGSTOP).unwrap();
    let (code, all) = verified(lab, "alpha/pod1-1");
    proxy.signal(Signal::SIGCONT).unwrap();
    assert_eq!(code, 3);
    assert_eq!(findings(&all, Aspect::Listeners), "");
    assert!(
        findings(&all, Aspect::Probe).contains("no answer"),
        "{all:#?}"
    );
    // One that was killed does not listen.
    lab.kill(1, Daemon::Proxy).unwrap();
    let (code, all) = verified(lab, "alpha/pod1-1");
    assert_eq!(code, 3);
    for port in [15001, 15006, 15008] {
        let missing = format!("nobody listens on port {port}");
        assert!(
            findings(&all, Aspect::Listeners).contains(&missing),
            "{all:#?}"
        );
    }
    assert_ne!(findings(&all, Aspect::Proxy), "", "{all:#?}");
    lab.start(1, Daemon::Proxy).unwrap();
    lab.wait_ready(1, &|_| {}).unwrap();
    let (code, all) = verified(lab, "");
    assert_eq!(code, 0, "{all:#?}");
    // A rule in front of the capture leaves every object in place, and leads past it.
    let pod = lab.netns("pod1-1").unwrap();
    let past = ["-t", "nat", "-I", "OUTPUT", "-p", "tcp", "-j", "ACCEPT"];
    let (place, past): (_, &[&str]) = match mode {
        Mode::Inpod => (&pod, &past),
        _ => (
            &lab.netns("node1").unwrap(),
            &[
                "-t",
                "mangle",
                "-I",
                "PREROUTING",
                "-p",
                "tcp",
                "-j",
                "ACCEPT",
            ],
        ),
    };
    let status = place.run(|| Command::new("iptables-nft").args(past).status());
    assert!(status.unwrap().unwrap().success());
    let (code, all) = verified(lab, "alpha/pod1-1");
    assert_eq!(code, 3);
    assert_ne!(findings(&all, Aspect::Probe), "", "{all:#?}");
}

/// Faults whose damage the agent mends by itself.
#[rstest]
#[case::in_pod_rules_flushed(Mode::Inpod, "pod1-1", "iptables-nft -t nat -F")]
#[case::in_pod_route_deleted(Mode::Inpod, "pod1-1", "ip route flush table 100")]
#[case::in_pod_probe_set_flushed(Mode::Inpod, "node1", "ipset flush istio-inpod-probes-v4")]
#[case::node_rules_flushed(Mode::Node, "node1", "iptables-nft -t mangle -F")]
#[case::node_set_flushed(Mode::Node, "node1", "ipset flush ztunnel-pods-ips")]
#[case::node_route_deleted(Mode::Node, "node1", "ip route flush table 100")]
#[case::node_rule_deleted(Mode::Node, "node1", "ip rule del pref 101")]
#[case::node_tunnel_deleted(Mode::Node, "node1", "ip link del istioout")]
#[case::proxy_rules_flushed(Mode::Node, "proxy1", "iptables-nft -t mangle -F")]
fn what_is_lost_is_put_back(#[case] mode: Mode, #[case] target: &str, #[case] damage: &str) {
    let mut spec = harness::spec(mode);
    spec.mends = true;
    let scene = own(&spec);
    let lab = &scene.lab;
    let before = runtime::dumps(lab, &[target]);
    let logged = std::fs::read_to_string(lab.log_path(1, Daemon::Agent))
        .unwrap()
        .len();
    let netns = lab.netns(target).unwrap();
    let status = netns.run(|| Command::new("sh").args(["-c", damage]).status());
    assert!(status.unwrap().unwrap().success(), "{damage}");
    let begun = Instant::now();
    while runtime::dumps(lab, &[target]) != before {
        assert!(begun.elapsed() < MENDED_WITHIN, "{damage} stays");
        std::thread::sleep(Duration::from_millis(100));
    }
    eprintln!("{damage}: mended after {:?}", begun.elapsed());
    let (code, all) = verified(lab, "");
    assert_eq!(code, 0, "{all:#?}");
    let said =
        || std::fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap()[logged..].to_owned();
    harness::eventually("the agent says what it mended", MENDED_WITHIN, || {
        said().contains("missing or changed")
    });
}
