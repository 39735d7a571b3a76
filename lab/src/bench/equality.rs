//! What was equal between the variants, measured in each lab: whatever differs and is not the capture would be measured
//! with it.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use anyhow::Result;
use host_net::netns::Netns;
use host_net::sysctl;
use serde::{Deserialize, Serialize};

use super::case::CLIENT;
use super::load::output_of;
use super::pinning;
use super::proof::Proof;
use super::stage::Stage;
use super::variant::Variant;

/// Where a lab is asked, by what it is there: the client's pod, the server's, the client's node and its proxy.
const PLACES: [(&str, &str); 4] = [
    ("client", CLIENT),
    ("server", "pod2-1"),
    ("node", "node1"),
    ("proxy", "proxy1"),
];
/// Where connections are looked at: every namespace that a measured connection has a socket in.
const SOCKETS: [(&str, &[&str]); 4] = [
    ("client", &[CLIENT]),
    ("server", &["pod2-1", "pod1-2"]),
    ("node", &["node1", "node2"]),
    ("proxy", &["proxy1", "proxy2"]),
];
/// Kernel settings that change how TCP behaves.
const TCP: [&str; 18] = [
    "net/ipv4/tcp_sack",
    "net/ipv4/tcp_timestamps",
    "net/ipv4/tcp_window_scaling",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/tcp_ecn",
    "net/ipv4/tcp_fastopen",
    "net/ipv4/tcp_fin_timeout",
    "net/ipv4/tcp_tw_reuse",
    "net/ipv4/tcp_slow_start_after_idle",
    "net/ipv4/tcp_no_metrics_save",
    "net/ipv4/tcp_mtu_probing",
    "net/ipv4/tcp_autocorking",
    "net/ipv4/tcp_notsent_lowat",
    "net/ipv4/tcp_limit_output_bytes",
    "net/ipv4/tcp_min_tso_segs",
    "net/ipv4/tcp_max_syn_backlog",
    "net/ipv4/tcp_syncookies",
    "net/core/somaxconn",
];
/// Limits of what a socket may buffer.
const BUFFERS: [&str; 7] = [
    "net/ipv4/tcp_rmem",
    "net/ipv4/tcp_wmem",
    "net/ipv4/tcp_moderate_rcvbuf",
    "net/core/rmem_default",
    "net/core/rmem_max",
    "net/core/wmem_default",
    "net/core/wmem_max",
];
/// Settings that no namespace has of its own.
const MACHINE: [&str; 4] = [
    "net/ipv4/tcp_mem",
    "net/core/netdev_max_backlog",
    "net/core/netdev_budget",
    "net/core/default_qdisc",
];
/// Offloads of a veth that change what a packet costs.
const OFFLOADS: [&str; 5] = [
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "generic-receive-offload",
    "tx-checksumming",
    "rx-checksumming",
];
const TOOL_LIMIT: Duration = Duration::from_secs(5);

/// A property, and what each variant has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Property {
    /// Of what.
    pub what: String,
    /// By the variant's word. A variant that has nothing of the kind is not there: no mesh has no proxies.
    pub values: BTreeMap<String, String>,
    /// Whether all that have it have the same; of congestion control, whether all connections everywhere have.
    pub equal: bool,
}

/// End of the names of properties that are about congestion control.
const USED: &str = ": congestion control of its connections";

/// What the congestion control of the connections in a place is called.
pub fn used_in(place: &str) -> String {
    format!("{place}{USED}")
}

/// Congestion control of the clients' connections, where it was the same in all labs.
pub fn of_clients(properties: &[Property]) -> Option<String> {
    let mut found = properties
        .iter()
        .filter(|p| p.equal && p.what == used_in("client"));
    found.next()?.values.values().next().cloned()
}

/// Properties of one lab.
pub type Facts = BTreeMap<String, String>;

/// Names of algorithms, by place.
pub type Used = BTreeMap<&'static str, BTreeSet<String>>;

