//! The styles of the in-pod capture: their rules to the letter, that each captures, and going from one to another.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use harness::state::apply_to;
use harness::{Scene, Stage, assert_same_dump, eventually, own};
use inpod_redirect::facts::{PROBE_ADDRESS, PROBE_ADDRESS6};
use lab::standing::Daemon;
use lab::topology::{
    APPLICATION_PORT, Families, InpodRules, Mode, SERVICE_PORT, SERVICE_VIP, ipv6,
};
use lab::traffic::Check;
use rstest::rstest;
use runtime::{Sandbox, ambidex, assert_same, diff_is_empty, dumps, start_agent};
use serde_json::json;

const STYLES: [InpodRules; 3] = [
    InpodRules::Redirect,
    InpodRules::Tproxy,
    InpodRules::Nftables,
];
/// Far over what an answer takes, on whatever machine.
const PATIENCE: Duration = Duration::from_secs(40);
/// Where the applications with open connections listen.
const PORT: u16 = 8097;
/// The pod that goes from one style to another.
const SUBJECT: &str = "pod1-2";

fn scene(rules: InpodRules) -> Scene {
    let mut spec = harness::spec(Mode::Inpod);
    spec.inpod_rules = rules;
    spec.families = Families::Dual;
    spec.agent_args.push("--dns-capture".to_owned());
    own(&spec)
}

/// A box by each family: its application, and itself.
fn in_both(scene: &Stage, target: &str) -> [(SocketAddr, IpAddr); 2] {
    [
        (scene.at(target), scene.ip(target).into()),
        (scene.at6(target), scene.ip6(target).into()),
    ]
}

/// Who a server sees of `from` by each family.
fn assert_seen(scene: &Stage, from: &str, to: &str) {
    let clients = in_both(scene, from);
    for ((to, _), (_, client)) in in_both(scene, to).into_iter().zip(clients) {
        assert_eq!(scene.seen(from, to), client, "{from} to {to}");
    }
}

fn run(scene: &Stage, target: &str, command: &str) -> String {
    let netns = scene.lab.netns(target).unwrap();
    let mut program = std::process::Command::new("sh");
    program.args(["-ec", command]);
    let output = netns.run(|| program.output()).unwrap().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command} in {target}: {stderr}");
    String::from_utf8(output.stdout).unwrap()
}

