#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "the applications at both ends, no part of the relay"
)]

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use super::*;
use crate::pipe::KEPT;

/// Far over what anything here takes: only what hangs is stopped by it.
const PATIENCE: Duration = Duration::from_secs(60);

/// A client, a server, and the relay between them.
struct Line {
    client: TcpStream,
    server: TcpStream,
    relay: JoinHandle<io::Result<()>>,
}

async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    let (opened, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (opened.unwrap(), accepted.unwrap().0)
}

async fn line(pipes: &Arc<Pipes>) -> Line {
    let (client, near) = pair().await;
    let (far, server) = pair().await;
    for stream in [&client, &near, &far, &server] {
        stream.set_nodelay(true).unwrap();
    }
    let pipes = Arc::clone(pipes);
    let relay = tokio::spawn(async move { between(Leg::new(near), Leg::new(far), &pipes).await });
    Line {
        client,
        server,
        relay,
    }
}

async fn in_time<F: Future>(what: &str, future: F) -> F::Output {
    let done = timeout(PATIENCE, future).await;
    done.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// Bytes that no shift, loss or repetition leaves the same (splitmix64 of the position).
fn pattern(seed: u64, at: u64) -> [u8; 8] {
    let mut z = (seed ^ at).wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (z ^ (z >> 31)).to_le_bytes()
}

fn bytes(seed: u64, range: std::ops::Range<u64>) -> Vec<u8> {
    let words = range.start / 8..range.end.div_ceil(8);
    let all: Vec<u8> = words.flat_map(|at| pattern(seed, at)).collect();
    let skip = usize::try_from(range.start % 8).unwrap();
    all[skip..skip + usize::try_from(range.end - range.start).unwrap()].to_vec()
}

async fn send(mut to: OwnedWriteHalf, seed: u64, length: u64, piece: u64) {
    let mut at = 0;
    while at < length {
        let end = length.min(at + piece);
        to.write_all(&bytes(seed, at..end)).await.unwrap();
        at = end;
    }
    to.shutdown().await.unwrap();
}

/// Compares every byte, up to the end of the direction.
async fn expect(mut from: OwnedReadHalf, seed: u64, length: u64, piece: usize) {
    let mut buffer = vec![0; piece];
    let mut at = 0;
    loop {
        let n = from.read(&mut buffer).await.unwrap() as u64;
        if n == 0 {
            break;
        }
        let expected = bytes(seed, at..at + n);
        assert!(
            buffer[..usize::try_from(n).unwrap()] == expected,
            "bytes {at} to {}",
            at + n
        );
        at += n;
    }
    assert_eq!(at, length);
}

async fn exchange(line: Line, length: u64, piece: u64, late: Duration) {
    let (client_in, client_out) = line.client.into_split();
    let (server_in, server_out) = line.server.into_split();
    let mut tasks = JoinSet::new();
    tasks.spawn(send(client_out, 1, length, piece));
    tasks.spawn(send(server_out, 2, length, piece));
    tasks.spawn(async move {
        tokio::time::sleep(late).await;
        expect(server_in, 1, length, 100_000).await;
    });
    tasks.spawn(expect(client_in, 2, length, 77_777));
    in_time("an exchange", tasks.join_all()).await;
    in_time("the relay's end", line.relay)
        .await
        .unwrap()
        .expect("an orderly end");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_each_way() {
    let line = line(&Arc::default()).await;
    exchange(line, 64 << 20, 1 << 20, Duration::ZERO).await;
}

/// The sender is stopped by full sockets and a full pipe, and nothing is lost when it goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_receiver_that_comes_late() {
    let line = line(&Arc::default()).await;
    exchange(line, 24 << 20, 300_000, Duration::from_millis(300)).await;
}

/// Pieces of one and a few bytes fill the pipe's slots and not its bytes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn small_pieces() {
    for piece in [1, 13] {
        let line = line(&Arc::default()).await;
        exchange(line, 60_000, piece, Duration::from_millis(100)).await;
    }
}

/// Messages around the number of slots, below which a socket is not asked again: a lost wake-up would hang.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_and_answers() {
    let Line {
        mut client,
        mut server,
        relay,
    } = line(&Arc::default()).await;
    let echo = async move {
        let mut buffer = [0; 4096];
        loop {
            let n = server.read(&mut buffer).await.unwrap();
            if n == 0 {
                return;
            }
            server.write_all(&buffer[..n]).await.unwrap();
        }
    };
    let asking = async move {
        let mut answer = [0; 300];
        for round in 0..5000 {
            let length = [1, 2, 254, 255, 256, 257, 300][round % 7];
            let request = bytes(round as u64, 0..length);
            client.write_all(&request).await.unwrap();
            let answer = &mut answer[..request.len()];
            client.read_exact(answer).await.unwrap();
            assert_eq!(answer, request);
        }
    };
    in_time("5,000 requests", async { tokio::join!(echo, asking) }).await;
    in_time("the relay's end", relay).await.unwrap().unwrap();
}

