//! Against ourselves and against tokio-rustls, over wires of every kind.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod ending;
mod wire;

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use proptest::prelude::*;
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::identity::{Certificates, Identity, LocalCa, RefreshPolicy, WorkloadCertificate};
use wire::{Counts, Wire};

const LIMIT: Duration = Duration::from_secs(60);

trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Stream for T {}

fn identity() -> Identity {
    "spiffe://cluster.local/ns/a/sa/b".parse().unwrap()
}

async fn issue() -> Arc<WorkloadCertificate> {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), "cluster.local", Duration::from_secs(3600)).unwrap();
    let certificates = Certificates::new(Arc::new(ca), RefreshPolicy::default());
    certificates.get(&identity()).await.unwrap()
}

/// One certificate for all tests; its key takes a while to make.
fn certificate() -> Arc<WorkloadCertificate> {
    static ISSUED: OnceLock<Arc<WorkloadCertificate>> = OnceLock::new();
    let make = || {
        let other_thread = std::thread::spawn(|| {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(issue())
        });
        other_thread.join().unwrap()
    };
    ISSUED.get_or_init(make).clone()
}

fn client_config() -> Arc<ClientConfig> {
    certificate().client_config(&[identity()])
}

fn server_config() -> Arc<ServerConfig> {
    certificate().server_config()
}

/// A server that sends what may come at any time after a handshake, and a client that may take it.
fn with_tickets() -> (Arc<ClientConfig>, Arc<ServerConfig>) {
    let mut server = ServerConfig::clone(&server_config());
    server.send_tls13_tickets = 3;
    server.session_storage = rustls::server::ServerSessionMemoryCache::new(16);
    let mut client = ClientConfig::clone(&client_config());
    client.resumption = rustls::client::Resumption::in_memory_sessions(16);
    (Arc::new(client), Arc::new(server))
}

fn name() -> ServerName<'static> {
    ServerName::IpAddress(std::net::IpAddr::from([127, 0, 0, 1]).into())
}

/// A client whose part of the handshake has left.
async fn connect<T: AsyncRead + AsyncWrite + Unpin>(
    io: T,
    config: Arc<ClientConfig>,
) -> io::Result<TlsStream<T>> {
    let mut stream = TlsStream::connect(io, config, name()).await?;
    stream.flush().await?;
    Ok(stream)
}

/// Client and server of ours over a wire that takes `capacity` bytes.
async fn pair(capacity: usize) -> (TlsStream<DuplexStream>, TlsStream<DuplexStream>) {
    let (near, far) = duplex(capacity);
    let (client, server) = tokio::join!(
        connect(near, client_config()),
        TlsStream::accept(far, server_config()),
    );
    (client.unwrap(), server.unwrap())
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i ^ (i >> 8)) as u8).collect()
}

/// Reads in pieces of these sizes, over and over, to the end.
async fn read_in_pieces(from: &mut (impl AsyncRead + Unpin), sizes: &[usize]) -> Vec<u8> {
    let (mut all, mut piece) = (Vec::new(), vec![0; 300_000]);
    for size in sizes.iter().cycle() {
        match from.read(&mut piece[..*size]).await.unwrap() {
            0 => break,
            length => all.extend_from_slice(&piece[..length]),
        }
    }
    all
}

/// Writes in pieces of these sizes, over and over, two slices at a time, and ends.
async fn write_in_pieces(to: &mut (impl AsyncWrite + Unpin), data: &[u8], sizes: &[usize]) {
    let mut at = 0;
    for (turn, sizes) in sizes.chunks(2).cycle().enumerate() {
        let rest = &data[at..];
        if rest.is_empty() {
            break;
        }
        let (first, rest) = rest.split_at(rest.len().min(sizes[0]));
        let second = &rest[..rest.len().min(sizes.get(1).copied().unwrap_or(0))];
        let slices = [IoSlice::new(first), IoSlice::new(second)];
        let written = to.write_vectored(&slices).await.unwrap();
        assert!(written > 0);
        at += written;
        if turn % 3 == 0 {
            to.flush().await.unwrap();
        }
    }
    to.flush().await.unwrap();
    to.shutdown().await.unwrap();
}

