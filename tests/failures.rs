//! Things that are down, wrong, expired or killed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Stage, eventually, own, shared};
use lab::standing::Daemon;
use lab::traffic::{Check, Saw};
use rstest::rstest;
use shared_proxy::identity::{CertificateAuthority, Identity, LocalCa, WorkloadCertificate};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

/// Nobody listens here.
const DEAD_PORT: u16 = 8099;
/// Only a witness listens here.
const WITNESS_PORT: u16 = 8082;
const HBONE_PORT: u16 = 15008;

/// The client is told soon, and the log says what it was.
#[rstest]
#[case::tunnel("pod1-1", "pod2-2", true)]
#[case::within_node("pod1-1", "pod1-2", true)]
#[case::inbound_plaintext("plain1", "pod2-2", false)]
#[case::outbound_plaintext("pod1-1", "plain2", false)]
fn application_down(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] from: &str,
    #[case] to: &str,
    #[case] tunnelled: bool,
) {
    let scene = shared(variant);
    let (near, far) = (
        scene.mark(scene.node_of(from)),
        scene.mark(scene.node_of(to)),
    );
    let outcome = scene.refused(from, (scene.ip(to), DEAD_PORT).into());
    assert!(outcome.millis < 3000, "{outcome:#?}");
    if tunnelled {
        let wanted = [
            ("direction", "outbound"),
            ("src.workload", from),
            ("error", "~503"),
        ];
        scene.access_line(near, &wanted);
    }
    if scene.pod(to).capture.is_some() {
        let wanted = [
            ("direction", "inbound"),
            ("dst.workload", to),
            ("error", "~refused"),
        ];
        scene.access_line(far, &wanted);
    } else {
        let wanted = [
            ("direction", "outbound"),
            ("src.workload", from),
            ("error", "~refused"),
        ];
        scene.access_line(near, &wanted);
    }
}

/// The pod proves another service account than the one that it is known by: the client hangs up before it says a byte.
#[rstest]
fn wrong_identity(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let to: SocketAddr = (scene.ip("pod2-1"), WITNESS_PORT).into();
    let witness = scene.witness("pod2-1", WITNESS_PORT);
    let near = scene.mark(1);
    let changed = scene.with_state(|state| {
        state.workload_mut("pod2-1").unwrap().service_account = "somebody-else".to_owned();
    });
    scene.refused("pod1-1", to);
    let wanted = [
        ("direction", "outbound"),
        ("src.workload", "pod1-1"),
        ("error", "~somebody-else"),
    ];
    let line = scene.access_line(near, &wanted);
    assert_eq!(line["bytes_sent"], 0, "{line}");
    assert!(!witness.saw_somebody(), "the client's connection arrived");
    drop(changed);

    // The witness takes connections without a word, so the client's time runs out.
    let outcome = scene.attempt("pod1-1", to, Check::Who, Duration::from_secs(1));
    assert_eq!(outcome.saw, Some(Saw::Timeout), "{outcome:#?}");
    assert!(witness.saw_somebody(), "with the right name it does arrive");
}

/// A peer whose certificate has run out is turned away by the pod's side with the alert that says so.
#[rstest]
fn expired_certificate_of_the_peer(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let valid = certificate(&scene, Duration::from_secs(600));
    let answer = knock(&scene, &valid, "pod2-2");
    assert_eq!(answer, Ok(()), "with a valid certificate HTTP/2 begins");

    let expired = certificate(&scene, Duration::from_secs(1));
    std::thread::sleep(Duration::from_millis(2100));
    let error = knock(&scene, &expired, "pod2-2").unwrap_err();
    assert!(error.contains("CertificateExpired"), "{error}");
}

/// A certificate of pod1-1's service account, from the lab's own CA.
fn certificate(stage: &Stage, lifetime: Duration) -> WorkloadCertificate {
    let ca = LocalCa::open(stage.lab.dir().join("ca"), "cluster.local", lifetime).unwrap();
    let identity: Identity = stage.identity("pod1-1").parse().unwrap();
    runtime().block_on(ca.issue(&identity)).unwrap()
}

