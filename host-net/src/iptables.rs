//! iptables: writing with one `iptables-restore` per namespace and family, reading with `iptables-save`.
//!
//! A restore is atomic per table and takes milliseconds; one program run per rule takes twenty times as long and shows
//! every intermediate state to packets. Both implementations of iptables are supported ([`Variant`]).

mod choice;
mod error;
mod nf_tables;
pub(crate) mod process;
mod reading;
mod ruleset;
mod script;
#[cfg(test)]
mod tests;

use std::io;

use serde::{Deserialize, Serialize};

pub use choice::{VARIANT_VARIABLE, Variant, choose, usable};
pub use error::IptablesError;
pub use ruleset::{Ruleset, parse_save};
pub use script::RestoreScript;

use crate::netns::Netns;
use crate::plan::{Family, Table};
use nf_tables::{Failure, NfTables};

/// Tables that iptables knows; any other nf_tables table is somebody's own and none of its business.
const TABLES: [&str; 5] = ["raw", "filter", "mangle", "nat", "security"];

/// How often the removal of an empty nft table is tried when rules change meanwhile.
const ATTEMPTS: usize = 10;

/// The variants chosen for one namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Iptables {
    /// For IPv4, if chosen.
    pub v4: Option<Variant>,
    /// For IPv6, if chosen.
    pub v6: Option<Variant>,
}

impl Iptables {
    /// Chooses the variants of these families in a namespace, see [`choose`].
    pub fn choose(
        netns: &Netns,
        families: impl IntoIterator<Item = Family>,
    ) -> Result<Self, IptablesError> {
        let mut chosen = Self::default();
        for family in families {
            let variant = choose(netns, family)?;
            chosen.set(family, variant);
        }
        Ok(chosen)
    }

    /// The same variant for both families.
    pub fn both(variant: Variant) -> Self {
        Self {
            v4: Some(variant),
            v6: Some(variant),
        }
    }

    /// Sets the variant of a family.
    pub fn set(&mut self, family: Family, variant: Variant) {
        match family {
            Family::V4 => self.v4 = Some(variant),
            Family::V6 => self.v6 = Some(variant),
        }
    }

    /// The variant of a family.
    pub fn variant(&self, family: Family) -> Result<Variant, IptablesError> {
        let variant = match family {
            Family::V4 => self.v4,
            Family::V6 => self.v6,
        };
        variant.ok_or(IptablesError::NotChosen { family })
    }

    /// Runs `iptables-restore --noflush` in the namespace with this script ([`RestoreScript::render`]). Atomic per
    /// table, not across tables: after an error, tables before the one that failed stay changed.
    pub fn restore(
        &self,
        netns: &Netns,
        family: Family,
        script: &str,
    ) -> Result<(), IptablesError> {
        restore_with(self.variant(family)?, netns, family, script)
    }

    /// Reads one table. Leaves no trace: a table that does not exist is returned without chains and is not created.
    pub fn save(
        &self,
        netns: &Netns,
        family: Family,
        table: Table,
    ) -> Result<Ruleset, IptablesError> {
        save_with(self.variant(family)?, netns, family, table.as_str())
    }

    /// Whether a chain exists.
    pub fn chain_exists(
        &self,
        netns: &Netns,
        family: Family,
        table: Table,
        chain: &str,
    ) -> Result<bool, IptablesError> {
        reading::chain_exists(self.variant(family)?, netns, family, table, chain)
    }

    /// Whether a rule exists in a chain, in whatever spelling. A rule that jumps to a chain that does not exist is an
    /// error.
    pub fn rule_exists(
        &self,
        netns: &Netns,
        family: Family,
        table: Table,
        chain: &str,
        rule: &str,
    ) -> Result<bool, IptablesError> {
        let variant = self.variant(family)?;
        reading::rule_exists(variant, netns, family, table, chain, rule)
    }
}

/// A table that exists in a namespace.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct TableInUse {
    /// Whose table it is.
    pub variant: Variant,
    /// Name.
    pub table: String,
    /// No rule, no own chain, every policy ACCEPT.
    pub trivial: bool,
}

