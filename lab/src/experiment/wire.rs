//! Packets in the clear, on every device where a pod's bytes could pass in the clear, judged as they come: the memory that
//! this takes does not depend on how many there are.
//!
//! Two kinds of devices are listened on. On a wire between nodes, or to the outside, every TCP segment from or to a pod
//! that is no tunnel's (port 15008) is in the clear. On the node's end of a pod's veth, segments pass in the clear where
//! all is well: between a pod that the node captures and the node's proxy, and from the proxy to the application. Only a
//! segment that comes to an application from the port of a client (proxies that speak with a client's address have ports
//! of their own below) has met no proxy.
//!
//! A device on which nothing is heard proves nothing, so each listener must have heard a knock before the load begins: a
//! segment to a port that nobody serves, by a way that no capture touches.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::process::{ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use serde::{Deserialize, Serialize};

use super::engine::CLIENT_PORTS;
use crate::bench::load::Running;
use crate::bench::tap::{DRAIN, all_that_it_says, dropped, until_it_listens};
use crate::topology::{APPLICATION_PORT, CLUSTER_CIDR};

/// Port of tunnels.
pub const HBONE: u16 = 15008;
/// Where knocks go: discard (RFC 863), which nobody serves.
pub const KNOCK: u16 = 9;
/// Bytes of a packet that are looked at: the headers with all options.
const SNAPLEN: &str = "134";
/// Size of tcpdump's ring in KiB.
const RING_KIB: &str = "16384";
/// Flows that are told apart on a device; what comes beyond is counted together.
const MOST_FLOWS: usize = 20_000;
/// Largest packet that a capture may hold; more is no capture.
const MOST_BYTES: usize = 1 << 18;

/// What a device is to the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Place {
    /// A wire between nodes or to the outside, with its tunnels.
    Wire,
    /// The same, heard elsewhere already: without the tunnels.
    FarEnd,
    /// The node's end of a pod's veth.
    Pod,
}

impl Place {
    fn filter(self, pod: Option<Ipv4Addr>) -> String {
        let (first, last) = (CLIENT_PORTS.start(), CLIENT_PORTS.end());
        match self {
            // What leaves for the outside has the node's address, so a knock has, too.
            Place::Wire => format!("tcp and (net {CLUSTER_CIDR} or port {KNOCK})"),
            Place::FarEnd => format!("tcp and net {CLUSTER_CIDR} and not port {HBONE}"),
            Place::Pod => {
                let into = pod.map_or_else(String::new, |ip| format!("dst host {ip} and "));
                format!(
                    "tcp and {into}(dst port {KNOCK} or (dst port {APPLICATION_PORT} and src portrange {first}-{last}))"
                )
            }
        }
    }
}

/// What was heard on a device.
#[derive(Debug, Clone, Default)]
pub struct Heard {
    /// Segments.
    pub packets: u64,
    /// Segments of tunnels.
    pub tunnel: u64,
    /// Knocks.
    pub knocks: u64,
    /// Segments in the clear, by connection.
    pub clear: BTreeMap<Flow, Clear>,
    /// Segments in the clear of connections beyond those that are told apart.
    pub beyond: u64,
    /// Segments that passed the device and were not heard.
    pub missed: u64,
}

/// A connection on a device, from the one who asks to the one who serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// The client.
    pub from: SocketAddrV4,
    /// The server.
    pub to: SocketAddrV4,
}

/// Segments of one connection in the clear. Instants are microseconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clear {
    /// How many, in both directions.
    pub packets: u64,
    /// When the first one passed.
    pub first_us: u64,
    /// When the last one passed.
    pub last_us: u64,
}

/// A device that is being listened on.
#[derive(Debug)]
pub struct Listener {
    /// `node1 eth0`.
    pub device: String,
    /// What it is.
    pub place: Place,
    heard: Arc<Mutex<Heard>>,
    running: Running,
    reader: JoinHandle<Result<()>>,
    stderr: JoinHandle<String>,
}

