//! The in-pod capture on a real kernel: a node and its pods as network namespaces, this crate's plans and scopes, and a
//! relay that speaks plain text where the proxy speaks mutual TLS. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod node;
mod relay;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use host_net::plan::Phase;
use inpod_redirect::plan::Style;
use node::{A, C, Connection, H, Node, PORT, Pod, V, VIP_OF_A};
use relay::{Seen, Way};
use rstest::rstest;
use tokio::time::timeout;

/// Longer than anything takes that works.
const PATIENCE: Duration = Duration::from_secs(8);

fn at(pod: Pod) -> SocketAddr {
    SocketAddr::from((pod.ip, PORT))
}

fn seen(scope: Pod, way: Way, client: Pod, dst: SocketAddr) -> Seen {
    Seen {
        scope: scope.netns.to_owned(),
        way,
        client: IpAddr::V4(client.ip),
        dst,
    }
}

/// Opens a connection and sends bytes both ways; returns it and whom the server saw.
async fn open(node: &Node, from: Pod, to: SocketAddr) -> Result<(Connection, IpAddr), String> {
    let talk = async {
        let mut connection = node.connect(from, to).await?;
        let seen = connection.greeting().await?;
        connection.echo(20_000).await?;
        Ok::<_, std::io::Error>((connection, seen))
    };
    timeout(PATIENCE, talk)
        .await
        .map_err(|_| "timed out".to_owned())?
        .map_err(|error| error.to_string())
}

async fn sees(node: &Node, from: Pod, to: SocketAddr) -> Result<IpAddr, String> {
    Ok(open(node, from, to).await?.1)
}

