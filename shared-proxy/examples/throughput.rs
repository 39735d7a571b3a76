//! What bytes cost inside this process: CPU seconds per gigabyte, and megabytes per second.
//!
//! `tls` compares [`TlsStream`] with tokio-rustls over loopback TCP; `tunnel` sends one stream through two proxies, with
//! several settings of HTTP/2; `requests` sends 1 KiB to and fro, on 64 connections at once. Variants take turns, so that
//! what else the machine does hits all alike; the median of the rounds counts. The tunnel's numbers include the client
//! and the application, which `direct` has alone.
//!
//! `cargo run --release -p shared-proxy --example throughput -- tunnel [ROUNDS] [MEGABYTES] [VARIANT]`
#![allow(clippy::unwrap_used, clippy::disallowed_methods)]

#[path = "../tests/data_plane/mesh.rs"]
#[allow(dead_code, missing_docs)]
mod mesh;

use std::fs;
use std::future::Future;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustls_pki_types::ServerName;
use shared_proxy::core::CoreConfig;
use shared_proxy::hbone::HboneConfig;
use shared_proxy::identity::{Certificates, Identity, LocalCa, RefreshPolicy, WorkloadCertificate};
use shared_proxy::tls_stream::TlsStream;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use mesh::{Mesh, Pair, quick};

const CHUNK: usize = 256 * 1024;
/// Bytes of a request and of its answer; connections that send them.
const REQUEST: usize = 1024;
const CLIENTS: usize = 64;

/// CPU time of all threads so far, in seconds.
fn cpu() -> f64 {
    let tasks = fs::read_dir("/proc/self/task").unwrap();
    tasks
        .filter_map(|task| fs::read_to_string(task.ok()?.path().join("schedstat")).ok())
        .filter_map(|stat| stat.split_whitespace().next()?.parse::<f64>().ok())
        .sum::<f64>()
        / 1e9
}

async fn send(mut to: impl AsyncWrite + Unpin, bytes: usize) {
    let chunk = vec![7; CHUNK];
    for _ in 0..bytes / CHUNK {
        to.write_all(&chunk).await.unwrap();
    }
    to.shutdown().await.unwrap();
}

async fn receive(mut from: impl AsyncRead + Unpin) -> usize {
    let (mut chunk, mut bytes) = (vec![0; CHUNK], 0);
    loop {
        match from.read(&mut chunk).await.unwrap() {
            0 => return bytes,
            length => bytes += length,
        }
    }
}

async fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let near = TcpStream::connect(listener.local_addr().unwrap());
    let (near, far) = tokio::join!(near, listener.accept());
    (near.unwrap(), far.unwrap().0)
}

fn name() -> ServerName<'static> {
    ServerName::from(IpAddr::from([127, 0, 0, 1]))
}

type Transfer = Pin<Box<dyn Future<Output = usize> + Send>>;
type Variant = (String, Box<dyn Fn(usize) -> Transfer>);

/// Runs the variants in turn and prints the median of each.
async fn compare(variants: &[Variant], rounds: usize, bytes: usize) {
    let mut results = vec![Vec::new(); variants.len()];
    for _ in 0..rounds {
        for ((_, transfer), results) in variants.iter().zip(&mut results) {
            let (started, before) = (Instant::now(), cpu());
            assert_eq!(transfer(bytes).await, bytes);
            let rate = bytes as f64 / 1e6 / started.elapsed().as_secs_f64();
            results.push(((cpu() - before) / (bytes as f64 / 1e9), rate));
        }
    }
    println!("{:<28} {:>12} {:>14}", "", "CPU s per GB", "MB/s");
    for ((name, _), mut results) in variants.iter().zip(results) {
        let of = |values: &mut Vec<f64>| {
            values.sort_by(f64::total_cmp);
            (values[0], values[values.len() / 4])
        };
        let (least, cost) = of(&mut results.iter().map(|r| r.0).collect());
        let (_, rate) = of(&mut results.iter_mut().map(|r| r.1).collect());
        println!("{name:<28} {cost:>5.2} (>={least:.2}) {rate:>12.0}");
    }
}

fn tls(certificate: &Arc<WorkloadCertificate>, ours: bool) -> Variant {
    let client = certificate.client_config(&[certificate.identity().clone()]);
    let server = certificate.server_config();
    let label = if ours { "TlsStream" } else { "tokio-rustls" };
    let transfer = move |bytes| -> Transfer {
        let (client, server) = (client.clone(), server.clone());
        Box::pin(async move {
            let (near, far) = tcp().await;
            let sender = tokio::spawn(async move {
                if ours {
                    let tls = TlsStream::connect(near, client, name()).await.unwrap();
                    send(tls, bytes).await;
                } else {
                    let tls = TlsConnector::from(client).connect(name(), near);
                    send(tls.await.unwrap(), bytes).await;
                }
            });
            let received = if ours {
                receive(TlsStream::accept(far, server).await.unwrap()).await
            } else {
                receive(TlsAcceptor::from(server).accept(far).await.unwrap()).await
            };
            sender.await.unwrap();
            received
        })
    };
    (label.to_owned(), Box::new(transfer))
}

