//! Reading what tcpdump wrote: TCP payloads per connection and direction, in order.
//!
//! Classic pcap in either byte order, link type Ethernet (1) or Linux cooked v1 (113); IPv4 only, since that is what the
//! lab speaks.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddrV4};

/// Why a capture cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PcapError {
    /// Not a pcap file.
    #[error("not a pcap file")]
    Magic,
    /// A link type that is not understood.
    #[error("link type {0} is not understood")]
    LinkType(u32),
    /// A packet was captured only in part, so nothing can be said about what it carried.
    #[error("packet {0} was not captured whole: capture with a snapshot length of 0")]
    Truncated(usize),
}

/// One direction of one TCP connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Flow {
    /// Sender.
    pub from: SocketAddrV4,
    /// Receiver.
    pub to: SocketAddrV4,
}

/// How much of one direction of a connection was captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Volume {
    /// Segments, with or without payload.
    pub segments: u64,
    /// Segments with the SYN flag.
    pub syns: u64,
    /// Bytes of payload; those that were sent twice count once, and gaps do not count.
    pub payload: u64,
}

/// TCP payload of a capture.
#[derive(Debug, Clone, Default)]
pub struct Capture {
    /// Bytes of each direction, in sequence order, retransmissions removed. A gap ends the stream.
    pub streams: BTreeMap<Flow, Vec<u8>>,
    /// Bytes that came after a gap and are therefore not in `streams`.
    pub beyond_gaps: usize,
    /// Each direction that at least one segment was captured of, with or without payload.
    pub volumes: BTreeMap<Flow, Volume>,
}

/// A stretch of payload: its sequence number and bytes.
type Segment<'a> = (u32, &'a [u8]);

/// What was captured of one direction, as it came.
#[derive(Default)]
struct Direction<'a> {
    start: Option<u32>,
    segments: u64,
    syns: u64,
    parts: Vec<Segment<'a>>,
}

impl Capture {
    /// Reads a pcap file.
    pub fn parse(file: &[u8]) -> Result<Self, PcapError> {
        let mut directions: BTreeMap<Flow, Direction<'_>> = BTreeMap::new();
        for packet in packets(file)? {
            let Some((flow, sequence, syn, payload)) = tcp_of(packet) else {
                continue;
            };
            let direction = directions.entry(flow).or_default();
            direction.segments += 1;
            if syn {
                direction.syns += 1;
                direction.start = Some(sequence.wrapping_add(1));
            } else if !payload.is_empty() {
                direction.parts.push((sequence, payload));
            }
        }
        let mut capture = Self::default();
        for (flow, direction) in directions {
            let Direction {
                start,
                segments,
                syns,
                mut parts,
            } = direction;
            let mut volume = Volume {
                segments,
                syns,
                payload: 0,
            };
            if let Some(first) = start.or_else(|| parts.first().map(|part| part.0)) {
                // Distance from the first byte: sequence numbers wrap at 2^32.
                parts.sort_by_key(|part| part.0.wrapping_sub(first));
                volume.payload = covered(first, &parts);
                let stream = reassemble(first, &parts, &mut capture.beyond_gaps);
                if !stream.is_empty() {
                    capture.streams.insert(flow, stream);
                }
            }
            capture.volumes.insert(flow, volume);
        }
        Ok(capture)
    }

    /// All that was captured of the directions that `wanted` chooses.
    pub fn volume(&self, wanted: impl Fn(&Flow) -> bool) -> Volume {
        let mut sum = Volume::default();
        for (_, volume) in self.volumes.iter().filter(|(flow, _)| wanted(flow)) {
            sum.segments += volume.segments;
            sum.syns += volume.syns;
            sum.payload += volume.payload;
        }
        sum
    }

    /// Whether `needle` occurs in the payload of any stream.
    pub fn contains(&self, needle: &[u8]) -> Option<Flow> {
        self.streams
            .iter()
            .find(|(_, stream)| find(stream, needle))
            .map(|(flow, _)| *flow)
    }
}

