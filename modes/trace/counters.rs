//! How many packets each rule met.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context, Result};

use crate::explain::nft;
use crate::explain::story::Stage;

/// Where a rule is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct RulePlace {
    /// Index of the namespace.
    pub(super) place: usize,
    /// Whether it is one of ip6tables: both families have chains of one name.
    pub(super) ipv6: bool,
    pub(super) table: String,
    pub(super) chain: String,
    /// From 1.
    pub(super) position: usize,
}

/// Packets that each rule met.
pub(super) type Counters = BTreeMap<RulePlace, u64>;

/// Reads the counters of all rules of all places. Only tools of the variants that are in use are asked: the others would make
/// tables.
pub(super) fn read(stage: &Stage) -> Result<Counters> {
    let mut counters = Counters::new();
    for (place, netns) in stage.namespaces.iter().enumerate() {
        let lines = host_net::dump::filter_rules(netns)?;
        if lines.iter().any(|line| line.contains(" | ")) {
            for ((table, chain, position), packets) in nft::read(netns)?.counted {
                // A table of both families counts for both.
                for ipv6 in [false, true] {
                    let (table, chain) = (table.clone(), chain.clone());
                    let at = RulePlace {
                        place,
                        ipv6,
                        table,
                        chain,
                        position,
                    };
                    counters.insert(at, packets);
                }
            }
        }
        for tool in [
            "iptables-nft",
            "iptables-legacy",
            "ip6tables-nft",
            "ip6tables-legacy",
        ] {
            if !lines
                .iter()
                .any(|line| line.starts_with(&format!("{tool} ")))
            {
                continue;
            }
            let save = format!("{tool}-save");
            let mut command = Command::new(&save);
            command.arg("-c");
            let output = netns.run(|| command.output())?;
            let output = output.with_context(|| format!("cannot run {save}"))?;
            counted(
                &String::from_utf8_lossy(&output.stdout),
                (place, tool.starts_with("ip6")),
                &mut counters,
            );
        }
    }
    Ok(counters)
}

/// `[packets:bytes] -A CHAIN RULE` lines of a save.
fn counted(save: &str, (place, ipv6): (usize, bool), into: &mut Counters) {
    let mut table = "";
    let mut positions: BTreeMap<&str, usize> = BTreeMap::new();
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = name;
            positions.clear();
        }
        let Some((counts, rule)) = line.strip_prefix('[').and_then(|it| it.split_once("] -A "))
        else {
            continue;
        };
        let chain = rule.split(' ').next().unwrap_or_default();
        let position = positions.entry(chain).or_default();
        *position += 1;
        let packets = counts.split(':').next().and_then(|it| it.parse().ok());
        let at = RulePlace {
            place,
            ipv6,
            table: table.to_owned(),
            chain: chain.to_owned(),
            position: *position,
        };
        into.insert(at, packets.unwrap_or(0));
    }
}

/// By how many packets each grew.
pub(super) fn grown(before: &Counters, after: &Counters) -> Counters {
    after
        .iter()
        .map(|(key, packets)| {
            let earlier = before.get(key).copied().unwrap_or(0);
            (key.clone(), packets.saturating_sub(earlier))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_counted_by_their_place_in_the_chain() {
        let save = "*mangle\n:PREROUTING ACCEPT [9:9]\n[3:180] -A PREROUTING -j own\n[1:60] -A own -j RETURN\n\
            [2:120] -A PREROUTING -j ACCEPT\nCOMMIT\n*nat\n[7:1] -A PREROUTING -j ACCEPT\nCOMMIT\n";
        let mut before = Counters::new();
        counted(save, (4, false), &mut before);
        counted(save, (4, true), &mut before);
        let mut after = before.clone();
        counted(&save.replace("[2:120]", "[12:120]"), (4, false), &mut after);
        let grown = grown(&before, &after);
        let of_family = |ipv6, table: &str, chain: &str, position| {
            grown[&RulePlace {
                place: 4,
                ipv6,
                table: table.to_owned(),
                chain: chain.to_owned(),
                position,
            }]
        };
        assert_eq!(of_family(true, "mangle", "PREROUTING", 2), 0);
        let of = |table: &str, chain: &str, position| of_family(false, table, chain, position);
        assert_eq!(of("mangle", "PREROUTING", 2), 10);
        assert_eq!(of("nat", "PREROUTING", 1), 0);
        assert_eq!(of("mangle", "own", 1), 0);
    }
}
