//! What is known to be here beyond the typed listings, or otherwise than in them, each with its reason. Nothing else may be.

use super::{Listing, Met};

/// What a listing was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Situation {
    /// Node capture, only first packets through the overlay.
    Hybrid,
    /// Node capture, everything through the overlay.
    Tunnel,
    /// Capture in the pod by REDIRECT.
    InpodRedirect,
    /// Capture in the pod by TPROXY inbound.
    InpodTproxy,
}

use Situation::{Hybrid, InpodRedirect, InpodTproxy, Tunnel};

/// The record of decisions that gives all reasons at length.
pub const RECORD: &str = include_str!("../../docs/decisions/0011-listings.md");

/// Something of ours that no listing of the field's has.
pub struct Extra {
    /// What it is called in the record.
    pub name: &'static str,
    pub situations: &'static [Situation],
    pub place: &'static str,
    pub what: What,
    pub reason: &'static str,
}

/// How an extra is recognised.
pub enum What {
    /// A chain of our own: its declaration, its rules, and what leads to it.
    Chain(&'static str),
    /// A set of our own, in a listing of sets.
    Set(&'static str),
    /// A line.
    Line(&'static str),
}

use What::{Chain, Line, Set};

pub const EXTRAS: [Extra; 13] = [
    Extra {
        name: "ambidex-PREROUTING",
        situations: &[Hybrid, Tunnel],
        place: "node",
        what: Chain("ambidex-PREROUTING"),
        reason: "connections that are older than the capture, that are masqueraded, ICMP",
    },
    Extra {
        name: "ambidex-OUTPUT",
        situations: &[Hybrid, Tunnel],
        place: "node",
        what: Chain("ambidex-OUTPUT"),
        reason: "messages about the size of packets reach the proxy, everything else of the node's is direct",
    },
    Extra {
        name: "ambidex-FORWARD",
        situations: &[Hybrid, Tunnel],
        place: "node",
        what: Chain("ambidex-FORWARD"),
        reason: "guard: nothing of a captured pod's passes beside the proxy when a part of the capture is gone",
    },
    Extra {
        name: "ambidex-guarded",
        situations: &[Hybrid, Tunnel],
        place: "node",
        what: Set("ambidex-guarded"),
        reason: "the guard's own set, so that no single flush takes both away",
    },
    Extra {
        name: "mesh-live-pods",
        situations: &[Hybrid, Tunnel],
        place: "node",
        what: Set("mesh-live-pods"),
        reason: "pods that were running when they were enrolled, whose connections go on",
    },
    Extra {
        name: "rule 99",
        situations: &[Hybrid, Tunnel],
        place: "node",
        what: Line("99: from all fwmark 0x80/0x80 lookup 103"),
        reason: "masqueraded connections stay in the tunnel that they came through",
    },
    Extra {
        name: "ambidex-PREROUTING in the proxy's namespace",
        situations: &[Hybrid, Tunnel],
        place: "proxy",
        what: Chain("ambidex-PREROUTING"),
        reason: "tunnels between two pods of a node, and messages about the size of packets",
    },
    Extra {
        name: "rule 20004",
        situations: &[Hybrid, Tunnel],
        place: "proxy",
        what: Line("20004: from all fwmark 0x404/0xfff lookup 100"),
        reason: "tunnels between two pods of a node",
    },
    Extra {
        name: "rule 20001",
        situations: &[Tunnel],
        place: "proxy",
        what: Line("20001: from all fwmark 0x401/0xfff lookup 101"),
        reason: "of 1.15, which leads answers back through the tunnel; 1.20 has it no more",
    },
    Extra {
        name: "rule 20002",
        situations: &[Tunnel],
        place: "proxy",
        what: Line("20002: from all fwmark 0x402/0xfff lookup 102"),
        reason: "of 1.15, which leads answers back through the tunnel; 1.20 has it no more",
    },
    Extra {
        name: "AMBIDEX_GUARD_IN",
        situations: &[InpodRedirect, InpodTproxy],
        place: "pod",
        what: Chain("AMBIDEX_GUARD_IN"),
        reason: "guard: nothing reaches the application beside the proxy when a part of the capture is gone",
    },
    Extra {
        name: "AMBIDEX_GUARD_OUT",
        situations: &[InpodRedirect, InpodTproxy],
        place: "pod",
        what: Chain("AMBIDEX_GUARD_OUT"),
        reason: "guard: nothing leaves beside the proxy when a part of the capture is gone",
    },
    Extra {
        name: "rule 32765",
        situations: &[InpodRedirect, InpodTproxy],
        place: "pod",
        what: Line("32765: from all fwmark 0x111/0xfff lookup 101"),
        reason: "guard: leads answers back to the proxy when the first rule or its route is gone",
    },
];

/// A line of the field's that is otherwise here.
pub struct Deviation {
    /// What it is called in the record.
    pub name: &'static str,
    pub situations: &'static [Situation],
    pub place: &'static str,
    /// The line as it is compared: after the rules.
    pub line: &'static str,
    /// What is here in its place.
    pub here: Option<&'static str>,
    pub reason: &'static str,
}

pub const DEVIATIONS: [Deviation; 10] = [
    Deviation {
        name: "references of the set",
        situations: &[Hybrid, Tunnel],
        place: "node",
        line: "References: 1",
        here: Some("References: 2"),
        reason: "ambidex-OUTPUT asks it, too",
    },
    Deviation {
        name: "broadcast address",
        situations: &[Hybrid, Tunnel],
        place: "node",
        line: "inet 192.168.127.1/30 brd 192.168.127.3 scope global istioout",
        here: Some("inet 192.168.127.1/30 scope global istioout"),
        reason: "a tunnel with two ends has nobody else to speak to",
    },
    Deviation {
        name: "length of queue",
        situations: &[Hybrid, Tunnel],
        place: "node",
        line: "istioout: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN group default",
        here: Some(
            "istioout: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN group default qlen 1000",
        ),
        reason: "a default of who makes the device; it has no queue",
    },
    Deviation {
        name: "length of queue, in detail",
        situations: &[Hybrid, Tunnel],
        place: "node",
        line: "istioout: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN mode DEFAULT group default",
        here: Some(
            "istioout: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN mode DEFAULT group default qlen 1000",
        ),
        reason: "a default of who makes the device; it has no queue",
    },
    Deviation {
        name: "length of queue, in detail, of the other one",
        situations: &[Hybrid, Tunnel],
        place: "node",
        line: "istioin: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN mode DEFAULT group default",
        here: Some(
            "istioin: <BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450 qdisc noqueue state UNKNOWN mode DEFAULT group default qlen 1000",
        ),
        reason: "a default of who makes the device; it has no queue",
    },
    Deviation {
        name: "probes",
        situations: &[Hybrid, Tunnel],
        place: "node",
        line: "mangle -A ztunnel-OUTPUT -s 10.244.1.1/32 -p tcp -m owner --socket-exists -m set --match-set ztunnel-pods-ips dst -j MARK --set-xmark 0x220/0xffffffff",
        here: None,
        reason: "packets without a full socket miss it and are reset; ambidex-OUTPUT has all",
    },
    Deviation {
        name: "table 101 in the proxy's namespace",
        situations: &[Hybrid],
        place: "proxy",
        line: "default via 192.168.127.1 dev pistioout",
        here: None,
        reason: "no rule of 1.20 leads there",
    },
    Deviation {
        name: "table 102 in the proxy's namespace",
        situations: &[Hybrid],
        place: "proxy",
        line: "default via 192.168.126.1 dev pistioin",
        here: None,
        reason: "no rule of 1.20 leads there",
    },
    Deviation {
        name: "way to the node in these tables",
        situations: &[Hybrid],
        place: "proxy",
        line: "10.244.1.1 dev eth0 scope link",
        here: None,
        reason: "no rule of 1.20 leads there",
    },
    Deviation {
        name: "older connections of the node's to a pod",
        situations: &[InpodRedirect],
        place: "node",
        line: "nat -A ISTIO_POSTRT -p tcp -m owner --socket-exists -m set --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127",
        here: Some(
            "nat -A ISTIO_POSTRT -p tcp -m tcp --tcp-flags FIN,SYN,RST,ACK SYN -m owner --socket-exists -m set --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127",
        ),
        reason: "connections that are older than the capture go on",
    },
];

/// The live lines without what is known to be ours.
pub fn without_extras(
    listing: &Listing,
    mut lines: Vec<String>,
    situation: Situation,
    met: &mut Met,
) -> Vec<String> {
    for extra in EXTRAS
        .iter()
        .filter(|extra| extra.place == listing.place && extra.situations.contains(&situation))
    {
        let before = lines.len();
        lines = match extra.what {
            Chain(chain) => of_other_chains(lines, chain, &listing.command),
            Set(set) => of_other_sets(lines, set, &listing.command),
            Line(line) => lines.into_iter().filter(|other| other != line).collect(),
        };
        if lines.len() < before {
            met.0.insert(extra.name);
        }
    }
    lines
}

fn of_other_chains(lines: Vec<String>, chain: &str, command: &str) -> Vec<String> {
    if !command.starts_with("iptables-save") {
        return lines;
    }
    let is_its = |line: &String| {
        let mut words = line.split(' ');
        words.any(|word| word.trim_start_matches(':') == chain)
    };
    lines.into_iter().filter(|line| !is_its(line)).collect()
}

fn of_other_sets(lines: Vec<String>, set: &str, command: &str) -> Vec<String> {
    if !command.starts_with("ipset list") {
        return lines;
    }
    let mut its = false;
    let mut others = Vec::new();
    for line in lines {
        match line.strip_prefix("Name: ") {
            Some(name) => its = name == set,
            None if line == set => continue,
            None => {}
        }
        if !its {
            others.push(line);
        }
    }
    others
}

/// The typed lines as they are known to be here.
pub fn with_deviations(
    listing: &Listing,
    lines: Vec<String>,
    situation: Situation,
    met: &mut Met,
) -> Vec<String> {
    let known = |line: &String| {
        DEVIATIONS.iter().find(|deviation| {
            deviation.place == listing.place
                && deviation.situations.contains(&situation)
                && deviation.line == line
        })
    };
    lines
        .into_iter()
        .filter_map(|line| match known(&line) {
            Some(deviation) => {
                met.0.insert(deviation.name);
                deviation.here.map(str::to_owned)
            }
            None => Some(line),
        })
        .collect()
}
