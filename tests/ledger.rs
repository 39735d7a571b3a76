//! The ledger of a change of capture names every connection of the pod once, as connection tracking has them, and goes on
//! to say what became of each.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;
mod talk;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};

use harness::{Scene, eventually, own, spec};
use lab::topology::Mode;
use runtime::{Done, ambidex, replace_agent};
use serde_json::Value;
use talk::{Echo, PATIENCE, PORT, Talk, assert_alive};

/// The pod whose capture changes: the node's at first.
const SUBJECT: &str = "pod1-1";
/// Of both captures, on both nodes, and one without any.
const PEERS: [&str; 4] = ["plain1", "pod1-2", "pod2-1", "pod2-2"];

fn at(scene: &Scene, target: &str) -> SocketAddr {
    (scene.ip(target), PORT).into()
}

fn both_ways(scene: &Scene) -> Vec<Talk> {
    let mut talks = Vec::new();
    for peer in PEERS {
        talks.push(Talk::open(&scene.lab, SUBJECT, at(scene, peer), false));
        talks.push(Talk::open(&scene.lab, peer, at(scene, SUBJECT), true));
    }
    talks
}

fn named(scene: &Scene) -> String {
    format!("{}/{SUBJECT}", scene.pod(SUBJECT).namespace)
}

fn switch(scene: &Scene, to: &str, flags: &str) -> Value {
    let arguments = format!(
        "mode set {} {to} --connections -o json{flags}",
        named(scene)
    );
    serde_json::from_str(&ambidex(&scene.lab, &arguments).with_code(0)).unwrap()
}

/// What the agent says of the pod's changes, the oldest first.
fn ledgers(scene: &Scene) -> Vec<Value> {
    let arguments = format!("mode ledger {} -o json", named(scene));
    serde_json::from_str(&ambidex(&scene.lab, &arguments).with_code(0)).unwrap()
}

fn number(ledger: &Value, key: &str) -> u64 {
    ledger[key]
        .as_u64()
        .unwrap_or_else(|| panic!("{key} in {ledger:#}"))
}

/// A connection by its two ends, whichever way round.
type Ends = (SocketAddr, SocketAddr);

fn ends(one: SocketAddr, other: SocketAddr) -> Ends {
    (one.min(other), one.max(other))
}

/// Connections that connection tracking has as established in a place, by the ends that each side sees.
fn tracked(scene: &Scene, place: &str) -> BTreeSet<(Ends, Ends)> {
    let mut conntrack = Command::new("conntrack");
    conntrack.args(["-L", "-p", "tcp", "--state", "ESTABLISHED"]);
    let netns = scene.lab.netns(place).unwrap();
    let listed = netns.run(|| Done::of(&mut conntrack, b"")).unwrap();
    let entry = |line: &str| {
        let values = |key: &str| {
            let words = line.split(' ').filter_map(|word| word.strip_prefix(key));
            words.map(str::to_owned).collect::<Vec<_>>()
        };
        let [src, dst, sport, dport] = ["src=", "dst=", "sport=", "dport="].map(values);
        let at = |ip: &str, port: &str| SocketAddr::new(ip.parse().unwrap(), port.parse().unwrap());
        let side = |n: usize| ends(at(&src[n], &sport[n]), at(&dst[n], &dport[n]));
        (side(0), side(1))
    };
    listed.with_code(0).lines().map(entry).collect()
}

/// Both namespaces that track connections of the pod.
fn tracked_of_pod(scene: &Scene) -> BTreeSet<(Ends, Ends)> {
    let ip = scene.ip(SUBJECT);
    let of_pod = |at: SocketAddr| at.ip() == ip;
    let mut all = tracked(scene, "node1");
    all.extend(tracked(scene, SUBJECT));
    all.retain(|((one, other), _)| of_pod(*one) || of_pod(*other));
    all
}

/// The pod's sockets with a connection. Connection tracking has some for longer than they last.
fn open_in_pod(scene: &Scene) -> BTreeSet<Ends> {
    let mut list = Command::new("ss");
    list.args(["-Htn", "state", "established"]);
    let netns = scene.lab.netns(SUBJECT).unwrap();
    let listed = netns.run(|| Done::of(&mut list, b"")).unwrap().with_code(0);
    let entry = |line: &str| {
        let mut words = line.split_whitespace().skip(2);
        let mut at = || words.next().and_then(|word| word.parse().ok());
        Some(ends(at()?, at()?))
    };
    listed.lines().filter_map(entry).collect()
}

