//! Whoever breaks a protocol harms only himself; who goes, goes in order.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Stage, eventually, own};
use lab::standing::Daemon;
use lab::traffic::Check;
use nix::sys::signal::Signal;
use rstest::rstest;
use shared_proxy::identity::{CertificateAuthority, Identity, LocalCa};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;

const PORT: u16 = 8105;
const HBONE_PORT: u16 = 15008;
/// Far over anything that is waited for here; a handshake may take ten seconds before it is given up.
const SOON: Duration = Duration::from_secs(60);

/// What no port of the proxy wants to hear.
fn payloads() -> Vec<(&'static str, Vec<u8>)> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let noise = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    });
    let tls = [
        &[22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff, 3, 3][..],
        &[0x41; 3000],
    ]
    .concat();
    let h2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    let proxy_v2 = b"\r\n\r\n\0\r\nQUIT\n\x21\x11\xff\xffshort";
    vec![
        ("nothing", Vec::new()),
        ("one byte", vec![0]),
        ("noise", noise.take(64 << 10).collect()),
        ("zeros", vec![0; 1 << 20]),
        ("HTTP/1", b"GET /\xff\0 HTTP/9.9\r\nA: b\r\n\r\n".to_vec()),
        ("an endless line", vec![b'A'; 1 << 20]),
        ("HTTP/2 in the clear", h2.to_vec()),
        ("half a ClientHello", tls),
        ("half a PROXY header", proxy_v2.to_vec()),
    ]
}

/// Connections that never say anything: at 10 s for each handshake, two minutes one after the other.
const SILENT: usize = 12;

/// Every port of the proxy, hostile bytes on each. As long as such connections stand, who comes after them is served as ever;
/// each of them ends, by its own end or by the proxy's; and nothing else does.
#[rstest]
fn hostile_bytes_harm_nobody_else(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    // Tunnels that nobody uses any more are no leak.
    let release = "POOL_UNUSED_RELEASE_TIMEOUT".to_owned();
    spec.daemon_env.insert(release, "2s".to_owned());
    let scene = own(&spec);
    let mut bystanders = ["pod1-1", "plain1"].map(|from| Connection::open(&scene, from, "pod2-1"));
    let before = [1, 2].map(|node| descriptors(&scene, node));
    let pod = scene.ip("pod2-1");
    let own = Ipv4Addr::LOCALHOST;
    let ports: [(&str, SocketAddr); 6] = [
        ("plain1", (pod, 15008).into()),
        ("plain1", (pod, 15006).into()),
        ("plain1", (pod, 15001).into()),
        ("proxy2", (own, 15000).into()),
        ("proxy2", (own, 15020).into()),
        ("proxy2", (own, 15021).into()),
    ];
    let refused = || {
        let labels = [("reporter", "destination")];
        scene.metric(2, "istio_tcp_connections_failed_total", &labels)
    };
    let so_far = refused();
    let mut kept: Vec<(u16, TcpStream)> = ports
        .iter()
        .flat_map(|(from, to)| {
            let kept = payloads().into_iter();
            let begun = kept.map(|(_, payload)| begin(&scene, from, *to, &payload).unwrap());
            begun.flatten().map(|stream| (to.port(), stream))
        })
        .collect();
    // If a tunnel had to wait until these are given up, it would wait for longer than any check does.
    let silent =
        (0..SILENT).filter_map(|_| begin(&scene, "plain1", (pod, HBONE_PORT).into(), b"").unwrap());
    kept.extend(silent.map(|stream| (HBONE_PORT, stream)));
    // To the same port of the same pod, in a tunnel that has to be opened first, and without one.
    for from in ["pod1-2", "pod2-2", "plain2"] {
        assert_eq!(scene.seen(from, scene.at("pod2-1")), scene.ip(from));
    }
    for (port, page) in [
        (15000, "/config_dump"),
        (15020, "/metrics"),
        (15021, "/healthz/ready"),
    ] {
        scene.page(2, port, page);
    }
    let tunnels = kept.iter().filter(|(port, _)| *port == HBONE_PORT);
    for (_, tunnel) in tunnels {
        let mut tunnel = tunnel;
        let end = tunnel.read_to_end(&mut Vec::new());
        let stays = end.is_err_and(|error| error.kind() == ErrorKind::WouldBlock);
        assert!(!stays, "a tunnel that never begins stays open");
    }
    drop(kept);
    eventually("each of them is counted", SOON, || {
        refused() >= so_far + payloads().len() as f64
    });
    std::thread::scope(|scope| {
        for (from, to) in ports {
            let scene = &scene;
            scope.spawn(move || {
                for (what, payload) in payloads() {
                    for resets in [false, true] {
                        bother(scene, from, to, &payload, resets)
                            .unwrap_or_else(|error| panic!("{what} on {to}: {error}"));
                    }
                }
            });
        }
    });
    bystanders.iter_mut().for_each(Connection::talks);
    unharmed(&scene, before, bystanders);
}

