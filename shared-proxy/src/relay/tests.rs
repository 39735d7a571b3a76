#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use h2::{RecvStream, SendStream};
use http::{Method, Request, Response};
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::*;
use crate::hbone::HboneConfig;

/// The two ends of one stream.
struct Ends {
    client: HboneStream,
    server: HboneStream,
}

/// One HTTP/2 connection in memory.
struct Wire {
    requests: h2::client::SendRequest<Bytes>,
    accepted: mpsc::UnboundedReceiver<HboneStream>,
}

impl Wire {
    async fn new(config: &HboneConfig) -> Self {
        let (near, far) = duplex(1 << 20);
        let (accept, accepted) = mpsc::unbounded_channel();
        let builder = config.server_builder();
        tokio::spawn(async move {
            let mut connection = builder.handshake::<_, Bytes>(far).await.unwrap();
            while let Some(Ok((request, mut respond))) = connection.accept().await {
                let send = respond.send_response(Response::new(()), false).unwrap();
                let recv = request.into_body();
                let _ = accept.send(HboneStream { send, recv });
            }
        });
        let (requests, connection) = config.client_builder().handshake(near).await.unwrap();
        tokio::spawn(connection);
        Self { requests, accepted }
    }

    async fn stream(&mut self) -> Ends {
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri("10.0.0.1:80")
            .body(())
            .unwrap();
        let mut requests = self.requests.clone().ready().await.unwrap();
        let (response, send) = requests.send_request(request, false).unwrap();
        let recv = response.await.unwrap().into_body();
        Ends {
            client: HboneStream { send, recv },
            server: self.accepted.recv().await.unwrap(),
        }
    }
}

async fn to_tunnel(mut from: DuplexStream, to: &mut SendStream<Bytes>) -> Result<(), MoveError> {
    let mut state = ToTunnel::default();
    poll_fn(|cx| state.poll(cx, &mut from, to, |_| {})).await
}

async fn from_tunnel(
    from: &mut RecvStream,
    mut to: DuplexStream,
    counted: &AtomicU64,
) -> Result<(), MoveError> {
    let mut state = FromTunnel::default();
    let count = |n| _ = counted.fetch_add(n, Relaxed);
    poll_fn(|cx| state.poll(cx, from, &mut to, count)).await
}

/// Small windows and pipes, so that few bytes already meet every limit.
fn narrow() -> HboneConfig {
    HboneConfig {
        stream_window: 70_000,
        connection_window: 70_000,
        max_frame_size: 16_384,
        max_send_buffer: 20_000,
        ..HboneConfig::default()
    }
}

async fn write_chunks(mut to: DuplexStream, data: &[u8], chunks: &[usize]) {
    let mut rest = data;
    for &chunk in chunks.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (now, later) = rest.split_at(chunk.min(rest.len()));
        to.write_all(now).await.unwrap();
        rest = later;
    }
    to.shutdown().await.unwrap();
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 31 + i / 251) as u8).collect()
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(async { timeout(Duration::from_secs(60), future).await.unwrap() })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_the_chunks_all_bytes_arrive_through_a_tunnel(
        length in 0usize..600_000,
        chunks in proptest::collection::vec(1usize..100_000, 1..6),
        pipe in 1usize..50_000,
    ) {
        block_on(async {
            let data = pattern(length);
            let mut wire = Wire::new(&narrow()).await;
            let Ends { mut client, mut server } = wire.stream().await;
            let (app, near) = duplex(pipe);
            let (far, mut user) = duplex(pipe);
            let counted = AtomicU64::new(0);
            let mut received = Vec::new();
            let (sent, written, _, _) = tokio::join!(
                to_tunnel(near, &mut client.send),
                from_tunnel(&mut server.recv, far, &counted),
                write_chunks(app, &data, &chunks),
                user.read_to_end(&mut received),
            );
            sent.unwrap();
            written.unwrap();
            assert_eq!(counted.load(Relaxed), length as u64);
            assert!(received == data, "{} of {length} bytes, or others", received.len());
        });
    }

    #[test]
    fn whatever_the_chunks_all_bytes_arrive_between_two_connections(
        length in 0usize..600_000,
        chunks in proptest::collection::vec(1usize..100_000, 1..6),
        pipe in 1usize..50_000,
    ) {
        block_on(async {
            let data = pattern(length);
            let (app, mut near) = duplex(pipe);
            let (mut far, mut user) = duplex(pipe);
            let mut copy = Copy::default();
            let counted = AtomicU64::new(0);
            let mut received = Vec::new();
            let count = |n| _ = counted.fetch_add(n, Relaxed);
            let (moved, _, _) = tokio::join!(
                poll_fn(|cx| copy.poll(cx, &mut near, &mut far, count)),
                write_chunks(app, &data, &chunks),
                user.read_to_end(&mut received),
            );
            moved.unwrap();
            assert_eq!(counted.load(Relaxed), length as u64);
            assert!(received == data, "{} of {length} bytes, or others", received.len());
        });
    }
}

