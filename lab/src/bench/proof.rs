//! Proof of the path: what was on the wire, who the server saw, how much went through the overlay.
//!
//! Every statement is made from packets that tcpdump captured and from device counters, never from what a proxy says.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path as FilePath, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use serde::Serialize;

use super::case::{CLIENT, Path};
use super::load::{Running, output_of};
use super::pcap::Capture;
use super::tls_records;
use super::variant::Variant;
use crate::topology::{Node, Pod, Topology};
use crate::traffic::{Check, Outcome, TrafficCommand};

/// Bytes sent in each direction to see how many of them pass through the overlay.
const EXCHANGE: u64 = 8 << 20;
/// Port of the traffic server that the proof talks to; the loads use others.
pub const PROOF_PORT: u16 = 8090;
/// HBONE, and HBONE between two pods of a node over the proxy's loopback.
const TUNNEL_PORTS: [u16; 2] = [15008, 15088];
/// With the flow `tunnel`, at least this share of a leg passes through the overlay in each direction.
const TUNNEL_SHARE: f64 = 0.95;
/// With the flow `hybrid`, at most this share of the payload does.
const HYBRID_SHARE: f64 = 0.01;

/// One statement about the path, and whether it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Statement {
    /// What should be.
    pub claim: String,
    /// Whether it is.
    pub holds: bool,
    /// What was found.
    pub found: String,
}

/// All statements about one variant on one path.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Proof {
    /// Variant.
    pub variant: Variant,
    /// Path.
    pub path: Path,
    /// Statements; a proof holds when all do.
    pub statements: Vec<Statement>,
    /// Share of the client leg's payload that passed through `istioout`, client to server and back.
    pub istioout_share: [f64; 2],
    /// Share of the tunnel's payload that passed through `istioin` on the server's node, there and back.
    pub istioin_share: [f64; 2],
}

impl Proof {
    /// Whether every statement holds.
    pub fn holds(&self) -> bool {
        self.statements.iter().all(|statement| statement.holds)
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{} {}: {}",
            self.variant,
            self.path,
            if self.holds() { "proven" } else { "NOT PROVEN" }
        )?;
        for statement in &self.statements {
            let sign = if statement.holds { "ok  " } else { "FAIL" };
            writeln!(f, "  {sign} {}: {}", statement.claim, statement.found)?;
        }
        Ok(())
    }
}

/// Counters of a device: bytes and packets received and sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counters {
    /// Bytes received.
    pub rx_bytes: u64,
    /// Packets received.
    pub rx_packets: u64,
    /// Bytes sent.
    pub tx_bytes: u64,
    /// Packets sent.
    pub tx_packets: u64,
}

/// Counters of a device, or zeros when there is no such device.
pub fn counters(netns: &Netns, device: &str) -> Result<Counters> {
    // `/proc/net` belongs to the process's main thread; this one is in the namespace.
    let text = netns.run(|| std::fs::read_to_string("/proc/thread-self/net/dev"))??;
    Ok(parse_counters(&text, device).unwrap_or_default())
}

fn parse_counters(text: &str, device: &str) -> Option<Counters> {
    let fields = text
        .lines()
        .find_map(|line| line.trim_start().strip_prefix(device)?.strip_prefix(':'))?;
    let numbers: Vec<u64> = fields
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let &[
        rx_bytes,
        rx_packets,
        _,
        _,
        _,
        _,
        _,
        _,
        tx_bytes,
        tx_packets,
        ..,
    ] = numbers.as_slice()
    else {
        return None;
    };
    Some(Counters {
        rx_bytes,
        rx_packets,
        tx_bytes,
        tx_packets,
    })
}

/// Where and with what a proof is made.
#[derive(Debug)]
pub struct Scene<'a> {
    /// The lab.
    pub topology: &'a Topology,
    /// The program that has `lab traffic`.
    pub ambidex: &'a FilePath,
    /// Directory for captures.
    pub directory: PathBuf,
}

/// A device to be listened on.
struct Tap {
    label: String,
    netns: Netns,
    device: String,
}

struct Wire {
    label: String,
    capture: Capture,
}

