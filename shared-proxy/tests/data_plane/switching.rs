//! A pod's capture changes while it speaks.

use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;

use shared_proxy::core::Attached;
use shared_proxy::drain::Drain;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::time::{Instant, timeout};

use crate::mesh::{CLIENT, LoopbackScope, Node, Pair, SERVER};

const LIMIT: Duration = Duration::from_secs(30);
/// Long enough for a connection that nothing holds.
const A_WHILE: Duration = Duration::from_millis(300);
/// Source ports by which the other capture's sockets are known.
const OTHERS: RangeInclusive<u16> = 21_000..=21_099;

async fn accept(app: &TcpListener) -> TcpStream {
    timeout(LIMIT, app.accept()).await.unwrap().unwrap().0
}

async fn speak(from: &mut TcpStream, to: &mut TcpStream) {
    from.write_all(b"?").await.unwrap();
    let read = timeout(LIMIT, to.read_u8()).await;
    assert_eq!(read.unwrap().unwrap(), b'?');
}

/// Another capture of a pod, on the node that serves it.
async fn other_capture(pair: &Pair, node: &Node, pod: u8, account: &str) -> Attached {
    let scope = LoopbackScope::new("other", vec![pair.mesh.pod(pod, account)])
        .in_mode("other")
        .with_ports(OTHERS);
    node.core.attach(Arc::new(scope)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_held_pod_opens_waits_and_what_is_open_goes_on() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut older, mut older_end) = (pair.connect().await, accept(&app).await);
    let held = pair.mesh.pod(CLIENT, "client");
    let hold = pair.one.core.hold(&held, LIMIT).await;
    let mut newer = pair.connect().await;
    newer.write_all(b"?").await.unwrap();
    assert!(timeout(A_WHILE, app.accept()).await.is_err());
    speak(&mut older, &mut older_end).await;
    speak(&mut older_end, &mut older).await;
    drop(hold);
    assert_eq!(accept(&app).await.read_u8().await.unwrap(), b'?');
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_to_a_held_pod_waits() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let held = pair.mesh.pod(SERVER, "server");
    let hold = pair.two.core.hold(&held, LIMIT).await;
    let second = pair.two.core.hold(&held, LIMIT).await;
    let mut client = pair.connect().await;
    client.write_all(b"?").await.unwrap();
    drop(hold);
    assert!(timeout(A_WHILE, app.accept()).await.is_err(), "held twice");
    drop(second);
    assert_eq!(accept(&app).await.read_u8().await.unwrap(), b'?');
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[allow(
    clippy::disallowed_methods,
    reason = "an application of a test, no part of the proxy"
)]
async fn a_hold_waits_for_connections_that_are_being_made() {
    let pair = Pair::new().await;
    // With its queue full, the application's host does not answer.
    let full = TcpSocket::new_v4().unwrap();
    full.bind(pair.mesh.app()).unwrap();
    let full = full.listen(0).unwrap();
    let mut fills = Vec::new();
    while let Ok(filled) = timeout(A_WHILE, TcpStream::connect(pair.mesh.app())).await {
        fills.push(filled.unwrap());
    }
    let held = pair.mesh.pod(SERVER, "server");
    let began = Instant::now();
    drop(pair.two.core.hold(&held, LIMIT).await);
    assert!(began.elapsed() < LIMIT / 2, "nothing is being made");

    let _waits = pair.connect().await;
    let dials = || async {
        let began = Instant::now();
        drop(pair.two.core.hold(&held, A_WHILE).await);
        began.elapsed() >= A_WHILE
    };
    timeout(LIMIT, async {
        while !dials().await {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await
    .unwrap();
    drop(full);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_of_an_older_tunnel_goes_by_the_pods_new_capture() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut older, mut older_end) = (pair.connect().await, accept(&app).await);
    let pod = pair.mesh.pod(SERVER, "server");
    let other = other_capture(&pair, &pair.two, SERVER, "server").await;
    let hold = pair.two.core.hold(&pod, LIMIT).await;
    let waits = pair.connect().await;
    pair.two.core.captured_by(&pod, &other);
    drop(hold);
    let port = |stream: &TcpStream| stream.peer_addr().unwrap().port();
    let end = accept(&app).await;
    assert!(OTHERS.contains(&port(&end)), "{end:?}");
    assert!(!OTHERS.contains(&port(&older_end)), "{older_end:?}");
    speak(&mut older, &mut older_end).await;
    drop((waits, end));

    pair.two.core.captured_as_accepted(&pod);
    let _client = pair.connect().await;
    let end = accept(&app).await;
    assert!(!OTHERS.contains(&port(&end)), "{end:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_waited_is_opened_by_the_pods_new_capture() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut older, mut older_end) = (pair.connect().await, accept(&app).await);
    let pod = pair.mesh.pod(CLIENT, "client");
    let other = other_capture(&pair, &pair.one, CLIENT, "client").await;
    let hold = pair.one.core.hold(&pod, LIMIT).await;
    let _waits = pair.connect().await;
    pair.one.core.captured_by(&pod, &other);
    let leaving = pair.one.core.ending(&pod, "loopback");
    drop(hold);
    let _end = accept(&app).await;
    let modes = || {
        let open = pair.one.core.connections().into_iter();
        open.map(|connection| connection.capture_mode)
            .collect::<Vec<_>>()
    };
    assert_eq!(modes(), ["loopback", "other"]);
    // Its tunnels are its own.
    assert_eq!(pair.one.core.pooled_tunnels(), 1);
    speak(&mut older, &mut older_end).await;

    // What it had by the capture that it left ends, and nothing else.
    leaving.within(Drain::CUT).await;
    assert_eq!(modes(), ["other"]);
}
