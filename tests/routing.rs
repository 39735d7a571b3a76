//! Where connections are led: past waypoints, into other networks, to the endpoints that a service wants.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::state::apply_to;
use harness::{Stage, shared};
use lab::topology::workloads::{LocalXds, Service};
use lab::topology::{APPLICATION_PORT, SERVICE_PORT, SERVICE_VIP};
use lab::traffic::Check;
use rstest::rstest;
use serde_json::{Value, json};

/// Calls; on node 1, as the service's endpoint `pod1-2`.
const CLIENT: &str = "pod1-1";
/// Stands between; on node 2, as the endpoint `pod2-1` and `pod2-3`, which serves nothing.
const BETWEEN: &str = "pod2-2";
const BEHIND: &str = "pod2-3";
/// Ports of application tunnels, one for each scenario that has one.
const WAYPOINT_PORT: u16 = 9088;
const GATEWAY_PORT: u16 = 9089;
const HBONE_PORT: u16 = 15008;
const LIMIT: Duration = Duration::from_secs(30);
/// Length of what the PROXY header has before its addresses.
const HEAD: usize = 16;

fn vip() -> SocketAddr {
    (SERVICE_VIP, SERVICE_PORT).into()
}

fn set(state: &mut LocalXds, pod: &str, key: &str, value: Value) {
    let workload = state.workload_mut(pod).expect("the pod is a workload");
    workload.more.insert(key.to_owned(), value);
}

fn set_service(state: &mut LocalXds, key: &str, value: Value) {
    state.services[0].more.insert(key.to_owned(), value);
}

fn waypoint(stage: &Stage) -> Value {
    json!({"destination": format!("/{}", stage.ip(BETWEEN))})
}

/// A waypoint gets what is meant for its service: in a tunnel, asked for by the service's address.
#[rstest]
fn a_service_s_waypoint_stands_in_its_way(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    scene.serve(BETWEEN, SERVICE_PORT);
    let waypoint = waypoint(&scene);
    let _changed = scene.with_state(|state| set_service(state, "waypoint", waypoint));
    let mark = scene.mark(2);
    assert_eq!(scene.seen(CLIENT, vip()), scene.ip(CLIENT));
    let asked = vip().to_string();
    let line = [
        ("direction", "inbound"),
        ("dst.workload", BETWEEN),
        ("dst.hbone_addr", &asked),
        ("dst.service", "echo.beta.svc.cluster.local"),
        ("src.identity", &scene.identity(CLIENT)),
    ];
    scene.access_line(mark, &line);
    // What the waypoint itself sends goes on to an endpoint.
    let mark = scene.mark(2);
    assert_eq!(scene.seen(BETWEEN, vip()), scene.ip(BETWEEN));
    let from_waypoint = [("direction", "outbound"), ("src.workload", BETWEEN)];
    let line = scene.access_line(mark, &from_waypoint);
    assert_ne!(line["dst.workload"], BETWEEN, "{line:#}");
}

#[rstest]
fn a_workload_s_waypoint_stands_in_its_way(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let waypoint = waypoint(&scene);
    let _changed = scene.with_state(|state| set(state, BEHIND, "waypoint", waypoint));
    let behind = scene.at(BEHIND);
    let asked = behind.to_string();
    let mark = scene.mark(2);
    assert_eq!(scene.seen(CLIENT, behind), scene.ip(CLIENT));
    let line = [
        ("direction", "inbound"),
        ("src.workload", CLIENT),
        ("dst.workload", BETWEEN),
        ("dst.hbone_addr", &asked),
    ];
    scene.access_line(mark, &line);
    let mark = scene.mark(2);
    assert_eq!(scene.seen(BETWEEN, behind), scene.ip(BETWEEN));
    let line = [
        ("direction", "inbound"),
        ("src.workload", BETWEEN),
        ("dst.workload", BEHIND),
    ];
    scene.access_line(mark, &line);
    // Plaintext does not go by way of it.
    let mark = scene.mark(2);
    assert_eq!(scene.seen("plain1", behind), scene.ip("plain1"));
    scene.access_line(mark, &[("direction", "inbound"), ("dst.workload", BEHIND)]);
}