/// Opens a tunnel from the uncaptured pod with this certificate; the error is what the client got instead of HTTP/2.
fn knock(stage: &Stage, certificate: &WorkloadCertificate, to: &str) -> Result<(), String> {
    let expected: Identity = stage.identity(to).parse().unwrap();
    let connector = TlsConnector::from(Arc::clone(&certificate.client_config(&[expected])));
    let to: SocketAddr = (stage.ip(to), HBONE_PORT).into();
    let talk = async {
        let tcp = tokio::net::TcpSocket::new_v4()?.connect(to).await?;
        let name = ServerName::IpAddress(to.ip().into());
        let mut tls = connector.connect(name, tcp).await?;
        // Preface and an empty SETTINGS frame. The server's own come when it has accepted the client's certificate.
        tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0")
            .await?;
        let mut frame = [0; 9];
        tls.read_exact(&mut frame).await?;
        const SETTINGS: u8 = 4;
        assert_eq!(frame[3], SETTINGS, "{frame:?}");
        std::io::Result::Ok(())
    };
    let netns = stage.lab.netns("plain1").unwrap();
    let bounded =
        || runtime().block_on(async { tokio::time::timeout(Duration::from_secs(10), talk).await });
    let answer = netns.run(bounded).unwrap().expect("an answer in time");
    answer.map_err(|error| error.to_string())
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// A CA that does not answer is no harm until the certificates run out; then connections end, and come back with it.
#[rstest]
fn expired_certificate_of_the_pod(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    spec.proxy_args = ["--cert-ttl-seconds", "4"].map(str::to_owned).to_vec();
    let scene = own(&spec);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let ca = scene.lab.dir().join("ca");
    let away = scene.lab.dir().join("ca-away");
    fs::rename(&ca, &away).unwrap();
    let witness = scene.witness("pod2-2", WITNESS_PORT);
    // Longer than any certificate that was issued before; a tunnel to pod2-2 was never opened.
    std::thread::sleep(Duration::from_millis(5500));
    let near = scene.mark(1);
    scene.refused("pod1-1", (scene.ip("pod2-2"), WITNESS_PORT).into());
    let wanted = [
        ("direction", "outbound"),
        ("src.workload", "pod1-1"),
        ("error", "~certificate"),
    ];
    scene.access_line(near, &wanted);
    assert!(
        !witness.saw_somebody(),
        "a connection without a certificate"
    );

    fs::rename(&away, &ca).unwrap();
    eventually("it works again", Duration::from_secs(30), || {
        let limit = Duration::from_secs(5);
        scene
            .attempt("pod1-1", scene.at("pod2-2"), Check::Who, limit)
            .ok
    });
}

/// While a proxy is dead its pods' connections fail; none passes beside it. Another one takes over where it was.
#[rstest]
#[case::of_the_client(1)]
#[case::of_the_server(2)]
fn killed_proxy_leaks_nothing(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] node: u8,
) {
    let scene = own(&variant.spec());
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    // More than can be done before the proxy is killed.
    let bytes = 4 << 30;
    let limit = Duration::from_secs(30);
    std::thread::scope(|scope| {
        let open = scope.spawn(|| {
            let check = Check::Exchange {
                up: bytes,
                down: bytes,
            };
            scene.attempt("pod1-1", scene.at("pod2-1"), check, limit)
        });
        std::thread::sleep(Duration::from_millis(500));
        scene.lab.kill(node, Daemon::Proxy).unwrap();
        let killed = Instant::now();
        let outcome = open.join().unwrap();
        assert!(
            !outcome.ok && outcome.saw != Some(Saw::Timeout),
            "{outcome:#?}"
        );
        assert!(
            killed.elapsed() < Duration::from_secs(20),
            "an open connection hangs"
        );
    });

    let tap = scene.tap("node1", "eth0", "");
    let markers = ["in-the-clear-1", "in-the-clear-2"];
    for (marker, (from, to)) in markers
        .into_iter()
        .zip([("pod1-1", "pod2-1"), ("pod2-1", "pod1-1")])
    {
        let check = Check::Marker {
            marker: Some(marker.to_owned()),
        };
        let outcome = scene.attempt(from, scene.at(to), check, Duration::from_secs(3));
        assert!(!outcome.ok, "{outcome:#?}");
    }
    let wire = tap.finish();
    for marker in markers {
        assert!(!wire.shows(marker), "{marker} in the clear");
    }
    for (flow, stream) in &wire.capture.streams {
        let tunnel = [flow.from.port(), flow.to.port()].contains(&HBONE_PORT);
        assert!(
            tunnel,
            "{} bytes from {} to {}",
            stream.len(),
            flow.from,
            flow.to
        );
    }

    scene.lab.start(node, Daemon::Proxy).unwrap();
    scene.lab.wait_ready(node, &|_| {}).unwrap();
    for (from, to) in [
        ("pod1-1", "pod2-1"),
        ("pod2-1", "pod1-1"),
        ("pod1-2", "pod1-1"),
    ] {
        assert_eq!(scene.seen(from, scene.at(to)), scene.ip(from));
    }
}

