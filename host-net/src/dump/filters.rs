//! ipsets, nftables and iptables, as their own tools print them, made canonical.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::process::Command;

use super::DumpError;
use crate::netns::Netns;
use crate::plan::Family;

/// Tables that iptables-nft keeps in nftables' `ip` and `ip6` families.
const IPTABLES_TABLES: [&str; 5] = ["filter", "mangle", "nat", "raw", "security"];
/// What nft says when the kernel has no nf_tables, hence no tables.
const NO_NFTABLES: [&str; 2] = [
    "cache initialization failed",
    "Unable to initialize Netlink socket",
];

fn output(
    ns: &Netns,
    tool: &'static str,
    args: &[&str],
) -> Result<Result<String, String>, DumpError> {
    let output = ns.run(|| Command::new(tool).args(args).output())?;
    let output = output.map_err(|source| DumpError::Start { tool, source })?;
    if output.status.success() {
        Ok(Ok(String::from_utf8_lossy(&output.stdout).into_owned()))
    } else {
        let message = String::from_utf8_lossy(&output.stderr);
        Ok(Err(message.trim().to_owned()))
    }
}

fn required(ns: &Netns, tool: &'static str, args: &[&str]) -> Result<String, DumpError> {
    output(ns, tool, args)?.map_err(|message| DumpError::Tool {
        command: [&[tool], args].concat().join(" "),
        message,
    })
}

/// Every set and every member, without what depends on history.
pub(super) fn ipsets(ns: &Netns) -> Result<Vec<String>, DumpError> {
    let text = required(ns, "ipset", &["save"])?;
    Ok(text.lines().filter_map(ipset_line).collect())
}

pub(super) fn ipset_line(line: &str) -> Option<String> {
    let (verb, rest) = line.split_once(' ')?;
    let (name, rest) = rest.split_once(' ')?;
    let (verb, passing): (_, &[&str]) = match verb {
        // The table grows with the members and its seed is random.
        "create" => ("", &["hashsize", "initval"]),
        "add" => (" member", &["timeout", "packets", "bytes"]),
        _ => return None,
    };
    // A comment is last, in quotes, and may hold anything.
    let (plain, comment) = match rest.find(" comment \"") {
        Some(at) => rest.split_at(at),
        None => (rest, ""),
    };
    let mut words = Vec::new();
    let mut parts = plain.split(' ');
    while let Some(part) = parts.next() {
        if passing.contains(&part) {
            parts.next();
        } else {
            words.push(part);
        }
    }
    Some(format!("ipset {name}{verb} {}{comment}", words.join(" ")))
}

/// nftables' lines and iptables' lines.
pub(super) fn tables(ns: &Netns) -> Result<(Vec<String>, Vec<String>), DumpError> {
    let skeleton = match output(ns, "nft", &["list", "chains"])? {
        Ok(text) => nft_skeleton(&text),
        Err(message) if NO_NFTABLES.iter().any(|known| message.contains(known)) => BTreeMap::new(),
        Err(message) => {
            let command = "nft list chains".to_owned();
            return Err(DumpError::Tool { command, message });
        }
    };
    let mut iptables = Vec::new();
    let mut hidden = BTreeSet::new();
    for (family, nft_family, save) in [
        (Family::V4, "ip", "iptables-nft-save"),
        (Family::V6, "ip6", "ip6tables-nft-save"),
    ] {
        if skeleton.keys().any(|table| is_iptables(table, nft_family)) {
            let text = required(ns, save, &[])?;
            hidden.extend(incompatible(&text).map(|name| format!("{nft_family} {name}")));
            iptables.extend(iptables_lines(save, &text, false));
        }
        iptables.extend(legacy(ns, family)?);
    }
    let mut nftables = Vec::new();
    for (table, chains) in &skeleton {
        nftables.push(format!("nft {table}"));
        nftables.extend(chains.iter().map(|chain| format!("nft {table} {chain}")));
        let shown_by_iptables = is_iptables(table, "ip") || is_iptables(table, "ip6");
        if !shown_by_iptables || hidden.contains(table) {
            let mut args = vec!["-s", "list", "table"];
            args.extend(table.split(' '));
            let text = required(ns, "nft", &args)?;
            let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
            nftables.extend(lines.map(|line| format!("nft {table} | {line}")));
        }
    }
    Ok((nftables, iptables))
}