/// A waypoint behind an application tunnel is told in a PROXY header whose connection it gets, and what that is for.
#[rstest]
fn an_application_tunnel_begins_with_a_proxy_header(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let own = (Ipv4Addr::LOCALHOST, APPLICATION_PORT).into();
    // In the pod's namespace the tunnel ends where nobody else can reach it; from the node's it cannot.
    let at = if variant.is_node() {
        Ipv4Addr::UNSPECIFIED
    } else {
        Ipv4Addr::LOCALHOST
    };
    let headers = relay(&scene, (at, WAYPOINT_PORT), BETWEEN, own);
    let waypoint = waypoint(&scene);
    let _changed = scene.with_state(|state| {
        set_service(state, "waypoint", waypoint);
        let tunnel = json!({"protocol": "PROXY", "port": WAYPOINT_PORT});
        set(state, BETWEEN, "applicationTunnel", tunnel);
    });
    scene.check(CLIENT, vip(), Check::Marker { marker: None });
    let header = headers.recv_timeout(LIMIT).unwrap();
    let ports = header[HEAD + 8..HEAD + 12].to_vec();
    let mut expected = b"\r\n\r\n\0\r\nQUIT\n\x21\x11".to_vec();
    let identity = scene.identity(CLIENT);
    expected.extend(
        u16::try_from(12 + 3 + identity.len())
            .unwrap()
            .to_be_bytes(),
    );
    expected.extend(scene.ip(CLIENT).octets());
    expected.extend(SERVICE_VIP.octets());
    expected.extend(&ports);
    expected.push(0xd0);
    expected.extend(u16::try_from(identity.len()).unwrap().to_be_bytes());
    expected.extend(identity.as_bytes());
    assert_eq!(header, expected);
    assert_eq!(ports[2..], SERVICE_PORT.to_be_bytes());
}

/// Endpoints of another network are reached through its gateway, which moves a tunnel that it cannot read.
#[rstest]
fn another_network_is_reached_by_a_tunnel_in_a_tunnel(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let gateway = scene.ip(BETWEEN);
    // The gateway's own software: it takes the outer tunnel's bytes to the endpoint of its choice. What it sends is not
    // captured, as if it had a network of its own.
    let endpoint = (scene.ip(BEHIND), HBONE_PORT).into();
    let at = (Ipv4Addr::UNSPECIFIED, GATEWAY_PORT);
    let headers = relay(&scene, at, "plain2", endpoint);
    let _changed = scene.with_state(|state| {
        let tunnel = json!({"protocol": "PROXY", "port": GATEWAY_PORT});
        set(state, BETWEEN, "applicationTunnel", tunnel);
        let between = state.workload_mut(BETWEEN).unwrap().clone();
        let behind = state.workload_mut(BEHIND).unwrap().clone();
        let mut service = std::collections::BTreeMap::new();
        for workload in &mut state.workloads {
            service.append(&mut workload.services);
        }
        // Here nobody serves it but the one that is called through the gateway, which the balancer does not choose.
        state.workload_mut(BEHIND).unwrap().services = service.clone();
        set(state, BEHIND, "capacity", json!(0));
        let mut there = |name: &str, mut workload: lab::topology::workloads::Workload| {
            workload.uid = format!("there//{name}");
            workload.name = name.to_owned();
            workload.more.clear();
            workload.more.insert("network".to_owned(), json!("there"));
            state.workloads.push(workload);
        };
        there("gateway", between);
        there("far", behind);
        let far = state.workload_mut("far").unwrap();
        far.workload_ips.clear();
        far.services = service;
        let named = json!({"destination": format!("there/{gateway}")});
        far.more.insert("networkGateway".to_owned(), named);
    });
    let (near, mark) = (scene.mark(1), scene.mark(2));
    let check = Check::Exchange {
        up: 200_000,
        down: 300_000,
    };
    scene.check(CLIENT, vip(), check);
    // To the gateway as who it is, for the service by name; inside, to the endpoint, as the same.
    let header = headers.recv_timeout(LIMIT).unwrap();
    let name = b"echo.beta.svc.cluster.local";
    let holds = |part: &[u8]| header.windows(part.len()).any(|window| window == part);
    assert!(holds(name), "{header:?}");
    assert!(holds(scene.identity(CLIENT).as_bytes()), "{header:?}");
    let inner = [
        ("direction", "inbound"),
        ("dst.workload", BEHIND),
        ("dst.service", "echo.beta.svc.cluster.local"),
        ("src.identity", &scene.identity(CLIENT)),
    ];
    scene.access_line(mark, &inner);
    let outer = [
        ("direction", "outbound"),
        ("src.workload", CLIENT),
        ("dst.workload", "gateway"),
        ("dst.hbone_addr", "echo.beta.svc.cluster.local:80"),
    ];
    scene.access_line(near, &outer);
}

