//! Headers that are nearly right.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use fuzz_driver::{Target, Verdict};

use super::*;

#[test]
fn proxy_v2() {
    let header = |source: &str, destination: &str| Header {
        source: source.parse().unwrap(),
        destination: destination.parse().unwrap(),
    };
    let mut extended = header("10.0.0.1:1", "10.0.0.2:2").encode();
    extended[15] += 5;
    extended.extend(b"\x02\x00\x02abpayload");
    let seeds = [
        header("10.0.0.1:40000", "10.0.0.2:8080").encode(),
        header("[fd00::1]:1", "10.0.0.2:65535").encode(),
        extended,
    ];
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let words: &[&[u8]] = &[
        &SIGNATURE,
        b"\x21\x11",
        b"\x21\x21",
        b"\x20\x00",
        b"\x00\x0c",
        b"\x00\x24",
    ];
    Target::new("proxy-v2", seeds).words(words).run(|input| {
        let mut rest = input;
        match runtime.block_on(Header::read(&mut rest)) {
            Err(error) => Verdict::refused(error),
            Ok(header) => {
                // Not one byte of what comes after it.
                let length = usize::from(u16::from_be_bytes([input[14], input[15]]));
                assert_eq!(input.len() - rest.len(), PREFIX + length);
                let written = header.encode();
                let again = runtime.block_on(Header::read(&mut &written[..])).unwrap();
                assert_eq!(again, header);
                Verdict::Taken(if header.source.is_ipv4() {
                    "IPv4"
                } else {
                    "IPv6"
                })
            }
        }
    });
}