/// Adds the congestion control of the connections that are open in a lab. To be called while a load runs.
pub fn look_at_connections(stage: &Stage, used: &mut Used) {
    for (place, targets) in SOCKETS {
        for netns in targets.iter().filter_map(|name| stage.lab.netns(name).ok()) {
            let known = sysctl::read(&netns, "net/ipv4/tcp_available_congestion_control");
            let known = known.unwrap_or_default();
            let text = output_of(&netns, "ss", &["-tinHO"], TOOL_LIMIT).unwrap_or_default();
            let names: BTreeSet<String> = text
                .split_ascii_whitespace()
                .filter(|word| known.split(' ').any(|name| name == *word))
                .map(str::to_owned)
                .collect();
            if !names.is_empty() {
                used.entry(place).or_default().extend(names);
            }
        }
    }
}

/// All that is to be compared of one lab.
///
/// # Errors
/// When a namespace cannot be entered.
pub fn facts(stage: &Stage) -> Result<Facts> {
    let mut facts = Facts::new();
    for (place, target) in PLACES {
        let netns = stage.lab.netns(target)?;
        let mut fact = |what: &str, value: String| facts.insert(format!("{place}: {what}"), value);
        let link = output_of(&netns, "ip", &["-o", "link", "show", "eth0"], TOOL_LIMIT);
        let link = link.unwrap_or_default();
        fact("MTU", after(&link, "mtu"));
        fact("qdisc", after(&link, "qdisc"));
        let offloads = output_of(&netns, "ethtool", &["-k", "eth0"], TOOL_LIMIT);
        fact(
            "offloads",
            offloads.map_or_else(|_| UNTOLD.to_owned(), |text| on(&text)),
        );
        fact("TCP settings", settings(&netns, &TCP));
        fact("socket buffers", settings(&netns, &BUFFERS));
        fact(
            "default congestion control",
            sysctl::read(&netns, "net/ipv4/tcp_congestion_control").unwrap_or_default(),
        );
        if place == "node" {
            let tracked = [
                "net/netfilter/nf_conntrack_max",
                "net/netfilter/nf_conntrack_buckets",
            ];
            fact("connection tracking", settings(&netns, &tracked));
        }
    }
    facts.insert(
        "machine: network settings".to_owned(),
        settings(&Netns::current()?, &MACHINE),
    );
    let affinity = |pids: &[i32]| {
        let mut sets: Vec<String> = pids
            .iter()
            .filter_map(|pid| Some(format!("{:?}", pinning::allowed(*pid).ok()?)))
            .collect();
        sets.dedup();
        sets.join(" and ")
    };
    let servers: Vec<i32> = stage
        .server_pids()
        .into_iter()
        .filter_map(|pid| i32::try_from(pid).ok())
        .collect();
    facts.insert("servers: processors".to_owned(), affinity(&servers));
    facts.insert(
        "clients: processors".to_owned(),
        format!("{:?}", pinning::policy()?.clients),
    );
    let proxies = stage.proxy_pids()?;
    if !proxies.is_empty() {
        facts.insert("proxies: processors".to_owned(), affinity(&proxies));
        let mut threads: Vec<String> = proxies
            .iter()
            .map(|pid| workers(*pid).to_string())
            .collect();
        threads.dedup();
        facts.insert("proxies: threads".to_owned(), threads.join(" and "));
    }
    Ok(facts)
}

const UNTOLD: &str = "not told: there is no ethtool";

/// What `ip -o link` says after a word.
fn after(line: &str, word: &str) -> String {
    let mut words = line.split_ascii_whitespace().skip_while(|w| *w != word);
    words.nth(1).unwrap_or("?").to_owned()
}

/// The offloads that are on.
fn on(text: &str) -> String {
    let on = |name: &&str| {
        text.lines().any(|line| {
            line.trim()
                .strip_prefix(*name)
                .is_some_and(|rest| rest.starts_with(": on"))
        })
    };
    OFFLOADS
        .into_iter()
        .filter(on)
        .collect::<Vec<_>>()
        .join(", ")
}

fn settings(netns: &Netns, keys: &[&str]) -> String {
    let setting = |key: &&str| {
        let name = key.rsplit('/').next().unwrap_or(key);
        let value = sysctl::read(netns, key).unwrap_or_else(|_| "?".to_owned());
        let value: Vec<&str> = value.split_ascii_whitespace().collect();
        format!("{name} {}", value.join(" "))
    };
    keys.iter().map(setting).collect::<Vec<_>>().join(", ")
}

