//! What the proxies' access logs say of the connections of a load: each is to be there once where it left its pod, and
//! once where it came to the other one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::topology::APPLICATION_PORT;

/// Entries about the load's connections.
#[derive(Debug, Default, PartialEq)]
pub struct Entries {
    /// Of proxies whose pod connected somewhere: by the client's address and port as they were seen, and the server.
    pub outbound: BTreeMap<(SocketAddr, IpAddr), u64>,
    /// Of proxies to whose pod something was connected: by the addresses of client and server.
    pub inbound: BTreeMap<(IpAddr, IpAddr), u64>,
    /// Those of them that came without a tunnel, in a few words, the first ones.
    pub plaintext: Vec<String>,
    /// Streams of tunnels that ended with an error before a byte had passed, by error: they are no capture of their own,
    /// because the client's proxy makes the stream again in another tunnel, where it counts.
    pub repeated: BTreeMap<String, u64>,
}

/// What is to be in the logs of one connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The client's end, as its client knows it.
    pub from: SocketAddr,
    /// The server's address.
    pub to: IpAddr,
    /// How many entries there are to be where it left its pod, and where it came to the other one.
    pub entries: [Wanted; 2],
}

/// How many entries there are to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Exactly one.
    One,
    /// One at most: a capture came or went meanwhile.
    OneAtMost,
    /// None.
    None,
}

/// A place where the logs say something else than is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deviation {
    /// Which connection, or which pods' connections.
    pub what: String,
    /// Entries that there are.
    pub entries: u64,
    /// Connections that entries are to be of, at least.
    pub least: u64,
    /// Connections that entries may be of.
    pub most: u64,
}

/// What came out of the logs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    /// Entries of connections that left a pod.
    pub outbound: u64,
    /// Entries of connections that came to a pod.
    pub inbound: u64,
    /// Entries beyond one for each connection and end.
    pub doubles: u64,
    /// Entries that are missing.
    pub missing: u64,
    /// Where, the first ones.
    pub deviations: Vec<Deviation>,
    /// Streams of tunnels that ended with an error before a byte had passed, by error, and were made again or failed.
    pub repeated: BTreeMap<String, u64>,
    /// Connections that came to a pod without a tunnel, the first ones: where all is inside the mesh, those that a proxy's
    /// own connections were captured as.
    pub plaintext: Vec<String>,
}

/// Deviations that are kept.
const MOST_DEVIATIONS: usize = 100;

impl Entries {
    /// Adds what a proxy's log has.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn read(&mut self, log: &Path) -> Result<()> {
        let shown = || log.display().to_string();
        let file = File::open(log).with_context(shown)?;
        for line in BufReader::new(file).lines() {
            // A line that is being written comes whole with the next look.
            let line = line.with_context(shown)?;
            if line.contains("\"access\"")
                && let Ok(line) = serde_json::from_str::<Value>(&line)
            {
                self.add(&line);
            }
        }
        Ok(())
    }

    /// Adds a line. The word on a connection that failed is one, too: it had been captured.
    fn add(&mut self, line: &Value) {
        let address = |key: &str| line[key].as_str()?.parse::<SocketAddr>().ok();
        let to = address("dst.hbone_addr").or_else(|| address("dst.addr"));
        let (Some(from), Some(to)) = (address("src.addr"), to) else {
            return;
        };
        if to.port() != APPLICATION_PORT {
            return;
        }
        match line["direction"].as_str() {
            Some("outbound") => *self.outbound.entry((from, to.ip())).or_default() += 1,
            Some("inbound") if line["src.identity"].is_string() && is_repeated(line) => {
                let error = line["error"].as_str().unwrap_or_default();
                *self.repeated.entry(error.to_owned()).or_default() += 1;
            }
            Some("inbound") => {
                *self.inbound.entry((from.ip(), to.ip())).or_default() += 1;
                if line["src.identity"].is_null() && self.plaintext.len() < MOST_DEVIATIONS {
                    let word = |key: &str| line[key].as_str().unwrap_or("-").to_owned();
                    let words = ["timestamp", "capture_mode", "duration", "error"].map(word);
                    self.plaintext
                        .push(format!("{from} to {to}: {}", words.join(" ")));
                }
            }
            _ => {}
        }
    }

    /// Compares with what is to be there.
    pub fn judge(&self, expected: &[Expected]) -> Verdict {
        let mut verdict = Verdict {
            outbound: self.outbound.values().sum(),
            inbound: self.inbound.values().sum(),
            plaintext: self.plaintext.clone(),
            repeated: self.repeated.clone(),
            ..Verdict::default()
        };
        let mut outbound: BTreeMap<(SocketAddr, IpAddr), (u64, u64)> = BTreeMap::new();
        let mut inbound: BTreeMap<(IpAddr, IpAddr), (u64, u64)> = BTreeMap::new();
        for one in expected {
            let [left, came] = one.entries.map(Wanted::range);
            add(outbound.entry((one.from, one.to)).or_default(), left);
            add(inbound.entry((one.from.ip(), one.to)).or_default(), came);
        }
        // What others than the load's pods open is no connection of the load.
        let pods: BTreeSet<IpAddr> = expected.iter().map(|one| one.from.ip()).collect();
        for key in self
            .outbound
            .keys()
            .filter(|(from, _)| pods.contains(&from.ip()))
        {
            outbound.entry(*key).or_default();
        }
        for (key @ (from, to), range) in outbound {
            let entries = self.outbound.get(&key).copied().unwrap_or_default();
            verdict.compare(format!("{from} to {to}, where it left"), entries, range);
        }
        for (key @ (from, to), range) in inbound {
            let entries = self.inbound.get(&key).copied().unwrap_or_default();
            verdict.compare(
                format!("all of {from} to {to}, where they came"),
                entries,
                range,
            );
        }
        verdict
    }
}

