//! What connection tracking of each place has of a connection.

use std::net::SocketAddr;
use std::process::Command;

use crate::explain::packet::Tuple;
use crate::explain::story::Stage;

/// An entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tracked {
    /// Index of the namespace.
    pub(super) place: usize,
    /// Its first packet.
    pub(super) original: Tuple,
    /// What an answer to it looks like.
    pub(super) reply: Tuple,
    /// Its mark.
    pub(super) mark: u32,
}

/// The TCP entries of all places. A place without connection tracking, or a machine without the tool, has none.
pub(super) fn read(stage: &Stage) -> Vec<Tracked> {
    let mut all = Vec::new();
    for (place, netns) in stage.namespaces.iter().enumerate() {
        for family in ["ipv4", "ipv6"] {
            let mut command = Command::new("conntrack");
            command.args(["-L", "-f", family, "-p", "tcp"]);
            if let Ok(Ok(output)) = netns.run(|| command.output()) {
                let text = String::from_utf8_lossy(&output.stdout);
                all.extend(text.lines().filter_map(|line| entry(line, place)));
            }
        }
    }
    all
}

/// `tcp 6 431999 ESTABLISHED src=… dst=… sport=… dport=… src=… … mark=528 use=1`; the first of each is the original's.
fn entry(line: &str, place: usize) -> Option<Tracked> {
    let value = |key: &str, number: usize| {
        let mut values = line
            .split(' ')
            .filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        values.nth(number)
    };
    let end = |address: &str, port: &str, number: usize| {
        Some(SocketAddr::new(
            value(address, number)?.parse().ok()?,
            value(port, number)?.parse().ok()?,
        ))
    };
    let ends = |number| {
        Some(Tuple {
            from: end("src", "sport", number)?,
            to: end("dst", "dport", number)?,
        })
    };
    Some(Tracked {
        place,
        original: ends(0)?,
        reply: ends(1)?,
        mark: value("mark", 0)
            .and_then(|mark| mark.parse().ok())
            .unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_read() {
        let line = "tcp      6 431999 ESTABLISHED src=10.0.0.1 dst=10.0.0.2 sport=4000 dport=80 src=10.0.0.9 dst=10.0.0.1 sport=8080 dport=4000 [ASSURED] mark=528 use=1";
        let found = entry(line, 2).unwrap();
        assert_eq!(found.original.from.to_string(), "10.0.0.1:4000");
        assert_eq!(found.original.to.to_string(), "10.0.0.2:80");
        assert_eq!(found.reply.to_string(), "10.0.0.9:8080 > 10.0.0.1:4000");
        assert_eq!((found.place, found.mark), (2, 0x210));
        assert!(
            entry(
                "conntrack v1.4.7 (conntrack-tools): 3 flow entries have been shown.",
                2
            )
            .is_none()
        );
    }
}