#[derive(Debug, Clone)]
struct Exchange {
    our_client: bool,
    our_server: bool,
    tickets: bool,
    /// Most bytes that the wire passes at a time.
    chop: usize,
    lengths: [usize; 2],
    reads: Vec<usize>,
    writes: Vec<usize>,
}

fn exchanges() -> impl Strategy<Value = Exchange> {
    let sizes = || {
        prop::collection::vec(
            prop_oneof![1..50usize, 1..40_000usize, 200_000..300_000usize],
            2..8,
        )
    };
    let chop = prop_oneof![Just(1usize), 2..100usize, 1_000..20_000usize, Just(1 << 20)];
    (
        any::<[bool; 3]>(),
        chop,
        any::<[u16; 2]>(),
        sizes(),
        sizes(),
    )
        .prop_map(
            |([our_client, our_server, tickets], chop, lengths, reads, writes)| Exchange {
                our_client,
                our_server,
                tickets,
                chop,
                // A chopped wire is slow.
                lengths: lengths.map(|l| usize::from(l) * if chop < 100 { 1 } else { 20 } / 2),
                reads,
                writes,
            },
        )
}

async fn exchange(how: Exchange) {
    let (client_config, server_config) = if how.tickets {
        with_tickets()
    } else {
        (client_config(), server_config())
    };
    let (near, far) = duplex(1 << 20);
    let near = Wire::new(near, how.chop);
    let far = Wire::new(far, how.chop);
    let client = async {
        let stream: Box<dyn Stream> = if how.our_client {
            Box::new(
                TlsStream::connect(near, client_config, name())
                    .await
                    .unwrap(),
            )
        } else {
            let connector = TlsConnector::from(client_config);
            Box::new(connector.connect(name(), near).await.unwrap())
        };
        stream
    };
    let server = async {
        let stream: Box<dyn Stream> = if how.our_server {
            Box::new(TlsStream::accept(far, server_config).await.unwrap())
        } else {
            let acceptor = TlsAcceptor::from(server_config);
            Box::new(acceptor.accept(far).await.unwrap())
        };
        stream
    };
    let sent = how.lengths.map(pattern);
    let both = |stream: Box<dyn Stream>, data: Vec<u8>| {
        let (reads, writes) = (how.reads.clone(), how.writes.clone());
        async move {
            let (mut read, mut write) = tokio::io::split(stream);
            tokio::join!(
                read_in_pieces(&mut read, &reads),
                write_in_pieces(&mut write, &data, &writes)
            )
            .0
        }
    };
    let client = async { both(client.await, sent[0].clone()).await };
    let server = async { both(server.await, sent[1].clone()).await };
    let (at_client, at_server) = tokio::join!(client, server);
    assert!(
        at_server == sent[0],
        "{} of {}",
        at_server.len(),
        sent[0].len()
    );
    assert!(
        at_client == sent[1],
        "{} of {}",
        at_client.len(),
        sent[1].len()
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_pass_in_any_pieces_to_any_peer(how in exchanges()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        runtime.block_on(async { timeout(LIMIT, exchange(how)).await.expect("stuck") });
    }
}

#[tokio::test]
async fn both_ends_know_each_other() {
    let (client, server) = pair(1 << 16).await;
    for stream in [&client, &server] {
        let peer = crate::identity::peer_identity(stream.peer_certificates().unwrap()).unwrap();
        assert_eq!(peer, identity());
        assert_eq!(stream.alpn_protocol(), Some(crate::identity::ALPN_H2));
    }
}

#[tokio::test]
async fn keys_may_change_at_any_time() {
    let (near, far) = duplex(1 << 20);
    let connector = TlsConnector::from(client_config());
    let (client, server) = tokio::join!(
        connector.connect(name(), near),
        TlsStream::accept(far, server_config()),
    );
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    for _ in 0..3 {
        // Asks the other side to change its keys, too.
        client.get_mut().1.refresh_traffic_keys().unwrap();
        let (mut there, mut back) = ([0; 5000], [0; 5000]);
        client.write_all(&pattern(5000)).await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut there).await.unwrap();
        server.write_all(&there).await.unwrap();
        server.flush().await.unwrap();
        client.read_exact(&mut back).await.unwrap();
        assert_eq!(back[..], pattern(5000));
    }
}

