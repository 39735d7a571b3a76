//! Who reaches whom, by which way, and with which address.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{eventually, own, shared};
use lab::bench::proof::counters;
use lab::topology::{SERVICE_PORT, SERVICE_VIP, SameNode};
use lab::traffic::Check;
use rstest::rstest;

/// What the kubelet's probes look like to an application that is captured in its pod.
const PROBE_SOURCE: Ipv4Addr = Ipv4Addr::new(169, 254, 7, 127);

/// Two captured pods: through a tunnel, with both identities proven.
#[rstest]
#[case::cross_node("pod1-1", "pod2-1")]
#[case::cross_node_back("pod2-2", "pod1-2")]
#[case::same_node("pod1-1", "pod1-2")]
#[case::same_node_and_identity("pod1-3", "pod1-1")]
fn pod_to_pod(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
    #[case] to: &str,
) {
    let scene = shared(variant);
    let (near, far) = (
        scene.mark(scene.node_of(from)),
        scene.mark(scene.node_of(to)),
    );
    let outcome = scene.check(from, scene.at(to), Check::Who);
    assert_eq!(
        outcome.seen.unwrap().ip(),
        scene.ip(from),
        "the client's address"
    );

    let (client, server) = (scene.identity(from), scene.identity(to));
    let application = scene.at(to).to_string();
    let outbound = scene.access_line(
        near,
        &[
            ("direction", "outbound"),
            ("src.addr", &outcome.local.unwrap().to_string()),
        ],
    );
    assert_eq!(outbound["dst.hbone_addr"], *application, "{outbound}");
    assert_eq!(outbound["src.identity"], *client, "{outbound}");
    assert_eq!(outbound["dst.identity"], *server, "{outbound}");
    assert_eq!(outbound["capture_mode"], variant.capture(), "{outbound}");
    let inbound = scene.access_line(
        far,
        &[
            ("direction", "inbound"),
            ("src.workload", from),
            ("dst.workload", to),
        ],
    );
    assert_eq!(inbound["src.identity"], *client, "{inbound}");
    assert_eq!(inbound["dst.hbone_addr"], *application, "{inbound}");
    assert!(inbound.get("error").is_none(), "{inbound}");
}

/// A service address, from the node of each endpoint and through both captures of its DNAT: the proxy chooses.
#[rstest]
#[case::from_first_node("pod1-1")]
#[case::from_second_node("pod2-2")]
fn service_address_to_both_endpoints(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
) {
    let scene = shared(variant);
    let near = scene.mark(scene.node_of(from));
    let service: SocketAddr = (SERVICE_VIP, SERVICE_PORT).into();
    let mut sources = Vec::new();
    // 24 choices with equal chance miss one of two endpoints once in 8 million runs.
    for _ in 0..24 {
        let outcome = scene.check(from, service, Check::Who);
        assert_eq!(
            outcome.seen.unwrap().ip(),
            scene.ip(from),
            "the client's address"
        );
        sources.push(outcome.local.unwrap().to_string());
    }
    let mut endpoints: Vec<String> = sources
        .iter()
        .map(|source| {
            let line = scene.access_line(near, &[("direction", "outbound"), ("src.addr", source)]);
            assert_eq!(line["dst.service"], "echo.beta.svc.cluster.local", "{line}");
            line["dst.hbone_addr"].as_str().unwrap().to_owned()
        })
        .collect();
    endpoints.sort();
    endpoints.dedup();
    let expected = [scene.at("pod1-2"), scene.at("pod2-1")].map(|to| to.to_string());
    assert_eq!(endpoints, expected);
}

/// An endpoint may be sent to itself.
#[rstest]
fn service_address_from_an_endpoint_of_it(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let near = scene.mark(1);
    let mut own = 0;
    for _ in 0..24 {
        let outcome = scene.check("pod1-2", (SERVICE_VIP, SERVICE_PORT).into(), Check::Who);
        let source = outcome.local.unwrap().to_string();
        let line = scene.access_line(near, &[("direction", "outbound"), ("src.addr", &source)]);
        own += u32::from(line["dst.hbone_addr"] == scene.at("pod1-2").to_string());
    }
    assert!(own > 0, "never sent to itself");
}

