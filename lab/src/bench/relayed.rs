//! What the relay's connections look like on the wire: readable, and with the addresses of the original connection in
//! front (PROXY protocol, version 2, over IPv4).

use std::net::{Ipv4Addr, SocketAddrV4};

use super::pcap::{Capture, Flow};
use super::proof::Statement;

/// Port of the connections between relays.
const RELAY_PORT: u16 = 15008;
/// Signature, version 2 and command PROXY, TCP over IPv4.
const BEGINNING: [u8; 14] = *b"\r\n\r\n\0\r\nQUIT\n\x21\x11";

/// Source and destination that a stream begins with, if it begins with a header.
pub fn header(stream: &[u8]) -> Option<(SocketAddrV4, SocketAddrV4)> {
    let rest = stream.strip_prefix(&BEGINNING)?;
    let (length, rest) = rest.split_first_chunk::<2>()?;
    let addresses = rest.first_chunk::<12>()?;
    if u16::from_be_bytes(*length) < 12 {
        return None;
    }
    let ip = |at: usize| {
        let octets: [u8; 4] = std::array::from_fn(|i| addresses[at + i]);
        Ipv4Addr::from(octets)
    };
    let port = |at: usize| u16::from_be_bytes([addresses[at], addresses[at + 1]]);
    Some((
        SocketAddrV4::new(ip(0), port(8)),
        SocketAddrV4::new(ip(4), port(10)),
    ))
}

/// Says whether a wire carried relayed connections and nothing else. That the marker is readable is also the control that
/// taps in this place see what is in the clear.
pub fn statements(label: &str, capture: &Capture, marker: &[u8]) -> Vec<Statement> {
    let seen = capture.contains(marker);
    let relayed = |flow: &Flow| [flow.from.port(), flow.to.port()].contains(&RELAY_PORT);
    let (mut begun, mut wrong, mut outside) = (0, Vec::new(), Vec::new());
    for (flow, stream) in &capture.streams {
        let way = format!("{} → {}", flow.from, flow.to);
        if !relayed(flow) {
            outside.push(format!("{way}: {} bytes", stream.len()));
        } else if flow.to.port() == RELAY_PORT {
            match header(stream) {
                Some((source, destination))
                    if source.ip() == flow.from.ip() && destination.ip() == flow.to.ip() =>
                {
                    begun += 1;
                }
                Some((source, destination)) => {
                    wrong.push(format!("{way}: header from {source} to {destination}"));
                }
                None => wrong.push(format!("{way}: no header")),
            }
        }
    }
    vec![
        Statement {
            claim: format!("{label}: the marker is visible on port 15008"),
            holds: seen.is_some_and(|flow| relayed(&flow)),
            found: seen.map_or_else(
                || "not seen".to_owned(),
                |flow| format!("seen from {} to {}", flow.from, flow.to),
            ),
        },
        Statement {
            claim: format!(
                "{label}: connections to port 15008 begin with a PROXY header with the addresses of both pods"
            ),
            holds: begun > 0 && wrong.is_empty(),
            found: if wrong.is_empty() {
                format!("{begun} connections")
            } else {
                wrong.join("; ")
            },
        },
        Statement {
            claim: format!("{label}: no TCP payload outside port 15008"),
            holds: outside.is_empty(),
            found: if outside.is_empty() {
                "none".to_owned()
            } else {
                outside.join("; ")
            },
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(last: u8, port: u16) -> SocketAddrV4 {
        SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, last), port)
    }

    /// From 10.244.1.10:40000 to 10.244.1.11:8090.
    const HEADER: &[u8] =
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c\x0a\xf4\x01\x0a\x0a\xf4\x01\x0b\x9c\x40\x1f\x9a";

    fn seen(from: SocketAddrV4, to: SocketAddrV4, stream: &[u8]) -> Capture {
        let mut capture = Capture::default();
        capture.streams.insert(Flow { from, to }, stream.to_vec());
        capture.streams.insert(
            Flow { from: to, to: from },
            b"answer with the marker".to_vec(),
        );
        capture
    }

    fn holding(capture: &Capture) -> [bool; 3] {
        let statements = statements("tap", capture, b"marker");
        std::array::from_fn(|at| statements[at].holds)
    }

    #[test]
    fn a_header_is_read() {
        assert_eq!(
            header(HEADER),
            Some((address(10, 40000), address(11, 8090)))
        );
        assert_eq!(header(&HEADER[..27]), None);
        assert_eq!(header(b"GET / HTTP/1.1\r\nHost: of some length\r\n"), None);
    }

    #[test]
    fn only_relayed_connections_are_a_proof() {
        let (client, relay) = (address(10, 50000), address(11, 15008));
        assert_eq!(holding(&seen(client, relay, HEADER)), [true; 3]);
        assert_eq!(
            holding(&seen(client, relay, b"no header")),
            [true, false, true]
        );
        assert_eq!(
            holding(&seen(address(12, 50000), relay, HEADER)),
            [true, false, true],
            "somebody else's address in the header"
        );
        assert_eq!(
            holding(&seen(client, address(11, 8090), HEADER)),
            [false; 3],
            "past the relay"
        );
        assert_eq!(
            holding(&Capture::default()),
            [false, false, true],
            "nothing seen is no proof"
        );
    }
}