/// The classes that each connection is in: those of the pod's own sockets, and those of the proxy's.
fn classes(ledger: &Value) -> (BTreeMap<Ends, Vec<String>>, BTreeSet<Ends>) {
    let (mut own, mut proxys) = (BTreeMap::new(), BTreeSet::new());
    for line in ledger["connections"].as_array().unwrap() {
        let at = |key: &str| line[key].as_str().unwrap().parse().unwrap();
        let ends = ends(at("local"), at("peer"));
        match line["class"].as_str().unwrap() {
            "proxy" => {
                assert!(proxys.insert(ends), "twice: {line}");
            }
            class => {
                let of: &mut Vec<String> = own.entry(ends).or_default();
                of.push(class.to_owned());
            }
        }
    }
    (own, proxys)
}

/// Under load, what connection tracking has of the pod before and after a change is in exactly one class, and what is in
/// a class is tracked; the counts are those of the connections that the test holds.
#[test]
fn it_adds_up_with_connection_tracking() {
    let scene = own(&spec(Mode::Mixed));
    let _servers: Vec<_> = [&[SUBJECT][..], &PEERS]
        .concat()
        .iter()
        .map(|target| Echo::start(&scene.lab, target))
        .collect();
    let talks = both_ways(&scene);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _done = End(&done);
        for (from, to) in [
            (SUBJECT, "pod2-1"),
            ("pod2-2", SUBJECT),
            ("plain1", SUBJECT),
        ] {
            let (scene, done) = (&scene, &done);
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    drop(Talk::open(&scene.lab, from, at(scene, to), false));
                }
            });
        }
        for to in ["inpod", "node", "inpod"] {
            let (before, open_before) = (tracked_of_pod(&scene), open_in_pod(&scene));
            let switched = switch(&scene, to, "");
            let (open_after, after) = (open_in_pod(&scene), tracked_of_pod(&scene));
            let is_open = |ends| open_before.contains(ends) && open_after.contains(ends);
            let ledger = &switched["ledger"];
            let (own, proxys) = classes(ledger);
            let both = before.intersection(&after);
            let both = both
                .filter(|(one, two)| is_open(one) || is_open(two))
                .count();
            assert!(both >= talks.len(), "to {to}: {both} of {before:#?}");
            for entry @ (asked, answered) in before.intersection(&after) {
                let of = own.get(asked).or_else(|| own.get(answered));
                let through_proxy = proxys.contains(asked) || proxys.contains(answered);
                match of {
                    Some(classes) => assert_eq!(classes.len(), 1, "{entry:?}: {classes:?}"),
                    None if !is_open(asked) && !is_open(answered) => {}
                    None => assert!(through_proxy, "to {to}: in no class: {entry:?}\n{ledger:#}"),
                }
            }
            let seen: BTreeSet<Ends> = after.iter().flat_map(|(one, two)| [*one, *two]).collect();
            // Those of the storm may have ended meanwhile.
            let stays = |ends: &&Ends| talks.iter().any(|talk| talk.is(ends.0) || talk.is(ends.1));
            for ends in own.keys().filter(stays) {
                assert!(seen.contains(ends), "to {to}: not tracked: {ends:?}");
            }
            assert!(number(ledger, "kept") >= talks.len() as u64, "{ledger:#}");
            assert_eq!(number(ledger, "outside"), 0, "{ledger:#}");
            assert_eq!(number(ledger, "kept"), number(ledger, "open"));
            let counted = |class: &str| {
                let all = own.values().flatten();
                all.filter(|of| *of == class).count() as u64
            };
            for class in ["kept", "new", "outside", "node"] {
                assert_eq!(number(ledger, class), counted(class), "{class}: {ledger:#}");
            }
            let delayed = &ledger["delayed"];
            assert!(number(delayed, "count") >= counted("delayed"), "{ledger:#}");
            assert!(number(delayed, "longest_us") <= number(ledger, "held_us"));
            assert!(number(delayed, "median_us") <= number(delayed, "longest_us"));
            assert_alive(&format!("captured by {to}"), &talks);
        }
    });
    let delayed: u64 = ledgers(&scene)
        .iter()
        .map(|ledger| number(&ledger["delayed"], "count"))
        .sum();
    assert_metric(&scene, "connections_total{class=\"delayed\"}", delayed);
}

