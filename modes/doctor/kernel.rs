//! What the kernel can do, and its settings.

use std::collections::BTreeSet;

use node_redirect::facts::{LIVE_PODS_SET, PODS_SET, TUNNEL_IN, TUNNEL_OUT};

use super::catalogue::{BOTH, Check, Found, INPOD, NODE};
use super::facts::{Facts, Feature};
use crate::options::InpodRules;

/// Share of the connection table, in percent, above which it is called nearly full.
const NEARLY_FULL: u64 = 80;

pub(super) static CHECKS: [Check; 22] = [
    Check {
        id: "host/netns",
        title: "network namespaces can be made and entered",
        modes: BOTH,
        why: "both captures work in the network namespaces of pods and of the proxy",
        fix: "run as root with CAP_SYS_ADMIN, and without a filter of system calls that forbids unshare and setns (securityContext.privileged, or seccompProfile: Unconfined)",
        look: |facts| lacking(facts, Feature::Netns),
    },
    Check {
        id: "host/iptables",
        title: "iptables works",
        modes: BOTH,
        why: "both captures redirect with rules of iptables",
        fix: "apt-get install iptables; modprobe nf_tables (or ip_tables)",
        look: |facts| lacking(facts, Feature::Iptables),
    },
    Check {
        id: "host/xt-mark",
        title: "rules can match and set packet marks",
        modes: BOTH,
        why: "marks tell the proxy's own packets from those of the pods",
        fix: "modprobe xt_mark",
        look: |facts| lacking(facts, Feature::Mark),
    },
    Check {
        id: "host/xt-connmark",
        title: "rules can match and set connection marks",
        modes: BOTH,
        why: "answers to the proxy find back by their connection's mark",
        fix: "modprobe xt_connmark",
        look: |facts| lacking(facts, Feature::Connmark),
    },
    Check {
        id: "host/conntrack",
        title: "connections can be tracked",
        modes: BOTH,
        why: "redirection and connection marks live in the connection table",
        fix: "modprobe nf_conntrack",
        look: |facts| lacking(facts, Feature::Conntrack),
    },
    Check {
        id: "host/nat",
        title: "addresses can be translated",
        modes: BOTH,
        why: "the node's probes of in-pod captured pods get an address of their own, and queries for names are led to the proxy",
        fix: "modprobe nf_nat xt_nat",
        look: |facts| lacking(facts, Feature::Nat),
    },
    Check {
        id: "host/xt-set",
        title: "rules can match sets",
        modes: BOTH,
        why: "the captured pods of the node are members of a set",
        fix: "modprobe xt_set",
        look: |facts| lacking(facts, Feature::SetMatch),
    },
    Check {
        id: "host/ipset",
        title: "sets of addresses with comments can be made",
        modes: BOTH,
        why: "the captured pods of the node are members of a set, with their owner in the comment",
        fix: "modprobe ip_set_hash_ip",
        look: |facts| lacking(facts, Feature::IpsetHashIp),
    },
    Check {
        id: "host/fwmark-rule",
        title: "packets can be routed by their mark",
        modes: BOTH,
        why: "rules by mark lead packets into the tunnels and answers to the proxy's sockets",
        fix: "use a kernel with CONFIG_IP_MULTIPLE_TABLES",
        look: |facts| lacking(facts, Feature::FwmarkRule),
    },
    Check {
        id: "host/ip6tables",
        title: "IPv6 of captured pods can be dropped",
        modes: BOTH,
        why: "IPv6 is not captured, and what is not captured must not pass",
        fix: "modprobe ip6table_filter (or nf_tables), or boot with ipv6.disable=1",
        look: |facts| match facts.features.get(&Feature::Ipv6) {
            Some(None) => lacking(facts, Feature::Ip6tables),
            _ => Vec::new(),
        },
    },
    Check {
        id: "host/xt-comment",
        title: "rules can carry comments",
        modes: BOTH,
        why: "no capture needs them, but kube-proxy and most network plugins do, and their rules fail without",
        fix: "modprobe xt_comment",
        look: |facts| {
            let why = facts.lacks(Feature::Comment);
            why.map(|why| Found::warn("kernel", why))
                .into_iter()
                .collect()
        },
    },
    Check {
        id: "node/overlay",
        title: "tunnel devices can be made",
        modes: NODE,
        why: "the node capture leads pods' packets to the proxy through two tunnels",
        fix: "modprobe geneve, or modprobe vxlan and --overlay vxlan",
        look: |facts| match (facts.lacks(Feature::Geneve), facts.lacks(Feature::Vxlan)) {
            (Some(geneve), Some(vxlan)) => {
                vec![Found::fail(
                    "kernel",
                    format!("geneve: {geneve}; vxlan: {vxlan}"),
                )]
            }
            _ => Vec::new(),
        },
    },
    Check {
        id: "node/geneve",
        title: "the tunnels can be geneve",
        modes: NODE,
        why: "proxies of the field expect geneve; with ours vxlan does the same",
        fix: "modprobe geneve, or choose --overlay vxlan for agent and proxy",
        look: |facts| match (
            facts.lacks(Feature::Geneve),
            facts.features.get(&Feature::Vxlan),
        ) {
            (Some(why), Some(None)) => vec![Found::warn("kernel", why)],
            _ => Vec::new(),
        },
    },
    Check {
        id: "node/tproxy",
        title: "packets can be handed to a socket with another address",
        modes: NODE,
        why: "the proxy takes packets out of the tunnels by TPROXY (in pods only with --inpod-rules tproxy)",
        fix: "modprobe xt_TPROXY, or choose --mode inpod",
        look: |facts| lacking(facts, Feature::Tproxy),
    },
    Check {
        id: "inpod/redirect",
        title: "connections can be redirected to a local port",
        modes: INPOD,
        why: "connections are redirected to the proxy's ports inside the pod",
        fix: "modprobe xt_REDIRECT, or choose --inpod-rules nftables",
        look: |facts| lacking(facts, Feature::Redirect),
    },
    Check {
        id: "inpod/nft",
        title: "with --inpod-rules nftables, nft works",
        modes: INPOD,
        why: "this style writes its rules in pods with the program nft, and without it enrols no pod",
        fix: "apt-get install nftables; modprobe nf_tables nft_redir; or leave --inpod-rules at redirect",
        look: |facts| match facts.inpod_rules {
            Some(InpodRules::Nftables) => lacking(facts, Feature::Nftables),
            _ => Vec::new(),
        },
    },
    Check {
        id: "inpod/xt-owner",
        title: "rules can tell packets of this machine's sockets",
        modes: INPOD,
        why: "only connections of the node itself get the probe address",
        fix: "modprobe xt_owner",
        look: |facts| lacking(facts, Feature::Owner),
    },
    Check {
        id: "host/ip-forward",
        title: "the node forwards packets",
        modes: BOTH,
        why: "without it no pod reaches another, captured or not",
        fix: "sysctl -w net.ipv4.ip_forward=1",
        look: |facts| match facts.sysctl("net/ipv4/ip_forward") {
            Some("0") => vec![Found::fail("net.ipv4.ip_forward", "is 0")],
            _ => Vec::new(),
        },
    },
    Check {
        id: "host/conntrack-full",
        title: "the connection table has room",
        modes: BOTH,
        why: "every captured connection takes two or three entries, and what finds no room is dropped",
        fix: "sysctl -w net.netfilter.nf_conntrack_max=N with N at least twice what it is",
        look: connection_table,
    },
    Check {
        id: "node/rp-filter",
        title: "the filter of reverse paths lets the proxy's packets pass",
        modes: NODE,
        why: "the proxy sends with the addresses of pods; a strict filter (1, and no 2 on the device) drops that, and a loose one too where no route leads back",
        fix: "sysctl -w net.ipv4.conf.OBJECT.rp_filter=2, in /etc/sysctl.d too, and give the node a default route",
        look: reverse_path,
    },
    Check {
        id: "node/fwmark-accept",
        title: "the proxy's sockets do not take over marks",
        modes: NODE,
        why: "an answer that takes over the tunnel's mark is routed back into the proxy's own namespace",
        fix: "ambidex verify --node says whether the agent keeps it right; by hand in the proxy's namespace: sysctl -w net.ipv4.OBJECT=0",
        look: |facts| in_proxy(facts, "tcp_fwmark_accept", None),
    },
    Check {
        id: "node/src-valid-mark",
        title: "sources are checked without regard to marks",
        modes: NODE,
        why: "in the proxy's namespace every marked packet's source seems to be local, which passes the check only with accept_local",
        fix: "in the proxy's namespace: sysctl -w net.ipv4.OBJECT=0",
        look: |facts| {
            in_proxy(
                facts,
                "conf/all/src_valid_mark",
                Some("conf/all/accept_local"),
            )
        },
    },
];