/// The endpoint on the client's own node, as long as it is healthy; then the others; the sick ones only for who wants all.
#[rstest]
fn health_and_preference_choose_the_endpoint(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let balancer = |health: &str| json!({"routingPreferences": ["Node"], "mode": "Failover", "healthPolicy": health});
    let chosen = |sick: &[&str], health: &str| {
        let _changed = scene.with_state(|state| {
            set_service(state, "loadBalancer", balancer(health));
            for pod in sick {
                set(state, pod, "status", json!("Unhealthy"));
            }
        });
        let mut pods = Vec::new();
        for _ in 0..3 {
            let mark = scene.mark(1);
            if health == "OnlyHealthy" && sick.len() == 2 {
                scene.refused(CLIENT, vip());
                scene.access_line(mark, &[("error", "~no healthy endpoint")]);
            } else {
                scene.seen(CLIENT, vip());
                let line = [("direction", "outbound"), ("src.workload", CLIENT)];
                let line = scene.access_line(mark, &line);
                pods.push(line["dst.workload"].as_str().unwrap_or("-").to_owned());
            }
        }
        pods.dedup();
        pods
    };
    assert_eq!(chosen(&[], "OnlyHealthy"), ["pod1-2"]);
    assert_eq!(chosen(&["pod1-2"], "OnlyHealthy"), ["pod2-1"]);
    assert_eq!(chosen(&["pod1-2", "pod2-1"], "OnlyHealthy"), [""; 0]);
    assert_eq!(chosen(&["pod1-2", "pod2-1"], "AllowAll"), ["pod1-2"]);
}

/// A waypoint that refuses, or cannot serve, is not gone around: the client's connection is reset, and the account says
/// what the waypoint answered.
#[rstest]
fn a_waypoint_that_refuses_is_not_gone_around(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let refused = |change: &dyn Fn(&mut LocalXds), status: &str| {
        let waypoint = waypoint(&scene);
        let _changed = scene.with_state(|state| {
            set_service(state, "waypoint", waypoint);
            change(state);
        });
        let (near, far) = (scene.mark(1), scene.mark(2));
        scene.refused(CLIENT, vip());
        let outbound = ("direction", "outbound");
        scene.access_line(
            near,
            &[outbound, ("dst.workload", BETWEEN), ("error", status)],
        );
        let reached =
            |line: &Value| line["direction"] == "inbound" && line["dst.workload"] != BETWEEN;
        let lines = [scene.access_lines(near), scene.access_lines(far)].concat();
        let around: Vec<_> = lines.into_iter().filter(|line| reached(line)).collect();
        assert!(around.is_empty(), "{around:#?}");
    };
    refused(
        &|state| apply_to(state, BETWEEN, "Deny", json!([[]])),
        "~401",
    );
    // Nobody listens there.
    let tunnel = json!({"protocol": "PROXY", "port": 9});
    refused(
        &|state| set(state, BETWEEN, "applicationTunnel", tunnel.clone()),
        "~503",
    );
}

/// Services with a range of addresses, of a workload that is known by its name, and of one outside the mesh.
#[rstest]
fn ranges_names_and_endpoints_without_a_tunnel(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let (behind, plain) = (scene.at(BEHIND), scene.at("plain2"));
    let _changed = scene.with_state(|state| {
        let echo = state.services[0].clone();
        let mut service = |name: &str, vips: &[&str], ranges: &[&str]| {
            let hostname = format!("{name}.beta.svc.cluster.local");
            let key = format!("beta/{hostname}");
            state.services.push(Service {
                name: name.to_owned(),
                hostname,
                vips: vips.iter().map(ToString::to_string).collect(),
                more: [("cidrVips".to_owned(), json!(ranges))].into(),
                ..echo.clone()
            });
            let ports = [(SERVICE_PORT, APPLICATION_PORT)].into();
            std::collections::BTreeMap::from([(key, ports)])
        };
        let wide = service("wide", &[], &["/10.98.0.0/15"]);
        let narrow = service("narrow", &[], &["/10.98.7.0/24"]);
        let named = service("named", &["/10.97.0.1"], &[]);
        let outside = service("outside", &["/10.97.0.2"], &[]);
        state.workload_mut("pod2-1").unwrap().services.extend(wide);
        state.workload_mut(BEHIND).unwrap().services.extend(narrow);
        state
            .workload_mut("plain2")
            .unwrap()
            .services
            .extend(outside);
        let mut by_name = state.workload_mut(BEHIND).unwrap().clone();
        by_name.uid = "by-name".to_owned();
        by_name.name = "by-name".to_owned();
        by_name.workload_ips.clear();
        by_name.services = named;
        // A name that the system's resolver knows without a server.
        by_name
            .more
            .insert("hostname".to_owned(), json!(behind.ip().to_string()));
        state.workloads.push(by_name);
    });
    let client = scene.ip(CLIENT);
    for (to, workload, service, asked) in [
        ("10.98.1.1", "pod2-1", "wide", Some(scene.at("pod2-1"))),
        ("10.99.255.255", "pod2-1", "wide", Some(scene.at("pod2-1"))),
        ("10.98.7.200", BEHIND, "narrow", Some(behind)),
        ("10.97.0.1", "by-name", "named", Some(behind)),
        ("10.97.0.2", "plain2", "outside", None),
    ] {
        let mark = scene.mark(1);
        let to = SocketAddr::new(to.parse().unwrap(), SERVICE_PORT);
        assert_eq!(scene.seen(CLIENT, to), client, "{to}");
        let asked = asked.map(|asked| asked.to_string());
        let service = format!("{service}.beta.svc.cluster.local");
        let line = [
            ("direction", "outbound"),
            ("src.workload", CLIENT),
            ("dst.workload", workload),
            ("dst.service", &*service),
        ];
        let line = scene.access_line(mark, &line);
        assert_eq!(
            line["dst.hbone_addr"].as_str(),
            asked.as_deref(),
            "{line:#}"
        );
    }
    // Beside the ranges nobody answers for the address, and no service has the connection.
    let mark = scene.mark(1);
    assert_eq!(scene.seen(CLIENT, plain), client);
    let line = [
        ("direction", "outbound"),
        ("src.workload", CLIENT),
        ("dst.workload", "plain2"),
    ];
    let line = scene.access_line(mark, &line);
    assert_eq!(
        line["dst.service"].as_str().unwrap_or_default(),
        "",
        "{line:#}"
    );
}

