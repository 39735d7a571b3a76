//! Ways of connections: predicted, flagged where the kernel is not as planned, and seen as predicted.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::sync::OnceLock;
use std::time::Duration;

use ambidex::explain::Explanation;
use ambidex::explain::hop::Hop;
use ambidex::trace::Trace;
use harness::{Scene, Variant};
use rstest::rstest;

/// How long a small command may take on a busy machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// One lab per capture, which every test leaves as it found it.
fn scene(variant: Variant) -> Scene {
    static STAGES: [OnceLock<harness::SharedStage>; 3] = [const { OnceLock::new() }; 3];
    harness::shared_in(&STAGES[variant as usize], || variant.spec())
}

#[track_caller]
fn explained(scene: &Scene, code: i32, what: &str) -> Explanation {
    let arguments = format!("ambidex explain -o json {what}");
    let argv: Vec<&str> = arguments.split(' ').collect();
    let done = scene.lab.run("node1", &argv, COMMAND_LIMIT).unwrap();
    assert_eq!(done.code, code, "{what}: {}{}", done.stdout, done.stderr);
    serde_json::from_str(&done.stdout).unwrap()
}

fn sh(scene: &Scene, target: &str, command: &str) {
    let done = scene
        .lab
        .run(target, &["sh", "-c", command], COMMAND_LIMIT)
        .unwrap();
    assert_eq!(done.code, 0, "{target}: {command}: {}", done.stderr);
}

fn accepted(explanation: &Explanation) -> Vec<&str> {
    let legs = explanation.legs.iter();
    legs.map(|leg| leg.accepted_by.as_deref().unwrap_or("nobody"))
        .collect()
}

/// Places that the first packet of a leg passes, each once in a row.
fn places(explanation: &Explanation, leg: usize) -> Vec<&str> {
    let hops = &explanation.legs[leg].walks[0].hops;
    let mut places: Vec<&str> = hops.iter().map(|hop| hop.place.as_str()).collect();
    places.dedup();
    places
}

fn devices<'a>(explanation: &'a Explanation, leg: usize, phase: &str) -> Vec<&'a str> {
    let walk = explanation.legs[leg]
        .walks
        .iter()
        .find(|walk| walk.phase == phase);
    let hops = walk.unwrap().hops.iter();
    hops.filter_map(|hop| hop.device.as_deref()).collect()
}

#[rstest]
#[case::node_hybrid(Variant::NodeHybrid)]
#[case::node_tunnel(Variant::NodeTunnel)]
#[case::inpod(Variant::Inpod)]
fn a_whole_capture_is_explained_without_a_flag(#[case] variant: Variant) {
    let scene = scene(variant);
    let _alone = scene.quiet.lock().unwrap();
    // To a service, by its far endpoint.
    let far = format!(
        "alpha/pod1-1 10.96.0.10:80 --endpoint {}",
        scene.at("pod2-1")
    );
    let way = explained(&scene, 0, &far);
    assert_eq!(
        accepted(&way),
        ["proxy:15001", "proxy:15008", "application:8080"]
    );
    let identity = |leg: usize| {
        way.legs[leg]
            .decision
            .as_ref()
            .unwrap()
            .source_identity
            .clone()
    };
    assert_eq!(identity(0), Some(scene.identity("pod1-1")));
    assert_eq!(identity(1), Some(scene.identity("pod1-1")));
    for leg in &way.legs {
        assert_eq!(leg.walks.len(), 3, "first, answer, later: {leg:#?}");
    }
    match variant.is_node() {
        true => assert_eq!(places(&way, 1), ["proxy1", "node1", "node2", "proxy2"]),
        false => assert_eq!(
            places(&way, 1),
            ["pod alpha/pod1-1", "node1", "node2", "pod alpha/pod2-1"]
        ),
    }
    // The flows of the node capture differ in what comes after the first packet.
    if variant.is_node() {
        assert!(devices(&way, 0, "first").contains(&"istioout"));
        let tunnel = variant == Variant::NodeTunnel;
        for phase in ["answer", "later"] {
            assert_eq!(
                devices(&way, 0, phase).contains(&"istioout"),
                tunnel,
                "{phase}"
            );
        }
    }
    // On one node, from outside the mesh, and from the node itself past the proxy.
    let near = explained(&scene, 0, "alpha/pod1-1 beta/pod1-2:8080");
    let tunnel = if variant.is_node() {
        "proxy:15088"
    } else {
        "proxy:15008"
    };
    assert_eq!(accepted(&near), ["proxy:15001", tunnel, "application:8080"]);
    let plain = explained(&scene, 0, "alpha/pod1-1 8080 --from plain1");
    assert_eq!(accepted(&plain), ["proxy:15006", "application:8080"]);
    let probe = explained(&scene, 0, "alpha/pod1-1 8080 --from node1");
    assert_eq!(accepted(&probe), ["application:8080"]);
}