/// A metric of changes that the agent has counted.
#[track_caller]
fn assert_metric(scene: &Scene, name: &str, value: u64) {
    let url = "http://127.0.0.1:15014/metrics";
    let argv = ["curl", "--silent", "--fail", url];
    let page = scene.lab.run("node1", &argv, PATIENCE).unwrap().stdout;
    let line = format!("ambidex_switch_{name} {value}");
    assert!(page.lines().any(|found| found == line), "{line}: {page}");
}

/// Raises a flag when it is dropped, also by a panic.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Kept connections end by themselves or are reset when their time is over; an agent that is killed meanwhile is followed
/// by one that goes on counting.
#[test]
fn it_says_what_became_of_those_that_were_kept() {
    let scene = own(&spec(Mode::Mixed));
    let _servers: Vec<_> = [&[SUBJECT][..], &PEERS]
        .concat()
        .iter()
        .map(|target| Echo::start(&scene.lab, target))
        .collect();
    let mut talks = both_ways(&scene);
    let all = talks.len() as u64;
    let last = || ledgers(&scene).pop().unwrap();
    let states = |ledger: &Value| ["open", "drained", "reset"].map(|key| number(ledger, key));

    let switched = switch(&scene, "inpod", " --drain 10m");
    assert_eq!(switched["from"], "node");
    assert_eq!(number(&switched["ledger"], "kept"), all);
    talks.truncate(6);
    eventually("those that ended are drained", PATIENCE, || {
        states(&last()) == [6, all - 6, 0]
    });
    replace_agent(&scene.lab);
    assert_eq!(states(&last()), [6, all - 6, 0], "an agent later");
    talks.truncate(5);
    eventually("one more has ended", PATIENCE, || {
        states(&last()) == [5, all - 5, 0]
    });
    assert_alive("an agent later", &talks);

    // Back before the first drain is over: those that are left go on without a limit of time, and the next ones have one.
    talks.extend(both_ways(&scene));
    let switched = switch(&scene, "node", " --drain 2s");
    let kept = talks.len() as u64;
    assert_eq!(number(&switched["ledger"], "kept"), kept, "{switched:#}");
    eventually(
        "those of the capture that it had are reset",
        PATIENCE,
        || states(&last()) == [5, 0, kept - 5] && last()["over"] == true,
    );
    let broken = |talk: &&Talk| talk.broken().is_some();
    eventually("their users see it", PATIENCE, || {
        // Idle ones find out by speaking.
        talks.iter().for_each(Talk::speak);
        talks.iter().filter(broken).count() as u64 == kept - 5
    });
    assert_alive("older than both", &talks[..5]);
    let first = ledgers(&scene).remove(0);
    assert_eq!(
        (&first["over"], states(&first)),
        (&true.into(), [5, all - 5, 0])
    );

    let netns = host_net::netns::Netns::path_of(&scene.pod(SUBJECT).netns);
    let name = named(&scene);
    let lab = &scene.lab;
    ambidex(lab, &format!("unenrol {name} --drain 1s --wait")).with_code(0);
    let gone = last();
    assert_eq!(
        (&gone["from"], &gone["to"]),
        (&"node".into(), &"none".into())
    );
    assert_eq!(states(&gone), [0, 0, 5], "{gone:#}");
    let outside = Talk::open(&scene.lab, SUBJECT, at(&scene, "pod2-1"), true);
    ambidex(lab, &format!("enrol {name} --netns {}", netns.display())).with_code(0);
    // Its name is all that is known of it: with another UID it is another pod.
    let enrolled = last();
    assert_eq!(
        (&enrolled["from"], &enrolled["to"]),
        (&"none".into(), &"node".into())
    );
    assert_eq!(number(&enrolled, "outside"), 1, "{enrolled:#}");
    drop(outside);

    for (from, to) in [("inpod", "node"), ("node", "none"), ("none", "node")] {
        let labels = format!("{{from=\"{from}\",to=\"{to}\",result=\"done\"}}");
        assert_metric(&scene, &format!("total{labels}"), 1);
    }
    assert_metric(&scene, "held_seconds_count", 1);
    assert_metric(&scene, "connections_total{class=\"reset\"}", kept);
}

#[test]
fn of_a_pod_that_nobody_knows_there_is_none() {
    let scene = own(&spec(Mode::Mixed));
    let unknown = ambidex(&scene.lab, "mode ledger nowhere/nobody");
    assert!(unknown.stderr.contains("get pods"), "{unknown:?}");
    unknown.with_code(1);
    let page = ambidex(&scene.lab, &format!("mode ledger {}", named(&scene))).with_code(0);
    assert!(
        page.starts_with("FROM") && page.lines().count() == 1,
        "{page}"
    );
}