/// The tables that exist in a namespace, of both variants. Legacy tables come into being when they are looked at and
/// cannot be removed, so trivial ones of them mean nothing.
pub fn tables_in_use(netns: &Netns, family: Family) -> Result<Vec<TableInUse>, IptablesError> {
    let mut found = Vec::new();
    for variant in Variant::ALL {
        for table in existing_tables(variant, netns, family)? {
            let trivial = match variant {
                Variant::Nft => NfTables::open(netns, family)?.is_trivial(&table)?,
                Variant::Legacy => save_with(variant, netns, family, &table)?.is_trivial(),
            };
            found.push(TableInUse {
                variant,
                table,
                trivial,
            });
        }
    }
    found.sort();
    Ok(found)
}

/// A chain that is not built in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct OwnChain {
    /// Whose chain it is.
    pub variant: Variant,
    /// IPv4 or IPv6.
    pub family: Family,
    /// Name of its table.
    pub table: String,
    /// Its name.
    pub name: String,
}

impl OwnChain {
    /// Name of the program that shows and changes it.
    pub fn program(&self) -> &'static str {
        program(self.variant, self.family, Tool::Single)
    }
}

/// The chains of the tables of iptables that are not built in, of both variants. Where only nf_tables is used no program
/// is run: a few messages of the kernel's say it.
fn own_chains(netns: &Netns, family: Family) -> Result<Vec<OwnChain>, IptablesError> {
    let chain = |variant, table: &str, name: String| OwnChain {
        variant,
        family,
        table: table.to_owned(),
        name,
    };
    let mut chains = Vec::new();
    for (table, name) in NfTables::open(netns, family)?.own_chains()? {
        if TABLES.contains(&table.as_str()) {
            chains.push(chain(Variant::Nft, &table, name));
        }
    }
    for table in existing_tables(Variant::Legacy, netns, family)? {
        let saved = save_with(Variant::Legacy, netns, family, &table)?;
        let own = saved.chains.iter().map(|(name, _)| name);
        let own = own.filter(|name| !saved.is_builtin(name));
        chains.extend(own.map(|name| chain(Variant::Legacy, &table, name.clone())));
    }
    chains.sort();
    Ok(chains)
}

/// Chains of iptables that are not built in, of both families, and names of nftables tables of the family `inet`.
pub type OwnRules = (Vec<OwnChain>, Vec<String>);

/// All that is not built in. In a namespace without rules, as that of a pod that is just being made, it is one message to
/// the kernel.
pub fn own_rules(netns: &Netns) -> Result<OwnRules, IptablesError> {
    let of_both = NfTables::open_inet(netns)?;
    let mut legacy = false;
    for family in Family::BOTH {
        legacy |= !legacy_tables(netns, family)?.is_empty();
    }
    if !legacy && !of_both.has_tables()? {
        return Ok(OwnRules::default());
    }
    let mut chains = own_chains(netns, Family::V4)?;
    chains.extend(own_chains(netns, Family::V6)?);
    Ok((chains, of_both.tables()?))
}

/// Names of the nftables tables of the family `inet`, which no iptables shows. No program is run.
pub fn inet_tables(netns: &Netns) -> Result<Vec<String>, IptablesError> {
    NfTables::open_inet(netns)?.tables()
}

/// The present state of all nf_tables rules of a namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RulesState {
    /// The kernel's number of the namespace, which it gives to no other one (`SO_NETNS_COOKIE`).
    pub namespace: u64,
    /// The kernel adds one with each transaction.
    pub generation: u32,
}

/// Asks for the present state of the rules; an error on kernels that do not number their namespaces (before 5.14).
pub fn rules_state(netns: &Netns) -> Result<RulesState, IptablesError> {
    let nf_tables = NfTables::open_inet(netns)?;
    Ok(RulesState {
        namespace: nf_tables.namespace()?,
        generation: nf_tables.generation()?,
    })
}

/// Names of the tables of iptables-nft that exist. No program is run.
pub fn nft_tables(netns: &Netns, family: Family) -> Result<Vec<String>, IptablesError> {
    existing_tables(Variant::Nft, netns, family)
}