impl Scene<'_> {
    /// Sends marked traffic and judges what was seen of it.
    pub fn prove(&self, variant: Variant, path: Path) -> Result<Proof> {
        let (client_node, client) = self.pod(CLIENT)?;
        let (server_node, server) = self.pod(path.server())?;
        let client_netns = open(&client.netns)?;
        let to = SocketAddr::new(IpAddr::V4(server.ip), PROOF_PORT);
        let (near, far) = (open(&client_node.netns)?, open(&server_node.netns)?);

        let taps = taps(variant, path, client_node, client)?;
        std::fs::create_dir_all(&self.directory)?;
        let listening: Vec<(Tap, PathBuf, Running)> = taps
            .into_iter()
            .enumerate()
            .map(|(index, tap)| {
                let file = self
                    .directory
                    .join(format!("{variant}-{path}-{index}.pcap"));
                let arguments = [
                    "-i",
                    &tap.device,
                    "-s",
                    "0",
                    "-B",
                    "65536",
                    "-U",
                    "-Z",
                    "root",
                    "-w",
                    utf8(&file)?,
                    "tcp",
                ];
                let running = Running::start_until_it_says(
                    &tap.netns,
                    "tcpdump",
                    &arguments,
                    "listening on",
                )?;
                Ok((tap, file, running))
            })
            .collect::<Result<_>>()?;

        let marker = format!("ambidex-{:032x}", rand::random::<u128>());
        let who = self.check(&client_netns, to, Check::Who)?;
        let marked = self.check(
            &client_netns,
            to,
            Check::Marker {
                marker: Some(marker.clone()),
            },
        )?;
        let before = (counters(&near, "istioout")?, counters(&far, "istioin")?);
        let exchange = self.check(
            &client_netns,
            to,
            Check::Exchange {
                up: EXCHANGE,
                down: EXCHANGE,
            },
        )?;
        let after = (counters(&near, "istioout")?, counters(&far, "istioin")?);

        // What is still on its way into the files.
        std::thread::sleep(Duration::from_millis(200));
        let mut wires = Vec::new();
        for (tap, file, running) in listening {
            running
                .stop()
                .with_context(|| format!("tcpdump on {}", tap.label))?;
            let capture = Capture::parse(&std::fs::read(&file)?)
                .with_context(|| format!("capture of {}", tap.label))?;
            std::fs::remove_file(&file)?;
            wires.push(Wire {
                label: tap.label,
                capture,
            });
        }

        let share = |bytes: u64| bytes as f64 / EXCHANGE as f64;
        let (out, inward) = (difference(before.0, after.0), difference(before.1, after.1));
        let istioout_share = [share(out.tx_bytes), share(out.rx_bytes)];
        let istioin_share = [share(inward.tx_bytes), share(inward.rx_bytes)];
        let mut statements = vec![
            Statement {
                claim: "traffic passes, every byte verified".to_owned(),
                holds: marked.ok && exchange.ok,
                found: match marked.error.or(exchange.error) {
                    Some(error) => error,
                    None => format!("{} bytes compared", exchange.bytes),
                },
            },
            Statement {
                claim: format!("the server sees the client's address {}", client.ip),
                holds: who
                    .seen
                    .is_some_and(|seen| seen.ip() == IpAddr::V4(client.ip)),
                found: who
                    .seen
                    .map_or_else(|| "no answer".to_owned(), |seen| seen.ip().to_string()),
            },
        ];
        for wire in &wires {
            statements.extend(on_the_wire(variant, wire, marker.as_bytes()));
        }
        statements.extend(through_the_overlay(
            variant,
            path,
            istioout_share,
            istioin_share,
            after,
        ));
        Ok(Proof {
            variant,
            path,
            statements,
            istioout_share,
            istioin_share,
        })
    }

    fn pod(&self, name: &str) -> Result<(&Node, &Pod)> {
        self.topology
            .pod(name)
            .with_context(|| format!("the lab has no pod {name}"))
    }

    /// Runs one check from a pod as a process of its own. A failed check is a result, not an error.
    pub fn check(&self, netns: &Netns, to: SocketAddr, check: Check) -> Result<Outcome> {
        let command = TrafficCommand::client(to, check).to_json()?;
        // The outcome is printed with exit code 1 too, so the shell turns the code into success.
        let line = output_of(
            netns,
            "sh",
            &[
                "-c",
                "\"$0\" lab traffic \"$1\" || true",
                utf8(self.ambidex)?,
                &command,
            ],
            Duration::from_secs(60),
        )?;
        serde_json::from_str(line.trim())
            .with_context(|| format!("the traffic client printed {line:?}"))
    }
}

fn utf8(path: &FilePath) -> Result<&str> {
    path.to_str()
        .with_context(|| format!("{} is not UTF-8", path.display()))
}

fn open(name: &str) -> Result<Netns> {
    Ok(Netns::open(Netns::path_of(name))?)
}

fn difference(before: Counters, after: Counters) -> Counters {
    Counters {
        rx_bytes: after.rx_bytes - before.rx_bytes,
        rx_packets: after.rx_packets - before.rx_packets,
        tx_bytes: after.tx_bytes - before.tx_bytes,
        tx_packets: after.tx_packets - before.tx_packets,
    }
}

