//! What happens to the bytes of a connection, and to its end.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{own, shared};
use lab::topology::{SERVICE_PORT, SERVICE_VIP};
use lab::traffic::{Check, Saw};
use rstest::rstest;

/// Through a tunnel, through one within a node, and as plaintext through the inbound side alone: three different relays.
const TUNNEL: (&str, &str) = ("pod1-1", "pod2-1");
const WITHIN_NODE: (&str, &str) = ("pod1-1", "pod1-2");
const INBOUND_PLAINTEXT: (&str, &str) = ("plain1", "pod2-1");
const OUTBOUND_PLAINTEXT: (&str, &str) = ("pod2-1", "plain1");

/// Each end closes its direction first, while the other goes on sending.
#[rstest]
#[case::tunnel(TUNNEL)]
#[case::within_node(WITHIN_NODE)]
#[case::inbound_plaintext(INBOUND_PLAINTEXT)]
#[case::outbound_plaintext(OUTBOUND_PLAINTEXT)]
fn half_close_both_ways(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] (from, to): (&str, &str),
) {
    let scene = shared(variant);
    scene.check(from, scene.at(to), Check::HalfClose { bytes: 1_000_000 });
}

/// A reset of the server is a reset at the client, after all that came before it.
#[rstest]
#[case::tunnel(TUNNEL)]
#[case::within_node(WITHIN_NODE)]
#[case::inbound_plaintext(INBOUND_PLAINTEXT)]
#[case::outbound_plaintext(OUTBOUND_PLAINTEXT)]
fn reset_by_the_server(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] (from, to): (&str, &str),
) {
    let scene = shared(variant);
    let outcome = scene.check(from, scene.at(to), Check::PeerReset { after: 100_000 });
    assert_eq!(outcome.saw, Some(Saw::Reset));
}

/// A reset of the client is a reset at the server.
#[rstest]
#[case::tunnel(TUNNEL)]
#[case::within_node(WITHIN_NODE)]
#[case::inbound_plaintext(INBOUND_PLAINTEXT)]
#[case::outbound_plaintext(OUTBOUND_PLAINTEXT)]
fn reset_by_the_client(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] (from, to): (&str, &str),
) {
    let scene = shared(variant);
    let outcome = scene.check(from, scene.at(to), Check::OwnReset);
    assert_eq!(outcome.saw, Some(Saw::Reset));
}

/// Every byte is compared where it arrives.
#[rstest]
#[case::tunnel(TUNNEL)]
#[case::within_node(WITHIN_NODE)]
fn sixty_four_mebibytes_each_way(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] (from, to): (&str, &str),
) {
    let scene = shared(variant);
    let bytes = 64 << 20;
    let outcome = scene.check(
        from,
        scene.at(to),
        Check::Exchange {
            up: bytes,
            down: bytes,
        },
    );
    assert_eq!(outcome.bytes, 2 * bytes);
}

/// All open at the same time; each must still work when all are.
#[rstest]
fn a_thousand_parallel_connections(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let check = Check::Storm { connections: 1000 };
    scene.check("pod1-1", scene.at("pod2-1"), check);
}

/// As many again through the service address, over both endpoints.
#[rstest]
fn parallel_connections_to_a_service(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let check = Check::Storm { connections: 200 };
    scene.check("pod2-2", (SERVICE_VIP, SERVICE_PORT).into(), check);
}

/// Unread single bytes must not cost the tunnel its life, nor anybody else's connection in it.
#[rstest]
#[case::tunnel(TUNNEL)]
#[case::within_node(WITHIN_NODE)]
#[case::inbound_plaintext(INBOUND_PLAINTEXT)]
fn slow_reader_of_single_bytes(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] (from, to): (&str, &str),
) {
    let scene = shared(variant);
    let slow = Check::OneByteWrites {
        count: 60_000,
        pause_ms: 1000,
    };
    let beside = Check::Exchange {
        up: 1_000_000,
        down: 1_000_000,
    };
    std::thread::scope(|scope| {
        scope.spawn(|| scene.check(from, scene.at(to), slow));
        std::thread::sleep(std::time::Duration::from_millis(300));
        scene.check(from, scene.at(to), beside);
    });
}

/// A link between the nodes that is narrower than the pods think: the kernel's "packet too big" must reach whoever sends,
/// although he speaks with somebody else's address.
#[rstest]
fn narrow_link_between_nodes(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    for node in ["node1", "node2"] {
        let argv = ["ip", "link", "set", "eth0", "mtu", "1400"];
        let done = scene
            .lab
            .run(node, &argv, std::time::Duration::from_secs(10));
        done.unwrap().success("ip link set mtu").unwrap();
    }
    let paths = [
        ("pod1-1", "pod2-1"),
        ("pod2-1", "pod1-1"),
        ("plain1", "pod2-1"),
        ("pod1-1", "plain2"),
    ];
    for (from, to) in paths {
        let check = Check::Exchange {
            up: 1_000_000,
            down: 1_000_000,
        };
        scene.check(from, scene.at(to), check);
    }
}

/// Connections by every way outlive what the nodes remember of them.
#[rstest]
fn flushed_connection_tracking(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let ways = [TUNNEL, WITHIN_NODE, INBOUND_PLAINTEXT, OUTBOUND_PLAINTEXT];
    std::thread::scope(|scope| {
        let scene = &scene;
        let connections = ways.map(|(from, to)| {
            // The server begins to read after the flushes, so there is something left to do both ways.
            let check = Check::OneByteWrites {
                count: 2000,
                pause_ms: 6000,
            };
            scope.spawn(move || scene.check(from, scene.at(to), check))
        });
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(500));
            for node in ["node1", "node2"] {
                let argv = ["conntrack", "-F"];
                let done = scene
                    .lab
                    .run(node, &argv, std::time::Duration::from_secs(10));
                done.unwrap().success("conntrack -F").unwrap();
            }
        }
        let over = connections
            .iter()
            .any(|connection| connection.is_finished());
        for connection in connections {
            let done = connection.join();
            done.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        }
        assert!(!over, "over before the last flush, so nothing is proven");
    });
}
