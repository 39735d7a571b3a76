//! IPv6 beside IPv4: captured, proven on the wire, and let alone where it is not the capture's.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{OnceLock, PoisonError};
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::wire::Tap;
use harness::{Scene, assert_same_dump, eventually, own};
use host_net::netns::Netns;
use inpod_redirect::facts::PROBE_ADDRESS6;
use lab::topology::{Cni, Families, InpodRules, SERVICE_PORT, SERVICE_VIP, ipv6};
use lab::traffic::{Check, Saw};
use rstest::rstest;
use runtime::{Sandbox, ambidex};
use socket2::{Domain, Protocol, Socket, Type};

const PATIENCE: Duration = Duration::from_secs(60);
const SECONDS: Duration = Duration::from_secs(10);

fn spec(variant: Variant) -> lab::topology::LabSpec {
    let mut spec = variant.spec();
    spec.families = Families::Dual;
    spec
}

fn dual(variant: Variant) -> Scene {
    static STAGES: [OnceLock<harness::SharedStage>; 3] = [const { OnceLock::new() }; 3];
    harness::shared_in(&STAGES[variant as usize], || spec(variant))
}

fn run(scene: &Scene, target: &str, command: &str) -> String {
    let argv: Vec<&str> = command.split(' ').collect();
    let done = scene.lab.run(target, &argv, SECONDS).unwrap();
    done.success(command).unwrap().stdout
}

/// How many packets of a finished tap a filter lets pass.
fn packets(scene: &Scene, file: &std::path::Path, filter: &str) -> usize {
    let argv = ["tcpdump", "-nn", "-r", file.to_str().unwrap(), filter];
    let done = scene.lab.run("out", &argv, SECONDS).unwrap();
    done.success(filter).unwrap().stdout.lines().count()
}

/// IPv6 segments with payload: longer than their header says that it is itself.
const PAYLOAD: &str = "ip6 and tcp and (ip6[4:2] - ((ip6[52] & 0xf0) >> 2) > 0)";

/// Fails unless the device had IPv6 payload, none of it beside the ports of tunnels, and not the marker.
fn assert_encrypted(scene: &Scene, tap: Tap, marker: &str) {
    let wire = tap.finish();
    let bytes = std::fs::read(&wire.file).unwrap();
    let shown = bytes
        .windows(marker.len())
        .any(|at| at == marker.as_bytes());
    assert!(!shown, "{}: {marker} in the clear", wire.label);
    let tunnels = "(tcp port 15008 or tcp port 15088)";
    let inside = packets(scene, &wire.file, &format!("{PAYLOAD} and {tunnels}"));
    let beside = packets(scene, &wire.file, &format!("{PAYLOAD} and not {tunnels}"));
    assert!(inside >= 2, "{}: no tunnel, nothing is proven", wire.label);
    assert_eq!(beside, 0, "{}: beside the tunnel", wire.label);
}

/// Through a tunnel by IPv6, with both identities, and nothing in the clear where others could read it.
#[rstest]
#[case::cross_node("pod1-1", "pod2-1", "node1", "eth0")]
#[case::same_node("pod1-1", "pod1-2", "proxy1", "lo")]
fn pod_to_pod(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
    #[case] to: &str,
    #[case] target: &str,
    #[case] device: &str,
) {
    let scene = dual(variant);
    // Pods that capture themselves have tunnels from pod to pod.
    let (target, device) = match (variant, device) {
        (Inpod, "lo") => ("node1", "vethp1"),
        _ => (target, device),
    };
    let _alone = scene.quiet.lock().unwrap_or_else(PoisonError::into_inner);
    let near = scene.mark(scene.node_of(from));
    let far = scene.mark(scene.node_of(to));
    let between = format!("host {} and host {}", scene.ip6(from), scene.ip6(to));
    let tap = scene.tap(target, device, &between);
    let outcome = scene.check(from, scene.at6(to), Check::Who);
    assert_eq!(outcome.seen.unwrap().ip(), scene.ip6(from));
    let marked = scene.check(from, scene.at6(to), Check::Marker { marker: None });
    assert_encrypted(&scene, tap, &marked.marker.unwrap());

    let source = outcome.local.unwrap().to_string();
    let outbound = scene.access_line(near, &[("direction", "outbound"), ("src.addr", &source)]);
    assert_eq!(outbound["dst.hbone_addr"], *scene.at6(to).to_string());
    assert_eq!(outbound["dst.identity"], *scene.identity(to), "{outbound}");
    let wanted = [
        ("direction", "inbound"),
        ("src.workload", from),
        ("dst.workload", to),
        ("dst.hbone_addr", &scene.at6(to).to_string()),
    ];
    let inbound = scene.access_line(far, &wanted);
    assert_eq!(inbound["src.identity"], *scene.identity(from), "{inbound}");
    // IPv4 is as it was.
    assert_eq!(scene.seen(from, scene.at(to)), scene.ip(from));
}

