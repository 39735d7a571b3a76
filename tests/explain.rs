//! Ways of connections: predicted, flagged where the kernel is not as planned, and seen as predicted.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod ways;

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};
use std::time::Duration;

use ambidex::explain::Explanation;
use ambidex::explain::hop::{Hop, Kind};
use ambidex::explain::render::plain;
use ambidex::trace::Trace;
use harness::{Scene, ambidex};
use lab::traffic::Check;
use rstest::rstest;
use ways::{article, mermaid};

use Style::{Nftables, NodeHybrid, NodeTunnel, Redirect, Tproxy};
use ways::styles::{Style, damages, scene};

/// How long a small command may take on a busy machine.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// What `ambidex` says on node 1.
#[track_caller]
fn said(scene: &Scene, code: i32, arguments: &str) -> String {
    let mut argv = vec!["ambidex"];
    argv.extend(arguments.split(' '));
    let done = scene.lab.run("node1", &argv, COMMAND_LIMIT).unwrap();
    assert_eq!(
        done.code, code,
        "{arguments}: {}{}",
        done.stdout, done.stderr
    );
    done.stdout + &done.stderr
}

#[track_caller]
fn explained(scene: &Scene, code: i32, what: &str) -> Explanation {
    serde_json::from_str(&said(scene, code, &format!("explain -o json {what}"))).unwrap()
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
#[case::node_hybrid(NodeHybrid)]
#[case::node_tunnel(NodeTunnel)]
#[case::redirect(Redirect)]
#[case::tproxy(Tproxy)]
#[case::nftables(Nftables)]
fn a_whole_capture_is_explained_without_a_flag(#[case] style: Style) {
    let scene = scene(style);
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
    match style.is_node() {
        true => assert_eq!(places(&way, 1), ["proxy1", "node1", "node2", "proxy2"]),
        false => assert_eq!(
            places(&way, 1),
            ["pod alpha/pod1-1", "node1", "node2", "pod alpha/pod2-1"]
        ),
    }
    // The flows of the node capture differ in what comes after the first packet.
    if style.is_node() {
        assert!(devices(&way, 0, "first").contains(&"istioout"));
        let tunnel = style == NodeTunnel;
        for phase in ["answer", "later"] {
            assert_eq!(
                devices(&way, 0, phase).contains(&"istioout"),
                tunnel,
                "{phase}"
            );
        }
    }
    assert_eq!(way.capture.as_deref(), Some(style.name()));
    assert_eq!(way.notes, Vec::<String>::new(), "everything is evaluated");
    if scene.lab.topology().families.have_v6() {
        let way = explained(&scene, 0, &format!("alpha/pod1-1 {}", scene.at6("pod2-1")));
        assert_eq!(
            accepted(&way),
            ["proxy:15001", "proxy:15008", "application:8080"]
        );
        assert!(
            way.legs[0]
                .connection
                .starts_with(&format!("[{}]", scene.ip6("pod1-1")))
        );
    }
    // On one node, from outside the mesh, and from the node itself past the proxy.
    let near = explained(&scene, 0, "alpha/pod1-1 beta/pod1-2:8080");
    let tunnel = if style.is_node() {
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

#[rstest]
#[case::node_hybrid(NodeHybrid)]
#[case::node_tunnel(NodeTunnel)]
#[case::redirect(Redirect)]
#[case::tproxy(Tproxy)]
#[case::nftables(Nftables)]
fn one_rule_changed_by_hand_is_flagged_at_its_hop(#[case] style: Style) {
    let scene = scene(style);
    let _alone = scene.quiet.lock().unwrap();
    let ip = scene.ip("pod1-1").to_string();
    for it in damages(style, &ip) {
        let what = match it.ipv6 {
            true => format!("alpha/pod1-1 {}", scene.at6("pod2-1")),
            false => "alpha/pod1-1 alpha/pod2-1:8080".to_owned(),
        };
        let what = what.as_str();
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
    serde_json::from_str(&said(scene, code, &format!("trace -o json {what}"))).unwrap()
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
#[case::node_hybrid(NodeHybrid)]
#[case::node_tunnel(NodeTunnel)]
#[case::redirect(Redirect)]
#[case::tproxy(Tproxy)]
#[case::nftables(Nftables)]
fn what_is_seen_is_what_was_predicted(#[case] style: Style) {
    let scene = scene(style);
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
    if scene.lab.topology().families.have_v6() {
        let trace = traced(&scene, 0, &format!("alpha/pod1-1 {}", scene.at6("pod2-1")));
        assert_eq!(trace.connection.tunnel, Some(true));
        assert!(evidence(&trace, 1, "later").0 >= 4, "{trace:#?}");
        assert!(trace.tracked.iter().any(|it| it.original.starts_with('[')));
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

/// What the prediction cannot know of, the trace finds: a rule whose condition is not evaluated.
#[rstest]
#[case::node_hybrid(NodeHybrid, "node1", "prerouting")]
#[case::redirect(Redirect, "pod1-1", "output")]
fn what_is_not_as_predicted_is_said(
    #[case] style: Style,
    #[case] target: &str,
    #[case] hook: &str,
) {
    let scene = scene(style);
    let _alone = scene.quiet.lock().unwrap();
    let ip = scene.ip("pod1-1");
    let rules = format!(
        "table ip strange {{ chain c {{ type filter hook {hook} priority -400; ip saddr {ip} ip ttl > 1 tcp dport 8080 drop; }}; }}"
    );
    sh(&scene, target, &format!("nft '{rules}'"));
    let trace = traced(&scene, 3, "alpha/pod1-1 alpha/pod2-1:8080");
    sh(&scene, target, "nft delete table ip strange");
    assert_eq!(trace.explanation.differences(), 0, "{trace:#?}");
    let mut unknown = trace.explanation.hops().filter(|hop| hop.unknown.is_some());
    let rule = unknown.next().unwrap().rule.as_ref().unwrap();
    assert!(rule.foreign && rule.table == "ip strange", "{rule:#?}");
    assert!(trace.connection.failed.is_some());
    let first = &trace.seen[0][0].hops;
    let missing = first
        .iter()
        .position(|hop| hop.disagrees.is_some())
        .unwrap();
    let hop = &trace.explanation.legs[0].walks[0].hops[missing];
    let place = if style.is_node() {
        "node1"
    } else {
        "pod alpha/pod1-1"
    };
    assert_eq!(hop.place, place, "{hop:#?}");
    traced(&scene, 0, "alpha/pod1-1 alpha/pod2-1:8080");
}

/// The third article's story, line by line, of a connection that nobody made before.
#[test]
fn a_trace_tells_the_articles_story() {
    let scene = scene(NodeTunnel);
    let _alone = scene.quiet.lock().unwrap();
    let topology = scene.lab.topology();
    let (far, _) = topology.pod("pod2-2").unwrap();
    let overlay = said(&scene, 0, "explain -o json beta/pod1-2 beta/pod2-2:8080");
    let overlay = ["geneve", "vxlan"]
        .into_iter()
        .find(|kind| overlay.contains(&format!("{kind} id")));
    let mut names = article::Names {
        places: [
            "pod beta/pod1-2",
            "node1",
            "proxy1",
            "node2",
            "proxy2",
            "pod beta/pod2-2",
        ]
        .map(str::to_owned),
        client: scene.ip("pod1-2").to_string(),
        destination: scene.ip("pod2-2").to_string(),
        gateway: far.pod_gateway.to_string(),
        overlay: overlay.unwrap().to_owned(),
        veth: "vethp2".to_owned(),
    };
    let story = said(&scene, 0, "trace -o story beta/pod1-2 beta/pod2-2:8080");
    let lines = article::held(&story, &article::POD_TO_POD, &names).unwrap();
    assert_eq!(lines.len(), article::POD_TO_POD.len());
    assert!(story.contains("conntrack -L:"), "{story}");
    let proven = format!("proven client: {}", scene.identity("pod1-2"));
    assert!(story.contains(&proven), "{story}");
    // Every station is needed, and none may lack what was seen of it.
    let all: Vec<&str> = story.lines().collect();
    for line in lines {
        let without: Vec<&str> = [&all[..line], &all[line + 1..]].concat();
        let told = article::held(&without.join("\n"), &article::POD_TO_POD, &names);
        assert!(told.is_err(), "not missed: {}", all[line]);
    }
    let unseen = story.replace(" ms ", "    ");
    assert!(article::held(&unseen, &article::POD_TO_POD, &names).is_err());
    // What comes in the clear.
    let (near, pod) = topology.pod("pod1-2").unwrap();
    names.destination = pod.ip.to_string();
    names.gateway = near.pod_gateway.to_string();
    let story = said(&scene, 0, "trace -o story beta/pod1-2 8080 --from plain1");
    article::held(&story, &article::PLAIN_TO_POD, &names).unwrap();
}

/// A diagram has every hop, and nothing that Mermaid would not read.
#[rstest]
#[case::node_tunnel(NodeTunnel)]
#[case::nftables(Nftables)]
fn a_diagram_has_every_hop(#[case] style: Style) {
    let scene = scene(style);
    let _alone = scene.quiet.lock().unwrap();
    let what = format!("alpha/pod1-1 {}", scene.at("pod2-1"));
    let predicted = explained(&scene, 0, &what);
    let diagram = said(&scene, 0, &format!("explain -o mermaid {what}"));
    let texts = mermaid::texts(&diagram).unwrap();
    let mut at = 0;
    for hop in predicted.hops().filter(|hop| !hop.is_idle()) {
        let text = plain(&hop.text);
        let rule = hop
            .rule
            .as_ref()
            .map_or(String::new(), |rule| plain(&rule.text));
        let next = texts[at..]
            .iter()
            .position(|it| it.contains(&text) && it.contains(&rule));
        // A packet's arrival stands at its arrow, whose line has its departure.
        at += next.unwrap_or_else(|| panic!("{text} {rule} is not behind {at} in {diagram}"));
        at += usize::from(hop.kind != Kind::Transmitted);
    }
    let diagram = said(&scene, 0, &format!("trace -o mermaid {what}"));
    let timed = mermaid::texts(&diagram).unwrap();
    assert!(timed.len() >= texts.len(), "{diagram}");
    let times = timed.iter().filter(|text| text.contains(" ms)")).count();
    assert!(times >= 10, "{diagram}");
}

/// The next connection of a pod, made by somebody else, and by a client that no proxy of its own has.
#[rstest]
#[case::node_hybrid(
    NodeHybrid,
    "pod1-1",
    "pod2-1",
    "alpha/pod1-1 alpha/pod2-1:8080",
    "proxy:15001"
)]
#[case::tproxy(
    Tproxy,
    "pod1-1",
    "pod2-1",
    "alpha/pod1-1 alpha/pod2-1:8080",
    "proxy:15001"
)]
#[case::from_plain(
    Redirect,
    "plain1",
    "pod1-1",
    "alpha/pod1-1 8080 --from plain1",
    "proxy:15006"
)]
fn the_next_connection_is_followed(
    #[case] style: Style,
    #[case] from: &str,
    #[case] to: &str,
    #[case] what: &str,
    #[case] taken_by: &str,
) {
    let scene = scene(style);
    let _alone = scene.quiet.lock().unwrap();
    // A connection that is open before is not the next one.
    scene.check(from, scene.at(to), Check::Who);
    let name = scene.lab.name();
    let arguments =
        format!("lab exec --name {name} node1 -- ambidex trace -o json --follow {what}");
    let mut child = Command::new(ambidex())
        .args(arguments.split(' '))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It says when it listens.
    let mut said = BufReader::new(child.stderr.take().unwrap()).lines();
    let waits = said.any(|line| line.unwrap().contains("waiting for the next connection"));
    assert!(waits, "it ended before");
    // More than a pipe holds.
    let mut stdout = child.stdout.take().unwrap();
    let text = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    let slow = Check::OneByteWrites {
        count: 200,
        pause_ms: 2_000,
    };
    while child.try_wait().unwrap().is_none() {
        scene.check(from, scene.at(to), slow.clone());
    }
    let text = text.join().unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0), "{text}");
    let trace: Trace = serde_json::from_str(&text).unwrap();
    assert_eq!(trace.connection.legs[0].from.ip(), scene.ip(from));
    assert_eq!(accepted(&trace.explanation)[0], taken_by);
    assert!(evidence(&trace, 0, "first").0 > 0, "{trace:#?}");
    assert_eq!(trace.contradictions, Vec::<String>::new());
}

