//! Which connections share a tunnel, and which never do.

use std::sync::Arc;
use std::time::Duration;

use shared_proxy::capture::Role;
use shared_proxy::core::CoreConfig;
use shared_proxy::pool::PoolConfig;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, Pair, SERVER, TWIN, quick};

const LIMIT: Duration = Duration::from_secs(60);

/// An application that answers one byte to each, and keeps its connections.
fn answer(listener: tokio::net::TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                while let Ok(byte) = stream.read_u8().await {
                    if stream.write_u8(byte.wrapping_add(1)).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
}

async fn ask(stream: &mut TcpStream, byte: u8) {
    stream.write_u8(byte).await.unwrap();
    let got = timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap();
    assert_eq!(got, byte.wrapping_add(1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_addresses_never_share_a_tunnel() {
    let pair = Pair::new().await;
    answer(pair.mesh.listen().await);
    let mut kept = Vec::new();
    for from in [CLIENT, TWIN, CLIENT, TWIN] {
        let mut client = pair.mesh.connect(from, pair.door).await.unwrap();
        ask(&mut client, from).await;
        kept.push(client);
    }
    assert_eq!(pair.one.core.pooled_tunnels(), 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_connections_take_ten_tunnels() {
    let pair = Pair::new().await;
    answer(pair.mesh.listen().await);
    let mut kept = Vec::new();
    for _ in 0..20 {
        let some = (0..50).map(|_| async {
            let mut client = pair.connect().await;
            ask(&mut client, 7).await;
            client
        });
        kept.extend(futures_util::future::join_all(some).await);
    }
    assert_eq!(pair.one.core.pooled_tunnels(), 10);
    assert_eq!(pair.two.core.connections().len(), 1000);
    for (number, client) in kept.iter_mut().enumerate() {
        ask(client, number as u8).await;
    }
    drop(kept);
    let ended = timeout(LIMIT, async {
        while !pair.two.core.connections().is_empty() || !pair.one.core.connections().is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    ended.await.expect("connections outlive their clients");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_tunnel_without_streams_is_closed_after_a_while() {
    let config = CoreConfig {
        pool: PoolConfig {
            idle_release: Duration::from_millis(100),
            ..PoolConfig::default()
        },
        ..quick()
    };
    let pair = Pair::of(Mesh::new(), config).await;
    answer(pair.mesh.listen().await);
    let mut client = pair.connect().await;
    ask(&mut client, 1).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    ask(&mut client, 2).await;
    assert_eq!(pair.one.core.pooled_tunnels(), 1);
    let listener = 1;
    assert!(pair.server.open() > listener);
    drop(client);
    let closed = timeout(LIMIT, async {
        while pair.one.core.pooled_tunnels() > 0 || pair.server.open() > listener {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    closed.await.expect("the tunnel stands though it is idle");
}

/// A source port that is free to bind may still be taken towards the destination: connecting says so, and the next port is
/// tried.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn source_ports_in_use_are_passed_over() {
    let mesh = Mesh::new();
    let node = mesh.node();
    let scope = mesh.server().with_ports(22_000..=22_004);
    let door = scope.forward(mesh.ip(SERVER), Role::InboundPlaintext, mesh.app());
    let _server = node.core.attach(Arc::new(scope)).await.unwrap();
    let app = mesh.listen().await;
    let mut kept = Vec::new();
    for _ in 0..5 {
        let client = mesh.connect(CLIENT, door).await.unwrap();
        let (server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
        assert!((22_000..=22_004).contains(&from.port()));
        kept.push((client, server, from.port()));
    }
    // Resets leave nothing behind that would keep the port.
    let (client, server, freed) = kept.remove(2);
    SockRef::from(&server)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
    drop((server, client));
    while node.core.connections().len() > 4 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let _client = mesh.connect(CLIENT, door).await.unwrap();
    let (_server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(from.port(), freed);
}