/// Everything that a pod is captured for, in each style.
#[rstest]
#[case::redirect(InpodRules::Redirect)]
#[case::tproxy(InpodRules::Tproxy)]
#[case::nftables(InpodRules::Nftables)]
fn each_style_captures(#[case] rules: InpodRules) {
    let scene = scene(rules);
    // Between captured pods: only tunnels, and the client's address arrives.
    let markers = ["marker-of-pod1-1", "marker-of-pod1-2"];
    let taps = ["pod1-1", "pod2-1"].map(|pod| scene.tap(pod, "eth0", ""));
    for (from, to) in [
        ("pod1-1", "pod2-1"),
        ("pod2-1", "pod1-1"),
        ("pod1-1", "pod1-2"),
        ("pod1-2", "pod1-1"),
    ] {
        assert_seen(&scene, from, to);
    }
    for tap in taps {
        let wire = tap.finish();
        wire.assert_encrypted(&markers);
        wire.assert_encrypted6(&markers);
    }
    // The service, which may be the pod itself.
    for _ in 0..8 {
        for address in [SERVICE_VIP.into(), IpAddr::from(ipv6::twin(SERVICE_VIP))] {
            let outcome = scene.check("pod1-2", (address, SERVICE_PORT).into(), Check::Who);
            assert!(outcome.ok);
        }
    }
    for (_, own) in in_both(&scene, "pod1-1") {
        let seen = scene.seen("pod1-1", (own, APPLICATION_PORT).into());
        assert_eq!(seen, own, "its own address");
    }

    // Past the mesh: in plain text as long as nobody wants more, and not at all if somebody does.
    assert_seen(&scene, "plain1", "pod1-1");
    assert_seen(&scene, "pod1-1", "plain1");
    {
        let strict = json!([[[{"notPrincipals": [{"Presence": []}]}]]]);
        let _changed = scene.with_state(|state| apply_to(state, "pod1-1", "Deny", strict));
        assert_seen(&scene, "pod2-1", "pod1-1");
        let probes: [IpAddr; 2] = [PROBE_ADDRESS.into(), PROBE_ADDRESS6.into()];
        for ((to, _), source) in in_both(&scene, "pod1-1").into_iter().zip(probes) {
            scene.refused("plain1", to);
            assert_eq!(scene.seen("node1", to), source, "probes pass");
        }
    }
    // Straight to the proxy's ports: nobody's.
    for port in [15001, 15006] {
        for (_, pod) in in_both(&scene, "pod1-1") {
            scene.refused("plain1", (pod, port).into());
        }
    }
    let answer = run(
        &scene,
        "pod1-1",
        "for server in 192.0.2.53 2001:db8::53; do for protocol in +notcp +tcp; do \
         dig +short +tries=1 +time=20 $protocol @$server echo.beta.svc.cluster.local; done; done",
    );
    let vip = SERVICE_VIP.to_string();
    assert_eq!(answer.lines().collect::<Vec<_>>(), [&vip; 4], "DNS");

    ambidex(&scene.lab, "verify alpha/pod1-1").with_code(0);
    diff_is_empty(&scene.lab, "alpha/pod1-1");
    // One thing is taken away, and named.
    let (damage, named) = match rules {
        InpodRules::Redirect => (
            "for family in ip ip6; do ${family}tables -t nat -F ISTIO_PRERT; done",
            "chain ISTIO_PRERT",
        ),
        InpodRules::Tproxy => (
            "for family in ip ip6; do ${family}tables -t mangle -F ISTIO_PRERT; done",
            "chain ISTIO_PRERT",
        ),
        InpodRules::Nftables => (
            "nft flush chain inet istio-ambient-nat istio-prerouting",
            "table inet istio-ambient-nat: different: lacks `chain istio-prerouting",
        ),
    };
    run(&scene, "pod1-1", damage);
    let difference = ambidex(&scene.lab, "diff alpha/pod1-1").with_code(3);
    assert!(difference.contains(named), "{difference}");
    // What stands beside it keeps others out meanwhile.
    for (to, _) in in_both(&scene, "pod1-1") {
        let outcome = scene.attempt("plain1", to, Check::Who, Duration::from_secs(2));
        assert!(!outcome.ok, "past the proxy: {outcome:#?}");
    }
}

/// A pod that was captured before it ran has the tables of Istio's own tests, as this nft spells them; those of iptables are
/// compared in tests/golden.rs.
#[test]
fn nftables_to_the_letter() {
    let mut spec = harness::spec(Mode::Inpod);
    spec.inpod_rules = InpodRules::Nftables;
    let scene = own(&spec);
    let list = "for table in mangle nat; do nft -s list table inet istio-ambient-$table; done";
    let found = run(&scene, "pod1-1", list);
    let lines = found.lines().map(str::trim);
    let found: Vec<&str> = lines.filter(|l| !l.is_empty() && *l != "}").collect();
    assert_eq!(found, NFTABLES);
    let tables = run(&scene, "pod1-1", "nft list tables");
    let others = tables
        .lines()
        .filter(|table| !table.contains(" istio-ambient-"));
    assert_eq!(others.collect::<Vec<_>>(), ["table inet ambidex-guard"]);
}

const NFTABLES: [&str; 26] = [
    "table inet istio-ambient-mangle {",
    "chain prerouting {",
    "type filter hook prerouting priority mangle; policy accept;",
    "jump istio-prerouting",
    "chain output {",
    "type route hook output priority mangle; policy accept;",
    "jump istio-output",
    "chain istio-prerouting {",
    "meta mark & 0x00000fff == 0x00000539 counter ct mark set ct mark & 0xfffff111 | 0x00000111",
    "chain istio-output {",
    "ct mark & 0x00000fff == 0x00000111 counter meta mark set ct mark",
    "table inet istio-ambient-nat {",
    "chain prerouting {",
    "type nat hook prerouting priority dstnat; policy accept;",
    "jump istio-prerouting",
    "chain output {",
    "type nat hook output priority -100; policy accept;",
    "jump istio-output",
    "chain istio-prerouting {",
    "meta l4proto tcp ip saddr 169.254.7.127 counter accept",
    "ip daddr != 127.0.0.1 tcp dport != 15008 meta mark & 0x00000fff != 0x00000539 counter redirect to :15006",
    "chain istio-output {",
    "meta l4proto tcp ip daddr 169.254.7.127 counter accept",
    "meta l4proto tcp meta mark & 0x00000fff == 0x00000111 counter accept",
    "oifname \"lo\" ip daddr != 127.0.0.1 counter accept",
    "meta l4proto tcp ip daddr != 127.0.0.1 meta mark & 0x00000fff != 0x00000539 counter redirect to :15001",
];