/// Looks for `needle`, skipping as far as the last byte of each position allows (Horspool): a capture has many megabytes.
fn find(haystack: &[u8], needle: &[u8]) -> bool {
    let Some((last, head)) = needle.split_last() else {
        return false;
    };
    let mut skip = [needle.len(); 256];
    for (index, byte) in head.iter().enumerate() {
        skip[usize::from(*byte)] = head.len() - index;
    }
    let mut at = head.len();
    while let Some(byte) = haystack.get(at) {
        if byte == last && haystack[at - head.len()..at] == *head {
            return true;
        }
        at += skip[usize::from(*byte)];
    }
    false
}

/// Bytes that segments, sorted by distance from `first`, cover.
fn covered(first: u32, parts: &[Segment<'_>]) -> u64 {
    let (mut end, mut bytes) = (0, 0);
    for (sequence, payload) in parts {
        let from = u64::from(sequence.wrapping_sub(first));
        let to = from + payload.len() as u64;
        bytes += to.saturating_sub(from.max(end));
        end = end.max(to);
    }
    bytes
}

fn reassemble(first: u32, parts: &[Segment<'_>], beyond_gaps: &mut usize) -> Vec<u8> {
    let mut stream = Vec::new();
    for (sequence, payload) in parts {
        let offset = sequence.wrapping_sub(first) as usize;
        if offset > stream.len() {
            *beyond_gaps += payload.len();
        } else if offset + payload.len() > stream.len() {
            stream.extend_from_slice(&payload[stream.len() - offset..]);
        }
    }
    stream
}

/// The packets of a file, as IPv4 datagrams.
fn packets(file: &[u8]) -> Result<Vec<&[u8]>, PcapError> {
    let magic: [u8; 4] = file
        .get(..4)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(PcapError::Magic)?;
    let little = match u32::from_le_bytes(magic) {
        0xa1b2_c3d4 | 0xa1b2_3c4d => true,
        0xd4c3_b2a1 | 0x4d3c_b2a1 => false,
        _ => return Err(PcapError::Magic),
    };
    let number = |bytes: &[u8], at: usize| -> Option<u32> {
        let bytes: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(if little {
            u32::from_le_bytes(bytes)
        } else {
            u32::from_be_bytes(bytes)
        })
    };
    let link = number(file, 20).ok_or(PcapError::Magic)?;
    // Bytes before the network header; the two before them are the protocol.
    let skip = match link {
        1 => 14,
        113 => 16,
        other => return Err(PcapError::LinkType(other)),
    };
    let mut packets = Vec::new();
    let mut rest = file.get(24..).unwrap_or_default();
    while let (Some(captured), Some(original)) = (number(rest, 8), number(rest, 12)) {
        if captured < original {
            return Err(PcapError::Truncated(packets.len()));
        }
        let Some(frame) = rest.get(16..16 + captured as usize) else {
            break;
        };
        if frame.get(skip - 2..skip) == Some(&[0x08, 0x00]) {
            packets.push(&frame[skip..]);
        }
        rest = &rest[16 + captured as usize..];
    }
    Ok(packets)
}

/// Flow, sequence number, SYN flag and payload of a TCP segment in an IPv4 datagram.
fn tcp_of(datagram: &[u8]) -> Option<(Flow, u32, bool, &[u8])> {
    let header = usize::from(datagram.first()? & 0x0f) * 4;
    let total = usize::from(u16::from_be_bytes([*datagram.get(2)?, *datagram.get(3)?]));
    if datagram[0] >> 4 != 4 || *datagram.get(9)? != 6 || header < 20 {
        return None;
    }
    // Segments that were offloaded to the device may have a total length of 0.
    let end = if total == 0 {
        datagram.len()
    } else {
        total.min(datagram.len())
    };
    let tcp = datagram.get(header..end)?;
    let port = |at: usize| Some(u16::from_be_bytes([*tcp.get(at)?, *tcp.get(at + 1)?]));
    let address = |at: usize| -> Option<Ipv4Addr> {
        let bytes: [u8; 4] = datagram.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(bytes))
    };
    let sequence: [u8; 4] = tcp.get(4..8)?.try_into().ok()?;
    let data_offset = usize::from(tcp.get(12)? >> 4) * 4;
    let syn = tcp.get(13)? & 0x02 != 0;
    let flow = Flow {
        from: SocketAddrV4::new(address(12)?, port(0)?),
        to: SocketAddrV4::new(address(16)?, port(2)?),
    };
    Some((
        flow,
        u32::from_be_bytes(sequence),
        syn,
        tcp.get(data_offset..)?,
    ))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn segment(sequence: u32, syn: bool, payload: &[u8]) -> Vec<u8> {
        let mut ip = vec![0x45, 0];
        ip.extend(((40 + payload.len()) as u16).to_be_bytes());
        ip.extend([0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        ip.extend(1000u16.to_be_bytes());
        ip.extend(15008u16.to_be_bytes());
        ip.extend(sequence.to_be_bytes());
        ip.extend([
            0,
            0,
            0,
            0,
            0x50,
            if syn { 2 } else { 0x10 },
            0,
            0,
            0,
            0,
            0,
            0,
        ]);
        ip.extend(payload);
        ip
    }

    fn file(datagrams: &[Vec<u8>]) -> Vec<u8> {
        let mut file = 0xa1b2_c3d4u32.to_le_bytes().to_vec();
        file.extend([2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 4, 0]);
        file.extend(1u32.to_le_bytes());
        for datagram in datagrams {
            let length = (datagram.len() + 14) as u32;
            file.extend([0; 8]);
            file.extend(length.to_le_bytes());
            file.extend(length.to_le_bytes());
            file.extend([0; 12]);
            file.extend([8, 0]);
            file.extend(datagram);
        }
        file
    }

    #[test]
    fn streams_are_put_together_in_order_without_retransmissions() {
        let start = u32::MAX - 1;
        let at = |offset: u32| start.wrapping_add(1).wrapping_add(offset);
        let capture = Capture::parse(&file(&[
            segment(start, true, b""),
            segment(at(3), false, b"def"),
            segment(at(0), false, b"abc"),
            segment(at(2), false, b"cde"),
            segment(at(20), false, b"late"),
        ]))
        .unwrap();
        assert_eq!(capture.streams.len(), 1);
        assert_eq!(capture.streams.values().next().unwrap(), b"abcdef");
        assert_eq!(capture.beyond_gaps, 4);
        assert!(capture.contains(b"cde").is_some());
        assert!(capture.contains(b"xyz").is_none());
        let seen = Volume {
            segments: 5,
            syns: 1,
            payload: 10,
        };
        assert_eq!(capture.volume(|flow| flow.to.port() == 15008), seen);
        assert_eq!(
            capture.volume(|flow| flow.from.port() == 15008),
            Volume::default()
        );
    }

    #[test]
    fn a_capture_that_cannot_be_judged_is_an_error() {
        assert_eq!(Capture::parse(b"nothing").unwrap_err(), PcapError::Magic);
        let mut cut = file(&[segment(1, false, b"abc")]);
        let original = 24 + 12;
        cut[original..original + 4].copy_from_slice(&5000u32.to_le_bytes());
        assert_eq!(Capture::parse(&cut).unwrap_err(), PcapError::Truncated(0));
    }

    proptest! {
        #[test]
        fn a_needle_is_found_wherever_it_is(
            haystack in proptest::collection::vec(0..3u8, 0..60),
            needle in proptest::collection::vec(0..3u8, 0..6),
        ) {
            let there = !needle.is_empty() && haystack.windows(needle.len()).any(|window| window == needle);
            prop_assert_eq!(find(&haystack, &needle), there);
        }

        #[test]
        fn no_file_panics(mut bytes in proptest::collection::vec(any::<u8>(), 0..400), valid_head in any::<bool>()) {
            if valid_head {
                let head = file(&[]);
                bytes.splice(0..0, head);
            }
            let _ = Capture::parse(&bytes);
        }
    }
}