/// The agent is not in the path: connections live and begin without it. The next one knows the pods and takes more.
#[rstest]
fn killed_agent_costs_nothing(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let long = Check::OneByteWrites {
        count: 5000,
        pause_ms: 3000,
    };
    std::thread::scope(|scope| {
        let through = scope.spawn(|| scene.check("pod1-1", scene.at("pod2-1"), long));
        std::thread::sleep(Duration::from_millis(500));
        scene.lab.kill(1, Daemon::Agent).unwrap();
        assert!(!through.is_finished());
        for (from, to) in [
            ("pod1-2", "pod2-1"),
            ("pod2-2", "pod1-2"),
            ("pod1-1", "pod1-2"),
        ] {
            assert_eq!(scene.seen(from, scene.at(to)), scene.ip(from));
        }
        assert!(
            scene.lab.add_pod("pod1-1").is_err(),
            "without an agent no pod starts"
        );
        scene.lab.start(1, Daemon::Agent).unwrap();
        scene.lab.wait_ready(1, &|_| {}).unwrap();
    });

    scene.recreate("pod1-2");
    scene.lab.add_pod("pod1-2").unwrap();
    let (near, far) = (scene.mark(1), scene.mark(2));
    assert_eq!(scene.seen("pod1-2", scene.at("pod2-1")), scene.ip("pod1-2"));
    let wanted = [("direction", "inbound"), ("src.workload", "pod1-2")];
    let line = scene.access_line(far, &wanted);
    assert_eq!(line["src.identity"], *scene.identity("pod1-2"), "{line}");
    assert_eq!(scene.seen("pod2-2", scene.at("pod1-2")), scene.ip("pod2-2"));
    let wanted = [("direction", "inbound"), ("dst.workload", "pod1-2")];
    let line = scene.access_line(near, &wanted);
    assert_eq!(line["src.identity"], *scene.identity("pod2-2"), "{line}");
}

/// SIGTERM lets a connection that can end do so, and tells peers to go elsewhere.
#[rstest]
fn stopped_proxy_lets_connections_end(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    spec.proxy_args = ["--drain-seconds", "10"].map(str::to_owned).to_vec();
    let scene = own(&spec);
    let slow = Check::OneByteWrites {
        count: 500,
        pause_ms: 2000,
    };
    std::thread::scope(|scope| {
        let through = scope.spawn(|| scene.check("pod1-1", scene.at("pod2-1"), slow));
        std::thread::sleep(Duration::from_millis(700));
        let started = Instant::now();
        scene.lab.stop(2, Daemon::Proxy).unwrap();
        assert!(through.is_finished() || started.elapsed() > Duration::from_secs(1));
        through.join().unwrap();
        assert!(
            started.elapsed() < Duration::from_secs(9),
            "it did not wait for nothing"
        );
    });
}

/// The address that no pod has any more is nobody's, whatever the capture.
#[rstest]
fn deleted_pod_is_gone(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    scene.check("pod1-1", scene.at("pod1-2"), Check::Who);
    let address: Ipv4Addr = scene.ip("pod1-2");
    scene.lab.destroy_pod("pod1-2").unwrap();
    let node = scene.dump("node1");
    assert!(!node.contains(&format!("{address} ")), "{node}");
    let outcome = scene.attempt(
        "pod2-2",
        (address, 8080).into(),
        Check::Who,
        Duration::from_secs(3),
    );
    assert!(!outcome.ok, "{outcome:#?}");
    assert_eq!(scene.seen("pod2-2", scene.at("pod1-1")), scene.ip("pod2-2"));
}