#[tokio::test]
async fn half_close_in_both_orders() {
    for client_first in [true, false] {
        let Line {
            client,
            server,
            relay,
        } = line(&Arc::default()).await;
        let (mut first, mut second) = if client_first {
            (client, server)
        } else {
            (server, client)
        };
        first.write_all(b"all I have to say").await.unwrap();
        first.shutdown().await.unwrap();
        let mut heard = String::new();
        in_time("the end", second.read_to_string(&mut heard))
            .await
            .unwrap();
        assert_eq!(heard, "all I have to say");
        // The other direction goes on as long as it likes.
        for _ in 0..3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
            second.write_all(b"still here ").await.unwrap();
        }
        assert!(!relay.is_finished());
        second.shutdown().await.unwrap();
        heard.clear();
        in_time("the end", first.read_to_string(&mut heard))
            .await
            .unwrap();
        assert_eq!(heard, "still here still here still here ");
        in_time("the relay's end", relay).await.unwrap().unwrap();
    }
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream)
        .set_linger(Some(Duration::ZERO))
        .unwrap();
}

async fn assert_is_reset(stream: &mut TcpStream) {
    let mut rest = Vec::new();
    let error = in_time("a reset", stream.read_to_end(&mut rest))
        .await
        .expect_err("not an orderly end");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_is_passed_on_in_both_directions() {
    for by_client in [true, false] {
        let Line {
            client,
            server,
            relay,
        } = line(&Arc::default()).await;
        let (going, mut staying) = if by_client {
            (client, server)
        } else {
            (server, client)
        };
        reset(going);
        assert_is_reset(&mut staying).await;
        in_time("the relay's end", relay)
            .await
            .unwrap()
            .expect_err("a reset");
    }
}

/// After its direction has ended, nothing is read from the one that resets.
#[tokio::test]
async fn a_reset_after_the_end_of_a_direction_is_passed_on() {
    let Line {
        mut client,
        mut server,
        relay,
    } = line(&Arc::default()).await;
    client.shutdown().await.unwrap();
    assert_eq!(in_time("the end", server.read(&mut [0])).await.unwrap(), 0);
    reset(client);
    let error = in_time("a reset", server.ready(Interest::ERROR)).await;
    error.unwrap();
    assert_eq!(
        server.take_error().unwrap().unwrap().kind(),
        io::ErrorKind::BrokenPipe,
        "a reset after the end of the stream"
    );
    in_time("the relay's end", relay)
        .await
        .unwrap()
        .expect_err("a reset");
}

#[tokio::test]
async fn a_relay_that_is_cut_resets_both_sides() {
    let Line {
        mut client,
        mut server,
        relay,
    } = line(&Arc::default()).await;
    client.write_all(b"x").await.unwrap();
    server.read_exact(&mut [0]).await.unwrap();
    relay.abort();
    assert_is_reset(&mut client).await;
    assert_is_reset(&mut server).await;
}

/// Pipes are shared by connections, never with bytes in them, and an idle connection holds none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_hundred_connections_share_pipes() {
    let pipes = Arc::new(Pipes::new());
    let mut lines = Vec::new();
    for _ in 0..200 {
        let mut line = line(&pipes).await;
        line.client.write_all(b"hello").await.unwrap();
        let mut hello = [0; 5];
        line.server.read_exact(&mut hello).await.unwrap();
        assert_eq!(&hello, b"hello");
        lines.push(line);
    }
    // One at a time had bytes on their way; the next one may have come before its pipe was back.
    let quiet = async {
        while pipes.idle() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    in_time("a pipe that is given back", quiet).await;
    assert!(
        pipes.idle() <= 8,
        "{} pipes for 200 idle connections",
        pipes.idle()
    );

    // Some are cut with bytes in their pipes, which must not come out anywhere else.
    let mut tasks = JoinSet::new();
    for (number, line) in lines.into_iter().enumerate() {
        if number % 10 == 0 {
            tasks.spawn(async move {
                let (mut client, server) = (line.client, line.server);
                let stuck = async { while client.write_all(&[0xaa; 65536]).await.is_ok() {} };
                let _ = timeout(Duration::from_millis(50), stuck).await;
                line.relay.abort();
                drop(server);
            });
        } else {
            tasks.spawn(exchange(line, 300_000, 50_000, Duration::ZERO));
        }
    }
    in_time("200 connections", tasks.join_all()).await;
    assert!(pipes.idle() <= KEPT);
}