fn is_repeated(line: &Value) -> bool {
    let none = |key: &str| line[key].as_u64() == Some(0);
    line["error"].is_string() && none("bytes_sent") && none("bytes_recv")
}

impl Wanted {
    fn range(self) -> (u64, u64) {
        match self {
            Wanted::One => (1, 1),
            Wanted::OneAtMost => (0, 1),
            Wanted::None => (0, 0),
        }
    }
}

fn add(to: &mut (u64, u64), more: (u64, u64)) {
    to.0 += more.0;
    to.1 += more.1;
}

impl Verdict {
    fn compare(&mut self, what: String, entries: u64, (least, most): (u64, u64)) {
        let (more, less) = (entries.saturating_sub(most), least.saturating_sub(entries));
        self.doubles += more;
        self.missing += less;
        if more + less > 0 && self.deviations.len() < MOST_DEVIATIONS {
            self.deviations.push(Deviation {
                what,
                entries,
                least,
                most,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use serde_json::json;

    use super::*;

    fn line(direction: &str, from: &str, hbone: Option<&str>, to: &str) -> Value {
        json!({"target": "access", "direction": direction, "src.addr": from, "dst.hbone_addr": hbone, "dst.addr": to, "src.identity": "spiffe://a/ns/b/sa/c"})
    }

    fn expected(from: &str, entries: [Wanted; 2]) -> Expected {
        Expected {
            from: from.parse().unwrap(),
            to: "10.244.2.10".parse().unwrap(),
            entries,
        }
    }

    fn entries(lines: &[Value]) -> Entries {
        let mut entries = Entries::default();
        lines.iter().for_each(|line| entries.add(line));
        entries
    }

    const CLIENT: &str = "10.244.1.10:40000";
    const SERVER: &str = "10.244.2.10:8080";

    fn once() -> Vec<Value> {
        vec![
            line("outbound", CLIENT, Some(SERVER), "10.244.2.10:15008"),
            line("inbound", "10.244.1.10:21007", None, SERVER),
            line("outbound", CLIENT, None, "10.244.2.10:9000"),
        ]
    }

    #[test]
    fn once_at_each_end_is_as_it_should_be() {
        let verdict = entries(&once()).judge(&[expected(CLIENT, [Wanted::One; 2])]);
        let fine = Verdict {
            outbound: 1,
            inbound: 1,
            ..Verdict::default()
        };
        assert_eq!(verdict, fine);
    }

    #[test]
    fn a_second_capture_is_a_double_also_by_a_port_that_no_client_has() {
        let one = [expected(CLIENT, [Wanted::One; 2])];
        for more in [
            line("outbound", CLIENT, Some(SERVER), "10.244.2.10:15008"),
            line("outbound", "10.244.1.10:21000", None, SERVER),
            line("inbound", "10.244.1.10:10500", None, SERVER),
        ] {
            let mut lines = once();
            lines.push(more.clone());
            let verdict = entries(&lines).judge(&one);
            assert_eq!((verdict.doubles, verdict.missing), (1, 0), "{more}");
            assert_eq!(verdict.deviations.len(), 1, "{more}");
        }
    }

    /// A tunnel that went away before a stream of it had begun is no capture; one that carried a byte is.
    #[test]
    fn a_stream_that_is_made_again_is_no_double() {
        let one = [expected(CLIENT, [Wanted::One; 2])];
        for (bytes, doubles) in [(0, 0), (1, 1)] {
            let mut lines = once();
            let mut again = lines[1].clone();
            again["error"] = json!("the tunnel failed");
            (again["bytes_sent"], again["bytes_recv"]) = (json!(bytes), json!(0));
            lines.push(again);
            let verdict = entries(&lines).judge(&one);
            assert_eq!(verdict.doubles, doubles);
            assert_eq!(verdict.repeated.values().sum::<u64>(), 1 - doubles);
        }
    }

    #[test]
    fn what_no_proxy_saw_is_missing_unless_it_was_outside() {
        let judge = |entries: [Wanted; 2]| {
            let verdict = Entries::default().judge(&[expected(CLIENT, entries)]);
            (verdict.doubles, verdict.missing)
        };
        assert_eq!(judge([Wanted::One; 2]), (0, 2));
        assert_eq!(judge([Wanted::None, Wanted::One]), (0, 1));
        assert_eq!(judge([Wanted::OneAtMost; 2]), (0, 0));
        let outside = entries(&once()).judge(&[expected(CLIENT, [Wanted::None; 2])]);
        assert_eq!((outside.doubles, outside.missing), (2, 0));
    }
}
