//! Proof of the path: what was on the wire, who the server saw, how much went through the overlay.
//!
//! Every statement is made from packets that tcpdump captured and from what the server saw, never from what a proxy says.
//! [`prove`] sends marked traffic through a standing lab and listens meanwhile; [`judge`] makes the statements.

pub mod judge;

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use serde::{Deserialize, Serialize};

use super::case::{CLIENT, Path};
pub use super::counters::{Counters, of as counters};
use super::counters::{ISTIOIN, ISTIOOUT, exists};
use super::interrupt;
use super::pcap::Capture;
use super::tap::{self, Tap};
use super::variant::Variant;
use crate::standing::Lab;
use crate::topology::{Node, Pod};
use crate::traffic::{Check, ClientOptions, Outcome};
use judge::{EXCHANGE, Observed, Wire, is_complete};

/// Port of the traffic server that the proof talks to; the loads use others.
pub const PROOF_PORT: u16 = 8090;
/// Longest that one check may take.
const CHECK_LIMIT_MS: u64 = 20_000;

/// One statement about the path, and whether it holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statement {
    /// What should be.
    pub claim: String,
    /// Whether it is.
    pub holds: bool,
    /// What was found.
    pub found: String,
}

/// How much of a leg passed through the overlay device on it. Of every pair, the first is from client to server.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leg {
    /// Bytes of payload on the leg.
    pub payload: [u64; 2],
    /// Bytes of payload that passed through the overlay.
    pub through_overlay: [u64; 2],
    /// Segments that passed through the overlay, with and without payload.
    pub segments: [u64; 2],
    /// Connections that began on the leg.
    pub reference_syns: u64,
    /// Connections that began through the overlay.
    pub syns: u64,
}

impl Leg {
    /// Share of the payload that passed through the overlay; none where there was no payload.
    pub fn shares(&self) -> [Option<f64>; 2] {
        [0, 1].map(|way| {
            (self.payload[way] > 0)
                .then(|| self.through_overlay[way] as f64 / self.payload[way] as f64)
        })
    }
}

/// What was seen on one device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Where.
    pub tap: String,
    /// TCP segments captured.
    pub segments: u64,
    /// Bytes of TCP payload captured.
    pub payload: u64,
    /// TLS records on the ports of the tunnel.
    pub tls_records: usize,
    /// Ciphers of the TLS handshakes that were seen.
    pub ciphers: Vec<String>,
    /// Whether the marker was there to be read.
    pub marker: bool,
}

/// All statements about one variant on one path, and the facts that they were made from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Proof {
    /// Variant.
    pub variant: Variant,
    /// Path.
    pub path: Path,
    /// Statements; a proof holds when all do.
    pub statements: Vec<Statement>,
    /// Address of the client as the server saw it.
    pub client_seen: Option<IpAddr>,
    /// What was seen where.
    pub taps: Vec<Seen>,
    /// From the client's pod to its proxy, or all the way without one; the overlay is `istioout` on the client's node.
    pub client_leg: Leg,
    /// Port 15008 on the server's node, where the overlay is `istioin`; only across nodes.
    pub tunnel_leg: Option<Leg>,
}

impl Proof {
    /// Whether every statement holds.
    pub fn holds(&self) -> bool {
        self.statements.iter().all(|statement| statement.holds)
    }

    /// The statements that do not hold.
    pub fn failed(&self) -> impl Iterator<Item = &Statement> {
        self.statements.iter().filter(|statement| !statement.holds)
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for statement in &self.statements {
            writeln!(
                f,
                "{} {} {}: {}: {}",
                if statement.holds { "ok  " } else { "FAIL" },
                self.variant,
                self.path,
                statement.claim,
                statement.found
            )?;
        }
        Ok(())
    }
}

/// Fails unless every proof holds; the error names what does not.
///
/// # Errors
/// See above.
pub fn require(proofs: &[Proof]) -> Result<()> {
    let failed: Vec<String> = proofs
        .iter()
        .flat_map(|proof| {
            proof.failed().map(move |statement| {
                format!(
                    "{} {}: {}: {}",
                    proof.variant, proof.path, statement.claim, statement.found
                )
            })
        })
        .collect();
    if failed.is_empty() {
        return Ok(());
    }
    bail!(
        "the path of the bytes is not proven:\n  {}",
        failed.join("\n  ")
    )
}