fn lacking(facts: &Facts, feature: Feature) -> Vec<Found> {
    let why = facts.lacks(feature);
    why.map(|why| Found::fail("kernel", why))
        .into_iter()
        .collect()
}

fn connection_table(facts: &Facts) -> Vec<Found> {
    let count = facts.number("net/netfilter/nf_conntrack_count");
    let max = facts.number("net/netfilter/nf_conntrack_max");
    let (Some(count), Some(max @ 1..)) = (count, max) else {
        return Vec::new();
    };
    let (object, what) = (
        "net.netfilter.nf_conntrack_max",
        format!("{count} of {max} entries"),
    );
    match count.saturating_mul(100) / max {
        100.. => vec![Found::fail(object, what)],
        NEARLY_FULL.. => vec![Found::warn(object, what)],
        _ => Vec::new(),
    }
}

/// The kernel takes the larger of the values of `all` and of the device, so 2 on a device wins over 1 for all.
fn reverse_path(facts: &Facts) -> Vec<Found> {
    let value = |dev: &str| facts.number(&format!("net/ipv4/conf/{dev}/rp_filter"));
    let Some(all) = value("all") else {
        return Vec::new();
    };
    let mut found = Vec::new();
    // Devices that packets of captures pass at this moment.
    for dev in capture_devices(facts) {
        if value(&dev).is_some_and(|own| own.max(all) == 1) {
            found.push(Found::fail(
                dev,
                "is strict, and a captured pod or the proxy is behind it",
            ));
        }
    }
    match all {
        1 if !facts.has_default_route() => {
            found.push(Found::fail("all", "is strict, and there is no default route, so loose is not enough"));
        }
        1 => found.push(Found::warn(
            "all",
            "is strict: the agent sets 2 on the devices of captured pods, which whoever writes sysctls back undoes",
        )),
        _ => {}
    }
    found
}

