//! What is on the wire: captured by tcpdump, judged from the packets.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use lab::bench::pcap::Capture;
use lab::bench::tls_records;
use lab::standing::Background;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Stage;

/// HBONE.
const TUNNEL_PORT: u16 = 15008;
/// HBONE between two pods of a node, on the proxy's loopback device.
const LOOPED_PORT: u16 = 15088;

/// A running tcpdump.
pub struct Tap {
    tcpdump: Background,
    file: PathBuf,
    label: String,
}

impl Stage {
    /// Listens on a device for TCP that a pcap filter lets pass (empty: all).
    pub fn tap(&self, target: &str, device: &str, filter: &str) -> Tap {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("tap{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        let file = self.lab.dir().join(format!("{name}.pcap"));
        let filter = if filter.is_empty() {
            "tcp".to_owned()
        } else {
            format!("tcp and ({filter})")
        };
        let argv = [
            "tcpdump",
            "-i",
            device,
            "-s",
            "0",
            "-B",
            "65536",
            "--immediate-mode",
            "-U",
            "-Z",
            "root",
            "-w",
            file.to_str().unwrap(),
            &filter,
        ];
        let mut tcpdump = self.lab.spawn(target, &name, &argv).unwrap();
        tcpdump
            .wait_for("listening on", Duration::from_secs(10))
            .unwrap();
        let label = format!("{target} {device}");
        Tap {
            tcpdump,
            file,
            label,
        }
    }
}

impl Tap {
    /// What was captured, after what is still on its way.
    pub fn finish(mut self) -> Wire {
        std::thread::sleep(Duration::from_millis(200));
        kill(
            Pid::from_raw(i32::try_from(self.tcpdump.pid()).unwrap()),
            Signal::SIGINT,
        )
        .unwrap();
        self.tcpdump
            .wait_for("dropped by kernel", Duration::from_secs(10))
            .unwrap();
        let output = self.tcpdump.output();
        assert!(
            output.contains("\n0 packets dropped by kernel"),
            "{}: {output}",
            self.label
        );
        let capture = Capture::parse(&std::fs::read(&self.file).unwrap()).unwrap();
        assert_eq!(capture.beyond_gaps, 0, "{}: bytes beyond gaps", self.label);
        Wire {
            label: self.label,
            file: self.file,
            capture,
        }
    }
}

/// What was on a device.
pub struct Wire {
    pub label: String,
    /// The packets, in pcap form.
    pub file: PathBuf,
    pub capture: Capture,
}

impl Wire {
    /// Whether these bytes were there in the clear.
    pub fn shows(&self, marker: &str) -> bool {
        self.capture.contains(marker.as_bytes()).is_some()
    }

    /// Fails unless there is payload, all of it TLS with application data in both directions on the ports of HBONE, and
    /// no marker in the clear.
    pub fn assert_encrypted(&self, markers: &[&str]) {
        for marker in markers {
            assert!(!self.shows(marker), "{}: {marker} in the clear", self.label);
        }
        let is_tunnel =
            |address: &SocketAddrV4| [TUNNEL_PORT, LOOPED_PORT].contains(&address.port());
        assert!(
            self.capture.streams.len() >= 2,
            "{}: no tunnel was seen, so nothing is proven",
            self.label
        );
        for (flow, stream) in &self.capture.streams {
            let way = format!("{}: {} to {}", self.label, flow.from, flow.to);
            assert!(
                is_tunnel(&flow.from) || is_tunnel(&flow.to),
                "{way}: {} bytes beside the tunnel",
                stream.len()
            );
            if let Err(error) = tls_records::check(stream) {
                panic!("{way}: {error}");
            }
        }
    }

    /// As [`Wire::assert_encrypted`], of IPv6: payload, none of it beside the ports of HBONE, and no marker in the clear.
    pub fn assert_encrypted6(&self, markers: &[&str]) {
        let bytes = std::fs::read(&self.file).unwrap();
        for marker in markers {
            let shown = bytes
                .windows(marker.len())
                .any(|at| at == marker.as_bytes());
            assert!(!shown, "{}: {marker} in the clear", self.label);
        }
        // Segments that are longer than their headers say that these are themselves.
        let payload = "ip6 and tcp and (ip6[4:2] - ((ip6[52] & 0xf0) >> 2) > 0)";
        let tunnels = format!("(tcp port {TUNNEL_PORT} or tcp port {LOOPED_PORT})");
        let packets = |filter: &str| {
            let mut tcpdump = std::process::Command::new("tcpdump");
            tcpdump.args(["-nn", "-r", self.file.to_str().unwrap(), filter]);
            let output = tcpdump.output().unwrap();
            assert!(output.status.success(), "{filter}: {output:?}");
            String::from_utf8(output.stdout).unwrap()
        };
        let inside = packets(&format!("{payload} and {tunnels}"));
        assert!(
            inside.lines().count() >= 2,
            "{}: no tunnel by IPv6 was seen, so nothing is proven",
            self.label
        );
        let beside = packets(&format!("{payload} and not {tunnels}"));
        assert_eq!(beside, "", "{}: beside the tunnel", self.label);
    }

    /// Addresses that opened tunnels to `to`.
    pub fn tunnel_clients(&self, to: Ipv4Addr) -> Vec<Ipv4Addr> {
        let to = SocketAddrV4::new(to, TUNNEL_PORT);
        let flows = self.capture.streams.keys().filter(|flow| flow.to == to);
        let mut clients: Vec<Ipv4Addr> = flows.map(|flow| *flow.from.ip()).collect();
        clients.sort();
        clients.dedup();
        clients
    }
}