/// Everybody sees whom he should, and only what is to be captured passes the proxies.
#[rstest]
fn others(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = dual(variant);
    let ip6 = |target| IpAddr::from(scene.ip6(target));
    let service = SocketAddr::from((ipv6::twin(SERVICE_VIP), SERVICE_PORT));
    for (from, to, seen) in [
        ("plain1", scene.at6("pod1-1"), ip6("plain1")),
        ("plain2", scene.at6("pod1-1"), ip6("plain2")),
        ("pod1-1", scene.at6("plain1"), ip6("pod1-1")),
        ("pod1-1", scene.at6("plain2"), ip6("pod1-1")),
        ("pod1-1", service, ip6("pod1-1")),
        ("plain2", service, ip6("plain2")),
    ] {
        assert_eq!(scene.seen(from, to), seen, "{from} to {to}");
    }
    let topology = scene.lab.topology();
    let node = topology.node(1).unwrap();
    let masqueraded = IpAddr::from(ipv6::twin(node.outside_address));
    assert_eq!(scene.seen("pod1-1", scene.at6("out")), masqueraded);

    // A probe of the node is direct; whoever is on another node goes through the proxy.
    let before = scene.mark(1);
    let gateway = IpAddr::from(ipv6::twin(node.pod_gateway));
    let probes_from = match variant {
        Inpod => PROBE_ADDRESS6.into(),
        _ => gateway,
    };
    assert_eq!(scene.seen("node1", scene.at6("pod1-1")), probes_from);
    let other = ipv6::twin(topology.node(2).unwrap().address);
    assert_eq!(
        scene.seen("node2", scene.at6("pod1-1")),
        IpAddr::from(other)
    );
    scene.access_line(before, &[("src.addr", &format!("~[{other}]:"))]);
    for line in scene.access_lines(before) {
        let client = line["src.addr"].as_str().unwrap_or_default();
        for nodes in [gateway, probes_from] {
            assert!(!client.starts_with(&format!("[{nodes}]:")), "{line}");
        }
    }
}

/// Neighbours are found, pings answered, datagrams delivered: none of it is captured.
#[rstest]
fn what_is_not_tcp(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = dual(variant);
    for (from, to) in [
        ("pod1-1", "pod2-1"),
        ("pod1-1", "pod1-2"),
        ("plain1", "pod2-1"),
        ("pod1-1", "plain2"),
        ("node1", "pod1-1"),
    ] {
        let (client, server) = (scene.lab.netns(from).unwrap(), scene.lab.netns(to).unwrap());
        let answered = client.run(|| echo(scene.ip6(to))).unwrap().unwrap();
        assert!(answered, "{from} pings {to}");
        let any = (Ipv6Addr::UNSPECIFIED, 0);
        let bind = |netns: &Netns| {
            let socket = netns.run(|| UdpSocket::bind(any)).unwrap().unwrap();
            socket.set_read_timeout(Some(SECONDS)).unwrap();
            socket
        };
        let (client, server) = (bind(&client), bind(&server));
        let port = server.local_addr().unwrap().port();
        client.connect((scene.ip6(to), port)).unwrap();
        client.send(b"forth").unwrap();
        let mut buffer = [0; 16];
        let (_, source) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(source, client.local_addr().unwrap(), "{from} to {to}");
        server.send_to(b"back", source).unwrap();
        assert_eq!(client.recv(&mut buffer).unwrap(), 4);
    }
    // What the node knows of its pods by their link alone goes on to be true.
    run(&scene, "node1", "ip -6 neigh flush dev vethp1");
    assert_eq!(
        scene.seen("pod1-1", scene.at6("pod2-1")),
        IpAddr::from(scene.ip6("pod1-1"))
    );
}

