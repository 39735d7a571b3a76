//! From what was observed to statements. No packets are captured here, so this can be tested without a lab.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use super::{Leg, PROOF_PORT, Proof, Seen, Statement};
use crate::bench::case::Path;
use crate::bench::pcap::{Capture, Flow, Volume};
use crate::bench::relayed;
use crate::bench::tap::Heard;
use crate::bench::tls_records;
use crate::bench::variant::Variant;
use crate::topology::{Node, Pod};

/// Bytes that the proof sends in each direction, to see where they pass.
pub const EXCHANGE: u64 = 4 << 20;
/// Connections that a proof makes.
pub const CONNECTIONS: u64 = 3;
/// HBONE.
const TUNNEL_PORT: u16 = 15008;
/// HBONE, and HBONE between two pods of a node over the proxy's loopback.
const TUNNEL_PORTS: [u16; 2] = [TUNNEL_PORT, 15088];
/// With the flow `tunnel`, at least this share of a leg's payload passes through the overlay in each direction.
const TUNNEL_SHARE: f64 = 0.95;
/// With the flow `hybrid`, at most this share does.
const HYBRID_SHARE: f64 = 0.01;

/// A device that is listened on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Node-side end of the client's veth.
    ClientVeth,
    /// Node-side end of the server's veth.
    ServerVeth,
    /// The link between the nodes, at the client's node.
    Uplink,
    /// Loopback of the proxy on the client's node.
    ProxyLoopback,
    /// Overlay device of the client's node for outgoing connections.
    Istioout,
    /// Overlay device of the server's node for incoming connections.
    Istioin,
}

/// What may be read on a wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Privacy {
    /// Nothing: TLS on the tunnel's port, and no other payload.
    Encrypted,
    /// The marker must be seen, or not seeing it elsewhere would mean nothing.
    Readable,
    /// In the clear, but between relays only, each connection with its addresses in front.
    Relayed,
    /// Not a byte: what is handed over inside a process is on no wire.
    Silent,
    /// It is only counted what passes.
    Counted,
}

impl Wire {
    /// Node and device.
    pub fn label(self, client: (&Node, &Pod), server: (&Node, &Pod)) -> String {
        let ((client_node, client), (server_node, server)) = (client, server);
        match self {
            Self::ClientVeth => {
                format!("{} {} (to {})", client_node.name, client.veth, client.name)
            }
            Self::ServerVeth => {
                format!("{} {} (to {})", server_node.name, server.veth, server.name)
            }
            Self::Uplink => format!("{} eth0 (uplink)", client_node.name),
            Self::ProxyLoopback => format!("{} lo", client_node.proxy_name),
            Self::Istioout => format!("{} istioout", client_node.name),
            Self::Istioin => format!("{} istioin", server_node.name),
        }
    }

    fn privacy(self, variant: &Variant, path: Path) -> Privacy {
        match (self, variant) {
            (Self::Istioout | Self::Istioin, _) => Privacy::Counted,
            (_, Variant::None) => Privacy::Readable,
            (_, Variant::Relay) => Privacy::Relayed,
            // The node captures what has left the pod: up to there it is in the clear, by design, as it is from there on
            // into a pod.
            (Self::ClientVeth | Self::ServerVeth, variant) if variant.is_node() => {
                Privacy::Readable
            }
            (_, Variant::NodeDirect) if path == Path::SameNode => Privacy::Silent,
            _ => Privacy::Encrypted,
        }
    }
}

/// All that a proof is made from.
#[derive(Debug)]
pub struct Observed {
    /// Address of the client's pod.
    pub client: Ipv4Addr,
    /// Address of the server's pod.
    pub server: Ipv4Addr,
    /// The marker that was sent and came back.
    pub marker: Vec<u8>,
    /// Why traffic did not pass, if it did not.
    pub failure: Option<String>,
    /// Bytes that were compared at both ends.
    pub bytes: u64,
    /// Address of the client as the server saw it.
    pub client_seen: Option<IpAddr>,
    /// Packets that ever went out through `istioin` on the server's node.
    pub istioin_ever: u64,
    /// Wires with their labels and what was heard on them.
    pub wires: Vec<(Wire, String, Heard)>,
}

/// Whether a capture has as much as this wire should carry with this variant, so that there is nothing to wait for.
pub fn is_complete(
    variant: &Variant,
    path: Path,
    wire: Wire,
    capture: &Capture,
    server: Ipv4Addr,
) -> bool {
    let ways = [
        capture.volume(|flow| *flow.to.ip() == server),
        capture.volume(|flow| *flow.from.ip() == server),
    ];
    match (wire, variant) {
        (Wire::Istioout, Variant::NodeHybrid | Variant::NodeDirect) => ways[0].syns >= CONNECTIONS,
        (Wire::Istioin, Variant::NodeHybrid | Variant::NodeDirect) => ways[0].syns > 0,
        // Nothing should be there, which only time can tell.
        (
            Wire::Istioout | Wire::Istioin,
            Variant::None | Variant::Relay | Variant::Inpod | Variant::External(_),
        ) => false,
        _ if wire.privacy(variant, path) == Privacy::Silent => false,
        _ => ways.iter().all(|way| way.payload >= EXCHANGE),
    }
}