/// Deletes those of these nft tables that exist and are trivial; returns the names of those deleted. A table that holds
/// anything is left alone, also when somebody fills it at this very moment.
pub fn delete_nft_tables(
    netns: &Netns,
    family: Family,
    tables: &[Table],
) -> Result<Vec<Table>, IptablesError> {
    let nf_tables = NfTables::open(netns, family)?;
    let mut deleted = Vec::new();
    for table in tables {
        let name = table.as_str();
        let gone = delete_if(
            &nf_tables,
            netns,
            "delete a table",
            || {
                let exists = nf_tables.tables()?.iter().any(|found| found == name);
                Ok(exists && nf_tables.is_trivial(name)?)
            },
            |generation| nf_tables.delete(name, generation),
        )?;
        if gone {
            deleted.push(*table);
        }
    }
    Ok(deleted)
}

/// A base chain that iptables-nft makes on first use: the table and the name, e.g. `nat` and `OUTPUT`.
pub type BaseChain = (Table, String);

/// The base chains of iptables-nft that exist in a namespace.
pub fn nft_base_chains(netns: &Netns, family: Family) -> Result<Vec<BaseChain>, IptablesError> {
    let found = NfTables::open(netns, family)?.built_in_chains()?;
    let known = [Table::Raw, Table::Filter, Table::Mangle, Table::Nat];
    Ok(found
        .into_iter()
        .filter_map(|(table, chain, _)| {
            let table = known.into_iter().find(|t| t.as_str() == table)?;
            Some((table, chain))
        })
        .collect())
}

/// Deletes those of these base chains that exist, hold no rule and have policy ACCEPT: iptables-nft leaves them, with
/// a hook that every packet passes, also in tables that others use. A chain in use is left alone.
pub fn delete_nft_base_chains(
    netns: &Netns,
    family: Family,
    chains: &[BaseChain],
) -> Result<(), IptablesError> {
    let nf_tables = NfTables::open(netns, family)?;
    for (table, chain) in chains {
        let table = table.as_str();
        delete_if(
            &nf_tables,
            netns,
            "delete a chain",
            || {
                let found = nf_tables.built_in_chains()?;
                Ok(found
                    .iter()
                    .any(|(t, c, idle)| t == table && c == chain && *idle))
            },
            |generation| nf_tables.delete_chain(table, chain, generation),
        )?;
    }
    Ok(())
}

/// Deletes something if it may go, and decides again when rules have changed between looking and deleting.
fn delete_if(
    nf_tables: &NfTables<'_>,
    netns: &Netns,
    action: &'static str,
    may_go: impl Fn() -> Result<bool, IptablesError>,
    delete: impl Fn(u32) -> Result<(), Failure>,
) -> Result<bool, IptablesError> {
    for _ in 0..ATTEMPTS {
        let generation = nf_tables.generation()?;
        if !may_go()? {
            return Ok(false);
        }
        match delete(generation) {
            Ok(()) => return Ok(true),
            Err(Failure::Stale) => {}
            Err(Failure::Other(error)) => return Err(error),
        }
    }
    Err(IptablesError::NfTables {
        netns: netns.id(),
        action,
        reason: format!("rules changed {ATTEMPTS} times meanwhile"),
    })
}

/// What a program is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    Restore,
    Save,
    Single,
}

/// Name of the program. The variants' own names, because `iptables` is either of them.
fn program(variant: Variant, family: Family, tool: Tool) -> &'static str {
    match (family, variant, tool) {
        (Family::V4, Variant::Nft, Tool::Restore) => "iptables-nft-restore",
        (Family::V4, Variant::Nft, Tool::Save) => "iptables-nft-save",
        (Family::V4, Variant::Nft, Tool::Single) => "iptables-nft",
        (Family::V4, Variant::Legacy, Tool::Restore) => "iptables-legacy-restore",
        (Family::V4, Variant::Legacy, Tool::Save) => "iptables-legacy-save",
        (Family::V4, Variant::Legacy, Tool::Single) => "iptables-legacy",
        (Family::V6, Variant::Nft, Tool::Restore) => "ip6tables-nft-restore",
        (Family::V6, Variant::Nft, Tool::Save) => "ip6tables-nft-save",
        (Family::V6, Variant::Nft, Tool::Single) => "ip6tables-nft",
        (Family::V6, Variant::Legacy, Tool::Restore) => "ip6tables-legacy-restore",
        (Family::V6, Variant::Legacy, Tool::Save) => "ip6tables-legacy-save",
        (Family::V6, Variant::Legacy, Tool::Single) => "ip6tables-legacy",
    }
}