/// Sends marked traffic through a lab from [`CLIENT`] to the path's server, and judges what was seen of it as if the lab
/// were one of `variant`. Nothing else may talk between the two pods meanwhile.
///
/// # Errors
/// When the proof cannot be made. A proof that does not hold is not an error: [`Proof::holds`].
pub fn prove(lab: &Lab, variant: &Variant, path: Path) -> Result<Proof> {
    let topology = lab.topology();
    let pod = |name: &str| -> Result<(&Node, &Pod)> {
        topology
            .pod(name)
            .with_context(|| format!("the lab has no pod {name}"))
    };
    let (client_node, client) = pod(CLIENT)?;
    let (server_node, server) = pod(path.server())?;
    let to = SocketAddr::new(IpAddr::V4(server.ip), PROOF_PORT);
    let _server = lab.serve(&server.name, PROOF_PORT)?;

    let ends = ((client_node, client), (server_node, server));
    let wires = wires(variant, path, ends)?;
    let mut taps = Vec::new();
    for (wire, netns, device) in wires {
        let label = wire.label(ends.0, ends.1);
        taps.push((wire, Tap::start(&netns, &device, label, file(lab)?)?));
    }

    let marker = format!("ambidex-{:032x}", rand::random::<u128>());
    let check = |check: Check| -> Result<Outcome> {
        interrupt::check()?;
        let options = ClientOptions {
            to,
            timeout_ms: CHECK_LIMIT_MS,
            from_port: None,
            check,
        };
        lab.traffic(CLIENT, &options)
    };
    let mut outcomes: Vec<Outcome> = Vec::new();
    for wanted in [
        Check::Who,
        Check::Marker {
            marker: Some(marker.clone()),
        },
        Check::Exchange {
            up: EXCHANGE,
            down: EXCHANGE,
        },
    ] {
        // After a failure nothing more can be proven.
        if outcomes.iter().all(|outcome| outcome.ok) {
            outcomes.push(check(wanted)?);
        }
    }
    let failure = outcomes
        .iter()
        .find(|outcome| !outcome.ok)
        .map(|outcome| outcome.error.clone().unwrap_or_default());

    let mut observed = Observed {
        client: client.ip,
        server: server.ip,
        marker: marker.into_bytes(),
        failure,
        bytes: outcomes.last().map_or(0, |outcome| outcome.bytes),
        client_seen: outcomes
            .iter()
            .find_map(|outcome| outcome.seen)
            .map(|seen| seen.ip()),
        istioin_ever: counters(&open(&server_node.netns)?, ISTIOIN)?.tx_packets,
        wires: Vec::new(),
    };
    let deadline = Instant::now() + tap::DRAIN;
    for (wire, tap) in taps {
        let complete = |capture: &Capture| is_complete(variant, path, wire, capture, server.ip);
        let heard = tap.finish(deadline, complete)?;
        let label = wire.label(ends.0, ends.1);
        observed.wires.push((wire, label, heard));
    }
    Ok(judge::judge(variant, path, &observed))
}

fn file(lab: &Lab) -> Result<std::path::PathBuf> {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let directory = lab.dir().join("captures");
    std::fs::create_dir_all(&directory)?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    Ok(directory.join(format!("{number}.pcap")))
}

fn open(name: &str) -> Result<Netns> {
    Ok(Netns::open(Netns::path_of(name))?)
}

/// What is listened on: the wire, the namespace and the device.
fn wires(
    variant: &Variant,
    path: Path,
    ((client_node, client), (server_node, server)): ((&Node, &Pod), (&Node, &Pod)),
) -> Result<Vec<(Wire, Netns, String)>> {
    let near = || open(&client_node.netns);
    let mut wires = vec![(Wire::ClientVeth, near()?, client.veth.clone())];
    if path == Path::CrossNode {
        wires.push((Wire::Uplink, near()?, "eth0".to_owned()));
    } else if variant.is_node() {
        let proxy = open(&client_node.proxy_netns)?;
        wires.push((Wire::ProxyLoopback, proxy, "lo".to_owned()));
        if *variant == Variant::NodeDirect {
            // Where the proxy hands over there is no tunnel to look at; so it is shown where the bytes are and are not.
            wires.push((Wire::ServerVeth, near()?, server.veth.clone()));
            wires.push((Wire::Uplink, near()?, "eth0".to_owned()));
        }
    }
    let mut overlays = vec![(Wire::Istioout, near()?, ISTIOOUT)];
    if path == Path::CrossNode {
        overlays.push((Wire::Istioin, open(&server_node.netns)?, ISTIOIN));
    }
    for (wire, netns, device) in overlays {
        // Without the device nothing can pass through it.
        if exists(&netns, device)? {
            wires.push((wire, netns, device.to_owned()));
        }
    }
    Ok(wires)
}