impl Listener {
    /// Listens from now on; on a pod's veth, to what comes to this address.
    ///
    /// # Errors
    /// When tcpdump cannot listen on the device; with what it says.
    pub fn start(
        netns: &Netns,
        target: &str,
        device: &str,
        place: Place,
        pod: Option<Ipv4Addr>,
    ) -> Result<Self> {
        let label = format!("{target} {device}");
        let mut command = Command::new("tcpdump");
        command
            .args([
                "-i", device, "-n", "-p", "-s", SNAPLEN, "-B", RING_KIB, "-U",
            ])
            .args(["-Z", "root", "-w", "-", &place.filter(pod)])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = netns
            .run(|| command.spawn())?
            .context("cannot start tcpdump: is it installed? (`make deps`)")?;
        let stdout = child.stdout.take();
        let said = until_it_listens(&mut child);
        let stderr = child.stderr.take();
        let running = Running::new(child);
        let said = said.with_context(|| format!("tcpdump on {label}"))?;
        let stdout = stdout.context("no standard output")?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let reader = std::thread::spawn({
            let heard = Arc::clone(&heard);
            move || listen(stdout, &heard)
        });
        let stderr = all_that_it_says(said, stderr);
        Ok(Self {
            device: label,
            place,
            heard,
            running,
            reader,
            stderr,
        })
    }

    /// Knocks that have been heard.
    pub fn knocks(&self) -> u64 {
        lock(&self.heard).knocks
    }

    /// Ends listening, once what has passed by then has been heard.
    ///
    /// # Errors
    /// When tcpdump does not end, wrote no capture, or does not say what it missed.
    pub fn finish(self) -> Result<Heard> {
        let device = self.device;
        self.running
            .stop()
            .with_context(|| format!("tcpdump on {device}"))?;
        match self.reader.join() {
            Ok(read) => read.with_context(|| format!("capture of {device}"))?,
            Err(_) => bail!("the capture of {device} is lost"),
        }
        let said = self.stderr.join().unwrap_or_default();
        let missed = dropped(&said)
            .with_context(|| format!("tcpdump on {device} does not say what it missed: {said}"))?;
        let mut heard = lock(&self.heard).clone();
        heard.missed = missed;
        Ok(heard)
    }
}