/// One thing is changed by hand: the way leaves the planned one there, and says so.
struct Damage {
    target: &'static str,
    breaks: String,
    mends: String,
    /// Where the flag is.
    flagged: &'static str,
    /// What it says.
    says: &'static str,
    foreign: bool,
}

fn damage(target: &'static str, breaks: &str, mends: &str, says: &'static str) -> Damage {
    Damage {
        target,
        breaks: breaks.to_owned(),
        mends: mends.to_owned(),
        flagged: if target.starts_with("pod") {
            "pod alpha/pod1-1"
        } else {
            target
        },
        says,
        foreign: false,
    }
}

fn damages(variant: Variant, ip: &str) -> Vec<Damage> {
    let foreign = |it: Damage| Damage {
        foreign: true,
        ..it
    };
    if variant == Variant::Inpod {
        let redirect =
            "! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001";
        return vec![
            damage(
                "pod1-1",
                &format!("iptables -t nat -D ISTIO_OUTPUT {redirect}"),
                &format!("iptables -t nat -A ISTIO_OUTPUT {redirect}"),
                "REDIRECT --to-ports 15001 (this rule is missing)",
            ),
            foreign(damage(
                "pod1-1",
                "iptables -t nat -I OUTPUT -p tcp -j ACCEPT",
                "iptables -t nat -D OUTPUT -p tcp -j ACCEPT",
                "nat ISTIO_OUTPUT",
            )),
            damage(
                "pod1-1",
                "ip rule del pref 32764",
                "ip rule add pref 32764 fwmark 0x111/0xfff lookup 100 proto 133",
                "this ip rule is missing",
            ),
        ];
    }
    let tproxy =
        "-i pistioout -p tcp -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff";
    vec![
        damage(
            "proxy1",
            &format!("iptables -t mangle -D PREROUTING {tproxy}"),
            &format!("iptables -t mangle -I PREROUTING 2 {tproxy}"),
            "(this rule is missing)",
        ),
        foreign(damage(
            "node1",
            &format!("iptables -t mangle -I PREROUTING -s {ip} -j ACCEPT"),
            &format!("iptables -t mangle -D PREROUTING -s {ip} -j ACCEPT"),
            "MARK --set-xmark 0x100/0x100",
        )),
        damage(
            "node1",
            &format!(
                "ipset save ztunnel-pods-ips > /run/explain-$$; ipset del ztunnel-pods-ips {ip}; rm /run/explain-$$"
            ),
            &format!(
                "ipset add ztunnel-pods-ips {ip} comment \"$(ipset list ambidex-guarded | grep '^{ip} ' | cut -d'\"' -f2)\""
            ),
            "lacks",
        ),
        damage(
            "node1",
            "ip route del default table 101",
            "ip route add default via 192.168.127.2 dev istioout table 101 proto 133",
            "(this route is missing)",
        ),
        damage(
            "node1",
            "ip rule del pref 101",
            "ip rule add pref 101 fwmark 0x100/0x100 lookup 101 proto 133",
            "this ip rule is missing",
        ),
    ]
}

#[rstest]
#[case::node_hybrid(Variant::NodeHybrid)]
#[case::node_tunnel(Variant::NodeTunnel)]
#[case::inpod(Variant::Inpod)]
fn one_rule_changed_by_hand_is_flagged_at_its_hop(#[case] variant: Variant) {
    let scene = scene(variant);
    let _alone = scene.quiet.lock().unwrap();
    let what = "alpha/pod1-1 alpha/pod2-1:8080";
    let ip = scene.ip("pod1-1").to_string();
    for it in damages(variant, &ip) {
        sh(&scene, it.target, &it.breaks);
        let way = explained(&scene, 3, what);
        let flags: Vec<&Hop> = way.hops().filter(|hop| hop.differs.is_some()).collect();
        let first = flags.first().expect("a flag");
        assert_eq!(first.place, it.flagged, "{}: {first:#?}", it.breaks);
        let differs = first.differs.as_deref().unwrap();
        assert!(differs.contains(it.says), "{}: {differs}", it.breaks);
        assert_eq!(first.is_foreign(), it.foreign, "{}: {first:#?}", it.breaks);
        sh(&scene, it.target, &it.mends);
        explained(&scene, 0, what);
    }
}

#[track_caller]
fn traced(scene: &Scene, code: i32, what: &str) -> Trace {
    let arguments = format!("ambidex trace -o json {what}");
    let argv: Vec<&str> = arguments.split(' ').collect();
    let done = scene.lab.run("node1", &argv, COMMAND_LIMIT).unwrap();
    assert_eq!(done.code, code, "{what}: {}{}", done.stdout, done.stderr);
    serde_json::from_str(&done.stdout).unwrap()
}

