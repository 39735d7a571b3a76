//! What an application is told of a connection: whatever the peer asked for and whoever it is, a reader that goes by the
//! specification finds exactly that.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use fuzz_driver::{Target, Verdict};

use super::proxy_protocol::header;
use crate::hbone::authority::Authority;
use crate::identity::Identity;

/// Source and destination, and the values behind them.
type Read = (SocketAddr, SocketAddr, Vec<(u8, Vec<u8>)>);

/// Section 2.2 of the specification, read naively.
fn read(bytes: &[u8]) -> Read {
    assert_eq!(bytes[..12], *b"\r\n\r\n\0\r\nQUIT\n");
    assert_eq!(bytes[12], 0x21, "version 2, PROXY");
    let body = &bytes[16..];
    assert_eq!(
        body.len(),
        usize::from(bytes[14]) << 8 | usize::from(bytes[15])
    );
    let (width, ip): (usize, fn(&[u8]) -> IpAddr) = match bytes[13] {
        0x11 => (4, |b| {
            Ipv4Addr::from(<[u8; 4]>::try_from(b).unwrap()).into()
        }),
        0x21 => (16, |b| {
            Ipv6Addr::from(<[u8; 16]>::try_from(b).unwrap()).into()
        }),
        other => panic!("family {other}"),
    };
    let port = |at: usize| u16::from(body[at]) << 8 | u16::from(body[at + 1]);
    let source = SocketAddr::new(ip(&body[..width]), port(2 * width));
    let destination = SocketAddr::new(ip(&body[width..2 * width]), port(2 * width + 2));
    let (mut rest, mut values) = (&body[2 * width + 4..], Vec::new());
    while let [kind, high, low, after @ ..] = rest {
        let (value, after) = after.split_at(usize::from(*high) << 8 | usize::from(*low));
        values.push((*kind, value.to_vec()));
        rest = after;
    }
    assert!(rest.is_empty());
    (source, destination, values)
}

fn canonical(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

#[test]
fn proxy_v2_written() {
    let seeds = [
        "10.0.0.1:1|10.96.0.1:80|10.0.0.2:80|spiffe://td/ns/a/sa/b",
        "10.0.0.1:1|web.example:80|10.0.0.2:80|spiffe://td/ns/a/sa/b",
        "[fd00::1]:1|web.example:80|10.0.0.2:8080|",
        "10.0.0.1:65535|[fd00::1]:443|[fd00::2]:443|",
    ];
    let words: &[&[u8]] = &[
        b"|",
        b":80",
        b"[::1]",
        b"web.example",
        b"spiffe://",
        b"/ns/",
        b"/sa/",
    ];
    Target::new("proxy-v2-written", seeds)
        .words(words)
        .run(|input| {
            let text = String::from_utf8_lossy(input);
            let parts: Vec<&str> = text.split('|').collect();
            let [source, asked, local, identity] = parts[..] else {
                return Verdict::refused("not four parts");
            };
            let (Ok(source), Ok(local)) = (source.parse(), local.parse::<SocketAddr>()) else {
                return Verdict::refused("not an address");
            };
            let asked: Authority = match asked.parse() {
                Ok(asked) => asked,
                Err(error) => return Verdict::refused(error),
            };
            let identity = match identity.parse::<Identity>() {
                Ok(identity) => Some(identity),
                Err(_) if identity.is_empty() => None,
                Err(error) => return Verdict::refused(error),
            };
            let (from, to, values) = read(&header(source, &asked, local, identity.as_ref()));
            assert_eq!(canonical(from), canonical(source));
            assert_eq!(canonical(to), canonical(asked.address().unwrap_or(local)));
            let mut expected = Vec::new();
            if let Authority::Hostname(name, _) = &asked {
                expected.push((0x02, name.as_bytes().to_vec()));
            }
            if let Some(identity) = &identity {
                expected.push((0xd0, identity.to_string().into_bytes()));
            }
            assert_eq!(values, expected);
            Verdict::Taken(match values.len() {
                0 => "addresses",
                1 => "one value",
                _ => "two values",
            })
        });
}