/// Plaintext from outside the mesh passes as long as no policy wants more.
#[rstest]
#[case::same_node("plain1", "pod1-1")]
#[case::cross_node("plain1", "pod2-1")]
fn uncaptured_to_captured(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
    #[case] to: &str,
) {
    let scene = shared(variant);
    let far = scene.mark(scene.node_of(to));
    assert_eq!(scene.seen(from, scene.at(to)), scene.ip(from));
    let line = scene.access_line(
        far,
        &[
            ("direction", "inbound"),
            ("src.workload", from),
            ("dst.workload", to),
        ],
    );
    assert!(
        line.get("src.identity").is_none(),
        "nothing is proven: {line}"
    );
    assert!(line.get("dst.hbone_addr").is_none(), "no tunnel: {line}");
}

/// Whoever is not captured gets to a captured endpoint by the node's DNAT, and is seen as ever.
#[rstest]
fn uncaptured_to_service_address(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let service: SocketAddr = (SERVICE_VIP, SERVICE_PORT).into();
    for _ in 0..12 {
        assert_eq!(scene.seen("plain1", service), scene.ip("plain1"));
    }
}

/// A process of the node, too. Its address is masqueraded on the way, as without a mesh; with the node capture the probes'
/// way past the proxy is decided before the DNAT, so it is led to the proxy, which never speaks with a node's address.
#[rstest]
fn node_to_service_address(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let node = scene.lab.topology().node(1).unwrap().clone();
    let near = if variant.is_node() {
        node.proxy_ip
    } else {
        PROBE_SOURCE
    };
    for _ in 0..12 {
        let seen = scene.seen("node1", (SERVICE_VIP, SERVICE_PORT).into());
        assert!(seen == near || seen == node.address, "{seen}");
    }
}

/// What is not TCP is not captured and must not get lost in what captures TCP.
#[rstest]
#[case::cross_node("pod1-1", "pod2-1")]
#[case::same_node("pod1-1", "pod1-2")]
#[case::to_uncaptured("pod1-1", "plain2")]
#[case::from_uncaptured("plain1", "pod2-1")]
#[case::from_the_node("node1", "pod1-1")]
fn udp_passes(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
    #[case] to: &str,
) {
    let scene = shared(variant);
    let socket = |target: &str| {
        let netns = scene.lab.netns(target).unwrap();
        let socket = netns.run(|| UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)));
        let socket = socket.unwrap().unwrap();
        let limit = Some(Duration::from_secs(5));
        socket.set_read_timeout(limit).unwrap();
        socket
    };
    let (client, server) = (socket(from), socket(to));
    let port = server.local_addr().unwrap().port();
    client.connect((scene.ip(to), port)).unwrap();
    let mut buffer = [0; 16];
    for round in 0..3 {
        client.send(&[round]).unwrap();
        let (length, source) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(buffer[..length], [round]);
        assert_eq!(source, client.local_addr().unwrap(), "the client's address");
        server.send_to(b"back", source).unwrap();
        let length = client.recv(&mut buffer).unwrap();
        assert_eq!(&buffer[..length], b"back");
    }
}

/// A process on another node is not the kubelet of this one: it goes through the proxy.
#[rstest]
fn other_node_to_captured(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let far = scene.mark(1);
    let node2: IpAddr = scene.lab.topology().node(2).unwrap().address.into();
    assert_eq!(scene.seen("node2", scene.at("pod1-1")), node2);
    scene.access_line(
        far,
        &[
            ("direction", "inbound"),
            ("src.addr", &format!("~{node2}:")),
        ],
    );
}

/// What is not in the mesh, or not captured, is spoken to as it is.
#[rstest]
#[case::same_node("pod1-1", "plain1")]
#[case::cross_node("pod1-1", "plain2")]
fn captured_to_uncaptured(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
    #[case] to: &str,
) {
    let scene = shared(variant);
    let near = scene.mark(scene.node_of(from));
    let outcome = scene.check(from, scene.at(to), Check::Who);
    assert_eq!(
        outcome.seen.unwrap().ip(),
        scene.ip(from),
        "the client's address"
    );
    let source = outcome.local.unwrap().to_string();
    let line = scene.access_line(near, &[("direction", "outbound"), ("src.addr", &source)]);
    assert!(line.get("dst.hbone_addr").is_none(), "no tunnel: {line}");
}