/// The same connection in two captures, next to each other.
#[test]
fn two_captures_are_compared() {
    let (node, inpod) = (scene(NodeTunnel), scene(Redirect));
    let (_one, _other) = (node.quiet.lock().unwrap(), inpod.quiet.lock().unwrap());
    let what = "alpha/pod1-1 alpha/pod2-1:8080";
    let left = traced(&node, 0, what);
    let path = inpod.lab.dir().join("other-trace.json");
    std::fs::write(&path, serde_json::to_vec(&left).unwrap()).unwrap();
    let compare = format!("--compare {}", path.display());
    let both = said(&inpod, 0, &format!("trace {compare} {what}"));
    let heading = both.lines().next().unwrap();
    assert!(heading.contains("(node, tunnel)") && heading.contains("(inpod, redirect)"));
    let (mark, redirect) = ("mark 0 → 0x100", "REDIRECT --to-ports 15001");
    let column = |text: &str| {
        let line = both.lines().find(|line| line.contains(text));
        let line = line.unwrap_or_else(|| panic!("no {text} in {both}"));
        line.split(text).next().unwrap().chars().count()
    };
    assert!(column(mark) < column(redirect), "{both}");
    assert!(!both.contains("table 101"), "{both}");
    let wide = said(&inpod, 0, &format!("trace -o wide {compare} {what}"));
    assert!(
        wide.contains("table 101: default via 192.168.127.2"),
        "{wide}"
    );
    let pair = said(&inpod, 0, &format!("trace -o json {compare} {what}"));
    let pair: Vec<Trace> = serde_json::from_str(&pair).unwrap();
    assert_eq!(pair[0], left);
    assert_eq!(
        pair[1].explanation.capture.as_deref(),
        Some("inpod, redirect")
    );
    let wrong = said(&inpod, 1, &format!("trace -o mermaid {compare} {what}"));
    assert!(wrong.contains("leave out --compare"), "{wrong}");
    std::fs::write(&path, "{}").unwrap();
    let wrong = said(&inpod, 1, &format!("trace {compare} {what}"));
    assert!(wrong.contains("no trace as `-o json` writes it"), "{wrong}");
    std::fs::remove_file(&path).unwrap();
}