/// The connection ends by itself after these bytes, however its other side takes them.
fn bother(
    scene: &Stage,
    from: &str,
    to: SocketAddr,
    payload: &[u8],
    resets: bool,
) -> Result<(), String> {
    let Some(mut stream) = begin(scene, from, to, payload)? else {
        return Ok(());
    };
    if resets {
        SockRef::from(&stream)
            .set_linger(Some(Duration::ZERO))
            .unwrap();
        return Ok(());
    }
    let _ = stream.shutdown(Shutdown::Write);
    match stream.read_to_end(&mut Vec::new()) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => Err("it stays open".to_owned()),
        _ => Ok(()),
    }
}

/// Connects and sends these bytes, as far as they are taken; none if the connection was refused.
fn begin(
    scene: &Stage,
    from: &str,
    to: SocketAddr,
    payload: &[u8],
) -> Result<Option<TcpStream>, String> {
    let netns = scene.lab.netns(from).unwrap();
    let connected = netns.run(|| TcpStream::connect_timeout(&to, SOON)).unwrap();
    let mut stream = match connected {
        Ok(stream) => stream,
        Err(error) if error.kind() == ErrorKind::TimedOut => return Err(error.to_string()),
        // Refused, or hung up on before it was noticed here.
        Err(_) => return Ok(None),
    };
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.set_write_timeout(Some(SOON)).unwrap();
    // Who is hung up on cannot write everything.
    let _ = stream.write_all(payload);
    Ok(Some(stream))
}

/// An HTTP/2 frame.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// A peer with a good certificate speaks bad HTTP/2: its tunnel ends, and those of others do not.
#[rstest]
fn a_peer_that_breaks_http2_harms_only_itself(#[values(NodeHybrid, Inpod)] variant: Variant) {
    const DATA: u8 = 0;
    const HEADERS: u8 = 1;
    const RESET: u8 = 3;
    const SETTINGS: u8 = 4;
    const PUSH: u8 = 5;
    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;
    const CONTINUATION: u8 = 9;
    let scene = own(&variant.spec());
    let mut bystander = Connection::open(&scene, "pod1-1", "pod2-1");
    let before = [1, 2].map(|node| descriptors(&scene, node));
    let ends: [(&str, Vec<u8>); 9] = [
        ("data of no stream", frame(DATA, 0, 1, b"x")),
        ("headers of the connection", frame(HEADERS, 4, 0, b"\x82")),
        ("headers that are none", frame(HEADERS, 4, 1, &[0xff; 64])),
        ("settings of five bytes", frame(SETTINGS, 0, 0, b"12345")),
        ("a window of nothing", frame(WINDOW_UPDATE, 0, 0, &[0; 4])),
        ("a continuation of nothing", frame(CONTINUATION, 4, 1, b"")),
        ("a push", frame(PUSH, 4, 1, &[0, 0, 0, 2, 0x82])),
        ("reset of no stream", frame(RESET, 0, 7, &[0; 4])),
        (
            "a frame too long",
            [&[0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 1][..], &[0; 100]].concat(),
        ),
    ];
    for (what, bytes) in ends {
        let ended = broken_tunnel(&scene, &bytes, true);
        assert!(ended, "{what}: the tunnel goes on");
    }
    // No error, but nothing that may cost much: many PINGs and SETTINGS whose answers are not read.
    for flood in [frame(PING, 0, 0, &[7; 8]), frame(SETTINGS, 0, 0, b"")] {
        broken_tunnel(&scene, &flood.repeat(50_000), false);
        bystander.talks();
    }
    unharmed(&scene, before, bystander);
}

/// Opens a tunnel from the uncaptured pod to pod2-1 as pod1-1's identity, sends this in it, and tells whether it ended for that.
fn broken_tunnel(scene: &Stage, bytes: &[u8], reads: bool) -> bool {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let netns = scene.lab.netns("plain1").unwrap();
    let talk = async {
        let mut tls = tunnel(scene).await;
        let begin = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        tls.write_all(begin).await.unwrap();
        // Fails when the other side has had enough.
        let _ = tokio::time::timeout(Duration::from_secs(10), tls.write_all(bytes)).await;
        if !reads {
            return false;
        }
        let _ = tls.flush().await;
        tokio::time::timeout(SOON, tls.read_to_end(&mut Vec::new()))
            .await
            .is_ok()
    };
    netns.run(|| runtime.block_on(talk)).unwrap()
}

async fn tunnel(scene: &Stage) -> TlsStream<tokio::net::TcpStream> {
    let directory = scene.lab.dir().join("ca");
    let ca = LocalCa::open(directory, "cluster.local", Duration::from_secs(600)).unwrap();
    let us: Identity = scene.identity("pod1-1").parse().unwrap();
    let expected: Identity = scene.identity("pod2-1").parse().unwrap();
    let certificate = ca.issue(&us).await.unwrap();
    let connector = TlsConnector::from(Arc::clone(&certificate.client_config(&[expected])));
    let to: SocketAddr = (scene.ip("pod2-1"), HBONE_PORT).into();
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    let tcp = socket.connect(to).await.unwrap();
    let name = ServerName::IpAddress(to.ip().into());
    connector.connect(name, tcp).await.unwrap()
}