/// Tables that somebody changes or deletes are put back; those that no journal knows are taken over, and go with the pod.
#[test]
fn nftables_are_kept_and_taken_over() {
    let mut spec = harness::spec(Mode::Inpod);
    spec.inpod_rules = InpodRules::Nftables;
    spec.mends = true;
    let scene = own(&spec);
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, SUBJECT);
    let tables = || run(&scene, SUBJECT, "nft -s list ruleset");
    let before = tables();
    for damage in [
        "nft delete table inet istio-ambient-nat",
        "nft insert rule inet istio-ambient-nat istio-output accept",
        "nft delete table inet ambidex-guard",
    ] {
        run(&scene, SUBJECT, damage);
        assert_ne!(tables(), before, "{damage}");
        eventually(damage, PATIENCE, || {
            ambidex(lab, &format!("diff {}/{SUBJECT}", sandbox.namespace)).code == 0
        });
    }
    assert_eq!(scene.seen(SUBJECT, scene.at("pod2-1")), scene.ip(SUBJECT));

    // By hand, with the commands that `plan` prints: the same, to the byte.
    let captured = scene.dump(SUBJECT);
    let subject = format!("{}/{SUBJECT}", sandbox.namespace);
    let plan = ambidex(lab, &format!("plan {subject} --as-commands")).with_code(0);
    ambidex(lab, &format!("undo {subject}")).with_code(0);
    assert_eq!(run(&scene, SUBJECT, "nft list tables inet"), "");
    let (_, in_pod) = plan.split_once("# pod-").unwrap();
    let (_, commands) = in_pod.split_once('\n').unwrap();
    run(&scene, SUBJECT, commands);
    assert_same_dump("made by hand", &captured, &scene.dump(SUBJECT));

    lab.add_pod(SUBJECT).unwrap();
    diff_is_empty(lab, &format!("{}/{SUBJECT}", sandbox.namespace));
    lab.del_pod(SUBJECT).unwrap();
    assert_eq!(run(&scene, SUBJECT, "nft list tables inet"), "");

    // Another mesh's.
    run(&scene, SUBJECT, "nft add table inet istio-ambient-nat");
    let error = lab.add_pod(SUBJECT).unwrap_err();
    let error = format!("{error:#}");
    for part in [
        "nftables table inet istio-ambient-nat (a name of Istio ambient)",
        "nft delete table inet istio-ambient-nat",
    ] {
        assert!(error.contains(part), "no {part:?} in {error}");
    }
}

/// A connection that says something and hears it back.
struct Talk(&'static str, TcpStream);

impl Talk {
    fn open(scene: &Stage, from: &'static str, to: SocketAddr) -> Self {
        let netns = scene.lab.netns(from).unwrap();
        let stream = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE));
        let stream = stream
            .unwrap()
            .unwrap_or_else(|e| panic!("{from} to {to}: {e}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut talk = Self(from, stream);
        talk.say("opened");
        talk
    }

    #[track_caller]
    fn say(&mut self, when: &str) {
        let sent: Vec<u8> = (0..3000).map(|at: u32| at.to_le_bytes()[0]).collect();
        let mut heard = vec![0; sent.len()];
        let said = self
            .1
            .write_all(&sent)
            .and_then(|()| self.1.read_exact(&mut heard));
        let (from, peer) = (self.0, self.1.peer_addr());
        assert!(said.is_ok(), "{when}: from {from} to {peer:?}: {said:?}");
        assert_eq!(sent, heard, "{when}");
    }
}

/// Says back what it hears, until the test ends.
fn echo(scene: &Stage, target: &str) {
    let netns = scene.lab.netns(target).unwrap();
    // By both families.
    let listener = netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT)));
    let listener = listener.unwrap().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut back = stream.try_clone().unwrap();
                let _ = std::io::copy(&mut &stream, &mut back);
            });
        }
    });
}

