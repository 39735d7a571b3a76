//! Which CONNECT is sent a second time, and how a dead peer is found.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use h2::Reason;
use http::StatusCode;
use shared_proxy::capture::{HBONE_PORT, Role};
use shared_proxy::core::{Attached, CoreConfig};
use shared_proxy::hbone::HboneConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, Node, SERVER, VIP, assert_failed, quick};
use crate::peer::{GOAWAY, Peer, RawServer};

const LIMIT: Duration = Duration::from_secs(30);

fn end(mesh: &Mesh) -> SocketAddr {
    SocketAddr::new(mesh.ip(SERVER), HBONE_PORT)
}

async fn client(mesh: &Mesh, config: CoreConfig) -> (Node, Attached, TcpStream) {
    let node = mesh.node_with(config);
    let scope = mesh.clients();
    let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, VIP.parse().unwrap());
    let attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let stream = mesh.connect(CLIENT, door).await.unwrap();
    (node, attached, stream)
}

async fn is_reset(client: &mut TcpStream) {
    let read = timeout(LIMIT, client.read(&mut [0; 1])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

async fn speaks(client: &mut TcpStream) {
    client.write_all(b"?").await.unwrap();
    let mut byte = [0];
    timeout(LIMIT, client.read_exact(&mut byte))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&byte, b"?");
}

/// REFUSED_STREAM: the peer has not looked at it. Once more, in another tunnel.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_stream_is_asked_for_once_more() {
    let mesh = Mesh::new();
    let mut peer = Peer::new(&mesh, end(&mesh), "server").await;
    let (_node, _attached, mut client) = client(&mesh, quick()).await;
    peer.asked().await.reset(Reason::REFUSED_STREAM);
    peer.asked().await.echo();
    speaks(&mut client).await;
    assert_eq!(peer.connections(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_is_refused_twice_is_not_asked_for_again() {
    let mesh = Mesh::new();
    let mut peer = Peer::new(&mesh, end(&mesh), "server").await;
    let (node, _attached, mut client) = client(&mesh, quick()).await;
    for _ in 0..2 {
        peer.asked().await.reset(Reason::REFUSED_STREAM);
    }
    is_reset(&mut client).await;
    assert_failed(&node, "CONNECT").await;
    assert!(peer.is_idle());
}

/// GOAWAY that does not cover the stream: the peer has not looked at it either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_goaway_does_not_cover_is_asked_for_once_more() {
    let mesh = Mesh::new();
    let server = RawServer::new(&mesh, end(&mesh), "server").await;
    let (_node, _attached, mut client) = client(&mesh, quick()).await;
    let mut first = server.accept().await;
    first.request().await;
    // Last stream 0, NO_ERROR.
    first.send(GOAWAY, 0, 0, &[0; 8]).await;
    let mut second = server.accept().await;
    let stream = second.request().await;
    second.answer_200(stream).await;
    // DATA.
    second.send(0, 0, stream, b"?").await;
    let mut byte = [0];
    timeout(LIMIT, client.read_exact(&mut byte))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&byte, b"?");
}

/// After 200 the application may have acted on what it got: whatever happens then is the client's to know.
#[rstest::rstest]
#[case::refused_stream(Reason::REFUSED_STREAM)]
#[case::cancel(Reason::CANCEL)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_asked_for_again_after_200(#[case] reason: Reason) {
    let mesh = Mesh::new();
    let mut peer = Peer::new(&mesh, end(&mesh), "server").await;
    let (_node, _attached, mut client) = client(&mesh, quick()).await;
    let (mut send, _recv) = peer.asked().await.accept();
    tokio::time::sleep(Duration::from_millis(100)).await;
    send.send_reset(reason);
    is_reset(&mut client).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(peer.is_idle());
    assert_eq!(peer.connections(), 1);
}

/// A status is an answer: it is not asked for again.
#[rstest::rstest]
#[case::bad_request(StatusCode::BAD_REQUEST)]
#[case::unauthorized(StatusCode::UNAUTHORIZED)]
#[case::not_found(StatusCode::NOT_FOUND)]
#[case::unavailable(StatusCode::SERVICE_UNAVAILABLE)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_other_than_200_is_final(#[case] status: StatusCode) {
    let mesh = Mesh::new();
    let mut peer = Peer::new(&mesh, end(&mesh), "server").await;
    let (node, _attached, mut client) = client(&mesh, quick()).await;
    peer.asked().await.refuse(status);
    is_reset(&mut client).await;
    assert_failed(&node, "CONNECT").await;
    assert!(peer.is_idle());
    // The tunnel is not to blame.
    assert_eq!(node.core.pooled_tunnels(), 1);
}

/// A peer that does not answer PINGs is dead, and every stream to it with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_does_not_answer_pings_is_given_up() {
    let mesh = Mesh::new();
    let server = RawServer::new(&mesh, end(&mesh), "server").await;
    let config = CoreConfig {
        hbone: HboneConfig {
            ping_interval: Duration::from_millis(200),
            ping_timeout: Duration::from_millis(300),
            ..HboneConfig::default()
        },
        ..quick()
    };
    let (node, _attached, mut client) = client(&mesh, config).await;
    let mut connection = server.accept().await;
    let stream = connection.request().await;
    connection.answer_200(stream).await;
    let began = Instant::now();
    // The server is there and silent.
    is_reset(&mut client).await;
    assert!(began.elapsed() < Duration::from_secs(10));
    assert!(node.core.connections().is_empty());
    drop(connection);
}
