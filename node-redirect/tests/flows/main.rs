//! The node capture on a real kernel: two nodes, their proxies and pods as network namespaces, this crate's plans and
//! scope, and a relay that speaks plain text where the proxy speaks mutual TLS. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod relay;
mod topology;
mod traffic;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use host_net::plan::Phase;
use node_redirect::plan::Flow;
use node_redirect::scope::SameNode;
use relay::{Seen, Way};
use rstest::rstest;
use tokio::time::timeout;
use topology::{A, B, C, H1, HOST_1, Lab, Pod, U, UPLINK_1, V, VIP, Z1, Z2, ipv6};

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(8);
const PORT: u16 = 8080;

fn at(pod: Pod) -> SocketAddr {
    SocketAddr::from((pod.ip, PORT))
}

/// Sends `size` bytes from `from` to the echo server behind `to`; returns whom the server saw.
async fn echo(lab: &Lab, from: Pod, to: SocketAddr, size: usize) -> Result<IpAddr, String> {
    let talk = async {
        let mut connection = lab.connect(from.netns, to).await?;
        let seen = connection.greeting().await?;
        connection.echo(size).await?;
        Ok::<_, std::io::Error>(seen)
    };
    timeout(PATIENCE, talk)
        .await
        .map_err(|_| "timed out".to_owned())?
        .map_err(|error| error.to_string())
}

