//! What goes in comes out, and how it ends.

use std::io::ErrorKind;
use std::time::Duration;

use rand::RngCore;
use shared_proxy::drain::Drain;
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, Pair, quick};

const LIMIT: Duration = Duration::from_secs(60);

fn random(length: usize) -> Vec<u8> {
    let mut data = vec![0; length];
    rand::rng().fill_bytes(&mut data);
    data
}

/// Sends all back, and ends when its client does.
fn echo(listener: TcpListener) {
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                if tokio::io::copy(&mut read, &mut write).await.is_ok() {
                    let _ = write.shutdown().await;
                }
            });
        }
    });
}

async fn echoes(client: TcpStream, data: Vec<u8>) {
    let (mut read, mut write) = client.into_split();
    let sent = data.clone();
    let writing = tokio::spawn(async move {
        write.write_all(&sent).await.unwrap();
        write.shutdown().await.unwrap();
    });
    let mut received = Vec::with_capacity(data.len());
    timeout(LIMIT, read.read_to_end(&mut received))
        .await
        .unwrap()
        .unwrap();
    assert!(received == data, "{} of {}", received.len(), data.len());
    writing.await.unwrap();
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

async fn assert_reset(stream: &mut TcpStream) {
    let read = timeout(LIMIT, stream.read(&mut [0; 16])).await.unwrap();
    assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
}

/// A client's connection and the application's end of it, with a byte passed each way.
async fn established(pair: &Pair, app: &TcpListener) -> (TcpStream, TcpStream) {
    let mut client = pair.connect().await;
    client.write_all(b"?").await.unwrap();
    let (mut server, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'?');
    server.write_all(b"!").await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
    (client, server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn any_number_of_bytes_comes_back_as_it_was() {
    let pair = Pair::new().await;
    echo(pair.mesh.listen().await);
    for length in [
        0,
        1,
        255,
        256,
        16_383,
        16_385,
        300_000,
        (1 << 20) + 1,
        12 << 20,
    ] {
        echoes(pair.connect().await, random(length)).await;
    }
    let many = (0..20).map(|_| rand::random_range(0..400_000));
    for length in many {
        echoes(pair.connect().await, random(length)).await;
    }
    assert_eq!(pair.one.core.pooled_tunnels(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_at_the_same_time_do_not_mix() {
    let pair = Pair::new().await;
    echo(pair.mesh.listen().await);
    let mut tasks = Vec::new();
    for _ in 0..40 {
        let client = pair.connect().await;
        tasks.push(tokio::spawn(echoes(client, random(700_000))));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_tcp_passes_too() {
    let mesh = Mesh::new();
    mesh.publish("TCP", "");
    let pair = Pair::of(mesh, quick()).await;
    echo(pair.mesh.listen().await);
    for length in [0, 1, 100_000, 5 << 20] {
        echoes(pair.connect().await, random(length)).await;
    }
    assert_eq!(pair.one.core.pooled_tunnels(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_application_sees_the_client_s_address() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let _client = pair.connect().await;
    let (_server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(from.ip(), pair.mesh.ip(CLIENT));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_that_is_closed_leaves_the_other_open() {
    for protocol in ["HBONE", "TCP"] {
        let mesh = Mesh::new();
        mesh.publish(protocol, "");
        let pair = Pair::of(mesh, quick()).await;
        let app = pair.mesh.listen().await;

        let (mut client, mut server) = established(&pair, &app).await;
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        server.write_all(b"answer after the end").await.unwrap();
        server.shutdown().await.unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert_eq!(answer, b"answer after the end");

        let (mut client, mut server) = established(&pair, &app).await;
        server.shutdown().await.unwrap();
        assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
        client.write_all(b"one more thing").await.unwrap();
        client.shutdown().await.unwrap();
        let mut rest = Vec::new();
        server.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"one more thing");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_arrives_as_a_reset() {
    for protocol in ["HBONE", "TCP"] {
        let mesh = Mesh::new();
        mesh.publish(protocol, "");
        let pair = Pair::of(mesh, quick()).await;
        let app = pair.mesh.listen().await;

        let (client, mut server) = established(&pair, &app).await;
        reset(client);
        assert_reset(&mut server).await;

        let (mut client, server) = established(&pair, &app).await;
        reset(server);
        assert_reset(&mut client).await;
    }
}

/// After the client's FIN nothing is read from it any more, so its reset has to be noticed in another way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_after_the_end_arrives_as_a_reset() {
    for protocol in ["HBONE", "TCP"] {
        let mesh = Mesh::new();
        mesh.publish(protocol, "");
        let pair = Pair::of(mesh, quick()).await;
        let app = pair.mesh.listen().await;

        let (mut client, mut server) = established(&pair, &app).await;
        client.shutdown().await.unwrap();
        assert_eq!(server.read(&mut [0; 8]).await.unwrap(), 0);
        reset(client);
        // What has ended cannot be read to fail; writing can.
        let failed = timeout(LIMIT, async {
            while server.write_all(b"anybody there?").await.is_ok() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        failed.await.expect("the application never learns of it");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_that_is_cut_off_is_a_reset_and_not_an_end() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut client, mut server) = established(&pair, &app).await;
    pair.server.detach(Drain::CUT).await;
    assert_reset(&mut client).await;
    assert_reset(&mut server).await;
}

/// An application that does not read must not harm its neighbours in the same tunnel, whatever its client sends: neither
/// many tiny writes nor so much that every buffer on the way is full.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stalled_application_harms_nobody() {
    const TINY: usize = 60_000;
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let mut stalled = Vec::new();
    for _ in 0..3 {
        stalled.push(established(&pair, &app).await);
    }
    let (mut neighbour, mut other) = established(&pair, &app).await;
    assert_eq!(pair.one.core.pooled_tunnels(), 1);

    let mut tasks = Vec::new();
    for (client, server) in stalled {
        client.set_nodelay(true).unwrap();
        tasks.push((tokio::spawn(write_until_blocked(client, TINY)), server));
    }
    let mut full = Vec::new();
    for (writing, server) in tasks {
        full.push((timeout(LIMIT, writing).await.unwrap().unwrap(), server));
    }
    for _ in 0..300 {
        neighbour.write_all(b"ping").await.unwrap();
        let mut got = [0; 4];
        timeout(LIMIT, other.read_exact(&mut got))
            .await
            .unwrap()
            .unwrap();
        other.write_all(b"pong").await.unwrap();
        timeout(LIMIT, neighbour.read_exact(&mut got))
            .await
            .unwrap()
            .unwrap();
    }
    for ((mut client, written), mut server) in full {
        client.shutdown().await.unwrap();
        let mut received = Vec::new();
        let reading = server.read_to_end(&mut received);
        timeout(LIMIT, reading).await.unwrap().unwrap();
        assert_eq!(received.len(), written);
        assert!(received[..TINY].iter().all(|byte| *byte == b'x'));
    }
}

/// Writes `tiny` single bytes and then as much as is taken. Returns how much that was.
async fn write_until_blocked(mut client: TcpStream, tiny: usize) -> (TcpStream, usize) {
    for _ in 0..tiny {
        client.write_all(b"x").await.unwrap();
    }
    let mut written = tiny;
    let chunk = vec![b'y'; 64 << 10];
    while let Ok(taken) = timeout(Duration::from_millis(500), client.write(&chunk)).await {
        written += taken.unwrap();
    }
    (client, written)
}

/// HTTP/2 counts what arrives for streams that were reset and forgotten, and would end the connection for too much of it.
/// Applications that reset connections into which their clients still write are nothing special.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn thousands_of_resets_do_not_wear_a_tunnel_out() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let (mut neighbour, mut other) = established(&pair, &app).await;
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = app.accept().await {
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 64]).await;
                reset(stream);
            });
        }
    });
    for _ in 0..25 {
        let some = (0..60).map(|_| async {
            let mut client = pair.connect().await;
            let chunk = [0; 32 << 10];
            while client.write_all(&chunk).await.is_ok() {}
        });
        timeout(LIMIT, futures_util::future::join_all(some))
            .await
            .unwrap();
    }
    neighbour.write_all(b"still there?").await.unwrap();
    other.read_exact(&mut [0; 12]).await.unwrap();
    assert_eq!(pair.one.core.pooled_tunnels(), 1);
}