/// Odd questions get an answer that says what to do, or a prediction; never a panic.
#[rstest]
#[case("nobody/there 10.244.2.10:80", "there are alpha/pod1-1")]
#[case(
    "10.244.1.10 10.244.2.10:80",
    "not its address 10.244.1.10 alpha/pod1-1"
)]
#[case("alpha/pod1-1 10.244.2.10", "has no port")]
#[case("alpha/pod1-1 fd00:10:244:2::10", "want [ADDRESS]:PORT")]
#[case("alpha/pod1-1 fd00:10:244:2::10:zz", "in brackets")]
#[case("alpha/pod1-1 [fd00:10:244:2::10]:8080", "no address of the family")]
#[case("alpha/pod1-1 10.244.2.10:http", "\"http\" is no port")]
#[case("alpha/pod1-1 10.244.2.10:70000", "\"70000\" is no port")]
#[case("alpha/pod1-1 10.244.2.10:0", "port 0")]
#[case("alpha/pod1-1 nothing:80", "no service nothing")]
#[case(
    "alpha/pod1-1 eighty --from node1",
    "neither a port of pod alpha/pod1-1"
)]
#[case(
    "alpha/pod1-1 80 --from nowhere",
    "neither a node (node1, node2) nor a pod"
)]
fn an_odd_question_is_answered(#[case] what: &str, #[case] answer: &str) {
    let scene = scene(NodeHybrid);
    let _alone = scene.quiet.lock().unwrap();
    let answered = said(&scene, 1, &format!("explain {what}"));
    assert!(answered.contains(answer), "{what}: {answered}");
    // A trace asks the same way.
    if answer == "has no port" {
        let answered = said(&scene, 1, &format!("trace {what}"));
        assert!(answered.contains(answer), "{what}: {answered}");
    }
}

/// A port that nobody serves, and an address that nobody has.
#[rstest]
#[case(NodeHybrid)]
#[case(Nftables)]
fn what_does_not_arrive_is_predicted(#[case] style: Style) {
    let scene = scene(style);
    let _alone = scene.quiet.lock().unwrap();
    let closed = explained(&scene, 0, "alpha/pod1-1 alpha/pod2-1:9");
    assert_eq!(accepted(&closed), ["proxy:15001", "proxy:15008", "nobody"]);
    let last = &closed.legs.last().unwrap().walks[0];
    assert!(last.ends.contains("nobody listens on port 9"), "{last:#?}");
    let nobody = explained(&scene, 0, "alpha/pod1-1 10.244.2.99:80");
    assert_eq!(accepted(&nobody)[0], "proxy:15001");
    let yaml = said(&scene, 0, "explain -o yaml alpha/pod1-1 alpha/pod2-1:9");
    assert!(
        yaml.contains("acceptedBy: proxy:15001") || yaml.contains("acceptedBy: \"proxy:15001\""),
        "{yaml}"
    );
}