/// The devices on which nothing of a captured connection may be in the clear.
fn taps(variant: Variant, path: Path, node: &Node, client: &Pod) -> Result<Vec<Tap>> {
    let uplink = Tap {
        label: format!("{} eth0 (uplink)", node.name),
        netns: open(&node.netns)?,
        device: "eth0".to_owned(),
    };
    let pod_veth = Tap {
        label: format!("{} {} (veth of {})", node.name, client.veth, client.name),
        netns: open(&node.netns)?,
        device: client.veth.clone(),
    };
    Ok(match (variant, path) {
        // In the pod: nothing leaves it in the clear.
        (Variant::Inpod, Path::CrossNode) => vec![uplink, pod_veth],
        (Variant::Inpod | Variant::None, Path::SameNode) => vec![pod_veth],
        (Variant::None, Path::CrossNode) => vec![uplink],
        // On the node: from the pod to the proxy it is in the clear, between proxies it is not.
        (Variant::NodeHybrid | Variant::NodeTunnel, Path::CrossNode) => vec![uplink],
        (Variant::NodeHybrid | Variant::NodeTunnel, Path::SameNode) => vec![Tap {
            label: format!("{} lo", node.proxy_name),
            netns: open(&node.proxy_netns)?,
            device: "lo".to_owned(),
        }],
    })
}

fn on_the_wire(variant: Variant, wire: &Wire, marker: &[u8]) -> Vec<Statement> {
    let label = &wire.label;
    let clear = wire.capture.contains(marker);
    let whole = Statement {
        claim: format!("{label}: the capture has no gaps"),
        holds: wire.capture.beyond_gaps == 0,
        found: format!("{} bytes beyond gaps", wire.capture.beyond_gaps),
    };
    if variant == Variant::None {
        // The control: without a mesh the tap does see the marker, so not seeing it elsewhere means something.
        return vec![
            Statement {
                claim: format!("{label}: the marker is visible"),
                holds: clear.is_some(),
                found: clear.map_or_else(
                    || "not seen".to_owned(),
                    |flow| format!("seen from {} to {}", flow.from, flow.to),
                ),
            },
            whole,
        ];
    }
    let mut others = BTreeMap::new();
    let mut tunnels = 0;
    let mut not_tls = Vec::new();
    let mut records = 0;
    for (flow, stream) in &wire.capture.streams {
        if TUNNEL_PORTS.contains(&flow.from.port()) || TUNNEL_PORTS.contains(&flow.to.port()) {
            tunnels += 1;
            // A tunnel that stood before the tap was idle then, so that it is entered between two records.
            match tls_records::check(stream) {
                Ok(count) => records += count,
                Err(error) => not_tls.push(format!("{} → {}: {error}", flow.from, flow.to)),
            }
        } else {
            others.insert(format!("{} → {}", flow.from, flow.to), stream.len());
        }
    }
    vec![
        Statement {
            claim: format!("{label}: the marker is never in the clear"),
            holds: clear.is_none(),
            found: clear.map_or_else(
                || "not seen".to_owned(),
                |flow| format!("seen from {} to {}", flow.from, flow.to),
            ),
        },
        Statement {
            claim: format!("{label}: port 15008 carries TLS records only"),
            holds: tunnels >= 2 && not_tls.is_empty(),
            found: if not_tls.is_empty() {
                format!("{records} records in {tunnels} directions")
            } else {
                not_tls.join("; ")
            },
        },
        Statement {
            claim: format!("{label}: no TCP payload outside port 15008"),
            holds: others.is_empty(),
            found: if others.is_empty() {
                "none".to_owned()
            } else {
                others
                    .iter()
                    .map(|(flow, bytes)| format!("{flow}: {bytes} bytes"))
                    .collect::<Vec<_>>()
                    .join("; ")
            },
        },
        whole,
    ]
}

fn through_the_overlay(
    variant: Variant,
    path: Path,
    istioout: [f64; 2],
    istioin: [f64; 2],
    counters: (Counters, Counters),
) -> Vec<Statement> {
    let percent = |shares: [f64; 2]| {
        format!(
            "{:.2} % there, {:.2} % back",
            shares[0] * 100.0,
            shares[1] * 100.0
        )
    };
    let mut legs = vec![("istioout on the client's node", istioout, counters.0)];
    if path == Path::CrossNode {
        legs.push(("istioin on the server's node", istioin, counters.1));
    }
    legs.into_iter()
        .map(|(device, shares, counters)| {
            let (claim, holds) = match variant {
                Variant::NodeTunnel => (
                    format!(
                        "at least {:.0} % of the payload through {device}",
                        TUNNEL_SHARE * 100.0
                    ),
                    shares.iter().all(|share| *share >= TUNNEL_SHARE),
                ),
                Variant::NodeHybrid => (
                    format!(
                        "first packets, and at most {:.0} % of the payload, through {device}",
                        HYBRID_SHARE * 100.0
                    ),
                    counters.tx_packets > 0 && shares[0] + shares[1] <= 2.0 * HYBRID_SHARE,
                ),
                Variant::Inpod | Variant::None => (
                    format!("nothing through {device}"),
                    counters == Counters::default(),
                ),
            };
            Statement {
                claim,
                holds,
                found: format!("{}, {} packets sent", percent(shares), counters.tx_packets),
            }
        })
        .collect()
}