/// How long the last packets take from the device to here at most.
pub fn drain_time() -> Duration {
    DRAIN
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Judges packets until the capture ends.
fn listen(mut from: ChildStdout, heard: &Mutex<Heard>) -> Result<()> {
    let mut from = std::io::BufReader::with_capacity(1 << 16, &mut from);
    let mut header = [0; 24];
    from.read_exact(&mut header)
        .context("beginning of a capture")?;
    // tcpdump writes in the machine's own byte order, times in microseconds unless it is told otherwise.
    if header[..4] != 0xa1b2_c3d4_u32.to_ne_bytes() || header[20..] != 1_u32.to_ne_bytes() {
        bail!("not a capture of Ethernet in microseconds");
    }
    let (mut head, mut frame) = ([0; 16], Vec::new());
    while from.read_exact(&mut head).is_ok() {
        let number = |at: usize| {
            let bytes: [u8; 4] = [head[at], head[at + 1], head[at + 2], head[at + 3]];
            u32::from_ne_bytes(bytes)
        };
        let length = number(8) as usize;
        if length > MOST_BYTES {
            bail!("a packet of {length} bytes");
        }
        frame.resize(length, 0);
        if from.read_exact(&mut frame).is_err() {
            break;
        }
        let at_us = u64::from(number(0)) * 1_000_000 + u64::from(number(4));
        lock(heard).judge(segment(&frame), at_us);
    }
    Ok(())
}

impl Heard {
    fn judge(&mut self, segment: Option<Flow>, at_us: u64) {
        self.packets += 1;
        let Some(Flow { from, to }) = segment else {
            return;
        };
        let ports = [from.port(), to.port()];
        if ports.contains(&HBONE) {
            self.tunnel += 1;
            return;
        }
        if ports.contains(&KNOCK) {
            self.knocks += 1;
            return;
        }
        let asks = to.port() == APPLICATION_PORT || from.port() != APPLICATION_PORT;
        let flow = if asks {
            Flow { from, to }
        } else {
            Flow { from: to, to: from }
        };
        if self.clear.len() >= MOST_FLOWS && !self.clear.contains_key(&flow) {
            self.beyond += 1;
            return;
        }
        let clear = self.clear.entry(flow).or_insert(Clear {
            packets: 0,
            first_us: at_us,
            last_us: at_us,
        });
        clear.packets += 1;
        clear.first_us = clear.first_us.min(at_us);
        clear.last_us = clear.last_us.max(at_us);
    }
}

/// Sender and receiver of a TCP segment in an Ethernet frame with IPv4.
fn segment(frame: &[u8]) -> Option<Flow> {
    if frame.get(12..14) != Some(&[0x08, 0x00]) {
        return None;
    }
    let datagram = frame.get(14..)?;
    let header = usize::from(datagram.first()? & 0x0f) * 4;
    if datagram[0] >> 4 != 4 || *datagram.get(9)? != 6 || header < 20 {
        return None;
    }
    let tcp = datagram.get(header..header + 4)?;
    let address = |at: usize| -> Option<Ipv4Addr> {
        let bytes: [u8; 4] = datagram.get(at..at + 4)?.try_into().ok()?;
        Some(bytes.into())
    };
    Some(Flow {
        from: SocketAddrV4::new(address(12)?, u16::from_be_bytes([tcp[0], tcp[1]])),
        to: SocketAddrV4::new(address(16)?, u16::from_be_bytes([tcp[2], tcp[3]])),
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn flow(from: &str, to: &str) -> Flow {
        Flow {
            from: from.parse().unwrap(),
            to: to.parse().unwrap(),
        }
    }

    #[test]
    fn both_directions_of_a_connection_in_the_clear_are_one_flow_and_tunnels_are_none() {
        let mut heard = Heard::default();
        let there = flow("10.244.1.10:40000", "10.244.2.10:8080");
        let back = flow("10.244.2.10:8080", "10.244.1.10:40000");
        heard.judge(Some(there), 20);
        heard.judge(Some(back), 10);
        heard.judge(Some(flow("10.244.1.10:21000", "10.244.2.10:15008")), 5);
        heard.judge(Some(flow("10.244.2.10:15008", "10.244.1.10:21000")), 5);
        heard.judge(Some(flow("10.244.1.200:3", "10.244.2.200:9")), 5);
        let clear = Clear {
            packets: 2,
            first_us: 10,
            last_us: 20,
        };
        assert_eq!(heard.clear, BTreeMap::from([(there, clear)]));
        assert_eq!((heard.packets, heard.tunnel, heard.knocks), (5, 2, 1));
    }

    #[test]
    fn flows_beyond_those_that_are_told_apart_are_counted() {
        let mut heard = Heard::default();
        for host in 0..MOST_FLOWS as u32 + 7 {
            let from = SocketAddrV4::new(Ipv4Addr::from(0x0a00_0000 + host), 40_000);
            let to = "10.244.2.10:8080".parse().unwrap();
            heard.judge(Some(Flow { from, to }), 1);
        }
        assert_eq!((heard.clear.len(), heard.beyond), (MOST_FLOWS, 7));
    }

    #[test]
    fn a_segment_is_read_out_of_a_frame() {
        let mut frame = vec![0; 12];
        frame.extend([0x08, 0x00, 0x46, 0, 0, 44, 0, 0, 0, 0, 64, 6, 0, 0]);
        frame.extend([
            10, 244, 1, 10, 10, 244, 2, 11, 1, 1, 1, 1, 0x9c, 0x40, 0x1f, 0x90,
        ]);
        assert_eq!(
            segment(&frame),
            Some(flow("10.244.1.10:40000", "10.244.2.11:8080"))
        );
        frame[23] = 17;
        assert_eq!(segment(&frame), None, "UDP");
        for length in 0..frame.len() {
            assert_eq!(segment(&frame[..length]), None);
        }
    }
}
