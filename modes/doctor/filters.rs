//! Rules of iptables and nftables that somebody else made.

use std::collections::BTreeSet;

use host_net::iptables::{VARIANT_VARIABLE, Variant};
use host_net::plan::Family;
use inpod_redirect::facts::PROBE_ADDRESS;
use ipnet::Ipv4Net;
use node_redirect::facts::{
    MARK_CONN_SKIP, MARK_OUTBOUND, MARK_PROXY, MARK_PROXY_RETURN, MARK_SKIP, MARK_STAYS_IN,
    MARK_STAYS_OUT,
};
use shared_proxy::capture::HBONE_PORT;

use super::catalogue::{BOTH, Check, Found, INPOD, NODE};
use super::clashes::HOST_PLANS;
use super::facts::Facts;

/// Bits of the packet mark that the node capture uses on the node.
pub(super) const HOST_MARKS: u32 = MARK_OUTBOUND.mask
    | MARK_SKIP.mask
    | MARK_CONN_SKIP.mask
    | MARK_PROXY.mask
    | MARK_PROXY_RETURN.mask
    | MARK_STAYS_IN.mask
    | MARK_STAYS_OUT.mask;

/// Beginnings of the names of IPv4 chains that are ours, or of a mesh whose names we have.
const OWN_CHAINS: [&str; 3] = ["ambidex-", "ztunnel-", "ISTIO_"];

pub(super) static CHECKS: [Check; 7] = [
    Check {
        id: "host/iptables-mixed",
        title: "one implementation of iptables is in use",
        modes: BOTH,
        why: "rules of both are in force and do not see each other, so the agent refuses to guess which one is to be joined",
        fix: "move the rules of one to the other (iptables-legacy-save | iptables-nft-restore), or set AMBIDEX_IPTABLES=nft or legacy for the agent",
        look: mixed,
    },
    Check {
        id: "node/mark-clash",
        title: "nobody else uses the capture's mark bits",
        modes: NODE,
        why: "the bits 0x3f8 of packet and connection marks say which way a captured packet goes, and who sets or takes them changes that",
        fix: "let the owner of OBJECT use other bits than 0x3f8, or --mode inpod",
        look: mark_clash,
    },
    Check {
        id: "node/rpf-rules",
        title: "no rule drops packets by their reverse path",
        modes: NODE,
        why: "the proxy sends with the addresses of pods, and such a rule takes that for forged whatever rp_filter says",
        fix: "Calico: FelixConfiguration workloadSourceSpoofing: Any, and cni.projectcalico.org/allowedSourcePrefixes on the proxy's pod; firewalld: IPv4 rpfilter off; else --mode inpod",
        look: |facts| {
            each_rule(facts, |rule| {
                let by_module = rule.text.contains("-m rpfilter") && !rule.text.contains("--loose");
                let by_fib = rule.text.contains("fib saddr") && rule.text.contains("oif");
                (rule.drops() && (by_module || by_fib)).then(|| Found::fail(rule.chain, rule.text))
            })
        },
    },
    Check {
        id: "host/hbone-dropped",
        title: "no rule drops port 15008",
        modes: BOTH,
        why: "tunnels between proxies end at port 15008 of the pods' addresses",
        fix: "accept TCP port 15008 before OBJECT does; in a NetworkPolicy: ingress port 15008 for every captured pod",
        look: |facts| {
            each_rule(facts, |rule| {
                // What enters the node itself is no tunnel of a pod.
                if rule.chain == "INPUT" || !rule.drops() || !rule.is_tcp() {
                    return None;
                }
                match rule.port(HBONE_PORT)? {
                    Meant::ByNumber => Some(Found::fail(rule.chain, rule.text)),
                    Meant::AsOneOfAllOthers => Some(Found::warn(rule.chain, rule.text)),
                }
            })
        },
    },
    Check {
        id: "inpod/probe-dropped",
        title: "no rule drops the probe address",
        modes: INPOD,
        why: "the node's own connections to captured pods come from 169.254.7.127, and health probes fail without them",
        fix: "accept 169.254.7.127/32 before OBJECT does; in a NetworkPolicy: ingress from 169.254.7.127/32",
        look: |facts| {
            each_rule(facts, |rule| {
                if !rule.drops() || !rule.names_probe_address() {
                    return None;
                }
                // Where addresses are translated, that is before or after these tables, and not where packets are filtered.
                Some(match rule.table {
                    Some("raw" | "mangle") => Found::fail(rule.chain, rule.text),
                    _ => Found::warn(rule.chain, rule.text),
                })
            })
        },
    },
    Check {
        id: "host/forward-drop",
        title: "what no rule names is forwarded",
        modes: BOTH,
        why: "where a firewall drops by default, port 15008 between pods needs a rule that accepts it, as do all other ports of pods",
        fix: "iptables -P FORWARD ACCEPT, or let the network plugin accept its pods' networks",
        look: |facts| {
            let policies = facts.filters.iter().filter(|line| {
                (line.starts_with("iptables-") && line.ends_with(" filter :FORWARD DROP"))
                    || (line.starts_with("nft ")
                        && !line.starts_with("nft ip6 ")
                        && !is_iptables_table(line)
                        && line.contains("hook forward")
                        && line.contains("policy drop"))
            });
            policies.map(|line| Found::warn("FORWARD", line)).collect()
        },
    },
    Check {
        id: "host/other-mesh",
        title: "no other mesh captures here",
        modes: BOTH,
        why: "a connection that two meshes capture is led in circles or encrypted twice, and what stands of another one is never taken away",
        fix: "uninstall it (istioctl uninstall --purge, linkerd uninstall), then restart its pods and remove OBJECT; remains of this one: ambidex undo --node",
        look: other_mesh,
    },
];