/// The outside host sees the node, as it would without a mesh.
#[rstest]
fn captured_to_outside(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let near = scene.mark(1);
    let masqueraded: IpAddr = scene.lab.topology().node(1).unwrap().outside_address.into();
    let outcome = scene.check("pod1-1", scene.at("out"), Check::Who);
    assert_eq!(outcome.seen.unwrap().ip(), masqueraded);
    let source = outcome.local.unwrap().to_string();
    scene.access_line(near, &[("direction", "outbound"), ("src.addr", &source)]);
}

/// A probe of the pod's own node reaches the application past the proxy.
#[rstest]
fn host_probe_to_captured(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let mark = scene.mark(1);
    let gateway = scene.lab.topology().node(1).unwrap().pod_gateway;
    let expected = if variant.is_node() {
        gateway
    } else {
        PROBE_SOURCE
    };
    for _ in 0..3 {
        assert_eq!(scene.seen("node1", scene.at("pod1-1")), expected);
    }
    // A connection after them, so that the log has come that far.
    let later = scene.check("pod1-1", scene.at("plain1"), Check::Who);
    let source = later.local.unwrap().to_string();
    scene.access_line(mark, &[("src.addr", &source)]);
    for line in scene.access_lines(mark) {
        let client = line["src.addr"].as_str().unwrap_or_default();
        assert!(
            !client.starts_with(&format!("{gateway}:"))
                && !client.starts_with(&format!("{PROBE_SOURCE}:")),
            "the probe went through the proxy: {line}"
        );
    }
}

/// What a pod says to itself is nobody's business.
#[rstest]
#[case::by_its_address(None)]
#[case::by_loopback(Some(Ipv4Addr::LOCALHOST))]
fn pod_to_itself(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] to: Option<Ipv4Addr>,
) {
    let scene = shared(variant);
    let own: IpAddr = to.unwrap_or(scene.ip("pod1-1")).into();
    assert_eq!(
        scene.seen("pod1-1", (own, scene.at("pod1-1").port()).into()),
        own
    );
}

/// Between proxies there is nothing but TLS, and two pods of one service account never share a connection.
#[rstest]
fn on_the_wire_between_nodes(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    spec.pods_per_node = 3;
    let scene = own(&spec);
    assert_eq!(scene.identity("pod1-1"), scene.identity("pod1-3"));
    let tap = scene.tap("node1", "eth0", "");
    let mut markers = Vec::new();
    for from in ["pod1-1", "pod1-3"] {
        assert_eq!(scene.seen(from, scene.at("pod2-1")), scene.ip(from));
        let outcome = scene.check(from, scene.at("pod2-1"), Check::Marker { marker: None });
        markers.push(outcome.marker.unwrap());
    }
    scene.check(
        "pod1-1",
        scene.at("pod2-1"),
        Check::Exchange {
            up: 100_000,
            down: 100_000,
        },
    );
    let wire = tap.finish();
    let markers: Vec<&str> = markers.iter().map(String::as_str).collect();
    wire.assert_encrypted(&markers);
    let clients = wire.tunnel_clients(scene.ip("pod2-1"));
    assert_eq!(
        clients,
        [scene.ip("pod1-1"), scene.ip("pod1-3")],
        "one wire connection per pod"
    );
}