fn seen(way: Way, client: Pod, dst: SocketAddr) -> Seen {
    Seen {
        way,
        client: IpAddr::V4(client.ip),
        dst,
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn every_pair_goes_its_way_and_keeps_the_clients_address(
    #[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow,
) {
    let lab = Lab::up(flow, SameNode::Hbone).await;
    let out = |client, dst| seen(Way::Outbound, client, dst);
    let tunnel = |client, pod: Pod| seen(Way::Hbone, client, SocketAddr::from((pod.ip, 15008)));
    let plain = |client, pod| seen(Way::Plaintext, client, at(pod));
    let external = SocketAddr::from((U.ip, PORT));
    let cases: [(&str, Pod, SocketAddr, Vec<Seen>); 8] = [
        ("A to B", A, at(B), vec![out(A, at(B)), tunnel(A, B)]),
        ("B to A", B, at(A), vec![out(B, at(A)), tunnel(B, A)]),
        ("A to service", A, VIP, vec![out(A, VIP), tunnel(A, B)]),
        (
            "A to C, one node",
            A,
            at(C),
            vec![out(A, at(C)), tunnel(A, C)],
        ),
        ("U to B, one node", U, at(B), vec![plain(U, B)]),
        ("V to B", V, at(B), vec![plain(V, B)]),
        ("V to A, one node", V, at(A), vec![plain(V, A)]),
        ("A to U", A, external, vec![out(A, external)]),
    ];
    for (what, from, to, way) in cases {
        lab.forget_seen();
        let server_saw = echo(&lab, from, to, 20_000).await;
        assert_eq!(server_saw, Ok(IpAddr::V4(from.ip)), "{flow}: {what}");
        assert_eq!(lab.seen(), way, "{flow}: {what}");
    }

    // Its own service: the proxy's own address, because equal ends cannot be told apart.
    lab.forget_seen();
    let saw = echo(&lab, B, VIP, 20_000).await;
    assert_eq!(saw, Ok(IpAddr::V4(Z2.ip)), "{flow}: B to its own service");
    assert_eq!(lab.seen(), [out(B, VIP), tunnel(B, B)]);

    // The node itself (probes): past the proxy.
    lab.forget_seen();
    let saw = echo(&lab, H1, at(A), 20_000).await;
    assert_eq!(saw, Ok(IpAddr::V4(HOST_1)), "{flow}: node to A");
    assert_eq!(lab.seen(), []);

    // A node port: masqueraded to the node's end of the tunnel, with which the proxy must not speak.
    lab.node_port_to(A);
    let node_port = SocketAddr::from((UPLINK_1, topology::NODE_PORT));
    let saw = echo(&lab, U, node_port, 20_000).await;
    assert_eq!(saw, Ok(IpAddr::V4(Z1.ip)), "{flow}: node port");
    let by_node = Seen {
        way: Way::Plaintext,
        client: IpAddr::V4(Ipv4Addr::new(192, 168, 126, 1)),
        dst: at(A),
    };
    assert_eq!(lab.seen(), [by_node]);

    for (from, to) in [(A, B), (A, U), (V, A), (A, C)] {
        assert!(lab.ping(from, to.ip), "{flow}: ping {} {}", from.ip, to.ip);
    }
}

/// Payload of the bulk test, bytes each way.
const BULK: u64 = 6_000_000;

#[tokio::test(flavor = "multi_thread")]
async fn tunnel_keeps_whole_connections_in_the_overlay() {
    let lab = Lab::up(Flow::Tunnel, SameNode::Hbone).await;
    let before = lab.counters();
    echo(&lab, A, at(B), BULK as usize).await.unwrap();
    let moved = lab.counters() - before;
    let most = BULK * 95 / 100;
    // The client's leg on the source node.
    assert!(moved.out_1.to_proxy.bytes >= most, "{moved:?}");
    assert!(moved.out_1.from_proxy.bytes >= most, "{moved:?}");
    // The tunnel's leg on the destination node.
    assert!(moved.in_2.to_proxy.bytes >= most, "{moved:?}");
    assert!(moved.in_2.from_proxy.bytes >= most, "{moved:?}");
    // Nothing else is in the overlay: the source proxy's side of the tunnel, and the last hop, are not.
    assert_eq!(moved.in_1.to_proxy.packets, 0, "{moved:?}");
    assert_eq!(moved.out_2.to_proxy.packets, 0, "{moved:?}");

    // Between two pods of one node only the client's leg is; the tunnel is on the proxy's lo.
    let before = lab.counters();
    echo(&lab, A, at(C), BULK as usize).await.unwrap();
    let moved = lab.counters() - before;
    assert!(moved.out_1.to_proxy.bytes >= most, "{moved:?}");
    assert!(moved.out_1.from_proxy.bytes >= most, "{moved:?}");
    assert_eq!(moved.in_1.to_proxy.packets, 0, "{moved:?}");
    assert!(moved.proxy_1_lo.to_proxy.bytes >= 2 * most, "{moved:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn hybrid_puts_the_first_packet_into_the_overlay_and_no_other() {
    let lab = Lab::up(Flow::Hybrid, SameNode::Hbone).await;
    // Neighbours resolved, so that no SYN waits and is sent twice.
    echo(&lab, A, at(B), 10).await.unwrap();
    let before = lab.counters();
    echo(&lab, A, at(B), BULK as usize).await.unwrap();
    let moved = lab.counters() - before;
    for first in [moved.out_1.to_proxy, moved.in_2.to_proxy] {
        // A busy machine may send it again.
        assert!((1..=3).contains(&first.packets), "{moved:?}");
        assert!(first.bytes <= 3 * 60, "a SYN, nothing longer: {moved:?}");
    }
    assert_eq!(moved.out_1.from_proxy.packets, 0, "{moved:?}");
    assert_eq!(moved.in_2.from_proxy.packets, 0, "{moved:?}");
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_smaller_mtu_between_the_nodes_stops_nothing(
    #[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow,
) {
    let lab = Lab::up(flow, SameNode::Hbone).await;
    lab.uplink_mtu(1300);
    for (what, from, to) in [
        ("A to B", A, at(B)),
        ("V to B", V, at(B)),
        ("B to A", B, at(A)),
        ("A to U", A, at(U)),
    ] {
        let saw = echo(&lab, from, to, 300_000).await;
        assert_eq!(saw, Ok(IpAddr::V4(from.ip)), "{flow}: {what}");
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn captured_connections_outlive_the_capture_and_a_conntrack_flush(
    #[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow,
) {
    let mut lab = Lab::up(flow, SameNode::Hbone).await;
    let mut old = Vec::new();
    for (from, to) in [
        (A, at(B)),
        (B, at(A)),
        (V, at(A)),
        (A, at(U)),
        (A, at(C)),
        (C, at(A)),
    ] {
        let mut connection = lab.connect(from.netns, to).await.unwrap();
        connection.greeting().await.unwrap();
        connection.echo(1000).await.unwrap();
        old.push((from.ip, to, connection));
    }
    lab.flush_conntrack();
    for (from, to, connection) in &mut old {
        let alive = timeout(PATIENCE, connection.echo(20_000)).await;
        assert!(
            matches!(alive, Ok(Ok(()))),
            "{flow}: flush: {from} {to}: {alive:?}"
        );
    }
    lab.pod_phase(Phase::Draining, false).await;
    for (from, to, connection) in &mut old {
        let alive = timeout(PATIENCE, connection.echo(20_000)).await;
        assert!(
            matches!(alive, Ok(Ok(()))),
            "{flow}: drain: {from} {to}: {alive:?}"
        );
    }
    lab.forget_seen();
    echo(&lab, A, at(U), 1000).await.unwrap();
    echo(&lab, V, at(A), 1000).await.unwrap();
    assert_eq!(lab.seen(), [], "{flow}: nothing new is captured");
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_older_than_the_capture_are_left_alone(
    #[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow,
) {
    let mut lab = Lab::up(flow, SameNode::Hbone).await;
    lab.pod_phase(Phase::Absent, false).await;
    let mut old = Vec::new();
    for (from, to) in [(A, at(U)), (V, at(A))] {
        let mut connection = lab.connect(from.netns, to).await.unwrap();
        connection.greeting().await.unwrap();
        connection.echo(1000).await.unwrap();
        old.push((from.ip, to, connection));
    }
    lab.pod_phase(Phase::Active, true).await;
    lab.forget_seen();
    for what in ["known to conntrack", "no longer known"] {
        for (from, to, connection) in &mut old {
            let alive = timeout(PATIENCE, connection.echo(20_000)).await;
            assert!(
                matches!(alive, Ok(Ok(()))),
                "{flow}: {what}: {from} {to}: {alive:?}"
            );
        }
        lab.flush_conntrack();
    }
    assert_eq!(lab.seen(), []);
    echo(&lab, A, at(U), 1000).await.unwrap();
    assert_eq!(lab.seen().len(), 1, "a new one is captured");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_captured_pods_ipv6_goes_nowhere() {
    let mut lab = Lab::up(Flow::Hybrid, SameNode::Hbone).await;
    lab.ipv6_on_node_1();
    let ways = [(A, V), (V, A), (A, H1), (H1, A)];
    lab.pod_phase(Phase::Absent, false).await;
    for (from, to) in ways {
        assert!(lab.ping(from, ipv6(to)), "{} to {}", from.netns, to.netns);
    }
    lab.pod_phase(Phase::Active, true).await;
    for (from, to) in ways {
        assert!(!lab.ping(from, ipv6(to)), "{} to {}", from.netns, to.netns);
    }
    assert!(lab.ping(V, ipv6(H1)), "others are not touched");
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_the_plans(#[values(Flow::Hybrid, Flow::Tunnel)] flow: Flow) {
    let lab = Lab::up(flow, SameNode::Direct).await;
    assert_ne!(lab.state().await, lab.untouched);
    lab.remove_plans().await;
    for (after, before) in lab.state().await.iter().zip(&lab.untouched) {
        assert_eq!(after, before);
    }
}
