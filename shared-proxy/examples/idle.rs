//! What rest costs: memory per tunnel that nobody uses, and per connection that nobody speaks on.
//!
//! Two proxies in this process, every connection in a tunnel of its own. Numbers are growth of the resident set, divided by
//! the ends: a tunnel has two. With the allocator that the daemons use.
//!
//! `cargo run --release -p shared-proxy --example idle -- [TUNNELS]`
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/data_plane/mesh.rs"]
#[allow(dead_code, missing_docs)]
mod mesh;

use std::fs;
use std::time::Duration;

use mesh::{Mesh, Pair, quick};
use shared_proxy::core::CoreConfig;
use shared_proxy::pool::PoolConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// Connections that are opened at a time.
const AT_ONCE: usize = 50;
/// So long nothing happens before memory is read, longer than the allocator keeps what was given back to it.
const REST: Duration = Duration::from_secs(15);

/// Resident memory, in KiB.
fn resident() -> f64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok())
        .unwrap()
}

/// Opens connections; each has carried a kilobyte both ways when this returns.
async fn open(pair: &Pair, application: &TcpListener, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let mut open = Vec::with_capacity(count);
    while open.len() < count {
        let clients = (0..AT_ONCE).map(|_| async {
            let mut client = pair.connect().await;
            client.write_all(&[7; 1024]).await.unwrap();
            client
        });
        let servers = async {
            let mut servers = Vec::new();
            for _ in 0..AT_ONCE {
                let (mut server, _) = application.accept().await.unwrap();
                server.read_exact(&mut [0; 1024]).await.unwrap();
                server.write_all(&[7; 1024]).await.unwrap();
                servers.push(server);
            }
            servers
        };
        let (clients, servers) = tokio::join!(futures_util::future::join_all(clients), servers);
        for (mut client, server) in clients.into_iter().zip(servers) {
            client.read_exact(&mut [0; 1024]).await.unwrap();
            open.push((client, server));
        }
    }
    open
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let tunnels = std::env::args().nth(1);
    let tunnels = tunnels.map_or(2000, |count| count.parse().unwrap());
    let config = CoreConfig {
        pool: PoolConfig {
            max_streams_per_connection: 1,
            ..PoolConfig::default()
        },
        ..quick()
    };
    let pair = Pair::of(Mesh::new(), config).await;
    let application = pair.mesh.listen().await;
    drop(open(&pair, &application, AT_ONCE).await);
    tokio::time::sleep(REST).await;
    let begin = resident();
    let connections = open(&pair, &application, tunnels).await;
    tokio::time::sleep(REST).await;
    let busy = resident();
    drop(connections);
    tokio::time::sleep(REST).await;
    let rest = resident();
    let ends = (pair.one.core.pooled_tunnels() - AT_ONCE) as f64 * 2.0;
    println!(
        "{:.1} MiB at first; {ends} ends of tunnels with a connection each: {:.1} KiB an end; without it: {:.1} KiB",
        begin / 1024.0,
        (busy - begin) / ends,
        (rest - begin) / ends,
    );
}