fn mixed(facts: &Facts) -> Vec<Found> {
    let mut found = Vec::new();
    for (family, name) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
        let of = |variant| {
            let tables = facts.tables.iter().filter(|filled| {
                filled.family == family && filled.table.variant == variant && !filled.table.trivial
            });
            tables
                .map(|filled| filled.table.table.as_str())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let (nft, legacy) = (of(Variant::Nft), of(Variant::Legacy));
        if nft.is_empty() || legacy.is_empty() {
            continue;
        }
        let what = format!("nft has rules in {nft}, legacy in {legacy}");
        found.push(match &facts.iptables_choice {
            Some(choice) => Found::warn(name, format!("{what}; {VARIANT_VARIABLE}={choice}")),
            None => Found::fail(name, what),
        });
    }
    found
}

/// A rule of somebody else, as `ambidex dump` has it.
struct Line<'a> {
    /// Table of iptables; none for what nftables has beside it.
    table: Option<&'a str>,
    /// Chain of iptables, or family and table of nftables.
    chain: &'a str,
    text: &'a str,
}

/// Whether a line of nftables is about a table that iptables shows as well.
fn is_iptables_table(line: &str) -> bool {
    let mut words = line.split(' ').skip(1);
    matches!(words.next(), Some("ip" | "ip6"))
        && matches!(
            words.next(),
            Some("filter" | "mangle" | "nat" | "raw" | "security")
        )
}

/// What a check finds in the rules of others, of the families that may be captured.
fn each_rule<'a>(facts: &'a Facts, look: impl Fn(&Line<'a>) -> Option<Found>) -> Vec<Found> {
    let by_ipv6 = facts.may_capture(Family::V6);
    let rules = facts.filters.iter().filter_map(|line| {
        if line.starts_with("iptables-") || by_ipv6 && line.starts_with("ip6tables-") {
            let (before, text) = line.split_once(" -A ")?;
            let chain = text.split(' ').next()?;
            let own = OWN_CHAINS.iter().any(|start| chain.starts_with(start));
            let table = before.split(' ').nth(1);
            return (!own).then_some(Line { table, chain, text });
        }
        let (table, text) = line.strip_prefix("nft ")?.split_once(" | ")?;
        let only_ipv6 = table.starts_with("ip6 ") || text.contains("nfproto ipv6");
        (by_ipv6 || !only_ipv6).then_some(Line {
            table: None,
            chain: table,
            text,
        })
    });
    rules.filter_map(|rule| look(&rule)).collect()
}

/// How a rule selects a port.
enum Meant {
    ByNumber,
    AsOneOfAllOthers,
}

impl Meant {
    fn of(within: bool, negated: bool) -> Option<Self> {
        match (within, negated) {
            (true, false) => Some(Self::ByNumber),
            (false, true) => Some(Self::AsOneOfAllOthers),
            _ => None,
        }
    }
}