/// Makes the statements.
pub fn judge(variant: &Variant, path: Path, observed: &Observed) -> Proof {
    let mut statements = vec![
        Statement {
            claim: "traffic passes, every byte verified".to_owned(),
            holds: observed.failure.is_none(),
            found: match &observed.failure {
                Some(failure) => failure.clone(),
                None => format!("{} bytes compared", observed.bytes),
            },
        },
        Statement {
            claim: format!("the server sees the client's address {}", observed.client),
            holds: observed.client_seen == Some(IpAddr::V4(observed.client)),
            found: observed
                .client_seen
                .map_or_else(|| "no answer".to_owned(), |seen| seen.to_string()),
        },
    ];
    let mut taps = Vec::new();
    for (wire, label, heard) in &observed.wires {
        let read = Reading::of(heard, observed);
        let privacy = wire.privacy(variant, path);
        statements.extend(match privacy {
            Privacy::Encrypted => read.encrypted(label),
            Privacy::Readable => vec![read.readable(label)],
            Privacy::Relayed => relayed::statements(label, &heard.capture, &observed.marker),
            Privacy::Silent => vec![silent(label, &heard.capture)],
            Privacy::Counted => Vec::new(),
        });
        statements.push(whole(label, privacy, heard));
        let all = heard.capture.volume(|_| true);
        taps.push(Seen {
            tap: label.clone(),
            segments: all.segments,
            payload: all.payload,
            tls_records: read.records,
            ciphers: read.ciphers.into_iter().collect(),
            marker: read.marker.is_some(),
        });
    }

    let client_leg = leg(observed, Wire::ClientVeth, Wire::Istioout, PROOF_PORT);
    statements.push(through_istioout(variant, &client_leg));
    let tunnel_leg =
        (path == Path::CrossNode).then(|| leg(observed, Wire::Uplink, Wire::Istioin, TUNNEL_PORT));
    if let Some(leg) = &tunnel_leg {
        statements.push(through_istioin(variant, leg, observed));
    }
    Proof {
        variant: variant.clone(),
        path,
        statements,
        client_seen: observed.client_seen,
        taps,
        client_leg,
        tunnel_leg,
    }
}

/// What can be read on a wire.
struct Reading {
    marker: Option<Flow>,
    /// TLS records on the tunnel's ports.
    records: usize,
    ciphers: BTreeSet<String>,
    /// Payload on the tunnel's ports, to the server and back.
    tunnelled: [u64; 2],
    not_tls: Vec<String>,
    outside: Vec<String>,
}

impl Reading {
    fn of(heard: &Heard, observed: &Observed) -> Self {
        let capture = &heard.capture;
        let mut reading = Self {
            marker: capture.contains(&observed.marker),
            records: 0,
            ciphers: BTreeSet::new(),
            tunnelled: [
                capture.volume(|flow| *flow.to.ip() == observed.server && is_tunnel(flow)),
                capture.volume(|flow| *flow.from.ip() == observed.server && is_tunnel(flow)),
            ]
            .map(|volume| volume.payload),
            not_tls: Vec::new(),
            outside: Vec::new(),
        };
        for (flow, stream) in &capture.streams {
            let name = format!("{} to {}", flow.from, flow.to);
            if !is_tunnel(flow) {
                reading
                    .outside
                    .push(format!("{name}: {} bytes", stream.len()));
                continue;
            }
            reading.ciphers.extend(tls_records::cipher(stream));
            // A tunnel that stood before the tap was idle then, so that it is entered between two records.
            match tls_records::check(stream) {
                Ok(count) => reading.records += count,
                Err(error) => reading.not_tls.push(format!("{name}: {error}")),
            }
        }
        reading
    }

    fn marker_found(&self) -> String {
        self.marker.map_or_else(
            || "not seen".to_owned(),
            |flow| format!("seen from {} to {}", flow.from, flow.to),
        )
    }

    fn readable(&self, label: &str) -> Statement {
        Statement {
            claim: format!("{label}: the marker is visible"),
            holds: self.marker.is_some(),
            found: self.marker_found(),
        }
    }

    fn encrypted(&self, label: &str) -> Vec<Statement> {
        let enough = self.tunnelled.iter().all(|bytes| *bytes >= EXCHANGE);
        let [there, back] = self.tunnelled;
        vec![
            Statement {
                claim: format!("{label}: the marker is never in the clear"),
                holds: self.marker.is_none(),
                found: self.marker_found(),
            },
            Statement {
                claim: format!("{label}: port 15008 carries all, in TLS records only"),
                holds: enough && self.not_tls.is_empty(),
                found: if self.not_tls.is_empty() {
                    format!("{} records, {there} bytes there, {back} back", self.records)
                } else {
                    self.not_tls.join("; ")
                },
            },
            Statement {
                claim: format!("{label}: no TCP payload outside port 15008"),
                holds: self.outside.is_empty(),
                found: if self.outside.is_empty() {
                    "none".to_owned()
                } else {
                    self.outside.join("; ")
                },
            },
        ]
    }
}