/// `iptables-restore --noflush`, waiting up to 5 s for the lock.
fn restore_with(
    variant: Variant,
    netns: &Netns,
    family: Family,
    script: &str,
) -> Result<(), IptablesError> {
    let program = program(variant, family, Tool::Restore);
    let args = ["--noflush", "--wait", "5"];
    let finished = process::run(netns, program, &args, script)?;
    if finished.status.success() {
        return Ok(());
    }
    let line = named_line(&finished.stderr).and_then(|number| {
        let text = script.lines().nth(number.checked_sub(1)?)?;
        Some((number, text.to_owned()))
    });
    Err(failed(program, netns, &finished, line))
}

fn save_with(
    variant: Variant,
    netns: &Netns,
    family: Family,
    table: &str,
) -> Result<Ruleset, IptablesError> {
    // Looking at a legacy table would create it; of an nft table that does not exist, chains would be made up.
    if !existing_tables(variant, netns, family)?
        .iter()
        .any(|name| name == table)
    {
        return Ok(Ruleset {
            table: table.to_owned(),
            ..Ruleset::default()
        });
    }
    let program = program(variant, family, Tool::Save);
    let finished = process::run(netns, program, &["-t", table], "")?;
    if !finished.status.success() {
        return Err(failed(program, netns, &finished, None));
    }
    let rulesets = parse_save(program, &finished.stdout)?;
    let found = rulesets.into_iter().find(|ruleset| ruleset.table == table);
    found.ok_or_else(|| IptablesError::Foreign {
        netns: netns.id(),
        table: table.to_owned(),
    })
}

fn existing_tables(
    variant: Variant,
    netns: &Netns,
    family: Family,
) -> Result<Vec<String>, IptablesError> {
    let mut tables = match variant {
        Variant::Nft => NfTables::open(netns, family)?.tables()?,
        Variant::Legacy => legacy_tables(netns, family)?,
    };
    tables.retain(|name| TABLES.contains(&name.as_str()));
    Ok(tables)
}

/// Legacy tables that exist. `/proc/net` would show those of the process's first thread.
fn legacy_tables(netns: &Netns, family: Family) -> Result<Vec<String>, IptablesError> {
    let path = match family {
        Family::V4 => "/proc/thread-self/net/ip_tables_names",
        Family::V6 => "/proc/thread-self/net/ip6_tables_names",
    };
    let names = netns.run(|| std::fs::read_to_string(path));
    match names.and_then(|names| names) {
        Ok(names) => Ok(names.lines().map(str::to_owned).collect()),
        // A kernel without ip_tables.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(source) => Err(IptablesError::Netns {
            netns: netns.id(),
            action: "read the names of the legacy tables",
            source,
        }),
    }
}

fn failed(
    program: &'static str,
    netns: &Netns,
    finished: &process::Finished,
    line: Option<(usize, String)>,
) -> IptablesError {
    // The first complaint is the cause; iptables-nft goes on to complain about every line after it.
    let words = finished.stderr.lines().map(str::trim);
    let words: Vec<&str> = words
        .filter(|line| !line.is_empty() && !line.starts_with("Try `"))
        .take(3)
        .collect();
    IptablesError::Failed {
        program,
        netns: netns.id(),
        status: finished.status.to_string(),
        stderr: words.join("; "),
        line,
    }
}

/// The number in `line 3 failed`, `Error occurred at line: 3` or `line 3: RULE_APPEND failed`.
fn named_line(stderr: &str) -> Option<usize> {
    stderr.match_indices("line").find_map(|(at, word)| {
        let rest = stderr[at + word.len()..].trim_start_matches([':', ' ']);
        let digits = rest.split(|c: char| !c.is_ascii_digit()).next()?;
        digits.parse().ok()
    })
}
