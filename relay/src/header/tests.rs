#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::pin::Pin;
use std::task::{Context, Poll};

use proptest::prelude::*;
use tokio::io::ReadBuf;

use super::*;

/// Bytes that come in pieces of at most this length.
struct Pieces<'a> {
    bytes: &'a [u8],
    piece: usize,
}

impl AsyncRead for Pieces<'_> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let n = self.piece.min(buffer.remaining()).min(self.bytes.len());
        let (now, later) = self.bytes.split_at(n);
        buffer.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

/// The header at the beginning of `bytes`, and what was not read.
fn read(bytes: &[u8], piece: usize) -> (Result<Header, HeaderError>, &[u8]) {
    let mut from = Pieces { bytes, piece };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let header = runtime.block_on(Header::read(&mut from));
    (header, from.bytes)
}

fn header(source: &str, destination: &str) -> Header {
    Header {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    }
}

/// Any address, written as IPv4 where it is one.
fn address() -> impl Strategy<Value = SocketAddr> {
    (any::<IpAddr>(), any::<u16>()).prop_map(|(ip, port)| SocketAddr::new(ip.to_canonical(), port))
}

/// The bytes as the specification has them, not as the code does.
#[test]
fn bytes_of_an_ipv4_header() {
    let expected = [
        0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a, // signature
        0x21, 0x11, 0x00, 0x0c, // PROXY, TCP over IPv4, 12 bytes
        10, 244, 1, 10, 10, 244, 2, 11, // addresses
        0x9c, 0x40, 0x1f, 0x90, // ports 40000 and 8080
    ];
    let header = header("10.244.1.10:40000", "10.244.2.11:8080");
    assert_eq!(header.encode(), expected);
}

#[test]
fn an_ipv6_header_has_its_own_family_and_length() {
    let bytes = header("[fd00::1]:1", "[fd00::2]:2").encode();
    assert_eq!(bytes[12..16], [0x21, 0x21, 0x00, 0x24]);
    assert_eq!(bytes.len(), 52);
}

#[test]
fn extensions_are_skipped() {
    let header = header("10.0.0.1:1", "10.0.0.2:2");
    let mut bytes = header.encode();
    bytes[15] += 7;
    bytes.extend([0x05, 0, 4, 1, 2, 3, 4]);
    bytes.extend(b"payload");
    let (found, left) = read(&bytes, 5);
    assert_eq!((found.unwrap(), left), (header, &b"payload"[..]));
}

#[test]
fn other_beginnings_are_refused() {
    let good = header("10.0.0.1:1", "10.0.0.2:2").encode();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        read(&bytes, usize::MAX).0.unwrap_err()
    };
    let other = read(b"GET / HTTP/1.1\r\nHost: somewhere\r\n\r\n", usize::MAX).0;
    assert!(matches!(other, Err(HeaderError::Signature(_))));
    // Too short for a header, but not for knowing that it is none.
    let short = read(b"who\n", usize::MAX).0;
    assert!(matches!(short, Err(HeaderError::Signature(found)) if found == b"who\n"));
    assert!(matches!(with(11, b'\r'), HeaderError::Signature(_)));
    // LOCAL: a health check of the relay itself, which relays nothing.
    assert!(matches!(
        with(12, 0x20),
        HeaderError::Kind { command: 0x20, .. }
    ));
    // UDP over IPv4.
    assert!(matches!(
        with(13, 0x12),
        HeaderError::Kind { family: 0x12, .. }
    ));
    assert!(matches!(with(15, 11), HeaderError::Short(11)));
    // IPv6 with the length of IPv4.
    assert!(matches!(with(13, 0x21), HeaderError::Short(12)));
}

#[test]
fn an_end_within_the_header_is_an_error() {
    let bytes = header("[fd00::1]:1", "[fd00::2]:2").encode();
    for length in 0..bytes.len() {
        let error = read(&bytes[..length], usize::MAX).0.unwrap_err();
        assert!(matches!(error, HeaderError::Io(_)), "{length}: {error}");
    }
}

proptest! {
    #[test]
    fn what_is_written_is_read_and_nothing_more(
        source in address(),
        destination in address(),
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        piece in 1_usize..80,
    ) {
        let header = Header { source, destination };
        let mut bytes = header.encode();
        bytes.extend(&payload);
        let (found, left) = read(&bytes, piece);
        prop_assert_eq!(found.unwrap(), header);
        prop_assert_eq!(left, &payload[..]);
    }

    /// No bytes make it panic or read beyond the longest header.
    #[test]
    fn any_bytes_are_read_or_refused(
        start in 0_usize..=16,
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        piece in 1_usize..80,
    ) {
        let mut all = header("10.0.0.1:1", "10.0.0.2:2").encode()[..start].to_vec();
        all.extend(&bytes);
        let _ = read(&all, piece);
    }
}