/// How many hops of a packet were seen on their device, and how many rules counted it.
fn evidence(trace: &Trace, leg: usize, phase: &str) -> (usize, usize) {
    let walks = &trace.explanation.legs[leg].walks;
    let walk = walks.iter().position(|walk| walk.phase == phase).unwrap();
    let hops = &trace.seen[leg][walk].hops;
    let on_devices = hops.iter().filter(|hop| hop.micros.is_some()).count();
    let counted = hops.iter().filter(|hop| hop.counted > Some(0)).count();
    (on_devices, counted)
}

#[rstest]
#[case::node_hybrid(Variant::NodeHybrid)]
#[case::node_tunnel(Variant::NodeTunnel)]
#[case::inpod(Variant::Inpod)]
fn what_is_seen_is_what_was_predicted(#[case] variant: Variant) {
    let scene = scene(variant);
    let _alone = scene.quiet.lock().unwrap();
    // The second time through the tunnel that is open already, which is no disagreement.
    for turn in ["first", "second"] {
        let trace = traced(&scene, 0, "alpha/pod1-1 alpha/pod2-1:8080 --bytes 20000");
        assert_eq!(trace.connection.tunnel, Some(true), "{turn}");
        assert_eq!(
            trace.connection.legs.len(),
            3,
            "{turn}: {:#?}",
            trace.connection
        );
        let source = Some(scene.identity("pod1-1"));
        assert_eq!(trace.connection.source_identity, source, "{turn}");
        if turn == "second" {
            assert!(trace.seen[1][0].spared, "{:#?}", trace.seen[1][0]);
        }
        for (leg, phase) in [(0, "first"), (0, "answer"), (0, "later"), (2, "first")] {
            let (on_devices, counted) = evidence(&trace, leg, phase);
            assert!(on_devices > 0, "{turn}: leg {leg} {phase}: {trace:#?}");
            let has_rules = trace.explanation.legs[leg].walks[0]
                .hops
                .iter()
                .any(|hop| hop.rule.is_some());
            assert!(
                counted > 0 || !has_rules || phase != "first",
                "{turn}: leg {leg} {phase}"
            );
        }
        let (on_devices, _) = evidence(&trace, 1, "later");
        assert!(
            on_devices >= 4,
            "{turn}: both nodes and both ends: {on_devices}"
        );
    }
    // By a service, with whichever endpoint; on one node; in the clear; from the node past the proxy.
    let service = traced(&scene, 0, "alpha/pod1-1 beta/echo:80");
    assert!(service.connection.endpoint.is_some());
    traced(&scene, 0, "alpha/pod1-1 beta/pod1-2:8080");
    let plain = traced(&scene, 0, "alpha/pod1-1 8080 --from plain1");
    assert_eq!(plain.connection.tunnel, Some(false));
    let probe = traced(&scene, 0, "alpha/pod1-1 8080 --from node1");
    assert_eq!(probe.connection.tunnel, None);
}

/// What the prediction cannot know of, the trace finds: rules of nftables' own.
#[rstest]
#[case::node_hybrid(Variant::NodeHybrid, "node1", "prerouting")]
#[case::inpod(Variant::Inpod, "pod1-1", "output")]
fn what_is_not_as_predicted_is_said(
    #[case] variant: Variant,
    #[case] target: &str,
    #[case] hook: &str,
) {
    let scene = scene(variant);
    let _alone = scene.quiet.lock().unwrap();
    let ip = scene.ip("pod1-1");
    let rules = format!(
        "table ip strange {{ chain c {{ type filter hook {hook} priority -400; ip saddr {ip} tcp dport 8080 drop; }}; }}"
    );
    sh(&scene, target, &format!("nft '{rules}'"));
    let trace = traced(&scene, 3, "alpha/pod1-1 alpha/pod2-1:8080");
    sh(&scene, target, "nft delete table ip strange");
    assert_eq!(trace.explanation.differences(), 0, "{trace:#?}");
    let notes = trace.explanation.notes.join(" ");
    assert!(notes.contains("strange"), "{notes}");
    assert!(trace.connection.failed.is_some());
    let first = &trace.seen[0][0].hops;
    let missing = first
        .iter()
        .position(|hop| hop.disagrees.is_some())
        .unwrap();
    let hop = &trace.explanation.legs[0].walks[0].hops[missing];
    let place = if variant.is_node() {
        "node1"
    } else {
        "pod alpha/pod1-1"
    };
    assert_eq!(hop.place, place, "{hop:#?}");
    traced(&scene, 0, "alpha/pod1-1 alpha/pod2-1:8080");
}