/// Both proxies are the processes that they were, have no more descriptors than before, and serve.
fn unharmed<T>(scene: &Stage, before: [f64; 2], bystanders: T) {
    for (node, before) in [1, 2].into_iter().zip(before) {
        let log = scene.proxy_log(node);
        assert!(!log.contains("panicked"), "{log}");
        assert_eq!(log.matches("proxy started").count(), 1);
        let what = format!("descriptors of proxy{node} are {before} again");
        eventually(&what, SOON, || descriptors(scene, node) <= before);
    }
    drop(bystanders);
    for (from, to) in [
        ("pod1-1", "pod2-1"),
        ("pod2-1", "pod1-1"),
        ("plain1", "pod2-1"),
    ] {
        scene.check(from, scene.at(to), Check::Who);
    }
}

fn descriptors(scene: &Stage, node: u8) -> f64 {
    scene.metric(node, "process_open_fds", &[])
}

/// The server's proxy is asked to end: at once the peer hears GOAWAY and keeps its tunnel no longer for others, while the
/// connection in it goes on; at the deadline it is cut.
#[rstest]
fn a_draining_proxy_says_so_early_and_cuts_late(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let mut spec = variant.spec();
    spec.proxy_args = ["--drain-seconds", "8"].map(str::to_owned).to_vec();
    let release = "POOL_UNUSED_RELEASE_TIMEOUT".to_owned();
    spec.daemon_env.insert(release, "2s".to_owned());
    let scene = own(&spec);
    let mut open = Connection::open(&scene, "pod1-1", "pod2-1");
    let tunnels = || scene.metric(1, "ambidex_pooled_tunnels", &[]);
    assert!(tunnels() >= 1.0);
    let proxy = scene.lab.process(2, Daemon::Proxy).unwrap();
    let began = Instant::now();
    proxy.signal(Signal::SIGTERM).unwrap();
    eventually("the peer has let go of the tunnel", SOON, || {
        tunnels() == 0.0
    });
    open.talks();
    assert!(proxy.is_alive());
    open.is_reset();
    let lasted = began.elapsed();
    assert!(lasted >= Duration::from_secs(7), "cut after {lasted:?}");
    assert!(proxy.wait_gone(SOON));
}

/// A pod leaves: its connections may end by themselves for a while, and are cut then; peers' tunnels to it are not used again.
/// With capture in the pod, what its application answers needs the rules that go with the capture, so its connections end at once.
#[rstest]
fn a_pod_that_leaves_has_time_to_finish(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let mut open = Connection::open(&scene, "pod1-1", "pod2-1");
    let began = Instant::now();
    scene.lab.del_pod("pod2-1").unwrap();
    if variant.is_node() {
        open.talks();
        open.is_reset();
        let lasted = began.elapsed();
        assert!(lasted >= Duration::from_secs(3), "cut after {lasted:?}");
    } else {
        for end in [&mut open.client, &mut open.application] {
            eventually("it has ended", SOON, || end.write_all(b"x").is_err());
        }
    }
    eventually("nothing of it is open", SOON, || {
        scene.metric(2, "istio_tcp_sockets_open", &[]) == 0.0
    });
    scene.lab.add_pod("pod2-1").unwrap();
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-1")), scene.ip("pod1-1"));
}

/// A connection with both of its ends in hand.
struct Connection {
    client: TcpStream,
    application: TcpStream,
}

impl Connection {
    fn open(scene: &Stage, from: &str, to: &str) -> Self {
        let there = scene.lab.netns(to).unwrap();
        let listener = there
            .run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)))
            .unwrap()
            .unwrap();
        let to: SocketAddr = (scene.ip(to), PORT).into();
        let here = scene.lab.netns(from).unwrap();
        let mut client = here.run(|| TcpStream::connect(to)).unwrap().unwrap();
        client.write_all(b"x").unwrap();
        let (application, _) = listener.accept().unwrap();
        for end in [&client, &application] {
            end.set_read_timeout(Some(SOON)).unwrap();
            end.set_write_timeout(Some(SOON)).unwrap();
        }
        let mut connection = Self {
            client,
            application,
        };
        connection.application.read_exact(&mut [0]).unwrap();
        connection.talks();
        connection
    }

    /// Bytes pass both ways.
    fn talks(&mut self) {
        self.client.write_all(b"hello").unwrap();
        self.application.read_exact(&mut [0; 5]).unwrap();
        self.application.write_all(b"hello").unwrap();
        self.client.read_exact(&mut [0; 5]).unwrap();
    }

    /// Both ends see that it was aborted.
    fn is_reset(&mut self) {
        for end in [&mut self.client, &mut self.application] {
            let read = loop {
                match end.read(&mut [0]).map_err(|error| error.kind()) {
                    // A read with a time limit is not begun again when a signal comes.
                    Err(ErrorKind::Interrupted) => {}
                    read => break read,
                }
            };
            assert_eq!(read, Err(ErrorKind::ConnectionReset));
        }
    }
}