impl Line<'_> {
    fn words(&self) -> impl Iterator<Item = &str> {
        self.text.split([' ', ','])
    }

    fn after<'a>(&'a self, flag: &str) -> Option<(bool, &'a str)> {
        let words: Vec<&str> = self.text.split(' ').collect();
        let at = words.iter().position(|word| *word == flag)?;
        let negated = at > 0 && words[at - 1] == "!";
        Some((negated, words.get(at + 1)?))
    }

    fn drops(&self) -> bool {
        match self.after("-j") {
            Some((_, target)) => matches!(target, "DROP" | "REJECT"),
            None => self.words().any(|word| matches!(word, "drop" | "reject")),
        }
    }

    fn is_tcp(&self) -> bool {
        match self.after("-p") {
            Some((negated, protocol)) => (protocol == "tcp") != negated,
            None => self.text.contains("tcp dport"),
        }
    }

    /// Whether and how a destination port is selected.
    fn port(&self, port: u16) -> Option<Meant> {
        for flag in ["--dport", "--dports"] {
            if let Some((negated, ports)) = self.after(flag) {
                let within = ports.split(',').any(|range| in_range(range, ':', port));
                return Meant::of(within, negated);
            }
        }
        let (_, rest) = self.text.split_once("tcp dport ")?;
        let (negated, rest) = match rest.strip_prefix("!= ") {
            Some(rest) => (true, rest),
            None => (false, rest),
        };
        let ports = match rest.strip_prefix('{') {
            Some(set) => set.split('}').next().unwrap_or_default(),
            None => rest.split(' ').next().unwrap_or_default(),
        };
        let within = ports
            .split(',')
            .any(|range| in_range(range.trim(), '-', port));
        Meant::of(within, negated)
    }

    fn names_probe_address(&self) -> bool {
        // Networks of everything are no special treatment of this one.
        let meets = |network: &str| {
            let network = network.parse::<Ipv4Net>().or_else(|_| {
                network
                    .parse()
                    .map(|address| Ipv4Net::new_assert(address, 32))
            });
            network.is_ok_and(|network: Ipv4Net| {
                network.prefix_len() >= 8 && network.contains(&PROBE_ADDRESS)
            })
        };
        let flagged = ["-s", "-d"].iter().any(|flag| {
            self.after(flag)
                .is_some_and(|(negated, network)| !negated && meets(network))
        });
        let in_nft = ["ip saddr ", "ip daddr "].iter().any(|selector| {
            let rest = self.text.split_once(selector).map(|(_, rest)| rest);
            rest.and_then(|rest| rest.split(' ').next())
                .is_some_and(meets)
        });
        flagged || in_nft
    }

    /// Bits of a mark that the rule sets, clears or selects.
    fn mark_bits(&self) -> u32 {
        let pair = |text: &str| {
            let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
            (number(value).unwrap_or(0), number(mask).unwrap_or(0))
        };
        let mut bits = 0;
        for flag in ["--set-xmark", "--set-mark"] {
            if let Some((_, mark)) = self.after(flag) {
                let (value, mask) = pair(mark);
                bits |= value | mask;
            }
        }
        if let Some((_, mark)) = self.after("--mark") {
            let (value, mask) = pair(mark);
            bits |= value & mask;
        }
        if self.text.contains("--restore-mark") || self.text.contains("--save-mark") {
            let flag = if self.text.contains("--restore-mark") {
                "--nfmask"
            } else {
                "--ctmask"
            };
            let mask = self.after(flag).and_then(|(_, mask)| number(mask));
            bits |= mask.unwrap_or(u32::MAX);
        }
        match self.text.split_once("mark set ") {
            Some((_, expression)) if self.after("-j").is_none() => bits | bits_of(expression),
            _ => bits,
        }
    }
}

/// Bits that an expression of nftables changes: those that it combines with the old value, or all of them.
fn bits_of(expression: &str) -> u32 {
    let words: Vec<&str> = expression
        .split([' ', '(', ')'])
        .filter(|word| !word.is_empty())
        .collect();
    let keeps = matches!(words[..], ["mark", ..] | ["meta", "mark", ..]);
    if !keeps {
        return u32::MAX;
    }
    words
        .windows(2)
        .fold(0, |bits, pair| match (pair[0], number(pair[1])) {
            ("|" | "or" | "^" | "xor", Some(value)) => bits | value,
            ("&" | "and", Some(value)) => bits | !value,
            _ => bits,
        })
}