fn capture_devices(facts: &Facts) -> BTreeSet<String> {
    let members: BTreeSet<_> = facts
        .sets
        .iter()
        .filter(|set| [PODS_SET, LIVE_PODS_SET].contains(&set.name.as_str()))
        .flat_map(|set| set.members.iter().copied())
        .collect();
    let of_pods = facts
        .pod_routes()
        .filter(|(route, _)| members.iter().any(|ip| route.dst.addr() == *ip))
        .map(|(_, dev)| dev.to_owned());
    let of_proxy = facts
        .routes
        .iter()
        .filter(|route| super::clashes::node_tables().contains(&route.table) && route.ours)
        .filter_map(|route| route.dev.clone())
        .filter(|dev| ![TUNNEL_IN.host, TUNNEL_OUT.host, "lo"].contains(&dev.as_str()));
    of_pods.chain(of_proxy).collect()
}

/// A setting that is 1 in the proxy's namespace and nothing else makes up for it.
fn in_proxy(facts: &Facts, key: &str, unless: Option<&str>) -> Vec<Found> {
    let is_set = |key: &str| {
        let value = facts.proxy_sysctls.get(&format!("net/ipv4/{key}"));
        value.is_some_and(|value| value == "1")
    };
    if is_set(key) && !unless.is_some_and(is_set) {
        vec![Found::fail(
            key.replace('/', "."),
            "is 1 in the proxy's namespace",
        )]
    } else {
        Vec::new()
    }
}
