//! A node whose proxy goes with its network namespace, and comes again in another one with another address: the node's
//! objects follow it, the pods stay captured, and nothing of theirs is on the wire in the clear meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::time::Duration;

use harness::Variant::{self, NodeHybrid, NodeTunnel};
use harness::marked::Marked;
use harness::{Scene, eventually, own};
use host_net::netns::Netns;
use lab::standing::{Daemon, Lab};
use rstest::rstest;
use runtime::successor::Successor;
use runtime::{Sandbox, ambidex, diff_is_empty, ip_batch, state_of};

/// Far over what anything here takes, for machines that are busy.
const SOON: Duration = Duration::from_secs(90);

fn node_lab(variant: Variant) -> Scene {
    let mut spec = variant.spec();
    spec.mends = true;
    own(&spec)
}

/// The lab's proxy of node1 goes as a deleted pod does: its process, its veth, its namespace.
fn delete_first_proxy(lab: &Lab) {
    lab.kill(1, Daemon::Proxy).unwrap();
    let topology = lab.topology();
    let node = topology.node(1).unwrap();
    ip_batch(&node.netns, &format!("link delete {}\n", node.proxy_veth));
    Netns::delete_named(&node.proxy_netns).unwrap();
}

/// A dump's lines with another proxy's device and address, in an order of their own.
fn with_proxy(dump: &str, old: (&str, &str), new: (&str, &str)) -> Vec<String> {
    let is_of_a_word = |c: char| c.is_ascii_alphanumeric() || c == '.';
    let put = |line: &str| {
        let parts = line.split_inclusive(|c: char| !is_of_a_word(c));
        parts
            .map(|part| {
                let word = part.trim_end_matches(|c: char| !is_of_a_word(c));
                let rest = &part[word.len()..];
                match word {
                    word if word == old.0 => format!("{}{rest}", new.0),
                    word if word == old.1 => format!("{}{rest}", new.1),
                    _ => part.to_owned(),
                }
            })
            .collect::<String>()
    };
    let mut lines: Vec<String> = dump.lines().map(put).collect();
    lines.sort();
    lines
}

fn node_dump(lab: &Lab) -> String {
    harness::dump(&lab.netns("node1").unwrap())
}

/// Lines that are in one of both only.
fn differing(one: &[String], other: &[String]) -> Vec<String> {
    let beyond = |these: &[String], those: &[String], sign: char| {
        let lines = these.iter().filter(|line| !those.contains(line));
        lines
            .map(|line| format!("{sign}{line}"))
            .collect::<Vec<_>>()
    };
    [beyond(one, other, '-'), beyond(other, one, '+')].concat()
}

/// The node's state is what it was, but for the proxy's device and address.
fn follows(lab: &Lab, before: &str, successor: &Successor) {
    let topology = lab.topology();
    let node = topology.node(1).unwrap();
    let old = (node.proxy_veth.as_str(), node.proxy_ip.to_string());
    let new = (successor.place.veth(), successor.place.ip.to_string());
    let wanted = with_proxy(before, (old.0, &old.1), (&new.0, &new.1));
    let same = || {
        let mut found: Vec<String> = node_dump(lab).lines().map(str::to_owned).collect();
        found.sort();
        differing(&wanted, &found)
    };
    let mut difference = same();
    let deadline = std::time::Instant::now() + SOON;
    while !difference.is_empty() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(100));
        difference = same();
    }
    assert!(difference.is_empty(), "{difference:#?}");
}

fn is_captured(lab: &Lab, pod: &str) -> bool {
    let uid = lab.topology().pod(pod).unwrap().1.uid.clone();
    state_of(lab, &uid).as_deref() == Some("captured")
}

