//! What stands in a network namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;

use host_net::ipset::Ipset;
use host_net::iptables::{Iptables, tables_in_use};
use host_net::netlink::{Netlink, NetlinkError, ROUTE_PROTOCOL};
use host_net::netns::Netns;
use host_net::plan::{Family, Table};
use host_net::sockets::Listeners;
use host_net::sysctl;
use inpod_redirect::facts::{MARK_RETURN, PROBES_SET, RULE_RETURN};
use node_redirect::facts::{LIVE_PODS_SET, PODS_SET};
use shared_proxy::telemetry::admin::READINESS_PORT;

use super::super::facts::{
    Assigned, Device, FORWARDS_IPV6, Facts, FilledTable, KnownRoute, KnownSet, Namespace,
    PolicyRule, Tunnel,
};
use super::super::filters::mesh_of;
use super::note;

/// The kernel's own table.
const TABLE_LOCAL: u32 = 255;
/// Named namespaces that are looked at, at most.
const NAMESPACES: usize = 512;
/// Sysctls of a namespace that are no device's.
const SETTINGS: [&str; 6] = [
    FORWARDS_IPV6,
    "net/ipv4/ip_forward",
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/netfilter/nf_conntrack_count",
    "net/netfilter/nf_conntrack_max",
];
/// Sysctls of every device.
const OF_DEVICES: [&str; 3] = ["rp_filter", "accept_local", "src_valid_mark"];

/// Everything in the namespace that matters.
pub(super) async fn look(here: &Netns, facts: &mut Facts) {
    if let Err(error) = look_by_netlink(here, facts).await {
        note(facts, "devices, rules and routes", error);
    }
    facts.sysctls = settings(here, facts);
    for family in [Family::V4, Family::V6] {
        match tables_in_use(here, family) {
            Ok(tables) => facts.tables.extend(
                tables
                    .into_iter()
                    .filter(|table| !table.trivial)
                    .map(|table| FilledTable { family, table }),
            ),
            Err(error) => note(facts, "tables of iptables", error),
        }
    }
    match host_net::dump::filter_rules(here) {
        Ok(filters) => facts.filters = filters,
        Err(error) => note(facts, "rules of iptables and nftables", error),
    }
    match sets(here) {
        Ok(sets) => facts.sets = sets,
        Err(error) => note(facts, "sets", error),
    }
    match Listeners::of(here).and_then(|listeners| listeners.now()) {
        Ok(listeners) => facts.listeners = listeners,
        Err(error) => note(facts, "listeners", error),
    }
    facts.udp_ports = udp_ports();
    facts.ipvs_services = ipvs_services();
}

async fn look_by_netlink(here: &Netns, facts: &mut Facts) -> Result<(), NetlinkError> {
    let netlink = Netlink::connect(here).await?;
    let links = netlink.links().await?;
    let with_classifier = netlink.with_classifier().await?;
    let names: BTreeMap<u32, &str> = links.iter().map(|l| (l.index, l.name.as_str())).collect();
    let device = |link: &host_net::netlink::LinkInfo| Device {
        name: link.name.clone(),
        kind: link.kind.clone(),
        overlay: link.overlay.as_ref().map(|overlay| Tunnel {
            kind: overlay.kind,
            vni: overlay.vni,
            port: overlay.port,
            external: overlay.external,
        }),
        master: link
            .master
            .and_then(|index| names.get(&index))
            .map(|name| (*name).to_owned()),
        classifier: with_classifier.contains(&link.index),
    };
    facts.devices = links.iter().map(device).collect();
    let addresses = netlink.addresses().await?.into_iter();
    facts.addresses = addresses
        .map(|(dev, addr)| Assigned { dev, addr })
        .collect();
    for family in [Family::V4, Family::V6] {
        for rule in netlink.rules(family).await? {
            facts.rules.push(PolicyRule {
                family,
                priority: rule.priority(),
                mark: rule.mark(),
                ours: rule.protocol == ROUTE_PROTOCOL,
                text: rule.to_string(),
            });
        }
        for route in netlink.routes(family).await? {
            if route.table == TABLE_LOCAL {
                continue;
            }
            let word_after = |key: &str| {
                let mut words = route.text.split(' ').skip_while(|word| *word != key);
                words.nth(1)
            };
            facts.routes.push(KnownRoute {
                table: route.table,
                dst: route.dst,
                dev: word_after("dev").map(str::to_owned),
                via: word_after("via").and_then(|via| via.parse().ok()),
                ours: route.protocol == ROUTE_PROTOCOL,
                text: route.text.clone(),
            });
        }
    }
    Ok(())
}

fn settings(netns: &Netns, facts: &Facts) -> BTreeMap<String, String> {
    let devices = facts.devices.iter().map(|device| device.name.as_str());
    let devices: Vec<&str> = ["all", "default"].into_iter().chain(devices).collect();
    let of_devices = devices.iter().flat_map(|device| {
        OF_DEVICES
            .iter()
            .map(move |name| format!("net/ipv4/conf/{device}/{name}"))
    });
    let keys = SETTINGS.into_iter().map(str::to_owned).chain(of_devices);
    keys.filter_map(|key| {
        let value = sysctl::read(netns, &key).ok()?;
        Some((key, value))
    })
    .collect()
}

