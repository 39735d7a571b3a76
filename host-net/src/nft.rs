//! nftables: tables of our own, written with one `nft -f -` for all tables of a change, and read back as text.
//!
//! A transaction deletes each table and makes it anew; the kernel changes from one to the other between two packets, and
//! what hangs in the packet path before hangs there afterwards. What a table should look like is said by the same program
//! that lists it: versions of nft spell one rule differently, so the wanted table is made in a namespace that exists only
//! for this, and listed there.

mod content;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fmt::Write;
use std::io;
use std::sync::{Mutex, PoisonError};

use thiserror::Error;

use crate::engine::Problem;
use crate::iptables::{IptablesError, inet_tables, process};
use crate::netns::{Netns, NetnsId};
use crate::plan::NftTable;
use content::Content;

const PROGRAM: &str = "nft";
/// What nft says of a table that does not exist.
const ABSENT: &str = "No such file or directory";
/// Wanted tables that are remembered as this machine's nft lists them. There are a few, for all pods.
const REMEMBERED: usize = 64;

/// What went wrong with nftables.
#[derive(Debug, Error)]
pub enum NftError {
    /// The program could not be started.
    #[error(
        "nft: cannot be run: {0} (Debian: apt-get install nftables; or choose --inpod-rules redirect)"
    )]
    Start(io::Error),
    /// The namespace could not be entered, or the program did not end.
    #[error("nft: {0}")]
    Run(IptablesError),
    /// A namespace to see in how this nft spells a table could not be made.
    #[error("nft: a network namespace for a trial: {0}")]
    Trial(io::Error),
    /// The program refused.
    #[error("nft in {netns}: {action} {tables}: {message}")]
    Refused {
        /// The namespace.
        netns: NetnsId,
        /// What was being done.
        action: &'static str,
        /// Names of the tables.
        tables: String,
        /// What it said.
        message: String,
    },
}

/// Makes tables with exactly this content, whatever they hold before: all of them, or on an error none.
pub fn apply(netns: &Netns, tables: &[NftTable]) -> Result<(), NftError> {
    let mut script = String::new();
    for table in tables {
        script.push_str(&deletion(&table.name));
        script.push_str(&definition(table));
    }
    run(netns, &script, "make", || names(tables))
}

/// Deletes a table. Returns whether it was there.
pub fn delete(netns: &Netns, name: &str) -> Result<bool, NftError> {
    if listing(netns, name)?.is_none() {
        return Ok(false);
    }
    run(netns, &deletion(name), "delete", || name.to_owned()).map(|()| true)
}

/// What a table holds at this moment, as a script that makes it again; none if it does not exist.
pub(crate) fn saved(netns: &Netns, name: &str) -> Result<Option<String>, NftError> {
    listing(netns, name)
}

/// Puts back what [`saved`] returned.
pub(crate) fn put_back(netns: &Netns, name: &str, saved: Option<&str>) -> Result<(), NftError> {
    let script = deletion(name) + saved.unwrap_or_default();
    run(netns, &script, "put back", || name.to_owned())
}

/// What is wrong with a table; none: it is there, and exactly as wanted.
pub fn look(netns: &Netns, table: &NftTable) -> Result<Option<Problem>, NftError> {
    let Some(found) = listing(netns, &table.name)? else {
        return Ok(Some(Problem::Missing));
    };
    Ok(wanted(table)?.problem(&Content::parse(&found)))
}

/// The table as this machine's nft lists it.
fn wanted(table: &NftTable) -> Result<Content, NftError> {
    static KNOWN: Mutex<Option<HashMap<NftTable, Content>>> = Mutex::new(None);
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(content) = known().as_ref().and_then(|all| all.get(table)) {
        return Ok(content.clone());
    }
    let nowhere = Netns::create_unnamed().map_err(NftError::Trial)?;
    apply(&nowhere, std::slice::from_ref(table))?;
    let content = Content::parse(&listing(&nowhere, &table.name)?.unwrap_or_default());
    let mut known = known();
    let all = known.get_or_insert_default();
    if all.len() >= REMEMBERED {
        all.clear();
    }
    all.insert(table.clone(), content.clone());
    Ok(content)
}

/// Commands of nft that make a table, one per line.
pub(crate) fn commands(table: &NftTable) -> Vec<String> {
    let name = &table.name;
    let mut lines = vec![format!("add table inet {name}")];
    for chain in &table.chains {
        let base = chain.base.as_ref().map_or_else(String::new, |base| {
            format!(
                " {{ type {} hook {} priority {} ; }}",
                base.kind, base.hook, base.priority
            )
        });
        lines.push(format!("add chain inet {name} {}{base}", chain.name));
    }
    // Rules may jump to chains that stand behind them.
    for chain in &table.chains {
        let rules = chain.rules.iter();
        lines.extend(rules.map(|rule| format!("add rule inet {name} {} {rule}", chain.name)));
    }
    lines
}

fn definition(table: &NftTable) -> String {
    let mut script = String::new();
    for line in commands(table) {
        let _ = writeln!(script, "{line}");
    }
    script
}

/// Deleting what is not there is an error; making what is there is none.
fn deletion(name: &str) -> String {
    format!("add table inet {name}\ndelete table inet {name}\n")
}

fn names(tables: &[NftTable]) -> String {
    let names: Vec<&str> = tables.iter().map(|table| table.name.as_str()).collect();
    names.join(", ")
}

/// The table without counters, which is a script, too.
fn listing(netns: &Netns, name: &str) -> Result<Option<String>, NftError> {
    let tables = inet_tables(netns).map_err(NftError::Run)?;
    if !tables.iter().any(|table| table == name) {
        return Ok(None);
    }
    let arguments = ["-s", "list", "table", "inet", name];
    let finished = process::run(netns, PROGRAM, &arguments, "").map_err(explain)?;
    if finished.status.success() {
        return Ok(Some(finished.stdout));
    }
    if finished.stderr.contains(ABSENT) {
        return Ok(None);
    }
    Err(NftError::Refused {
        netns: netns.id(),
        action: "list",
        tables: name.to_owned(),
        message: finished.stderr.trim().to_owned(),
    })
}

fn run(
    netns: &Netns,
    script: &str,
    action: &'static str,
    tables: impl Fn() -> String,
) -> Result<(), NftError> {
    let finished = process::run(netns, PROGRAM, &["-f", "-"], script).map_err(explain)?;
    if finished.status.success() {
        return Ok(());
    }
    Err(NftError::Refused {
        netns: netns.id(),
        action,
        tables: tables(),
        message: finished.stderr.trim().to_owned(),
    })
}

fn explain(error: IptablesError) -> NftError {
    match error {
        IptablesError::Start { source, .. } => NftError::Start(source),
        other => NftError::Run(other),
    }
}