/// The proxy's own ports are nobody's to reach: not by a tunnel, not in the clear, not by the pod itself, not as the
/// target port of a service. The proxy goes on.
#[rstest]
fn ports_of_the_proxy_are_refused(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    for port in [15_001, 15_006, HBONE_PORT] {
        let _changed = scene.with_state(|state| {
            let mut ports = state.workload_mut("pod2-1").unwrap().services.clone();
            for ports in ports.values_mut() {
                ports.insert(SERVICE_PORT, port);
            }
            for workload in &mut state.workloads {
                workload.services.clear();
            }
            state.workload_mut("pod2-1").unwrap().services = ports;
        });
        let mark = scene.mark(2);
        scene.refused(CLIENT, vip());
        let said = [
            ("direction", "inbound"),
            ("error", "~is a port of the proxy itself"),
        ];
        scene.access_line(mark, &said);
        let to = (scene.ip(BEHIND), port).into();
        scene.refused(CLIENT, to);
        // In the clear, nobody but a client of TLS gets an answer from the port of the tunnels.
        if port != HBONE_PORT {
            scene.refused("plain1", to);
            scene.refused(BEHIND, to);
        }
        assert_eq!(scene.seen(CLIENT, scene.at(BEHIND)), scene.ip(CLIENT));
    }
}

/// Takes a connection at a port of [`BETWEEN`], takes the PROXY header off and moves the rest to and
/// from `to`, dialled in another target. Returns the headers.
fn relay(stage: &Stage, at: (Ipv4Addr, u16), from: &str, to: SocketAddr) -> Receiver<Vec<u8>> {
    #![allow(clippy::disallowed_methods)]
    let (here, there) = (
        stage.lab.netns(BETWEEN).unwrap(),
        stage.lab.netns(from).unwrap(),
    );
    let listener = here.run(|| TcpListener::bind(at)).unwrap().unwrap();
    let (send, headers) = channel();
    std::thread::spawn(move || {
        // One connection is what each scenario makes; the listener goes with it.
        let (mut client, _) = listener.accept().unwrap();
        client.set_read_timeout(Some(LIMIT)).unwrap();
        let mut header = vec![0; HEAD];
        client.read_exact(&mut header).unwrap();
        let length = usize::from(u16::from_be_bytes([header[14], header[15]]));
        header.resize(HEAD + length, 0);
        client.read_exact(&mut header[HEAD..]).unwrap();
        send.send(header).unwrap();
        let server = there.run(|| TcpStream::connect(to)).unwrap().unwrap();
        server.set_read_timeout(Some(LIMIT)).unwrap();
        let back = (server.try_clone().unwrap(), client.try_clone().unwrap());
        let other = std::thread::spawn(move || copy(back.0, back.1));
        copy(client, server);
        other.join().unwrap();
    });
    headers
}

fn copy(mut from: TcpStream, mut to: TcpStream) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
    let _ = to.shutdown(Shutdown::Write);
}