/// Threads of a process that do its work: as many as have the most frequent name.
fn workers(pid: i32) -> usize {
    let mut names: BTreeMap<String, usize> = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        // Names of a pool's threads end in their number.
        let name = name
            .trim_end()
            .trim_end_matches(|c: char| c.is_ascii_digit() || c == '-');
        *names.entry(name.to_owned()).or_default() += 1;
    }
    names.into_values().max().unwrap_or(0)
}

/// Puts the facts of all labs beside each other, with the ciphers that were seen on the wire.
pub fn matrix(labs: &[(Variant, Facts)], proofs: &[Proof]) -> Vec<Property> {
    let mut properties: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut put = |what: &str, variant: &Variant, value: String| {
        let values = properties.entry(what.to_owned()).or_default();
        values.insert(variant.to_string(), value);
    };
    for (variant, facts) in labs {
        for (what, value) in facts {
            put(what, variant, value.clone());
        }
        let of_variant = proofs.iter().filter(|proof| proof.variant == *variant);
        let ciphers: BTreeSet<&str> = of_variant
            .flat_map(|proof| &proof.taps)
            .flat_map(|seen| seen.ciphers.iter().map(String::as_str))
            .collect();
        if !ciphers.is_empty() {
            let ciphers: Vec<&str> = ciphers.into_iter().collect();
            put("tunnel: cipher", variant, ciphers.join(" and "));
        }
    }
    // A stream is as fast as the slowest of its connections: they have to be alike in all places, not in each one only.
    let used = properties
        .iter()
        .filter(|(what, _)| what.ends_with(USED))
        .flat_map(|(_, values)| values.values().cloned())
        .collect::<BTreeSet<String>>();
    let alike = used.len() <= 1 && !used.iter().any(|names| names.contains(' '));
    properties
        .into_iter()
        .map(|(what, values)| Property {
            equal: match what.ends_with(USED) {
                true => alike,
                false => values.values().collect::<BTreeSet<_>>().len() <= 1,
            },
            what,
            values,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_differs_is_found_and_what_a_variant_does_not_have_is_no_difference() {
        let facts = |pairs: &[(&str, &str)]| -> Facts {
            let pairs = pairs.iter();
            pairs
                .map(|(what, value)| ((*what).to_owned(), (*value).to_owned()))
                .collect()
        };
        let labs = [
            (Variant::None, facts(&[("client: MTU", "1500")])),
            (
                Variant::Relay,
                facts(&[("client: MTU", "1400"), ("proxies: threads", "2")]),
            ),
            (
                Variant::Inpod,
                facts(&[("client: MTU", "1500"), ("proxies: threads", "2")]),
            ),
        ];
        let matrix = matrix(&labs, &[]);
        let equal: Vec<(&str, bool)> = matrix.iter().map(|p| (p.what.as_str(), p.equal)).collect();
        assert_eq!(equal, [("client: MTU", false), ("proxies: threads", true)]);
        assert_eq!(matrix[0].values["relay"], "1400");
    }

    #[test]
    fn connections_are_alike_only_if_they_are_in_all_places() {
        let equal = |client: &str, proxy: &str| {
            let labs = [
                (
                    Variant::None,
                    Facts::from([(used_in("client"), client.to_owned())]),
                ),
                (
                    Variant::Inpod,
                    Facts::from([
                        (used_in("client"), client.to_owned()),
                        (used_in("proxy"), proxy.to_owned()),
                    ]),
                ),
            ];
            let matrix = matrix(&labs, &[]);
            assert_eq!(matrix.len(), 2);
            matrix.iter().all(|property| property.equal)
        };
        assert!(equal("cubic", "cubic"));
        assert!(!equal("cubic", "bbr"));
        assert!(!equal("bbr and cubic", "bbr and cubic"));
    }

    #[test]
    fn links_and_offloads_are_read() {
        let line = "2: eth0@if3: <UP> mtu 1500 qdisc noqueue state UP mode DEFAULT";
        assert_eq!(
            (after(line, "mtu"), after(line, "qdisc")),
            ("1500".into(), "noqueue".into())
        );
        let text = "Features for eth0:\nrx-checksumming: on\ntx-checksumming: off\n\ttx-checksum-ipv4: off\n\
            tcp-segmentation-offload: on\n";
        assert_eq!(on(text), "tcp-segmentation-offload, rx-checksumming");
    }
}
