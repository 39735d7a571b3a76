//! Which CONNECT the proxy sends a second time, to an HTTP/2 that is not ours: python3-h2.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "a client of a test, no part of the proxy"
)]

mod harness;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::authority::{Authority, VALID};
use harness::{eventually, shared};
use lab::standing::Background;
use rstest::rstest;

const CLIENT: &str = "pod1-1";
/// A pod that is not captured: its port 15008 is free.
const PEER: &str = "plain2";
const SOON: Duration = Duration::from_secs(60);

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Lines of the peer that begin so.
fn said(peer: &Background, start: &str) -> usize {
    let output = peer.output();
    output
        .lines()
        .filter(|line| line.starts_with(start))
        .count()
}

/// Refused by REFUSED_STREAM or GOAWAY before an answer: once more in another tunnel, and no third time. After 200 the
/// application may have acted on what it got: never.
#[rstest]
#[case::refused_stream("refused", 2, true)]
#[case::goaway("goaway", 2, true)]
#[case::refused_twice("always-refused", 2, false)]
#[case::refused_after_200("after-200", 1, false)]
fn a_connect_is_asked_for_once_more(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
    #[case] how: &str,
    #[case] asked: usize,
    #[case] served: bool,
) {
    let scene = shared(variant);
    let _changed = scene.with_state(|state| {
        state.workload_mut(PEER).unwrap().protocol = "HBONE".to_owned();
    });
    let authority = Authority::of(&scene);
    let name = format!("URI:{}", scene.identity(PEER));
    let pair = authority.issue("peer", &[&name], VALID);
    let root = authority.root();
    let argv = [
        "/usr/bin/python3",
        concat!(env!("CARGO_MANIFEST_DIR"), "/tests/judges/tunnel_peer.py"),
        text(&pair.certificate),
        text(&pair.key),
        text(&root),
        how,
    ];
    let mut peer = scene
        .lab
        .spawn(PEER, &format!("peer-{how}"), &argv)
        .unwrap();
    peer.wait_for("listening", SOON).unwrap();

    let to = SocketAddr::new(scene.ip(PEER).into(), 8200);
    let mark = scene.mark(1);
    let netns = scene.lab.netns(CLIENT).unwrap();
    let mut client = netns.run(|| TcpStream::connect(to)).unwrap().unwrap();
    client.set_read_timeout(Some(SOON)).unwrap();
    client.write_all(b"hello").unwrap();
    let mut back = [0; 5];
    let read = client.read_exact(&mut back);
    if served {
        read.unwrap();
        assert_eq!(&back, b"hello");
        drop(client);
    } else {
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    let tunnelled = to.to_string();
    let line = [
        ("direction", "outbound"),
        ("dst.hbone_addr", &*tunnelled),
        ("level", if served { "INFO" } else { "ERROR" }),
    ];
    scene.access_line(mark, &line);
    let connect = format!("CONNECT {to}");
    eventually("the peer has said all", SOON, || {
        said(&peer, &connect) >= asked
    });
    // A third time would come at once.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(said(&peer, &connect), asked, "{}", peer.output());
    assert!(said(&peer, "connection h2") > 0, "{}", peer.output());
}