async fn assert_alive(what: &str, connections: &mut [Connection]) {
    for connection in connections {
        let alive = timeout(PATIENCE, connection.echo(20_000)).await;
        assert!(matches!(alive, Ok(Ok(()))), "{what}: {alive:?}");
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn every_pair_goes_its_way_and_keeps_the_clients_address(
    #[values(Style::Redirect, Style::Tproxy, Style::Nftables)] style: Style,
) {
    let mut node = Node::up(style);
    node.enrol(A, Phase::Active).await;
    node.enrol(C, Phase::Active).await;
    let out = |client, dst| seen(client, Way::Outbound, client, dst);
    let hbone = |pod: Pod, client| {
        let dst = SocketAddr::from((pod.ip, 15008));
        seen(pod, Way::Hbone, client, dst)
    };
    let cases: [(&str, Pod, SocketAddr, Vec<Seen>); 4] = [
        ("A to C", A, at(C), vec![out(A, at(C)), hbone(C, A)]),
        ("V to A", V, at(A), vec![seen(A, Way::Plaintext, V, at(A))]),
        ("A to V", A, at(V), vec![out(A, at(V))]),
        (
            "A to its own service",
            A,
            VIP_OF_A,
            vec![out(A, VIP_OF_A), hbone(A, A)],
        ),
    ];
    for (what, from, to, way) in cases {
        node.forget_seen();
        assert_eq!(
            sees(&node, from, to).await,
            Ok(IpAddr::V4(from.ip)),
            "{what}"
        );
        assert_eq!(node.seen(), way, "{what}");
    }

    // Not captured: its own address and loopback, and the node's own connections, which come as probes.
    node.forget_seen();
    for own in [A.ip, Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)] {
        let to = SocketAddr::from((own, PORT));
        assert!(sees(&node, A, to).await.is_ok(), "A to {own}");
    }
    let probe = IpAddr::V4(Ipv4Addr::new(169, 254, 7, 127));
    assert_eq!(sees(&node, H, at(A)).await, Ok(probe));
    assert_eq!(node.seen(), []);

    // Straight to the proxy's ports: nobody's.
    for port in [15001, 15006] {
        let to = SocketAddr::from((A.ip, port));
        assert!(sees(&node, V, to).await.is_err(), "V to A:{port}");
    }
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn connections_outlive_enrolment_and_unenrolment(
    #[values(Style::Redirect, Style::Tproxy, Style::Nftables)] style: Style,
) {
    let mut node = Node::up(style);
    let mut old = Vec::new();
    for (from, to) in [(A, at(V)), (V, at(A)), (H, at(A))] {
        old.push(open(&node, from, to).await.unwrap().0);
    }
    node.enrol(A, Phase::Active).await;
    assert_alive("enrolled", &mut old).await;
    assert_eq!(node.seen(), [], "old connections are not captured");

    let mut captured = Vec::new();
    for (from, to) in [(A, at(V)), (V, at(A))] {
        captured.push(open(&node, from, to).await.unwrap().0);
    }
    assert_eq!(node.seen().len(), 2, "new ones are");
    node.enrol(A, Phase::Draining).await;
    assert_alive("draining, older than the capture", &mut old).await;
    assert_alive("draining, captured", &mut captured).await;
    node.forget_seen();
    assert!(sees(&node, A, at(V)).await.is_ok());
    assert!(sees(&node, V, at(A)).await.is_ok());
    assert_eq!(node.seen(), [], "nothing new is captured");
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn a_captured_pods_ipv6_goes_nowhere(
    #[values(Style::Redirect, Style::Nftables)] style: Style,
) {
    let mut node = Node::up(style);
    node.ipv6();
    let ways = [(A, V), (V, A)];
    let crosses = async |node: &Node, (from, to): (Pod, Pod)| {
        let to = SocketAddr::from((node::ipv6(to), PORT));
        timeout(Duration::from_secs(3), node.connect(from, to))
            .await
            .is_ok_and(|connected| connected.is_ok())
    };
    for way in ways {
        assert!(crosses(&node, way).await, "{way:?}");
    }
    node.enrol(A, Phase::Active).await;
    for way in ways {
        assert!(!crosses(&node, way).await, "{way:?}");
    }
    assert!(crosses(&node, (V, C)).await, "others are not touched");
}

/// A pod goes from one style to another and back, and neither what is captured nor what is older notices.
#[rstest]
#[case(Style::Redirect, Style::Tproxy)]
#[case(Style::Redirect, Style::Nftables)]
#[case(Style::Tproxy, Style::Redirect)]
#[case(Style::Tproxy, Style::Nftables)]
#[case(Style::Nftables, Style::Redirect)]
#[case(Style::Nftables, Style::Tproxy)]
#[tokio::test(flavor = "multi_thread")]
async fn connections_outlive_a_change_of_style(#[case] first: Style, #[case] second: Style) {
    let mut node = Node::up(first);
    let ways = [(A, at(V)), (V, at(A)), (H, at(A)), (A, at(C)), (C, at(A))];
    let mut older = Vec::new();
    let mut idle = Vec::new();
    for (from, to) in ways {
        older.push(open(&node, from, to).await.unwrap().0);
        idle.push(open(&node, from, to).await.unwrap().0);
    }
    node.enrol(A, Phase::Active).await;
    node.enrol(C, Phase::Active).await;
    let mut captured = Vec::new();
    for (from, to) in ways {
        captured.push(open(&node, from, to).await.unwrap().0);
    }
    assert_alive("enrolled, older", &mut older).await;
    for style in [second, first, second] {
        node.style = style;
        node.enrol(A, Phase::Active).await;
        let what = format!("{style:?}");
        assert_alive(&format!("{what}, captured"), &mut captured).await;
        assert_alive(&format!("{what}, older"), &mut older).await;
        node.forget_seen();
        let seen_by = sees(&node, V, at(A)).await;
        assert_eq!(seen_by, Ok(IpAddr::V4(V.ip)), "{what}");
        let (seen_by, way) = (sees(&node, A, at(V)).await, node.seen());
        assert_eq!(seen_by, Ok(IpAddr::V4(A.ip)), "{what}");
        assert_eq!(way.len(), 2, "{what}: new ones are captured: {way:?}");
    }
    assert_alive("idle all the time", &mut idle).await;
}

#[rstest]
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_left_of_the_plans(
    #[values(Style::Redirect, Style::Tproxy, Style::Nftables)] style: Style,
) {
    let mut node = Node::up(style);
    let before = node.state().await;
    node.enrol(A, Phase::Active).await;
    assert_ne!(node.state().await, before);
    node.remove_plans().await;
    for (after, before) in node.state().await.iter().zip(&before) {
        assert_eq!(after, before);
    }
}