fn direct() -> Variant {
    let transfer = |bytes| -> Transfer {
        Box::pin(async move {
            let (near, far) = tcp().await;
            let sender = tokio::spawn(send(near, bytes));
            let received = receive(far).await;
            sender.await.unwrap();
            received
        })
    };
    ("direct".to_owned(), Box::new(transfer))
}

async fn tunnel(label: &str, hbone: HboneConfig) -> Variant {
    let config = CoreConfig { hbone, ..quick() };
    let pair = Arc::new(Pair::of(Mesh::new(), config).await);
    let transfer = move |bytes| -> Transfer {
        let pair = pair.clone();
        Box::pin(async move {
            let application = pair.mesh.listen().await;
            let sender = tokio::spawn(send(pair.connect().await, bytes));
            let (stream, _) = application.accept().await.unwrap();
            let received = receive(stream).await;
            sender.await.unwrap();
            received
        })
    };
    (label.to_owned(), Box::new(transfer))
}

/// Sends back each kilobyte.
async fn echo(mut stream: TcpStream) {
    let mut request = [0; REQUEST];
    while stream.read_exact(&mut request).await.is_ok() {
        stream.write_all(&request).await.unwrap();
    }
}

async fn requests() -> Variant {
    let pair = Arc::new(Pair::of(Mesh::new(), quick()).await);
    let application = pair.mesh.listen().await;
    tokio::spawn(async move {
        while let Ok((stream, _)) = application.accept().await {
            tokio::spawn(echo(stream));
        }
    });
    let transfer = move |bytes: usize| -> Transfer {
        let pair = pair.clone();
        Box::pin(async move {
            let clients = (0..CLIENTS).map(|_| async {
                let (mut stream, mut answer) = (pair.connect().await, [0; REQUEST]);
                for _ in 0..bytes / REQUEST / CLIENTS {
                    stream.write_all(&[7; REQUEST]).await.unwrap();
                    stream.read_exact(&mut answer).await.unwrap();
                }
            });
            futures_util::future::join_all(clients).await;
            bytes
        })
    };
    ("requests".to_owned(), Box::new(transfer))
}

async fn tunnels() -> Vec<Variant> {
    let with = |change: fn(&mut HboneConfig)| {
        let mut config = HboneConfig::default();
        change(&mut config);
        config
    };
    vec![
        direct(),
        tunnel("defaults", with(|_| ())).await,
        tunnel("frames of 64 KiB", with(|c| c.max_frame_size = 64 << 10)).await,
        tunnel("frames of 128 KiB", with(|c| c.max_frame_size = 128 << 10)).await,
        tunnel("frames of 1 MiB", with(|c| c.max_frame_size = 1 << 20)).await,
        tunnel("window of 512 KiB", with(|c| c.stream_window = 512 << 10)).await,
        tunnel("window of 2 MiB", with(|c| c.stream_window = 2 << 20)).await,
        tunnel("window of 4 MiB", with(|c| c.stream_window = 4 << 20)).await,
        tunnel(
            "send buffer of 256 KiB",
            with(|c| c.max_send_buffer = 256 << 10),
        )
        .await,
        tunnel(
            "send buffer of 1 MiB",
            with(|c| c.max_send_buffer = 1 << 20),
        )
        .await,
    ]
}

#[tokio::main(worker_threads = 2)]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default| arguments.get(at).map_or(default, |n| n.parse().unwrap());
    let (rounds, bytes) = (number(1, 5), number(2, 256) << 20);
    let mut variants = match arguments.first().map(String::as_str) {
        Some("tls") => {
            let dir = tempfile::tempdir().unwrap();
            let ca = LocalCa::open(dir.path(), "cluster.local", Duration::from_secs(3600));
            let certificates = Certificates::new(Arc::new(ca.unwrap()), RefreshPolicy::default());
            let identity = Identity::new("cluster.local", "default", "peer").unwrap();
            let certificate = certificates.get(&identity).await.unwrap();
            vec![direct(), tls(&certificate, false), tls(&certificate, true)]
        }
        Some("tunnel") => tunnels().await,
        Some("requests") => vec![requests().await],
        _ => panic!("say `tls`, `tunnel` or `requests`"),
    };
    let only = arguments.get(3).map_or("", String::as_str);
    variants.retain(|(label, _)| label.contains(only));
    compare(&variants, rounds, bytes).await;
}
