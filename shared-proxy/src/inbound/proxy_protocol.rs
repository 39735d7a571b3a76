//! The header of the PROXY protocol, version 2 (haproxy's proxy-protocol.txt, section 2.2).

use std::net::{IpAddr, SocketAddr};

use crate::hbone::authority::Authority;
use crate::identity::Identity;

const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Version 2, command PROXY.
const VERSION_AND_COMMAND: u8 = 0x21;
const TCP_OVER_IPV4: u8 = 0x11;
const TCP_OVER_IPV6: u8 = 0x21;
/// Type of a value: the name that the client asked for.
const PP2_TYPE_AUTHORITY: u8 = 0x02;
/// Type of a value: the identity that the client proved. Of the range for private use.
const SOURCE_IDENTITY: u8 = 0xD0;

/// Tells of a connection of `source` to `asked`; `local` stands for the address of a destination that was asked for by
/// name.
pub(super) fn header(
    source: SocketAddr,
    asked: &Authority,
    local: SocketAddr,
    identity: Option<&Identity>,
) -> Vec<u8> {
    let destination = asked.address().unwrap_or(local);
    let mut body = Vec::with_capacity(128);
    let family = match (source.ip(), destination.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            body.extend(source.octets());
            body.extend(destination.octets());
            TCP_OVER_IPV4
        }
        (source, destination) => {
            for ip in [source, destination] {
                let ip = match ip {
                    IpAddr::V4(ip) => ip.to_ipv6_mapped(),
                    IpAddr::V6(ip) => ip,
                };
                body.extend(ip.octets());
            }
            TCP_OVER_IPV6
        }
    };
    body.extend(source.port().to_be_bytes());
    body.extend(destination.port().to_be_bytes());
    if let Authority::Hostname(hostname, _) = asked {
        add(&mut body, PP2_TYPE_AUTHORITY, hostname.as_bytes());
    }
    if let Some(identity) = identity {
        add(&mut body, SOURCE_IDENTITY, identity.to_string().as_bytes());
    }
    let mut header = Vec::with_capacity(16 + body.len());
    header.extend(SIGNATURE);
    header.extend([VERSION_AND_COMMAND, family]);
    // A hostname is at most 253 bytes and an identity at most 2048.
    header.extend(u16::try_from(body.len()).unwrap_or(u16::MAX).to_be_bytes());
    header.extend(body);
    header
}

fn add(body: &mut Vec<u8>, kind: u8, value: &[u8]) {
    body.push(kind);
    body.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_be_bytes());
    body.extend(value);
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_header_of_an_ipv4_connection_with_an_identity() {
        let identity: Identity = "spiffe://td/ns/a/sa/b".parse().unwrap();
        let header = header(
            "10.0.0.1:4096".parse().unwrap(),
            &"10.96.0.1:80".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
            Some(&identity),
        );
        let expected = "0d0a0d0a000d0a515549540a".to_owned()
            + "21110024"
            + "0a0000010a60000110000050"
            + "d00015"
            + &hex(b"spiffe://td/ns/a/sa/b");
        assert_eq!(hex(&header), expected);
    }

    #[test]
    fn the_header_of_an_ipv6_connection_by_name_without_an_identity() {
        let header = header(
            "10.0.0.1:1".parse().unwrap(),
            &"web.example:80".parse().unwrap(),
            "[fd00::2]:8080".parse().unwrap(),
            None,
        );
        let expected = "0d0a0d0a000d0a515549540a".to_owned()
            + "21210032"
            + "00000000000000000000ffff0a000001"
            + "fd000000000000000000000000000002"
            + "00011f90"
            + "02000b"
            + &hex(b"web.example");
        assert_eq!(hex(&header), expected);
    }
}