/// Lengths of the records in these bytes, without their heads.
fn records(mut wire: &[u8]) -> Vec<usize> {
    let mut lengths = Vec::new();
    while let [_, _, _, high, low, rest @ ..] = wire {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        lengths.push(length);
        wire = &rest[length..];
    }
    lengths
}

#[tokio::test]
async fn slices_share_full_records_and_one_write() {
    let (client, server) = duplex(1 << 20);
    let counts = Counts::default();
    let wire = Wire::counted(client, counts.clone());
    let (client, server) = tokio::join!(
        connect(wire, client_config()),
        TlsStream::accept(server, server_config()),
    );
    let (mut client, server) = (client.unwrap(), server.unwrap());
    let TlsStream { io: mut wire, .. } = server;
    let before = counts.writes();
    let (head, payload) = (pattern(9), pattern(120_000));
    let slices = [IoSlice::new(&head), IoSlice::new(&payload)];
    assert_eq!(client.write_vectored(&slices).await.unwrap(), 120_009);
    client.flush().await.unwrap();
    assert_eq!(counts.writes() - before, 1);
    let mut received = vec![0; 300_000];
    let length = wire.read(&mut received).await.unwrap();
    let mut expected = vec![RECORD + 17; 7];
    expected.push(120_009 - 7 * RECORD + 17);
    assert_eq!(records(&received[..length]), expected);
}

#[tokio::test]
async fn many_records_take_few_reads() {
    let (near, far) = duplex(4 << 20);
    let counts = Counts::default();
    let far = Wire::counted(far, counts.clone());
    let (client, server) = tokio::join!(
        connect(near, client_config()),
        TlsStream::accept(far, server_config()),
    );
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    // In records of a hundred bytes.
    for _ in 0..30_000 {
        client.write_all(&[7; 100]).await.unwrap();
    }
    client.flush().await.unwrap();
    let before = counts.reads();
    let mut received = vec![0; 3_000_000];
    server.read_exact(&mut received).await.unwrap();
    let reads = counts.reads() - before;
    assert!(reads < 3_700_000 / LARGEST_INPUT + 10, "{reads} reads");
}

/// What HTTP/2 does with three DATA frames: head and payload, flush, three times; flush.
#[tokio::test]
async fn frames_of_one_turn_leave_together() {
    let (near, far) = duplex(1 << 20);
    let counts = Counts::default();
    let near = Wire::counted(near, counts.clone());
    let (client, server) = tokio::join!(
        connect(near, client_config()),
        TlsStream::accept(far, server_config()),
    );
    let (mut client, mut server) = (client.unwrap(), server.unwrap());
    let before = counts.writes();
    for _ in 0..3 {
        let slices = [IoSlice::new(b"head"), IoSlice::new(b"payload")];
        assert_eq!(client.write_vectored(&slices).await.unwrap(), 11);
        client.flush().await.unwrap();
        assert_eq!(counts.writes(), before);
    }
    client.flush().await.unwrap();
    assert_eq!(counts.writes() - before, 1);
    let mut received = [0; 33];
    server.read_exact(&mut received).await.unwrap();
    assert_eq!(&received, b"headpayloadheadpayloadheadpayload");

    // The last flush does not come: whoever waits for the answer is polled again, and it leaves then.
    let slices = [IoSlice::new(b"a"), IoSlice::new(b"b")];
    assert_eq!(client.write_vectored(&slices).await.unwrap(), 2);
    client.flush().await.unwrap();
    let echo = async {
        let mut received = [0; 2];
        server.read_exact(&mut received).await.unwrap();
        server.write_all(&received).await.unwrap();
        server.flush().await.unwrap();
    };
    let mut back = [0; 2];
    let both = async { tokio::join!(client.read_exact(&mut back), echo).0 };
    timeout(LIMIT, both).await.unwrap().unwrap();
    assert_eq!(&back, b"ab");
}