/// Fails unless every proof holds.
pub fn require(proofs: &[Proof]) -> Result<()> {
    let failed: Vec<String> = proofs
        .iter()
        .filter(|proof| !proof.holds())
        .map(ToString::to_string)
        .collect();
    if failed.is_empty() {
        Ok(())
    } else {
        bail!(
            "the path of the bytes is not proven:\n{}",
            failed.join("\n")
        )
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddrV4};

    use super::*;
    use crate::bench::pcap::Flow;

    fn wire(port: u16, payload: &[u8]) -> Wire {
        let pod = |last, port| SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, last), port);
        let (client, server) = (pod(10, 40000), pod(11, port));
        let mut capture = Capture::default();
        capture.streams.insert(
            Flow {
                from: client,
                to: server,
            },
            payload.to_vec(),
        );
        capture.streams.insert(
            Flow {
                from: server,
                to: client,
            },
            payload.to_vec(),
        );
        Wire {
            label: "tap".to_owned(),
            capture,
        }
    }

    fn holds(statements: &[Statement]) -> bool {
        statements.iter().all(|statement| statement.holds)
    }

    const DATA: &[u8] = &[23, 3, 3, 0, 3, b'x', b'y', b'z'];

    #[test]
    fn only_tls_on_15008_is_a_proof() {
        assert!(holds(&on_the_wire(
            Variant::Inpod,
            &wire(15008, DATA),
            b"marker"
        )));
        assert!(
            !holds(&on_the_wire(Variant::Inpod, &wire(8080, DATA), b"marker")),
            "payload beside the tunnel"
        );
        assert!(
            !holds(&on_the_wire(
                Variant::Inpod,
                &wire(15008, b"CONNECT marker"),
                b"marker"
            )),
            "no TLS"
        );
        assert!(
            !holds(&on_the_wire(Variant::Inpod, &wire(15008, DATA), b"xyz")),
            "marker visible"
        );
        let silent = Wire {
            label: "tap".to_owned(),
            capture: Capture::default(),
        };
        assert!(
            !holds(&on_the_wire(Variant::Inpod, &silent, b"marker")),
            "nothing seen is no proof"
        );
    }

    #[test]
    fn without_a_mesh_the_marker_must_be_seen() {
        assert!(holds(&on_the_wire(
            Variant::None,
            &wire(8080, b"a marker b"),
            b"marker"
        )));
        assert!(!holds(&on_the_wire(
            Variant::None,
            &wire(8080, b"nothing"),
            b"marker"
        )));
    }

    #[test]
    fn the_share_through_the_overlay_tells_the_flows_apart() {
        let used = Counters {
            tx_packets: 1,
            tx_bytes: 60,
            ..Counters::default()
        };
        let judge = |variant, shares, counters| {
            holds(&through_the_overlay(
                variant,
                Path::CrossNode,
                shares,
                shares,
                (counters, counters),
            ))
        };
        assert!(judge(Variant::NodeTunnel, [1.02, 1.01], used));
        assert!(!judge(Variant::NodeTunnel, [1.02, 0.5], used));
        assert!(!judge(Variant::NodeTunnel, [0.0, 0.0], used));
        assert!(judge(Variant::NodeHybrid, [0.0, 0.0], used));
        assert!(!judge(Variant::NodeHybrid, [1.0, 0.0], used));
        assert!(
            !judge(Variant::NodeHybrid, [0.0, 0.0], Counters::default()),
            "not even the first packet"
        );
        assert!(judge(Variant::Inpod, [0.0, 0.0], Counters::default()));
        assert!(!judge(Variant::Inpod, [0.0, 0.0], used));
    }

    #[test]
    fn counters_are_read_by_device() {
        let text = "Inter-|   Receive\n face |bytes\n istioout: 10 2 0 0 0 0 0 0 30 4 0 0 0 0 0 0\n    lo: 1 1 0 0 0 0 0 0 1 1 0 0 0 0 0 0\n";
        let found = parse_counters(text, "istioout").unwrap();
        assert_eq!(
            found,
            Counters {
                rx_bytes: 10,
                rx_packets: 2,
                tx_bytes: 30,
                tx_packets: 4
            }
        );
        assert!(parse_counters(text, "istioin").is_none());
    }
}