#[tokio::test]
async fn what_waits_for_window_is_sent_in_one_frame() {
    let config = HboneConfig {
        stream_window: 65_535,
        connection_window: 1 << 20,
        ..HboneConfig::default()
    };
    let mut wire = Wire::new(&config).await;
    let Ends {
        mut client,
        mut server,
    } = wire.stream().await;
    let (mut app, near) = duplex(1 << 20);
    let sending = tokio::spawn(async move { to_tunnel(near, &mut client.send).await });
    // Fills the window, and leaves it closed: nobody gives credit back.
    app.write_all(&[1; 65_535]).await.unwrap();
    let mut filled = 0;
    while filled < 65_535 {
        filled += server.recv.data().await.unwrap().unwrap().len();
    }
    for _ in 0..3_000 {
        app.write_all(&[2]).await.unwrap();
        tokio::task::yield_now().await;
    }
    server.recv.flow_control().release_capacity(filled).unwrap();
    let frame = server.recv.data().await.unwrap().unwrap();
    assert_eq!(frame.len(), 3_000);
    drop(app);
    // The end itself is a frame, without bytes.
    let end = server.recv.data().await.unwrap().unwrap();
    assert!(end.is_empty() && server.recv.is_end_stream());
    sending.await.unwrap().unwrap();
}

/// A peer that does not coalesce sends a burst of one-byte frames to an application that does not read. Neither that
/// stream nor its neighbour may suffer.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_byte_frames_to_a_stalled_application_harm_no_stream() {
    const FRAMES: usize = 100_000;
    let mut wire = Wire::new(&HboneConfig::default()).await;
    let Ends {
        client: mut burst,
        server: mut stalled,
    } = wire.stream().await;
    let neighbour = wire.stream().await;
    let (app, mut reader) = duplex(1);
    let stalled =
        tokio::spawn(async move { from_tunnel(&mut stalled.recv, app, &AtomicU64::new(0)).await });
    for _ in 0..FRAMES {
        burst
            .send
            .send_data(Bytes::from_static(b"x"), false)
            .unwrap();
    }
    burst.send.send_data(Bytes::new(), true).unwrap();

    let (mut near, mut far) = (neighbour.client, neighbour.server);
    for _ in 0..200 {
        near.send
            .send_data(Bytes::from_static(b"ping"), false)
            .unwrap();
        let got = far.recv.data().await.unwrap().unwrap();
        far.recv.flow_control().release_capacity(got.len()).unwrap();
        assert_eq!(&got[..], b"ping");
    }

    let mut received = Vec::new();
    reader.read_to_end(&mut received).await.unwrap();
    assert_eq!(received, vec![b'x'; FRAMES]);
    stalled.await.unwrap().unwrap();
}

#[tokio::test]
async fn the_window_bounds_what_waits_for_a_stalled_application() {
    let config = HboneConfig::default();
    let mut wire = Wire::new(&config).await;
    let Ends {
        mut client,
        mut server,
    } = wire.stream().await;
    let (app, _unread) = duplex(1);
    let stalled =
        tokio::spawn(async move { from_tunnel(&mut server.recv, app, &AtomicU64::new(0)).await });
    let (mut source, near) = duplex(1 << 16);
    let sending = tokio::spawn(async move { to_tunnel(near, &mut client.send).await });
    let mut accepted = 0;
    let chunk = vec![0; 1 << 14];
    while timeout(Duration::from_millis(300), source.write_all(&chunk))
        .await
        .is_ok()
    {
        accepted += chunk.len();
        assert!(accepted < 4 << 20, "nothing stops the sender");
    }
    let bound = config.stream_window as usize + config.max_send_buffer + 2 * buffer::LARGEST_READ;
    assert!(
        accepted <= bound,
        "{accepted} bytes were taken, more than {bound}"
    );
    sending.abort();
    stalled.abort();
}

#[tokio::test]
async fn an_idle_direction_keeps_no_buffer() {
    let (mut app, mut near) = duplex(1 << 20);
    let mut intake = Intake::default();
    app.write_all(&[0; 1000]).await.unwrap();
    let read = poll_fn(|cx| intake.poll_read(cx, &mut near)).await.unwrap();
    drop(intake.take(read));
    let idle = timeout(
        Duration::from_millis(10),
        poll_fn(|cx| intake.poll_read(cx, &mut near)),
    );
    assert!(idle.await.is_err());
    assert_eq!(intake.buffered().capacity(), 0);
}