#[tokio::test]
async fn a_slow_reader_bounds_memory() {
    let (mut client, mut server) = pair(4096).await;
    let data = pattern(10_000_000);
    let mut accepted = 0;
    let mut cx = Context::from_waker(futures_util::task::noop_waker_ref());
    while let Poll::Ready(written) = Pin::new(&mut client).poll_write(&mut cx, &data[accepted..]) {
        accepted += written.unwrap();
    }
    assert!(accepted <= 2 * LARGEST_OUTPUT, "{accepted} bytes accepted");
    assert!(client.buffer_memory() < LARGEST_OUTPUT * 9 / 8);
    let rest = async {
        client.write_all(&data[accepted..]).await.unwrap();
        client.shutdown().await.unwrap();
    };
    let (received, ()) = tokio::join!(read_in_pieces(&mut server, &[7000]), rest);
    assert!(received == data);
}

#[tokio::test]
async fn a_flood_lets_others_run() {
    let (mut client, mut server) = pair(4 << 20).await;
    client.write_all(&pattern(3_000_000)).await.unwrap();
    client.flush().await.unwrap();
    let (mut taken, mut turns, mut data) = (0, 0, vec![0; 100_000]);
    while taken < 3_000_000 {
        let mut this_turn = 0;
        poll_fn(|cx| {
            let mut buf = ReadBuf::new(&mut data);
            while let Poll::Ready(read) = Pin::new(&mut server).poll_read(cx, &mut buf) {
                read.unwrap();
                this_turn += buf.filled().len();
                buf.clear();
            }
            Poll::Ready(())
        })
        .await;
        assert!(
            this_turn < TURN + data.len(),
            "{this_turn} bytes in one turn"
        );
        taken += this_turn;
        turns += 1;
    }
    assert!(turns <= 3_000_000 / TURN + 1, "{turns} turns");
    // Where a turn ended, the task was woken for another: nobody else would.
    client.write_all(&pattern(3_000_000)).await.unwrap();
    client.flush().await.unwrap();
    let all = timeout(LIMIT, server.read_exact(&mut vec![0; 3_000_000])).await;
    all.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_at_rest_holds_no_buffers() {
    let (mut client, mut server) = pair(4 << 20).await;
    let data = pattern(3_000_000);
    for _ in 0..2 {
        client.write_all(&data).await.unwrap();
        client.flush().await.unwrap();
        let mut received = vec![0; data.len()];
        server.read_exact(&mut received).await.unwrap();
        assert!(received == data);
    }
    assert!(server.buffer_memory() >= LARGEST_INPUT);
    assert!(client.buffer_memory() >= RECORD);
    // Such as HTTP/2's PINGs.
    for _ in 0..4 {
        client.write_all(b"ping").await.unwrap();
        client.flush().await.unwrap();
        server.read_exact(&mut [0; 4]).await.unwrap();
        // Both wait for more.
        for stream in [&mut client, &mut server] {
            let mut byte = [0];
            let nothing = stream.read(&mut byte);
            assert!(futures_util::poll!(std::pin::pin!(nothing)).is_pending());
        }
    }
    assert_eq!(server.buffer_memory(), 0);
    assert_eq!(client.buffer_memory(), 0);
}
