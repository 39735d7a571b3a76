//! Connections whose other end is gone without a word are found and closed, and nothing of them stays.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Stage, eventually, own};
use lab::traffic::Check;
use rstest::rstest;

/// Where the first connection's application listens; the others' follow.
const PORT: u16 = 8101;
/// Far over what finding out takes with the settings of these tests: three seconds of keepalive, or four of silence.
const SOON: Duration = Duration::from_secs(60);

/// Settings under which a dead connection is found within seconds.
fn impatient(variant: Variant) -> lab::topology::LabSpec {
    let mut spec = variant.spec();
    for (name, value) in [
        ("KEEPALIVE_TIME", "1s"),
        ("KEEPALIVE_INTERVAL", "1s"),
        ("KEEPALIVE_RETRIES", "2"),
        ("AMBIDEX_HALF_OPEN_TIMEOUT", "4s"),
    ] {
        spec.daemon_env.insert(name.to_owned(), value.to_owned());
    }
    spec
}

/// No FIN and no RST of the lost ends ever arrives: their packets are dropped, in both directions. Each is found by what it is
/// found by: the client's and the application's by TCP keepalive, the tunnel's by keepalive, too, the silent half-closed
/// connection by its time. The connection that is half-closed and has something to say lives.
#[rstest]
fn a_lost_end_is_found_and_nothing_of_it_stays(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = own(&impatient(variant));
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    settled(&scene);
    let before = [1, 2].map(|node| kept(&scene, node));

    let mut lost_client = Connection::open(&scene, PORT);
    let mut lost_application = Connection::open(&scene, PORT + 1);
    let mut silent = Connection::open(&scene, PORT + 2);
    let mut slow = Connection::open(&scene, PORT + 3);
    let port = lost_client.client.local_addr().unwrap().port();
    drop_packets(&scene, "pod1-1", port);
    drop_packets(&scene, "pod2-1", PORT + 1);
    let marks = [1, 2].map(|node| scene.mark(node));
    let began = Instant::now();
    silent.client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(silent.application.read(&mut [0]).unwrap(), 0);
    slow.client.shutdown(Shutdown::Write).unwrap();
    let talk = std::thread::scope(|scope| {
        let talk = scope.spawn(|| {
            let mut said = 0;
            // Twice as long as a silent one may.
            while began.elapsed() < Duration::from_secs(8) {
                slow.application.write_all(b"x").unwrap();
                slow.client.read_exact(&mut [0]).unwrap();
                said += 1;
                std::thread::sleep(Duration::from_millis(500));
            }
            said
        });
        is_reset(
            "the application of a lost client",
            &mut lost_client.application,
        );
        is_reset(
            "the client of a lost application",
            &mut lost_application.client,
        );
        is_reset("the client of a silent connection", &mut silent.client);
        eventually("the application of a silent connection", SOON, || {
            silent.application.write_all(b"x").is_err()
        });
        talk.join().unwrap()
    });
    assert!(talk >= 8, "{talk}");
    slow.application.shutdown(Shutdown::Write).unwrap();
    assert_eq!(slow.client.read(&mut [0]).unwrap(), 0, "ended in order");
    // Whichever of the two proxies looks first.
    eventually("the log says why", SOON, || {
        let lines = marks.iter().flat_map(|mark| scene.access_lines(*mark));
        let mut reasons = lines.filter_map(|line| line["error"].as_str().map(str::to_owned));
        reasons.any(|reason| reason.starts_with("half-open: the client ended"))
    });

    // The wire between the nodes.
    let mut idle = Connection::open(&scene, PORT + 4);
    let rules = ["--dport", "--sport"]
        .map(|which| ["PREROUTING", "-p", "tcp", which, "15008", "-j", "DROP"]);
    for rule in &rules {
        iptables(&scene, "node1", &[&["-t", "raw", "-I"], &rule[..]].concat());
    }
    is_reset("the client beyond a cut wire", &mut idle.client);
    is_reset("the application beyond a cut wire", &mut idle.application);
    for rule in &rules {
        iptables(&scene, "node1", &[&["-t", "raw", "-D"], &rule[..]].concat());
    }

    settled(&scene);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    settled(&scene);
    for (node, before) in [1, 2].into_iter().zip(before) {
        let mut after = before;
        eventually(
            &format!("proxy{node} keeps no more than before"),
            SOON,
            || {
                after = kept(&scene, node);
                after.0 <= before.0 && after.1 <= before.1
            },
        );
    }
}

