//! TCP segments out of what tcpdump wrote, also those inside an overlay's packets, with their times.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::explain::packet::Tuple;

/// Bytes of an Ethernet header.
const ETHERNET: usize = 14;
/// Bytes of a vxlan header; a geneve header without options.
const OVERLAY: usize = 8;

/// A segment on a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Index of the namespace.
    pub place: usize,
    /// Device.
    pub device: String,
    /// Microseconds since 1970.
    pub micros: i64,
    /// Its ends.
    pub tuple: Tuple,
    /// `first`, `answer`, `later` (with payload), or nothing that matters.
    pub phase: Option<&'static str>,
    /// Ends of the packet that it was wrapped in.
    pub outer: Option<Tuple>,
}

/// Reads a pcap file of link type Ethernet, in the machine's byte order. What is cut off at its end is left out.
pub fn parse(file: &[u8], place: usize, device: &str) -> Option<Vec<Segment>> {
    let word = |at: usize| -> Option<u32> {
        Some(u32::from_ne_bytes(file.get(at..at + 4)?.try_into().ok()?))
    };
    if word(0)? != 0xa1b2_c3d4 || word(20)? != 1 {
        return None;
    }
    let mut segments = Vec::new();
    let mut at = 24;
    while let (Some(seconds), Some(micros), Some(length)) = (word(at), word(at + 4), word(at + 8)) {
        let length = length as usize;
        let Some(frame) = file.get(at + 16..at + 16 + length) else {
            break;
        };
        at += 16 + length;
        if let Some((outer, tuple, phase)) = in_frame(frame) {
            segments.push(Segment {
                place,
                device: device.to_owned(),
                micros: i64::from(seconds) * 1_000_000 + i64::from(micros),
                tuple,
                phase,
                outer,
            });
        }
    }
    Some(segments)
}

type Found = (Option<Tuple>, Tuple, Option<&'static str>);

fn in_frame(frame: &[u8]) -> Option<Found> {
    let (from, to, protocol, rest, length) = datagram(frame.get(ETHERNET..)?)?;
    match protocol {
        6 => {
            let (tuple, phase) = segment(from, to, rest, length)?;
            Some((None, tuple, phase))
        }
        17 => {
            let outer = ends(from, to, rest)?;
            let overlay = rest.get(8..)?;
            // geneve says how many options there are, in words of 4 bytes; vxlan has its flag for a valid id there.
            let options = match overlay.first()? {
                0x08 => 0,
                first => usize::from(first & 0x3f) * 4,
            };
            let inner = overlay.get(OVERLAY + options + ETHERNET..)?;
            let (from, to, protocol, rest, length) = datagram(inner)?;
            let (tuple, phase) = segment(from, to, rest, length).filter(|_| protocol == 6)?;
            Some((Some(outer), tuple, phase))
        }
        _ => None,
    }
}

/// Ends, protocol and content of an IP datagram, and how long the content is in whole: the capture may be shorter.
fn datagram(bytes: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8], usize)> {
    match bytes.first()? >> 4 {
        4 => {
            let header = usize::from(bytes[0] & 15) * 4;
            let total = usize::from(u16::from_be_bytes([*bytes.get(2)?, *bytes.get(3)?]));
            let ip = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(octets).into())
            };
            // Segments that were offloaded to the device may have a total length of 0.
            let length = if total == 0 {
                usize::MAX
            } else {
                total.checked_sub(header)?
            };
            Some((
                ip(12)?,
                ip(16)?,
                *bytes.get(9)?,
                bytes.get(header..)?,
                length,
            ))
        }
        6 => {
            let ip = |at: usize| -> Option<IpAddr> {
                let octets: [u8; 16] = bytes.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(octets).into())
            };
            let length = usize::from(u16::from_be_bytes([*bytes.get(4)?, *bytes.get(5)?]));
            Some((ip(8)?, ip(24)?, *bytes.get(6)?, bytes.get(40..)?, length))
        }
        _ => None,
    }
}

fn ends(from: IpAddr, to: IpAddr, transport: &[u8]) -> Option<Tuple> {
    let port = |at: usize| {
        Some(u16::from_be_bytes([
            *transport.get(at)?,
            *transport.get(at + 1)?,
        ]))
    };
    Some(Tuple {
        from: SocketAddr::new(from, port(0)?),
        to: SocketAddr::new(to, port(2)?),
    })
}

fn segment(
    from: IpAddr,
    to: IpAddr,
    tcp: &[u8],
    length: usize,
) -> Option<(Tuple, Option<&'static str>)> {
    let tuple = ends(from, to, tcp)?;
    let header = usize::from(tcp.get(12)? >> 4) * 4;
    let flags = tcp.get(13)?;
    let (syn, ack) = (flags & 2 != 0, flags & 16 != 0);
    let phase = match (syn, ack) {
        (true, false) => Some("first"),
        (true, true) => Some("answer"),
        (false, _) if length > header => Some("later"),
        _ => None,
    };
    Some((tuple, phase))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(protocol: u8, content: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x45, 0];
        bytes.extend(((20 + content.len()) as u16).to_be_bytes());
        bytes.extend([0, 0, 0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        bytes.extend(content);
        bytes
    }

    fn tcp(flags: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0x0f, 0xa0, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags];
        bytes.extend([0; 6]);
        bytes.extend(payload);
        bytes
    }

    fn frame(datagram: &[u8]) -> Vec<u8> {
        [&[0; 12], &[8, 0][..], datagram].concat()
    }

    fn file(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut file = 0xa1b2_c3d4_u32.to_ne_bytes().to_vec();
        file.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
        file.extend(1_u32.to_ne_bytes());
        for (index, frame) in frames.iter().enumerate() {
            file.extend(7_u32.to_ne_bytes());
            file.extend((index as u32).to_ne_bytes());
            file.extend((frame.len() as u32).to_ne_bytes());
            file.extend((frame.len() as u32).to_ne_bytes());
            file.extend(frame);
        }
        file
    }

    #[test]
    fn segments_are_found_bare_and_wrapped() {
        let inner = frame(&ip(6, &tcp(2, b"")));
        let overlay = |header: &[u8]| {
            let udp = [&[0xf0, 0, 0x17, 0xc1, 0, 0, 0, 0], header, &inner].concat();
            frame(&ip(17, &udp))
        };
        let found = parse(
            &file(&[
                inner.clone(),
                overlay(&[8, 0, 0, 0, 0, 3, 0xe8, 0]),
                // geneve with one option of 4 bytes.
                overlay(&[1, 0, 0x65, 0x58, 0, 3, 0xe8, 0, 1, 2, 3, 4]),
                frame(&ip(6, &tcp(0x12, b""))),
                frame(&ip(6, &tcp(0x10, b""))),
                frame(&ip(6, &tcp(0x18, b"x"))),
            ]),
            3,
            "eth0",
        )
        .unwrap();
        let phases: Vec<_> = found.iter().map(|it| it.phase).collect();
        let first = Some("first");
        assert_eq!(
            phases,
            [first, first, first, Some("answer"), None, Some("later")]
        );
        let wrapped: Vec<bool> = found.iter().map(|it| it.outer.is_some()).collect();
        assert_eq!(wrapped, [false, true, true, false, false, false]);
        assert!(found.iter().all(|it| it.tuple == found[0].tuple));
        assert_eq!(found[5].micros, 7_000_005);
    }

    proptest! {
        #[test]
        fn no_frame_panics(frame in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = parse(&file(&[frame]), 0, "eth0");
        }
    }
}