/// Sends an echo request until its answer comes.
fn echo(to: Ipv6Addr) -> std::io::Result<bool> {
    let socket = Socket::new(Domain::IPV6, Type::RAW, Some(Protocol::ICMPV6))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    socket.connect(&SocketAddr::from((to, 0)).into())?;
    let deadline = Instant::now() + SECONDS;
    let mut packet = [0; 256];
    while Instant::now() < deadline {
        // The kernel fills in the checksum.
        socket.send(&[128, 0, 0, 0, 0x4d, 0x58, 0, 0])?;
        let again = Instant::now() + Duration::from_secs(1);
        while Instant::now() < again {
            match (&socket).read(&mut packet) {
                Ok(size) if size >= 8 && packet[0] == 129 && packet[4..6] == [0x4d, 0x58] => {
                    return Ok(true);
                }
                _ => {}
            }
        }
    }
    Ok(false)
}

/// A captured pod that calls itself something else is not heard: neither by what it is nor by what it is not.
#[test]
fn an_address_that_is_not_the_pods_leads_nowhere() {
    let scene = own(&spec(NodeHybrid));
    let stolen = "fd00:10:244:1::99";
    run(
        &scene,
        "pod1-1",
        &format!("ip addr add {stolen}/128 dev eth0 preferred_lft 0 nodad"),
    );
    run(
        &scene,
        "node1",
        &format!("ip route add {stolen}/128 dev vethp1"),
    );
    let attempt = |to: SocketAddr| {
        let netns = scene.lab.netns("pod1-1").unwrap();
        let connected = netns.run(|| {
            let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
            socket.bind(&SocketAddr::from((stolen.parse::<Ipv6Addr>().unwrap(), 0)).into())?;
            socket.connect_timeout(&to.into(), Duration::from_secs(2))
        });
        connected.unwrap()
    };
    for to in [scene.at6("pod2-1"), scene.at6("plain1"), scene.at6("out")] {
        assert!(attempt(to).is_err(), "{stolen} reached {to}");
    }
    assert_eq!(
        scene.seen("pod1-1", scene.at6("plain1")),
        IpAddr::from(scene.ip6("pod1-1"))
    );
    // Without the rule it would be heard, so it is the rule that stops it.
    run(&scene, "node1", "ip6tables -F ambidex-v6");
    attempt(scene.at6("plain1")).unwrap();
}