/// Settings of the proxy's namespace that decide whether it works at all.
pub(super) fn proxy_settings(netns: &Netns) -> BTreeMap<String, String> {
    let keys = [
        "tcp_fwmark_accept",
        "conf/all/src_valid_mark",
        "conf/all/accept_local",
    ];
    keys.iter()
        .filter_map(|key| {
            let key = format!("net/ipv4/{key}");
            let value = sysctl::read(netns, &key).ok()?;
            Some((key, value))
        })
        .collect()
}

fn sets(here: &Netns) -> Result<Vec<KnownSet>, host_net::ipset::IpsetError> {
    let ipset = Ipset::open(here)?;
    let mut sets = Vec::new();
    for name in ipset.sets()? {
        let Some(header) = ipset.header(&name)? else {
            continue;
        };
        let plain = header.is_hash_of(Family::V4) && header.options.is_empty();
        let wanted = [PODS_SET, LIVE_PODS_SET, PROBES_SET].contains(&name.as_str());
        let members = match wanted && plain {
            true => ipset
                .listing(&name)?
                .map_or_else(Vec::new, |listing| listing.entries),
            false => Vec::new(),
        };
        sets.push(KnownSet {
            definition: header.definition(),
            plain,
            comments: header.comments,
            members: members
                .into_iter()
                .filter_map(|entry| match entry.ip? {
                    IpAddr::V4(ip) => Some(ip),
                    IpAddr::V6(_) => None,
                })
                .collect(),
            name,
        });
    }
    Ok(sets)
}

/// Bound UDP ports of this process's namespace; the second column is `ADDRESS:PORT`, hexadecimal.
fn udp_ports() -> BTreeSet<u16> {
    let texts = ["udp", "udp6"].map(|name| {
        fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default()
    });
    texts
        .iter()
        .flat_map(|text| text.lines().skip(1))
        .filter_map(bound_port)
        .collect()
}

fn bound_port(line: &str) -> Option<u16> {
    let (_, port) = line.split_whitespace().nth(1)?.rsplit_once(':')?;
    u16::from_str_radix(port, 16).ok()
}

fn ipvs_services() -> usize {
    let text = fs::read_to_string("/proc/thread-self/net/ip_vs").unwrap_or_default();
    let service = |line: &&str| {
        ["TCP ", "UDP ", "SCTP ", "FWM "]
            .iter()
            .any(|p| line.starts_with(p))
    };
    text.lines().filter(service).count()
}

/// Named namespaces but this one and those of proxies. They come and go: what cannot be looked at is left out.
pub(super) async fn look_at_others(here: &Netns, facts: &mut Facts) {
    let names = match Netns::list_named() {
        Ok(names) => names,
        Err(error) => return note(facts, "named namespaces", error),
    };
    for name in names.into_iter().take(NAMESPACES) {
        let Ok(netns) = Netns::open(Netns::path_of(&name)) else {
            continue;
        };
        if netns.id() == here.id() {
            continue;
        }
        if let Ok(Some(namespace)) = other(name, &netns).await {
            facts.namespaces.push(namespace);
        }
    }
}

async fn other(name: String, netns: &Netns) -> io::Result<Option<Namespace>> {
    let listeners = Listeners::of(netns)?.now()?;
    let ports: BTreeSet<u16> = listeners.iter().map(std::net::SocketAddr::port).collect();
    if ports.contains(&READINESS_PORT) {
        return Ok(None);
    }
    let netlink = Netlink::connect(netns).await.map_err(io::Error::other)?;
    let rules = netlink.rules(Family::V4).await.map_err(io::Error::other)?;
    let captured = rules
        .iter()
        .filter_map(|listed| listed.rule.as_ref())
        .any(|rule| rule.priority == RULE_RETURN && rule.fwmark == Some(MARK_RETURN));
    // A program run for each captured pod would take seconds on a full node.
    let chains = if captured {
        BTreeSet::new()
    } else {
        mesh_chains(netns)
    };
    Ok(Some(Namespace {
        name,
        captured,
        ports,
        chains,
    }))
}

fn mesh_chains(netns: &Netns) -> BTreeSet<String> {
    let tables = tables_in_use(netns, Family::V4).unwrap_or_default();
    let nat = tables
        .iter()
        .filter(|used| used.table == Table::Nat.as_str() && !used.trivial);
    let saved = nat.filter_map(|used| {
        Iptables::both(used.variant)
            .save(netns, Family::V4, Table::Nat)
            .ok()
    });
    let chains = saved.flat_map(|ruleset| ruleset.chains.into_iter().map(|(chain, _)| chain));
    chains.filter(|chain| mesh_of(chain).is_some()).collect()
}

#[cfg(test)]
mod tests {
    use super::bound_port;

    #[test]
    fn ports_are_read_as_the_kernel_writes_them() {
        let line = "  383: 00000000:17C1 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 1 2 0 0";
        assert_eq!(bound_port(line), Some(6081));
        assert_eq!(bound_port("sl local_address"), None);
    }
}
