//! Errors of iptables.

use std::io;

use thiserror::Error;

use super::Variant;
use crate::netns::NetnsId;
use crate::plan::Family;

/// What went wrong with iptables.
#[derive(Debug, Error)]
pub enum IptablesError {
    /// The namespace could not be entered or looked at.
    #[error("iptables in {netns}: {action}: {source}")]
    Netns {
        /// The namespace.
        netns: NetnsId,
        /// What was being done.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The program could not be started or talked to.
    #[error("{program}: cannot be run: {source} (Debian: apt-get install iptables)")]
    Start {
        /// Program name.
        program: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The program did not end in time and was killed.
    #[error("{program} in {netns}: killed after {seconds} s without result")]
    Timeout {
        /// Program name.
        program: &'static str,
        /// The namespace.
        netns: NetnsId,
        /// Limit in seconds.
        seconds: u64,
    },
    /// The program failed.
    #[error("{program} in {netns}: {status}{}: {stderr}", at_line(line))]
    Failed {
        /// Program name.
        program: &'static str,
        /// The namespace.
        netns: NetnsId,
        /// Exit status.
        status: String,
        /// What it said.
        stderr: String,
        /// The line of the script that it named, with its number from 1.
        line: Option<(usize, String)>,
    },
    /// The output of a `-save` program could not be understood.
    #[error("{what}: line {number} is not understood: {line:?}")]
    Parse {
        /// Where the text comes from.
        what: String,
        /// Line number from 1.
        number: usize,
        /// The line.
        line: String,
    },
    /// A name or rule that would break out of its line of the script.
    #[error("iptables script: {text:?} has a line break or is empty")]
    Text {
        /// The text.
        text: String,
    },
    /// `AMBIDEX_IPTABLES` has another value than `nft` or `legacy`.
    #[error("AMBIDEX_IPTABLES={value:?}: must be nft or legacy")]
    Choice {
        /// The value.
        value: String,
    },
    /// Both variants have rules in the namespace.
    #[error(
        "{netns}: both iptables-nft (tables {nft}) and iptables-legacy (tables {legacy}) have rules here: set AMBIDEX_IPTABLES=nft or legacy"
    )]
    Mixed {
        /// The namespace.
        netns: NetnsId,
        /// Tables with nft rules.
        nft: String,
        /// Tables with legacy rules.
        legacy: String,
    },
    /// No variant works.
    #[error("no usable iptables for {family:?}: nft: {nft}; legacy: {legacy}")]
    NoneUsable {
        /// Address family.
        family: Family,
        /// Why nft does not work.
        nft: Box<IptablesError>,
        /// Why legacy does not work.
        legacy: Box<IptablesError>,
    },
    /// No variant was chosen for this family.
    #[error("no iptables variant was chosen for {family:?}")]
    NotChosen {
        /// Address family.
        family: Family,
    },
    /// nf_tables could not be asked over netlink.
    #[error("nf_tables in {netns}: {action}: {reason}")]
    NfTables {
        /// The namespace.
        netns: NetnsId,
        /// What was being done.
        action: &'static str,
        /// Why.
        reason: String,
    },
    /// A table with one of iptables' names has contents that iptables cannot show.
    #[error(
        "{netns}: nf_tables table {table} was not made by iptables (nft list table {table}): it cannot be read or written as one of its tables"
    )]
    Foreign {
        /// The namespace.
        netns: NetnsId,
        /// Table name.
        table: String,
    },
    /// A reading call failed.
    #[error("{program} in {netns}: {reason}")]
    Read {
        /// Program name.
        program: &'static str,
        /// The namespace.
        netns: NetnsId,
        /// Why.
        reason: String,
    },
}

fn at_line(line: &Option<(usize, String)>) -> String {
    match line {
        Some((number, text)) => format!(" at line {number} `{text}`"),
        None => String::new(),
    }
}

impl IptablesError {
    /// A failed attempt of one variant, for [`IptablesError::NoneUsable`].
    pub(super) fn none_usable(family: Family, nft: IptablesError, legacy: IptablesError) -> Self {
        IptablesError::NoneUsable {
            family,
            nft: Box::new(nft),
            legacy: Box::new(legacy),
        }
    }

    /// Both variants are in use.
    pub(super) fn mixed(netns: NetnsId, tables: &[super::TableInUse]) -> Self {
        let names = |variant: Variant| {
            let of_variant = tables.iter().filter(|t| t.variant == variant && !t.trivial);
            let names: Vec<&str> = of_variant.map(|table| table.table.as_str()).collect();
            names.join(", ")
        };
        IptablesError::Mixed {
            netns,
            nft: names(Variant::Nft),
            legacy: names(Variant::Legacy),
        }
    }
}
