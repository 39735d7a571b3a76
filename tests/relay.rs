//! The benchmark's bound is a relay that does what the proxy does to connections, and nothing to their bytes.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::sync::{MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use harness::{Scene, SharedStage, Stage, ambidex, eventually, shared_in};
use lab::bench::relayed;
use lab::standing::Daemon;
use lab::topology::{Mode, SERVICE_PORT, SERVICE_VIP};
use lab::traffic::{Check, Saw};
use rstest::rstest;

/// Pipes that a relay may keep, in descriptors.
const KEPT: usize = 2 * splice_relay::pipe::KEPT;

fn relay() -> Scene {
    static STAGE: OnceLock<SharedStage> = OnceLock::new();
    shared_in(&STAGE, || {
        let mut spec = harness::spec(Mode::Inpod);
        spec.proxy_command = Some([ambidex(), "lab", "relay"].map(str::to_owned).to_vec());
        spec
    })
}

/// Descriptors are counted and devices listened on, so one test at a time.
fn alone(scene: &Stage) -> MutexGuard<'_, ()> {
    scene.quiet.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Descriptors of a node's relay: sockets and pipes.
fn descriptors(scene: &Stage, node: u8) -> [usize; 2] {
    let pid = scene.lab.process(node, Daemon::Proxy).unwrap().pid;
    let links: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok())
        .map(|link| link.display().to_string())
        .collect();
    ["socket:", "pipe:"].map(|kind| links.iter().filter(|link| link.starts_with(kind)).count())
}

/// The client's address is kept, and the wire shows the bytes and whose they are.
#[rstest]
#[case::cross_node("pod1-1", "pod2-1", "eth0")]
#[case::same_node("pod1-1", "pod1-2", "vethp1")]
fn readable_and_with_the_clients_address(
    #[case] from: &str,
    #[case] to: &str,
    #[case] device: &str,
) {
    let scene = relay();
    let _alone = alone(&scene);
    let (near, far) = (scene.ip(from), scene.ip(to));
    let tap = scene.tap("node1", device, &format!("host {near} and host {far}"));
    assert_eq!(scene.seen(from, scene.at(to)), near);
    let marked = scene.check(from, scene.at(to), Check::Marker { marker: None });
    let wire = tap.finish();
    let marker = marked.marker.unwrap();
    for statement in relayed::statements(&wire.label, &wire.capture, marker.as_bytes()) {
        assert!(statement.holds, "{}: {}", statement.claim, statement.found);
    }
}

/// A service address, and the two ways with a relay at one end only.
#[test]
fn every_other_way() {
    let scene = relay();
    let _alone = alone(&scene);
    let service = (SERVICE_VIP, SERVICE_PORT).into();
    // Both endpoints, but for once in 30,000 runs.
    for _ in 0..16 {
        assert_eq!(scene.seen("pod1-1", service), scene.ip("pod1-1"));
    }
    for (from, to) in [("plain1", "pod2-1"), ("pod2-1", "plain1")] {
        assert_eq!(scene.seen(from, scene.at(to)), scene.ip(from));
    }
    scene.check("pod1-1", scene.at("out"), Check::Who);
}

/// Bytes, ends and resets arrive as they were sent; afterwards the relays hold what they held before.
#[rstest]
#[case::cross_node("pod1-1", "pod2-1")]
#[case::same_node("pod1-1", "pod1-2")]
fn nothing_is_lost_and_nothing_is_left(#[case] from: &str, #[case] to: &str) {
    let scene = relay();
    let _alone = alone(&scene);
    let to = scene.at(to);
    let before = [1, 2].map(|node| descriptors(&scene, node)[0]);
    let (up, down) = (32 << 20, 32 << 20);
    let exchanged = scene.check(from, to, Check::Exchange { up, down });
    assert_eq!(exchanged.bytes, up + down);
    scene.check(from, to, Check::HalfClose { bytes: 1_000_000 });
    let by_server = scene.check(from, to, Check::PeerReset { after: 100_000 });
    assert_eq!(by_server.saw, Some(Saw::Reset));
    let by_client = scene.check(from, to, Check::OwnReset);
    assert_eq!(by_client.saw, Some(Saw::Reset));
    scene.check(from, to, Check::Storm { connections: 200 });
    eventually(
        "the relays close every connection",
        Duration::from_secs(10),
        || [1, 2].map(|node| descriptors(&scene, node)[0]) == before,
    );
    for node in [1, 2] {
        let pipes = descriptors(&scene, node)[1];
        assert!(pipes <= KEPT, "relay{node} holds {pipes} ends of pipes");
    }
}

/// Only who has an address may speak for it, also without encryption; and nobody reaches the relay's own ports.
#[test]
fn connections_to_the_relay_itself_are_refused() {
    let scene = relay();
    let _alone = alone(&scene);
    let port = |port| (scene.ip("pod2-1"), port).into();
    // From a pod that is not captured, 15008 is reached directly, and a request of the traffic tool is no header.
    scene.refused("plain1", port(15008));
    for own in [15001, 15006, 15008] {
        scene.refused("pod1-1", port(own));
    }
}