/// Serves one connection at a time in a namespace, for as long as it is open, by saying back what it hears.
fn say_back(netns: &Netns) -> SocketAddr {
    let listener = netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)));
    let listener = listener.unwrap().unwrap();
    let at = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                let mut stream = stream;
                while let Ok(size @ 1..) = stream.read(&mut buffer) {
                    if stream.write_all(&buffer[..size]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    at
}

fn open(scene: &Scene, from: &str, to: SocketAddr) -> TcpStream {
    let netns = scene.lab.netns(from).unwrap();
    let stream = netns.run(|| TcpStream::connect(to)).unwrap().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream
}

#[track_caller]
fn assert_alive(when: &str, stream: &mut TcpStream) {
    let mut buffer = [0; 5];
    let heard = stream
        .write_all(b"still")
        .and_then(|()| stream.read_exact(&mut buffer));
    assert!(heard.is_ok() && buffer == *b"still", "{when}: {heard:?}");
}

/// Older connections of IPv6 stay direct, captured ones outlive the capture, and nothing of it is left in the end.
#[rstest]
fn a_running_pod_is_enrolled_and_let_go(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    const SUBJECT: &str = "pod1-1";
    let scene = own(&spec(variant));
    let lab = &scene.lab;
    let places = ["node1", "proxy1", SUBJECT];
    let dumps = || places.map(|place| scene.dump(place));
    lab.del_pod(SUBJECT).unwrap();
    let apart = dumps();
    let at = |target: &str| {
        let port = say_back(&lab.netns(target).unwrap()).port();
        SocketAddr::from((scene.ip6(target), port))
    };
    let (to_plain, to_pod, to_subject) = (at("plain2"), at("pod2-1"), at(SUBJECT));
    let mut before = [
        open(&scene, SUBJECT, to_plain),
        open(&scene, "plain1", to_subject),
        open(&scene, SUBJECT, to_pod),
    ];
    let sandbox = Sandbox::of(lab, SUBJECT);
    let enrol = format!(
        "enrol {}/{SUBJECT} --netns {} --uid {} --service-account {}",
        sandbox.namespace,
        sandbox.netns.display(),
        sandbox.uid,
        sandbox.service_account
    );
    let said = ambidex(lab, &enrol).with_code(0);
    assert!(said.contains("3 open connection(s) kept outside"), "{said}");
    let mark = scene.mark(1);
    let mut captured = open(&scene, SUBJECT, to_pod);
    for stream in before.iter_mut().chain([&mut captured]) {
        assert_alive("enrolled", stream);
    }
    assert_eq!(
        scene.seen(SUBJECT, scene.at6("pod2-1")),
        IpAddr::from(scene.ip6(SUBJECT))
    );
    scene.access_line(
        mark,
        &[("direction", "outbound"), ("src.workload", SUBJECT)],
    );
    ambidex(lab, &format!("verify {}/{SUBJECT}", sandbox.namespace)).with_code(0);
    let unenrol = format!("unenrol {}/{SUBJECT} --drain 10m", sandbox.namespace);
    let said = ambidex(lab, &unenrol).with_code(0);
    assert!(said.contains("1 connection(s) through the proxy"), "{said}");
    for stream in before.iter_mut().chain([&mut captured]) {
        assert_alive("let go", stream);
    }
    drop(captured);
    eventually("nothing is left of the capture", PATIENCE, || {
        dumps() == apart
    });
    for (place, (before, after)) in places.iter().zip(apart.iter().zip(&dumps())) {
        assert_same_dump(place, before, after);
    }
    for stream in &mut before {
        assert_alive("nobody cares any more", stream);
    }
}

/// "Packet too big" reaches whoever sends, although he speaks with somebody else's address. No router fragments IPv6.
#[rstest]
fn a_narrow_link_between_nodes(#[values(NodeHybrid, NodeTunnel)] variant: Variant) {
    let scene = own(&spec(variant));
    for node in ["node1", "node2"] {
        run(&scene, node, "ip link set eth0 mtu 1400");
    }
    for (from, to) in [
        ("pod1-1", "pod2-1"),
        ("pod2-1", "pod1-1"),
        ("plain1", "pod2-1"),
        ("pod1-1", "plain2"),
    ] {
        let (up, down) = (300_000, 300_000);
        scene.check(from, scene.at6(to), Check::Exchange { up, down });
    }
}

/// What of IPv6 is lost is named, and fails closed: no connection passes beside the proxy.
#[test]
fn a_lost_object_is_named_and_nothing_passes() {
    let scene = own(&spec(NodeHybrid));
    let to = scene.at6("plain1");
    assert_eq!(scene.seen("pod1-1", to), IpAddr::from(scene.ip6("pod1-1")));
    let (ip, uid) = (scene.ip6("pod1-1"), scene.pod("pod1-1").uid);
    for (damage, named, repair) in [
        (
            format!("ipset del ztunnel-pods-ips6 {ip}"),
            "ztunnel-pods-ips6",
            format!("ipset add ztunnel-pods-ips6 {ip} comment {uid}"),
        ),
        (
            "ip -6 rule del pref 101".to_owned(),
            "ip -6 rule 101",
            "ip -6 rule add pref 101 fwmark 0x100/0x100 lookup 101 protocol 133".to_owned(),
        ),
        (
            "ip6tables -t mangle -D PREROUTING -j ztunnel-PREROUTING".to_owned(),
            "ip6tables chain ztunnel-PREROUTING",
            "ip6tables -t mangle -I PREROUTING -j ztunnel-PREROUTING".to_owned(),
        ),
    ] {
        run(&scene, "node1", &damage);
        let said = ambidex(&scene.lab, "verify");
        assert_ne!(said.code, 0, "{damage}: {said:?}");
        let all = format!("{}{}", said.stdout, said.stderr);
        assert!(all.contains(named), "{damage}: {all}");
        let outcome = scene.attempt("pod1-1", to, Check::Who, Duration::from_secs(3));
        assert!(!outcome.ok, "{damage}: {outcome:?}");
        assert_eq!(outcome.saw, Some(Saw::Timeout), "{outcome:?}");
        run(&scene, "node1", &repair);
    }
    ambidex(&scene.lab, "verify").with_code(0);
}

/// Pods without IPv4: captured all the same.
#[rstest]
#[case::node(NodeHybrid, InpodRules::Redirect)]
#[case::redirect(Inpod, InpodRules::Redirect)]
#[case::tproxy(Inpod, InpodRules::Tproxy)]
#[case::nftables(Inpod, InpodRules::Nftables)]
fn pods_with_ipv6_only(#[case] variant: Variant, #[case] rules: InpodRules) {
    let mut spec = spec(variant);
    spec.families = Families::V6;
    spec.inpod_rules = rules;
    let scene = own(&spec);
    assert_eq!(
        run(&scene, "pod1-1", "ip -4 -o addr show dev eth0").trim(),
        ""
    );
    let mark = scene.mark(1);
    let seen = scene.check("pod1-1", scene.at6("pod2-1"), Check::Who).seen;
    assert_eq!(seen.unwrap().ip(), scene.ip6("pod1-1"));
    let line = scene.access_line(mark, &[("direction", "outbound")]);
    assert_eq!(line["dst.identity"], *scene.identity("pod2-1"), "{line}");
    let attempt = scene.attempt("pod1-1", scene.at("pod2-1"), Check::Who, SECONDS);
    assert!(!attempt.ok);
    ambidex(&scene.lab, "verify").with_code(0);
}

/// Pods of one bridge are each other's neighbours, by both families: captured all the same, and nobody takes their place.
#[test]
fn pods_on_a_bridge() {
    let mut spec = spec(Inpod);
    spec.cni = Cni::Bridge;
    let scene = own(&spec);
    let veth = scene.pod("pod1-1").veth;
    for (to, target, device) in [
        ("pod2-1", "node1", "eth0"),
        ("pod1-2", "node1", veth.as_str()),
    ] {
        let between = format!("host {} and host {}", scene.ip6("pod1-1"), scene.ip6(to));
        let tap = scene.tap(target, device, &between);
        let marked = scene.check("pod1-1", scene.at6(to), Check::Marker { marker: None });
        assert_encrypted(&scene, tap, &marked.marker.unwrap());
    }
    let ip6 = |target| IpAddr::from(scene.ip6(target));
    let service = SocketAddr::from((ipv6::twin(SERVICE_VIP), SERVICE_PORT));
    for (from, to, seen) in [
        ("pod1-1", scene.at6("pod1-2"), ip6("pod1-1")),
        ("pod1-1", service, ip6("pod1-1")),
        ("plain1", service, ip6("plain1")),
        ("plain1", scene.at6("pod1-1"), ip6("plain1")),
        ("pod1-1", scene.at6("plain1"), ip6("pod1-1")),
        ("node1", scene.at6("pod1-1"), PROBE_ADDRESS6.into()),
        ("pod1-1", scene.at("pod1-2"), scene.ip("pod1-1").into()),
    ] {
        assert_eq!(scene.seen(from, to), seen, "{from} to {to}");
    }
    ambidex(&scene.lab, "verify").with_code(0);
}

/// Connections of one family are led past the proxy: the pod is closed in both, and open again when that is over.
#[rstest]
#[case::node(NodeHybrid, "node1")]
#[case::inpod(Inpod, "pod1-1")]
fn what_passes_by_in_one_family_is_closed_in_both(#[case] variant: Variant, #[case] place: &str) {
    let mut spec = spec(variant);
    spec.mends = true;
    let scene = own(&spec);
    let address = scene.ip6("pod1-1");
    let (past, back) = match variant {
        Inpod => (
            "ip6tables -t nat -I OUTPUT -p tcp -j ACCEPT".to_owned(),
            "ip6tables -t nat -D OUTPUT -p tcp -j ACCEPT".to_owned(),
        ),
        _ => (
            format!("ip -6 rule add pref 50 from {address} lookup main"),
            format!("ip -6 rule del pref 50 from {address} lookup main"),
        ),
    };
    let before = [scene.dump("node1"), scene.dump("pod1-1")];
    run(&scene, place, &past);
    let verify = || ambidex(&scene.lab, "verify alpha/pod1-1");
    eventually("the pod is closed", PATIENCE * 2, || {
        verify().stdout.contains("its TCP is stopped in")
    });
    for to in [scene.at("plain1"), scene.at6("plain1")] {
        let outcome = scene.attempt("pod1-1", to, Check::Who, Duration::from_secs(2));
        assert_eq!(outcome.saw, Some(Saw::Timeout), "{to}: {outcome:?}");
    }
    run(&scene, place, &back);
    eventually("the pod is open", PATIENCE * 2, || verify().code == 0);
    eventually("nothing is left of it", PATIENCE, || {
        before == [scene.dump("node1"), scene.dump("pod1-1")]
    });
    for to in [scene.at("plain1"), scene.at6("plain1")] {
        scene.check("pod1-1", to, Check::Who);
    }
}
