//! The state of a network namespace as canonical text: two dumps are equal exactly when the state is.
//!
//! What is in it: devices, addresses, policy rules and routes of both families, ipsets with their members, nftables,
//! iptables of both variants and both families, and the sysctls that capture depends on. One object per line.
//!
//! What is left out, because it differs between equal states or comes and goes by itself: interface indices, MAC
//! addresses, counters and time-outs; IPv6 link-local addresses (random) and IPv6 routes to link-local and multicast
//! destinations or made by the kernel for its own addresses (they appear when duplicate address detection ends); the
//! state flags of routes whose device is down; hash parameters of ipsets; `nf_conntrack_tcp_loose` at its default (the
//! key appears when a module is loaded); and legacy iptables tables that hold nothing but ACCEPT policies (the kernel
//! never removes a legacy table). Empty nftables tables and chains are not left out: their hooks work.
//!
//! Reading changes nothing: legacy tables are read only where they exist, since asking for one would make it.

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::netlink::{LinkInfo, ListedRoute, Netlink, NetlinkError};
use crate::netns::Netns;
use crate::plan::Family;

mod difference;
mod filters;
mod settings;

/// `RTPROT_KERNEL`.
const PROTOCOL_KERNEL: u8 = 2;
/// `RT_TABLE_LOCAL`.
const TABLE_LOCAL: u32 = 255;

/// Why a namespace could not be dumped.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// Links, addresses, rules or routes.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A tool could not be started.
    #[error("cannot run {tool}: {source}{}", install_hint(source))]
    Start {
        /// The program.
        tool: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A tool failed.
    #[error("{command} failed: {message}")]
    Tool {
        /// The command line.
        command: String,
        /// What it printed as error.
        message: String,
    },
    /// A sysctl or /proc file could not be read, or the namespace could not be entered.
    #[error("reading kernel state: {0}")]
    Read(#[from] io::Error),
}

fn install_hint(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::NotFound => " (install the packages iptables, ipset and nftables)",
        _ => "",
    }
}

/// Canonical state of one namespace. [`fmt::Display`] gives the text.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dump {
    /// Devices, sorted.
    pub links: Vec<String>,
    /// Addresses, sorted.
    pub addresses: Vec<String>,
    /// Policy rules in the order in which the kernel looks at them, IPv4 first.
    pub rules: Vec<String>,
    /// Routes of all tables, sorted.
    pub routes: Vec<String>,
    /// ipsets and their members, sorted.
    pub ipsets: Vec<String>,
    /// nftables: tables and chains of everybody, and the content of tables that iptables does not show.
    pub nftables: Vec<String>,
    /// iptables: chains sorted, rules in order.
    pub iptables: Vec<String>,
    /// Sysctls, sorted.
    pub sysctls: Vec<String>,
}

impl Dump {
    fn sections(&self) -> [&Vec<String>; 8] {
        [
            &self.links,
            &self.addresses,
            &self.rules,
            &self.routes,
            &self.ipsets,
            &self.nftables,
            &self.iptables,
            &self.sysctls,
        ]
    }

    /// What differs: lines only here as `-…`, lines only in `other` as `+…`. Empty when the states are equal. A rule
    /// that only moved shows up as both.
    pub fn diff(&self, other: &Self) -> Vec<String> {
        let pairs = self.sections().into_iter().zip(other.sections());
        pairs
            .flat_map(|(ours, theirs)| difference::between(ours, theirs))
            .collect()
    }
}

impl fmt::Display for Dump {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for line in self.sections().into_iter().flatten() {
            writeln!(f, "{line}")?;
        }
        Ok(())
    }
}

/// Reads the state of a namespace. Must be called inside a tokio runtime.
///
/// # Errors
/// Something could not be read; a partial dump would compare as a difference, so there is none.
pub async fn dump(ns: &Netns) -> Result<Dump, DumpError> {
    let netlink = Netlink::connect(ns).await?;
    let mut dump = Dump {
        links: links(&netlink.links().await?),
        ..Dump::default()
    };
    for address in netlink.listed_addresses().await? {
        let random = match address.addr.addr() {
            IpAddr::V6(ip) => ip.is_unicast_link_local(),
            IpAddr::V4(_) => false,
        };
        if !random {
            dump.addresses.push(format!("address {address}"));
        }
    }
    for (family, digit) in [(Family::V4, 4), (Family::V6, 6)] {
        let rules = netlink.rules(family).await?;
        let lines = rules.iter().map(|rule| format!("rule{digit} {rule}"));
        dump.rules.extend(lines);
        let routes = netlink.routes(family).await?;
        let lasting = routes.iter().filter(|route| !is_transient(route));
        let lines = lasting.map(|route| format!("route{digit} {}", route.text));
        dump.routes.extend(lines);
    }
    let place = ns.clone();
    let rest = tokio::task::spawn_blocking(move || read_by_tools(&place, dump)).await;
    let mut dump = rest.map_err(io::Error::other)??;
    for section in [
        &mut dump.links,
        &mut dump.addresses,
        &mut dump.routes,
        &mut dump.ipsets,
        &mut dump.sysctls,
    ] {
        section.sort();
    }
    Ok(dump)
}

/// Rules and chains of nftables and iptables only, as [`dump`] has them: nftables first.
///
/// # Errors
/// As [`dump`].
pub fn filter_rules(ns: &Netns) -> Result<Vec<String>, DumpError> {
    let (nftables, iptables) = filters::tables(ns)?;
    Ok([nftables, iptables].concat())
}

fn read_by_tools(ns: &Netns, mut dump: Dump) -> Result<Dump, DumpError> {
    dump.ipsets = filters::ipsets(ns)?;
    let (nftables, iptables) = filters::tables(ns)?;
    dump.nftables = nftables;
    dump.iptables = iptables;
    dump.sysctls = settings::sysctls(ns)?;
    Ok(dump)
}

fn links(links: &[LinkInfo]) -> Vec<String> {
    let names: BTreeMap<_, _> = links.iter().map(|link| (link.index, &link.name)).collect();
    let line = |link: &LinkInfo| {
        let master = link.master.and_then(|index| names.get(&index));
        let master = master.map(|name| format!(" master {name}"));
        let underlay = link.overlay.as_ref().and_then(|overlay| overlay.underlay);
        let underlay = underlay.and_then(|index| names.get(&index));
        let underlay = underlay.map(|name| format!(" over {name}"));
        let (master, underlay) = (master.unwrap_or_default(), underlay.unwrap_or_default());
        format!("link {link}{master}{underlay}")
    };
    links.iter().map(line).collect()
}

/// IPv6 routes that follow from device state and come and go on their own time.
fn is_transient(route: &ListedRoute) -> bool {
    let IpAddr::V6(dst) = route.dst.addr() else {
        return false;
    };
    let for_own_address = route.table == TABLE_LOCAL && route.protocol == PROTOCOL_KERNEL;
    for_own_address || dst.is_multicast() || dst.is_unicast_link_local()
}

#[cfg(test)]
mod tests;
