//! nftables' own tables, read from `nft -j list ruleset` into the form in which iptables' rules are met.
//!
//! A table `inet NAME` counts for both families. What a rule says in its own words is taken from the listing, by the rule's
//! handle. What is not known becomes [`Unknown`](super::rule::Match::Unknown), never an error.

mod rules;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use host_net::plan::NftTable;
use serde_json::Value;

use super::rule::Rule;
use super::state::{Base, Chain, State, Tables};

/// Tables that iptables keeps in nftables, and shows itself.
const OF_IPTABLES: [&str; 5] = ["filter", "mangle", "nat", "raw", "security"];

/// The tables of a namespace that are nobody's but nftables'.
#[derive(Debug, Clone, Default)]
pub struct Ruleset {
    /// IPv4's and IPv6's, by names with the family: `inet istio-ambient-nat`.
    pub(super) tables: [Tables; 2],
    /// Chains that hang in the packets' path.
    pub(super) bases: Vec<Base>,
    /// Packets that rules with a counter met, by table, chain and position from 1.
    pub(crate) counted: BTreeMap<(String, String, usize), u64>,
}

/// Reads the tables of a namespace.
///
/// # Errors
/// When nft cannot be run, or refuses.
pub(crate) fn read(netns: &Netns) -> Result<Ruleset> {
    let json = listing(netns, &["-j", "list", "ruleset"])?;
    let text = listing(netns, &["-a", "-s", "list", "ruleset"])?;
    let json = serde_json::from_str(&json).context("what `nft -j list ruleset` says")?;
    Ok(Ruleset::of(&json, &text))
}

/// What planned tables are once nft has read them: they are made in a namespace that exists only for this.
///
/// # Errors
/// As [`read`].
pub(crate) fn as_listed(tables: &[NftTable]) -> Result<Ruleset> {
    let nowhere = Netns::create_unnamed().context("a namespace for a trial")?;
    host_net::nft::apply(&nowhere, tables)?;
    read(&nowhere)
}

fn listing(netns: &Netns, arguments: &[&str]) -> Result<String> {
    let mut command = Command::new("nft");
    command.args(arguments);
    let output = netns.run(|| command.output())?;
    let output = output.context("cannot run nft (Debian: apt-get install nftables)")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("nft {}: {}", arguments.join(" "), said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

impl Ruleset {
    /// Of both listings.
    pub(super) fn of(json: &Value, text: &str) -> Self {
        let texts = texts(text);
        let mut ruleset = Self::default();
        let objects = json["nftables"].as_array().into_iter().flatten();
        for object in objects {
            if let Some(chain) = object.get("chain") {
                ruleset.chain(chain);
            } else if let Some(rule) = object.get("rule") {
                ruleset.rule(rule, &texts);
            }
        }
        ruleset.bases.sort_by_key(|base| base.priority);
        ruleset
    }

    fn chain(&mut self, chain: &Value) {
        let Some((table, families)) = place(chain) else {
            return;
        };
        let name = word(chain, "name");
        let policy = chain["policy"].as_str().map(str::to_uppercase);
        for family in families {
            let chains = self.tables[*family].entry(table.clone()).or_default();
            chains.entry(name.clone()).or_default().policy = policy.clone();
        }
        if let Some(hook) = chain["hook"].as_str() {
            self.bases.push(Base {
                table,
                chain: name,
                kind: word(chain, "type"),
                hook: hook.to_uppercase(),
                priority: i32::try_from(chain["prio"].as_i64().unwrap_or(0)).unwrap_or(0),
                families,
            });
        }
    }

    fn rule(&mut self, rule: &Value, texts: &BTreeMap<(String, u64), String>) {
        let Some((table, families)) = place(rule) else {
            return;
        };
        let chain = word(rule, "chain");
        let handle = rule["handle"].as_u64().unwrap_or(0);
        let parts: &[Value] = rule["expr"].as_array().map_or(&[], Vec::as_slice);
        let text = texts.get(&(table.clone(), handle)).cloned();
        let (matches, target) = rules::read(parts);
        let read = Rule {
            text: text.unwrap_or_else(|| rule["expr"].to_string()),
            matches,
            target,
        };
        let mut position = 0;
        for family in families {
            let chains = self.tables[*family].entry(table.clone()).or_default();
            let into = chains.entry(chain.clone()).or_default();
            into.rules.push(read.clone());
            position = into.rules.len();
        }
        let counter = parts.iter().find_map(|part| part.get("counter"));
        if let Some(packets) = counter.and_then(|counter| counter["packets"].as_u64()) {
            self.counted.insert((table, chain, position), packets);
        }
    }

    /// Names of the tables.
    pub(super) fn names(&self) -> BTreeSet<&str> {
        let tables = self.tables.iter().flat_map(BTreeMap::keys);
        tables.map(String::as_str).collect()
    }
}

impl State {
    /// Puts these tables in, in the place of those of the same names.
    pub(super) fn put(&mut self, ruleset: &Ruleset) {
        let names = ruleset.names();
        self.bases
            .retain(|base| !names.contains(base.table.as_str()));
        self.bases.extend(ruleset.bases.iter().cloned());
        self.bases.sort_by_key(|base| base.priority);
        for (into, tables) in self.tables.iter_mut().zip(&ruleset.tables) {
            into.extend(tables.iter().map(|(name, chains)| {
                let chains: BTreeMap<String, Chain> = chains.clone();
                (name.clone(), chains)
            }));
        }
        self.not_evaluated
            .retain(|name| !names.contains(name.as_str()));
    }
}

fn word(object: &Value, key: &str) -> String {
    object[key].as_str().unwrap_or_default().to_owned()
}

/// The table with its family, and the families of packets that pass it; none for one of iptables, and for those that see
/// no packets of IP.
fn place(object: &Value) -> Option<(String, &'static [usize])> {
    let (family, table) = (object["family"].as_str()?, object["table"].as_str()?);
    let families: &[usize] = match family {
        "inet" => &[0, 1],
        "ip" => &[0],
        "ip6" => &[1],
        _ => return None,
    };
    let of_iptables = family != "inet" && OF_IPTABLES.contains(&table);
    (!of_iptables).then(|| (format!("{family} {table}"), families))
}

/// What each rule says, by table and handle. One with many elements goes over several lines.
fn texts(listing: &str) -> BTreeMap<(String, u64), String> {
    let mut texts = BTreeMap::new();
    let mut table = String::new();
    let mut begun = String::new();
    for line in listing.lines().map(str::trim) {
        let (said, handle) = match line.rsplit_once(" # handle ") {
            Some((said, handle)) => (said, handle.parse().ok()),
            None => (line, None),
        };
        if let Some(name) = said
            .strip_prefix("table ")
            .and_then(|rest| rest.strip_suffix(" {"))
        {
            table = name.to_owned();
        }
        if said.ends_with('{') && handle.is_some() || ["", "}"].contains(&said) {
            begun.clear();
            continue;
        }
        if !begun.is_empty() {
            begun.push(' ');
        }
        begun.push_str(said);
        if let Some(handle) = handle {
            texts.insert((table.clone(), handle), std::mem::take(&mut begun));
        } else if said.ends_with(';') || !said.ends_with([',', '{']) {
            begun.clear();
        }
    }
    texts
}