/// What goes through the overlay is what tells the two flows of the node capture apart.
#[rstest]
#[case::hybrid_only_first_packets(NodeHybrid, 0.0..0.01)]
#[case::tunnel_everything(NodeTunnel, 0.95..2.0)]
#[case::inpod_nothing(Inpod, 0.0..0.0)]
fn share_of_the_overlay(#[case] variant: Variant, #[case] share: std::ops::Range<f64>) {
    const BYTES: u64 = 4 << 20;
    let scene = own(&variant.spec());
    let passed = |target: &str, device: &str| {
        let counters = counters(&scene.lab.netns(target).unwrap(), device).unwrap();
        [counters.tx_bytes as f64, counters.rx_bytes as f64]
    };
    // The client's leg on its node, the tunnel's on the server's; both directions of both.
    let devices = [("node1", "istioout"), ("node2", "istioin")];
    let before = devices.map(|(node, device)| passed(node, device));
    scene.check(
        "pod1-1",
        scene.at("pod2-1"),
        Check::Exchange {
            up: BYTES,
            down: BYTES,
        },
    );
    let after = devices.map(|(node, device)| passed(node, device));
    for ((device, before), after) in devices.iter().zip(&before).zip(&after) {
        for (direction, (before, after)) in before.iter().zip(after).enumerate() {
            let found = (after - before) / BYTES as f64;
            let fits = share.contains(&found) || found == share.start;
            assert!(fits, "{device:?}, direction {direction}: {found}");
        }
    }
    if variant == NodeHybrid {
        assert!(after[0][0] > before[0][0], "not even the first packet");
    }
}

/// Two pods of a node: TLS too, on the device on which the capture has it.
#[rstest]
fn on_the_wire_within_a_node(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let between = format!(
        "host {} and host {}",
        scene.ip("pod1-1"),
        scene.ip("pod1-2")
    );
    let tap = if variant.is_node() {
        scene.tap("proxy1", "lo", &between)
    } else {
        scene.tap("node1", &scene.pod("pod1-1").veth, &between)
    };
    let marker = scene.check("pod1-1", scene.at("pod1-2"), Check::Marker { marker: None });
    tap.finish().assert_encrypted(&[&marker.marker.unwrap()]);
}

/// Without a capture the same tap does see the marker, so not seeing it means something.
#[test]
fn on_the_wire_without_capture_everything_is_seen() {
    let scene = own(&harness::spec(lab::topology::Mode::None));
    let tap = scene.tap("node1", "eth0", "");
    let marker = scene.check("pod1-1", scene.at("pod2-1"), Check::Marker { marker: None });
    let wire = tap.finish();
    assert!(wire.shows(&marker.marker.unwrap()));
}

/// The node capture's variant for two pods of a node: handed over inside the proxy, with the policies of both ends.
#[rstest]
fn same_node_direct_needs_no_tunnel_and_obeys_policies(
    #[values(NodeHybrid, NodeTunnel)] variant: Variant,
) {
    let mut spec = variant.spec();
    spec.same_node = SameNode::Direct;
    let scene = own(&spec);
    let mark = scene.mark(1);
    let outcome = scene.check("pod1-1", scene.at("pod1-2"), Check::Who);
    assert_eq!(
        outcome.seen.unwrap().ip(),
        scene.ip("pod1-1"),
        "the client's address"
    );
    let source = outcome.local.unwrap().to_string();
    let line = scene.access_line(mark, &[("direction", "outbound"), ("src.addr", &source)]);
    assert!(line.get("dst.hbone_addr").is_none(), "no tunnel: {line}");
    let line = scene.access_line(
        mark,
        &[("direction", "inbound"), ("dst.workload", "pod1-2")],
    );
    assert_eq!(line["src.identity"], *scene.identity("pod1-1"), "{line}");
    // Other nodes still use tunnels.
    let far = scene.mark(2);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let line = scene.access_line(far, &[("direction", "inbound"), ("dst.workload", "pod2-1")]);
    assert_eq!(line["src.identity"], *scene.identity("pod1-1"), "{line}");

    let only_others = serde_json::json!([[[{"notPrincipals": [
        {"Exact": "cluster.local/ns/alpha/sa/client"}
    ]}]]]);
    let _changed = scene.with_state(|state| {
        harness::state::apply_to(state, "pod1-2", "Allow", only_others);
    });
    scene.refused("pod1-1", scene.at("pod1-2"));
    assert_eq!(scene.seen("pod2-1", scene.at("pod1-2")), scene.ip("pod2-1"));
    eventually("the denial is counted", Duration::from_secs(5), || {
        scene.metric(
            1,
            "istio_tcp_connections_failed_total",
            &[("response_flags", "DENY")],
        ) > 0.0
    });
}