/// Twice: a namespace that was never the lab's is left as another one's was.
#[rstest]
fn a_proxy_in_another_namespace(#[values(NodeHybrid, NodeTunnel)] variant: Variant) {
    let scene = node_lab(variant);
    let lab = &scene.lab;
    let before = node_dump(lab);
    let agent = lab.process(1, Daemon::Agent).unwrap().pid;
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");

    delete_first_proxy(lab);
    let failed = marked.failed();
    eventually("connections fail", SOON, || marked.failed() > failed + 2);
    let mut first = Successor::start(lab, Sandbox::wired(lab, "other1", [10, 244, 1, 105].into()));
    marked.flows("through the second proxy");
    follows(lab, &before, &first);
    diff_is_empty(lab, "--node");

    first.kill();
    first.place.destroy(lab);
    let second = Successor::start(lab, Sandbox::wired(lab, "third1", [10, 244, 1, 106].into()));
    marked.flows("through the third proxy");
    follows(lab, &before, &second);
    diff_is_empty(lab, "--node");
    ambidex(lab, "verify").with_code(0);
    assert!(is_captured(lab, "pod1-1") && is_captured(lab, "pod1-2"));
    assert_eq!(lab.process(1, Daemon::Agent).unwrap().pid, agent);
    marked.assert_never_in_the_clear();
}

/// Somebody's route is where one of ours has to be, half-way through the change-over; and somebody's device in the new
/// proxy's namespace. Nothing half-made stays, the agent says what is in the way, and all is well when that is gone.
#[rstest]
fn a_set_up_that_fails_half_way_is_taken_back_and_tried_again(
    #[values(NodeHybrid, NodeTunnel)] variant: Variant,
    #[values("node", "proxy")] at: &str,
) {
    let scene = node_lab(variant);
    let lab = &scene.lab;
    let before = node_dump(lab);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    delete_first_proxy(lab);
    let place = Sandbox::wired(lab, "other1", [10, 244, 1, 105].into());
    let topology = lab.topology();
    let node = topology.node(1).unwrap().netns.clone();
    let in_proxy = place
        .netns
        .file_name()
        .unwrap()
        .to_str()
        .unwrap()
        .to_owned();
    let (netns, obstacle) = match at {
        "node" => (&node, "route {} unreachable 10.244.1.105 table 102\n"),
        _ => (
            &in_proxy,
            "link {} pistioout type veth peer name somebodys\n",
        ),
    };
    ip_batch(netns, &obstacle.replace("{}", "add"));
    let clean = harness::dump(&Netns::open(&place.netns).unwrap());
    let successor = Successor::start(lab, place);

    let why = || {
        let verify = ambidex(lab, "verify");
        format!("{}{}", verify.stdout, verify.stderr)
    };
    let named = if at == "node" {
        "10.244.1.105"
    } else {
        "pistioout"
    };
    eventually("the agent says what is in the way", SOON, || {
        why().contains(named)
    });
    let succeeded = marked.succeeded();
    // Neither led to the new proxy by half, nor let out; the agent tries again and again meanwhile.
    let half_made = || {
        let dump = node_dump(lab);
        let of_the_new = |line: &&str| {
            line.contains("istio") && line.contains("10.244.1.105")
                || line.contains("vother1 table 10")
        };
        let lines: Vec<String> = dump.lines().filter(of_the_new).map(str::to_owned).collect();
        lines
    };
    eventually("nothing half-made is on the node", SOON, || {
        half_made().is_empty()
    });
    if at == "proxy" {
        eventually("nothing half-made is in the namespace", SOON, || {
            successor.dump() == clean
        });
    }
    assert_eq!(
        marked.succeeded(),
        succeeded,
        "nobody serves, and something passes"
    );
    assert!(is_captured(lab, "pod1-1"));

    ip_batch(
        netns,
        &obstacle
            .replace("{}", "del")
            .replace(" type veth peer name somebodys", ""),
    );
    marked.flows("when the way is free");
    follows(lab, &before, &successor);
    diff_is_empty(lab, "--node");
    marked.assert_never_in_the_clear();
}