fn is_iptables(table: &str, family: &str) -> bool {
    let name = table
        .strip_prefix(family)
        .and_then(|rest| rest.strip_prefix(' '));
    name.is_some_and(|name| IPTABLES_TABLES.contains(&name))
}

/// `family name` of every table, with its chains and where they are hooked in. iptables' own listing shows built-in
/// chains whether or not they exist.
fn nft_skeleton(text: &str) -> BTreeMap<String, BTreeSet<String>> {
    let mut tables = BTreeMap::<_, BTreeSet<_>>::new();
    let mut table = String::new();
    let mut chain = String::new();
    for line in text.lines().map(str::trim) {
        if let Some(name) = opens(line, "table ") {
            table = name.to_owned();
            tables.entry(table.clone()).or_default();
        } else if let Some(name) = opens(line, "chain ") {
            chain = format!("chain {name}");
        } else if line == "}" {
            let done = std::mem::take(&mut chain);
            if !done.is_empty() {
                tables.entry(table.clone()).or_default().insert(done);
            }
        } else if !chain.is_empty() && !line.is_empty() {
            chain = format!("{chain} {line}");
        }
    }
    tables
}

fn opens<'a>(line: &'a str, what: &str) -> Option<&'a str> {
    let (name, _) = line.strip_prefix(what)?.split_once(" {")?;
    Some(name)
}

/// Tables that iptables says it cannot show completely.
fn incompatible(save: &str) -> impl Iterator<Item = &str> {
    save.lines()
        .filter(|line| line.starts_with("# Table `") && line.contains("incompatible"))
        .filter_map(|line| line.split(['`', '\'']).nth(1))
}

/// The legacy tables of a family, if this namespace has any. The save tool would make the tables that it asks for.
fn legacy(ns: &Netns, family: Family) -> Result<Vec<String>, DumpError> {
    let (names, save) = match family {
        Family::V4 => ("ip_tables_names", "iptables-legacy-save"),
        Family::V6 => ("ip6_tables_names", "ip6tables-legacy-save"),
    };
    // Of this thread: /proc/net is where the main thread is.
    let path = format!("/proc/thread-self/net/{names}");
    let present = match ns.run(|| fs::read_to_string(&path))? {
        Ok(text) => !text.trim().is_empty(),
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => return Err(e.into()),
    };
    if !present {
        return Ok(Vec::new());
    }
    Ok(iptables_lines(save, &required(ns, save, &[])?, true))
}

#[derive(Default)]
struct SavedTable {
    /// Built-in chains with their policies.
    policies: BTreeSet<String>,
    /// Own chains.
    chains: BTreeSet<String>,
    /// Rules by chain, in order.
    rules: BTreeMap<String, Vec<String>>,
}

impl SavedTable {
    /// Like a table that nobody has touched.
    fn is_untouched(&self) -> bool {
        let open = self.policies.iter().all(|line| line.ends_with(" ACCEPT"));
        open && self.chains.is_empty() && self.rules.is_empty()
    }
}

/// Lines `TOOL TABLE …` of a save, without counters and comments; chains sorted, each chain's rules in order.
fn iptables_lines(save: &str, text: &str, leave_out_untouched: bool) -> Vec<String> {
    let mut tables = BTreeMap::<&str, SavedTable>::new();
    let mut name = "";
    for line in text.lines() {
        if let Some(table) = line.strip_prefix('*') {
            name = table;
            tables.entry(name).or_default();
        } else if let Some(chain) = line.strip_prefix(':') {
            let mut words = chain.split(' ');
            let (chain, policy) = (words.next().unwrap_or(""), words.next().unwrap_or("-"));
            let table = tables.entry(name).or_default();
            if policy == "-" {
                table.chains.insert(format!(":{chain}"));
            } else {
                table.policies.insert(format!(":{chain} {policy}"));
            }
        } else if let Some(rule) = line.strip_prefix("-A ") {
            let chain = rule.split(' ').next().unwrap_or("");
            let rules = &mut tables.entry(name).or_default().rules;
            rules
                .entry(chain.to_owned())
                .or_default()
                .push(line.to_owned());
        }
    }
    let tool = save.trim_end_matches("-save");
    let mut lines = Vec::new();
    for (name, table) in tables {
        if leave_out_untouched && table.is_untouched() {
            continue;
        }
        let rules = table.rules.values().flatten();
        let all = table.policies.iter().chain(&table.chains).chain(rules);
        lines.extend(all.map(|line| format!("{tool} {name} {line}")));
    }
    lines
}
