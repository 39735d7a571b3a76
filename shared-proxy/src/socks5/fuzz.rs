//! What a pod writes to its SOCKS5 listener: taken is what a reader that goes by RFC 1928 takes, and not one byte more of the
//! connection behind it is read.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, SocketAddr};

use futures_util::FutureExt;
use fuzz_driver::{Target as Fuzzed, Verdict};

use super::{Target, read_request};

/// RFC 1928, sections 3 and 4, read naively: address type, address, port, and how long all is.
fn naive(bytes: &[u8]) -> Option<(u8, Vec<u8>, u16, usize)> {
    let methods = usize::from(*bytes.get(1)?);
    let greeting = bytes.get(2..2 + methods)?;
    let request = &bytes[2 + methods..];
    if bytes[0] != 5 || !greeting.contains(&0) {
        return None;
    }
    let [5, 1, _, kind, ..] = request else {
        return None;
    };
    let (from, length) = match kind {
        1 => (4, 4),
        4 => (4, 16),
        3 => (5, usize::from(*request.get(4)?)),
        _ => return None,
    };
    let address = request.get(from..from + length)?.to_vec();
    let port = request.get(from + length..from + length + 2)?;
    let port = u16::from(port[0]) << 8 | u16::from(port[1]);
    Some((*kind, address, port, 2 + methods + from + length + 2))
}

#[test]
fn socks5_requests() {
    let seeds: [&[u8]; 5] = [
        b"\x05\x01\x00\x05\x01\x00\x01\x0a\x00\x00\x01\x00\x50GET /",
        b"\x05\x02\x00\x02\x05\x01\x00\x03\x0bweb.default\x1f\x90",
        b"\x05\x01\x00\x05\x01\x00\x04\xfd\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x02\x01\xbb",
        b"\x05\x01\x00\x05\x01\x00\x03\x0810.0.0.1\x00\x50",
        b"\x05\x01\x00\x05\x02\x00\x01\x0a\x00\x00\x01\x00\x50",
    ];
    let words: &[&[u8]] = &[
        b"\x05\x01\x00",
        b"\x05\x03\x00",
        b"\x03\x04a.b.",
        b"\xff",
        b"_",
    ];
    Fuzzed::new("socks5-requests", seeds)
        .words(words)
        .run(|input| {
            let (mut rest, mut answered) = (input, Vec::new());
            // All of it is there, so nothing waits.
            let read = read_request(&mut rest, &mut answered).now_or_never();
            let expected = naive(input);
            let target = match read.unwrap() {
                Ok(target) => target,
                Err(error) => {
                    // What the naive reader takes beyond this: names that are none.
                    let named = expected.is_none_or(|(kind, ..)| kind == 3);
                    assert!(named, "{error}");
                    return Verdict::refused(error);
                }
            };
            let (kind, address, port, length) = expected.unwrap();
            assert_eq!(input.len() - rest.len(), length);
            assert_eq!(answered, [5, 0]);
            match target {
                Target::Address(found) => {
                    let ip = match kind {
                        1 => IpAddr::from(<[u8; 4]>::try_from(address).unwrap()),
                        4 => IpAddr::from(<[u8; 16]>::try_from(address).unwrap()),
                        _ => std::str::from_utf8(&address).unwrap().parse().unwrap(),
                    };
                    assert_eq!(found, SocketAddr::new(ip.to_canonical(), port));
                    Verdict::Taken("address")
                }
                Target::Hostname(name, found) => {
                    assert_eq!((kind, found), (3, port));
                    let address = String::from_utf8(address).unwrap().to_ascii_lowercase();
                    assert_eq!(name, address.strip_suffix('.').unwrap_or(&address));
                    Verdict::Taken("hostname")
                }
            }
        });
}