/// A tunnel whose peer is gone is found by HTTP/2 PING where TCP keepalive is off. The core sends it, whatever the capture, and
/// it takes half a minute: in one capture only.
#[test]
fn a_dead_tunnel_is_found_by_its_pings() {
    let mut spec = impatient(Inpod);
    spec.daemon_env
        .insert("KEEPALIVE_ENABLED".to_owned(), "false".to_owned());
    let scene = own(&spec);
    let mut idle = Connection::open(&scene, PORT);
    for which in ["--dport", "--sport"] {
        let rule = ["-t", "raw", "-I", "PREROUTING", "-p", "tcp", which, "15008"];
        iptables(&scene, "node1", &[&rule[..], &["-j", "DROP"]].concat());
    }
    is_reset("the client", &mut idle.client);
    is_reset("the application", &mut idle.application);
    for node in [1, 2] {
        eventually("the log says so", SOON, || {
            scene.proxy_log(node).contains("does not answer PINGs")
        });
    }
}

/// A connection from pod1-1 to an application of pod2-1, with both of its ends in hand.
struct Connection {
    client: TcpStream,
    application: TcpStream,
}

impl Connection {
    fn open(scene: &Stage, port: u16) -> Self {
        let there = scene.lab.netns("pod2-1").unwrap();
        let listener = there
            .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)))
            .unwrap()
            .unwrap();
        let to: SocketAddr = (scene.ip("pod2-1"), port).into();
        let here = scene.lab.netns("pod1-1").unwrap();
        let mut client = here.run(|| TcpStream::connect(to)).unwrap().unwrap();
        // The client's connection stands before the application's does.
        client.write_all(b"hello").unwrap();
        let (mut application, _) = listener.accept().unwrap();
        for end in [&client, &application] {
            end.set_read_timeout(Some(SOON)).unwrap();
            end.set_write_timeout(Some(SOON)).unwrap();
        }
        application.read_exact(&mut [0; 5]).unwrap();
        application.write_all(b"hello").unwrap();
        client.read_exact(&mut [0; 5]).unwrap();
        Self {
            client,
            application,
        }
    }
}

/// An aborted connection must not look like one that has ended.
fn is_reset(what: &str, end: &mut TcpStream) {
    let read = end.read(&mut [0]);
    let kind = read.as_ref().map_err(std::io::Error::kind);
    assert_eq!(kind, Err(ErrorKind::ConnectionReset), "{what}: {read:?}");
}

/// Drops every packet from and to a port in a pod, also those that stay in it.
fn drop_packets(scene: &Stage, pod: &str, port: u16) {
    let port = port.to_string();
    for (chain, which) in [("OUTPUT", "--sport"), ("INPUT", "--dport")] {
        let rule = ["-I", chain, "-p", "tcp", which, &port, "-j", "DROP"];
        iptables(scene, pod, &rule);
    }
}

fn iptables(scene: &Stage, target: &str, arguments: &[&str]) {
    let argv = [&["iptables", "--wait", "10"], arguments].concat();
    let done = scene.lab.run(target, &argv, Duration::from_secs(20));
    done.unwrap().success(&argv.join(" ")).unwrap();
}

/// Descriptors and tunnels that a proxy has.
fn kept(scene: &Stage, node: u8) -> (f64, f64) {
    let descriptors = scene.metric(node, "process_open_fds", &[]);
    (
        descriptors,
        scene.metric(node, "ambidex_pooled_tunnels", &[]),
    )
}

/// Waits until no connection is open.
fn settled(scene: &Stage) {
    for node in [1, 2] {
        eventually("no connection is open", SOON, || {
            scene.metric(node, "istio_tcp_sockets_open", &[]) == 0.0
        });
    }
}