/// Opens connections of the subject, in both directions.
fn open(scene: &Stage, peers: &[&'static str]) -> Vec<Talk> {
    let mut talks = Vec::new();
    for peer in peers {
        for _ in 0..2 {
            talks.extend(one_each_way(scene, peer));
        }
    }
    talks
}

/// To a peer and from it, by both families.
fn one_each_way(scene: &Stage, peer: &'static str) -> Vec<Talk> {
    let families = in_both(scene, peer)
        .into_iter()
        .zip(in_both(scene, SUBJECT));
    let talks = families.flat_map(|((_, peers), (_, subjects))| {
        [
            Talk::open(scene, SUBJECT, (peers, PORT).into()),
            Talk::open(scene, peer, (subjects, PORT).into()),
        ]
    });
    talks.collect()
}

/// An agent with another style takes a running pod over: connections that are older than its capture go on, captured ones
/// go on, nothing is on the wire that was not before, and at the end nothing is left of any style.
#[test]
fn a_pod_goes_from_any_style_to_any_other() {
    let scene = scene(STYLES[0]);
    let lab = &scene.lab;
    let places = [SUBJECT, "node1"];
    lab.del_pod(SUBJECT).unwrap();
    let apart = dumps(lab, &places);
    for target in ["plain1", "pod2-1", SUBJECT] {
        echo(&scene, target);
    }
    let mut older = open(&scene, &["plain1"]);
    let mut silent = open(&scene, &["plain1"]);
    let sandbox = Sandbox::of(lab, SUBJECT);
    let enrol = format!(
        "enrol {}/{SUBJECT} --netns {} --uid {} --service-account {}",
        sandbox.namespace,
        sandbox.netns.display(),
        sandbox.uid,
        sandbox.service_account
    );
    ambidex(lab, &enrol).with_code(0);
    let mut captured = open(&scene, &["plain1", "pod2-1"]);
    // Each of the six ordered pairs once.
    let ends = in_both(&scene, SUBJECT)
        .into_iter()
        .zip(in_both(&scene, "pod2-1"));
    let filter: Vec<String> = ends
        .map(|((_, subject), (_, peer))| format!("(host {subject} and host {peer})"))
        .collect();
    let filter = filter.join(" or ");
    let tap = scene.tap(SUBJECT, "eth0", &filter);
    for to in [1, 2, 0, 2, 1, 0] {
        let style = STYLES[to];
        lab.choose_inpod_rules(style).unwrap();
        lab.stop(1, Daemon::Agent).unwrap();
        start_agent(lab);
        let when = format!("{style}");
        diff_is_empty(lab, &format!("{}/{SUBJECT}", sandbox.namespace));
        for family in ["ip", "ip6"] {
            let mark = run(
                &scene,
                SUBJECT,
                &format!("{family}tables-save; nft list tables inet"),
            );
            for (word, is_there) in [
                ("TPROXY", style == InpodRules::Tproxy),
                ("istio-ambient-nat", style == InpodRules::Nftables),
                ("ISTIO_PRERT", style != InpodRules::Nftables),
            ] {
                assert_eq!(mark.contains(word), is_there, "{when}: {word}: {mark}");
            }
        }
        captured
            .iter_mut()
            .chain(&mut older)
            .for_each(|talk| talk.say(&when));
        captured.extend(one_each_way(&scene, "pod2-1"));
        assert_seen(&scene, "plain1", SUBJECT);
    }
    silent
        .iter_mut()
        .for_each(|talk| talk.say("silent all the time"));
    // New ones and captured ones of before are in tunnels, at every moment.
    let wire = tap.finish();
    wire.assert_encrypted(&[]);
    wire.assert_encrypted6(&[]);

    // What older connections need goes with the last of them.
    let needs = |save: &str| run(&scene, SUBJECT, save).contains("AMBIDEX_OLDER");
    assert!(needs("iptables-save") && needs("ip6tables-save"));
    drop((older, silent));
    eventually("rules for older connections are gone", PATIENCE, || {
        !needs("iptables-save") && !needs("ip6tables-save")
    });
    captured.iter_mut().for_each(|talk| talk.say("settled"));
    diff_is_empty(lab, &format!("{}/{SUBJECT}", sandbox.namespace));
    drop(captured);
    lab.del_pod(SUBJECT).unwrap();
    assert_same("removed", &apart, &dumps(lab, &places));
}