fn number(text: &str) -> Option<u32> {
    match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

fn in_range(range: &str, separator: char, port: u16) -> bool {
    let (low, high) = range.split_once(separator).unwrap_or((range, range));
    match (low.parse::<u16>(), high.parse::<u16>()) {
        (Ok(low), Ok(high)) => (low..=high).contains(&port),
        _ => false,
    }
}

fn mark_clash(facts: &Facts) -> Vec<Found> {
    each_rule(facts, |rule| {
        (rule.mark_bits() & HOST_MARKS != 0).then(|| Found::fail(rule.chain, rule.text))
    })
}

/// The mesh whose names the captures have.
const AMBIENT: &str = "Istio ambient";

/// Which mesh has chains or tables of such a name.
pub(crate) fn mesh_of(name: &str) -> Option<&'static str> {
    let sidecar = [
        "ISTIO_INBOUND",
        "ISTIO_REDIRECT",
        "ISTIO_IN_REDIRECT",
        "ISTIO_DIVERT",
        "ISTIO_TPROXY",
    ];
    if sidecar.contains(&name) {
        Some("an Istio sidecar")
    } else if ["ztunnel-", "ISTIO_", "istio-ambient"]
        .iter()
        .any(|start| name.starts_with(start))
    {
        Some(AMBIENT)
    } else if name.starts_with("PROXY_INIT_") {
        Some("Linkerd")
    } else if name.to_ascii_lowercase().starts_with("kmesh") {
        Some("Kmesh")
    } else {
        None
    }
}

fn other_mesh(facts: &Facts) -> Vec<Found> {
    let made_here = HOST_PLANS.iter().any(|plan| facts.made(plan)) || facts.state.is_none();
    let mut found = Vec::new();
    let names: BTreeSet<&str> = facts
        .filters
        .iter()
        .filter_map(|line| match line.strip_prefix("nft ") {
            Some(table) => table.split(' ').nth(1),
            None => line
                .split_once(" :")
                .map(|(_, chain)| chain.split(' ').next().unwrap_or(chain)),
        })
        .collect();
    for name in names {
        match mesh_of(name) {
            // Names that are ours as well.
            Some(AMBIENT) if made_here => {}
            Some(mesh) => found.push(Found::fail(
                name,
                format!("belongs to {mesh}, or to an agent that is gone"),
            )),
            None => {}
        }
    }
    for pod in &facts.namespaces {
        // What has our names there is judged by `ambidex verify`.
        let foreign = |chain: &&String| mesh_of(chain).is_some_and(|mesh| mesh != AMBIENT);
        if let Some(chain) = pod.chains.iter().find(foreign) {
            let mesh = mesh_of(chain).unwrap_or_default();
            found.push(Found::warn(
                &pod.name,
                format!("has chain {chain} of {mesh}"),
            ));
        }
    }
    let traces = facts
        .traces
        .iter()
        .filter_map(|path| Some((path, trace_of(path)?)));
    found.extend(traces.map(|(path, mesh)| Found::warn(path, format!("is of {mesh}"))));
    for file in &facts.cni {
        let foreign = file
            .plugins
            .iter()
            .find(|plugin| ["istio-cni", "linkerd-cni", "kmesh-cni"].contains(&plugin.as_str()));
        if let Some(plugin) = foreign {
            found.push(Found::fail(&file.path, format!("has the plugin {plugin}")));
        }
    }
    found
}

/// Sockets of other meshes' agents and proxies.
pub(super) const MESH_TRACES: [(&str, &str); 4] = [
    ("/var/run/istio-cni/pluginevent.sock", "Istio's node agent"),
    ("/var/run/ztunnel/ztunnel.sock", "Istio's node agent"),
    ("/var/run/kmesh", "Kmesh"),
    ("/sys/fs/bpf/bpf_kmesh", "Kmesh"),
];

fn trace_of(path: &str) -> Option<&'static str> {
    let known = MESH_TRACES.iter().find(|(known, _)| *known == path);
    known.map(|(_, mesh)| *mesh)
}
