//! Single questions about chains and rules, asked through the `iptables` crate.
//!
//! The crate's own `exists` and `chain_exists` take every failure for "no", and its lock waits for ever; `execute`
//! hands out the exit status and takes a limit, and is what is used here.

use ::iptables::IPTables;

use super::{IptablesError, Tool, Variant, legacy_tables, program};
use crate::netns::Netns;
use crate::plan::{Family, Table};

/// "No such chain" and "no such rule".
const ABSENT: i32 = 1;

/// Whether a chain exists.
pub(super) fn chain_exists(
    variant: Variant,
    netns: &Netns,
    family: Family,
    table: Table,
    chain: &str,
) -> Result<bool, IptablesError> {
    ask(variant, netns, family, table, &format!("-w 5 -S {chain}"))
}

/// Whether a rule exists in a chain. A rule that jumps to a chain that does not exist is an error.
pub(super) fn rule_exists(
    variant: Variant,
    netns: &Netns,
    family: Family,
    table: Table,
    chain: &str,
    rule: &str,
) -> Result<bool, IptablesError> {
    let question = format!("-w 5 -C {chain} {rule}");
    ask(variant, netns, family, table, &question)
}

fn ask(
    variant: Variant,
    netns: &Netns,
    family: Family,
    table: Table,
    question: &str,
) -> Result<bool, IptablesError> {
    // A question about a legacy table would create it.
    if variant == Variant::Legacy
        && !legacy_tables(netns, family)?
            .iter()
            .any(|name| name == table.as_str())
    {
        return Ok(false);
    }
    let program = program(variant, family, Tool::Single);
    let reader = IPTables {
        cmd: program,
        has_check: true,
        has_wait: false,
        is_numeric: true,
    };
    let failed = |reason: String| IptablesError::Read {
        program,
        netns: netns.id(),
        reason,
    };
    let output = netns
        .run(|| {
            let output = reader.execute(table.as_str(), question);
            output.map_err(|error| error.to_string())
        })
        .map_err(|error| failed(error.to_string()))?
        .map_err(failed)?;
    match output.status.code() {
        Some(0) => Ok(true),
        Some(ABSENT) => Ok(false),
        _ => Err(failed(
            String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        )),
    }
}