fn silent(label: &str, capture: &Capture) -> Statement {
    let carried: Vec<String> = capture
        .volumes
        .iter()
        .filter(|(_, volume)| volume.payload > 0)
        .map(|(flow, volume)| format!("{} to {}: {} bytes", flow.from, flow.to, volume.payload))
        .collect();
    Statement {
        claim: format!("{label}: no TCP payload at all, not even a tunnel's"),
        holds: carried.is_empty(),
        found: if carried.is_empty() {
            "none".to_owned()
        } else {
            carried.join("; ")
        },
    }
}

fn is_tunnel(flow: &Flow) -> bool {
    TUNNEL_PORTS.contains(&flow.from.port()) || TUNNEL_PORTS.contains(&flow.to.port())
}

/// What was missed might be anything, so missing something is no proof. Where a part of a connection takes another way,
/// gaps are what should be.
fn whole(label: &str, privacy: Privacy, heard: &Heard) -> Statement {
    let beyond = heard.capture.beyond_gaps;
    Statement {
        claim: format!("{label}: no packet was missed"),
        holds: heard.dropped == 0 && (beyond == 0 || privacy == Privacy::Counted),
        found: match (heard.dropped, beyond) {
            (0, 0) => "none".to_owned(),
            (dropped, beyond) => {
                format!("{dropped} packets dropped by tcpdump, {beyond} bytes beyond gaps")
            }
        },
    }
}

/// How much of the payload to and from a port of the server passes through an overlay device.
fn leg(observed: &Observed, reference: Wire, overlay: Wire, port: u16) -> Leg {
    let volumes = |wanted: Wire| {
        let capture = observed
            .wires
            .iter()
            .find(|(wire, _, _)| *wire == wanted)
            .map(|(_, _, heard)| &heard.capture);
        let server = std::net::SocketAddrV4::new(observed.server, port);
        capture.map_or_else(Default::default, |capture| {
            [
                capture.volume(|flow| flow.to == server),
                capture.volume(|flow| flow.from == server),
            ]
        })
    };
    let (all, through): ([Volume; 2], [Volume; 2]) = (volumes(reference), volumes(overlay));
    Leg {
        payload: all.map(|volume| volume.payload),
        through_overlay: through.map(|volume| volume.payload),
        segments: through.map(|volume| volume.segments),
        syns: through[0].syns,
        reference_syns: all[0].syns,
    }
}

fn through_istioout(variant: &Variant, leg: &Leg) -> Statement {
    let begun = leg.syns >= CONNECTIONS;
    through(variant, leg, "istioout on the client's node", begun)
}

fn through_istioin(variant: &Variant, leg: &Leg, observed: &Observed) -> Statement {
    // A tunnel that stood before the proof began through the overlay, or never.
    let begun = if leg.reference_syns > 0 {
        leg.syns > 0
    } else {
        observed.istioin_ever > 0
    };
    through(variant, leg, "istioin on the server's node", begun)
}

fn through(variant: &Variant, leg: &Leg, device: &str, begun: bool) -> Statement {
    let shares = leg.shares();
    // A share of the few bytes that an idle tunnel carries says nothing about what was sent.
    let enough = leg.payload.iter().all(|bytes| *bytes >= EXCHANGE);
    let all = |fits: fn(f64) -> bool| enough && shares.iter().all(|share| share.is_some_and(fits));
    let (claim, holds) = match variant {
        Variant::NodeTunnel => (
            format!(
                "at least {:.0} % of the payload through {device}",
                TUNNEL_SHARE * 100.0
            ),
            all(|share| share >= TUNNEL_SHARE),
        ),
        Variant::NodeHybrid | Variant::NodeDirect => (
            format!(
                "the SYN, and at most {:.0} % of the payload, through {device}",
                HYBRID_SHARE * 100.0
            ),
            begun && all(|share| share <= HYBRID_SHARE),
        ),
        Variant::Inpod | Variant::Relay | Variant::None | Variant::External(_) => {
            (format!("nothing through {device}"), leg.segments == [0, 0])
        }
    };
    let percent = |share: Option<f64>| {
        share.map_or_else(|| "-".to_owned(), |share| format!("{:.2} %", share * 100.0))
    };
    Statement {
        claim,
        holds,
        found: format!(
            "{} of {} bytes there, {} of {} back, {} segments, {} SYNs",
            percent(shares[0]),
            leg.payload[0],
            percent(shares[1]),
            leg.payload[1],
            leg.segments[0] + leg.segments[1],
            leg.syns
        ),
    }
}

#[cfg(test)]
mod tests;
