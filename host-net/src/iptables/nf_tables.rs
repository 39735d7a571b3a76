//! Which nf_tables tables exist, and the removal of empty ones, straight over netlink.
//!
//! `iptables-nft` makes its tables on first use and leaves them, with hooks that every packet passes. The `nft` program
//! need not be installed to take them away, and the kernel's generation counter makes "remove if still empty" safe: a
//! removal that was decided on an older state of the rules is refused (linux/netfilter/nf_tables.h, nfnetlink.h).

use super::IptablesError;
use crate::netns::Netns;
use crate::nfnetlink::{
    AttributeWriter, Attributes, Connection, FAMILY_INET, FAMILY_INET6, FLAG_REQUEST, Malformed,
    NfnetlinkError, Request,
};
use crate::plan::Family;

const SUBSYSTEM: u8 = 10;
/// `NFPROTO_INET` (linux/netfilter.h).
const BOTH_FAMILIES: u8 = 1;
/// `NFPROTO_UNSPEC`.
const ANY_FAMILY: u8 = 0;
const GET_TABLE: u8 = 1;
const DELETE_TABLE: u8 = 2;
const GET_CHAIN: u8 = 4;
const DELETE_CHAIN: u8 = 5;
const GET_GENERATION: u8 = 16;
const TABLE_NAME: u16 = 1;
const TABLE_USE: u16 = 3;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_USE: u16 = 6;
const POLICY_ACCEPT: u32 = 1;
const GENERATION_ID: u16 = 1;

/// The chains that iptables hangs into the packet path; any other base chain is somebody's own.
const BUILTIN_CHAINS: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// Message types without a subsystem that begin and end a transaction; the resource id names the subsystem.
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const BATCH_GENERATION: u16 = 1;

/// What the kernel answers to a transaction that was decided on an older generation.
const STALE: i32 = libc::ERESTART;

/// Why nf_tables did not do it.
#[derive(Debug)]
pub(super) enum Failure {
    /// Decided on a state that has changed since.
    Stale,
    /// Anything else.
    Other(IptablesError),
}

/// A connection to nf_tables in one namespace.
pub(super) struct NfTables<'a> {
    netns: &'a Netns,
    family: u8,
    connection: Connection,
}

impl<'a> NfTables<'a> {
    pub(super) fn open(netns: &'a Netns, family: Family) -> Result<Self, IptablesError> {
        Self::open_family(
            netns,
            match family {
                Family::V4 => FAMILY_INET,
                Family::V6 => FAMILY_INET6,
            },
        )
    }

    /// The tables that are of both families, nftables' `inet`.
    pub(super) fn open_inet(netns: &'a Netns) -> Result<Self, IptablesError> {
        Self::open_family(netns, BOTH_FAMILIES)
    }

    fn open_family(netns: &'a Netns, family: u8) -> Result<Self, IptablesError> {
        let connection = Connection::open(netns).map_err(|source| IptablesError::Netns {
            netns: netns.id(),
            action: "open a netfilter socket",
            source,
        })?;
        Ok(Self {
            netns,
            family,
            connection,
        })
    }

    /// Whether there is a table of any family.
    pub(super) fn has_tables(&self) -> Result<bool, IptablesError> {
        Ok(!self
            .dump_of(ANY_FAMILY, GET_TABLE, "list tables")?
            .is_empty())
    }

    /// Names of the tables of the family; none on a kernel without nf_tables.
    pub(super) fn tables(&self) -> Result<Vec<String>, IptablesError> {
        let parts = self.dump(GET_TABLE, "list tables")?;
        let name = |part: &Vec<u8>| -> Result<String, Malformed> {
            Ok(Attributes(part).require(TABLE_NAME)?.text()?.to_owned())
        };
        let names: Result<Vec<String>, Malformed> = parts.iter().map(name).collect();
        names.map_err(|error| self.explain("list tables", &error.into()))
    }

    /// Whether the table holds nothing but iptables' built-in chains, without rules and with policy ACCEPT. One that
    /// does not exist is trivial too.
    pub(super) fn is_trivial(&self, table: &str) -> Result<bool, IptablesError> {
        const ACTION: &str = "look into a table";
        let tables = self.dump(GET_TABLE, ACTION)?;
        let chains = self.dump(GET_CHAIN, ACTION)?;
        holds_nothing(table, &tables, &chains).map_err(|error| self.explain(ACTION, &error.into()))
    }

    fn dump(&self, command: u8, action: &'static str) -> Result<Vec<Vec<u8>>, IptablesError> {
        self.dump_of(self.family, command, action)
    }

    fn dump_of(
        &self,
        family: u8,
        command: u8,
        action: &'static str,
    ) -> Result<Vec<Vec<u8>>, IptablesError> {
        let mut request = Request::new(SUBSYSTEM, command, Vec::new()).dump();
        request.family = family;
        match self.connection.exchange(&request) {
            Err(NfnetlinkError::Refused { code, .. }) if means_unsupported(code) => Ok(Vec::new()),
            answer => answer.map_err(|error| self.explain(action, &error)),
        }
    }

    /// The kernel's number of the namespace.
    pub(super) fn namespace(&self) -> Result<u64, IptablesError> {
        let number = self.connection.namespace();
        number.map_err(|error| self.explain("ask which namespace it is", &error.into()))
    }

    /// The number of the present state of all rules of the namespace.
    pub(super) fn generation(&self) -> Result<u32, IptablesError> {
        const ACTION: &str = "read the generation";
        let request = Request::new(SUBSYSTEM, GET_GENERATION, Vec::new());
        let parts = self.connection.exchange(&request);
        let parts = parts.map_err(|error| self.explain(ACTION, &error))?;
        let first = parts.first().map_or(&[][..], Vec::as_slice);
        let id = Attributes(first).require(GENERATION_ID);
        let id = id.and_then(|attribute| attribute.number());
        id.map_err(|error| self.explain(ACTION, &error.into()))
    }

    /// Deletes a table with all it holds, unless rules have changed since `generation`.
    pub(super) fn delete(&self, table: &str, generation: u32) -> Result<(), Failure> {
        let name = AttributeWriter::default().text(TABLE_NAME, table);
        self.change(DELETE_TABLE, name, generation, "delete a table")
    }

    /// The base chains of iptables that exist: table, chain, and whether it is empty with policy ACCEPT.
    pub(super) fn built_in_chains(&self) -> Result<Vec<(String, String, bool)>, IptablesError> {
        const ACTION: &str = "list chains";
        let parts = self.dump(GET_CHAIN, ACTION)?;
        let read = |part: &Vec<u8>| -> Result<Option<(String, String, bool)>, Malformed> {
            let part = Attributes(part);
            let name = part.require(CHAIN_NAME)?.text()?;
            if !is_built_in(part, name)? {
                return Ok(None);
            }
            let table = part.require(CHAIN_TABLE)?.text()?;
            Ok(Some((
                table.to_owned(),
                name.to_owned(),
                is_idle_base_chain(part)?,
            )))
        };
        parts
            .iter()
            .filter_map(|part| read(part).transpose())
            .collect::<Result<_, _>>()
            .map_err(|error| self.explain(ACTION, &error.into()))
    }

    /// The chains that are not built in: table and name. Base chains of other programs are among them.
    pub(super) fn own_chains(&self) -> Result<Vec<(String, String)>, IptablesError> {
        const ACTION: &str = "list chains";
        let read = |part: &Vec<u8>| -> Result<Option<(String, String)>, Malformed> {
            let part = Attributes(part);
            let name = part.require(CHAIN_NAME)?.text()?;
            let table = part.require(CHAIN_TABLE)?.text()?;
            Ok((!is_built_in(part, name)?).then(|| (table.to_owned(), name.to_owned())))
        };
        self.dump(GET_CHAIN, ACTION)?
            .iter()
            .filter_map(|part| read(part).transpose())
            .collect::<Result<_, _>>()
            .map_err(|error| self.explain(ACTION, &error.into()))
    }

    /// Deletes a chain, unless rules have changed since `generation`.
    pub(super) fn delete_chain(
        &self,
        table: &str,
        chain: &str,
        generation: u32,
    ) -> Result<(), Failure> {
        let names = AttributeWriter::default()
            .text(CHAIN_TABLE, table)
            .text(CHAIN_NAME, chain);
        self.change(DELETE_CHAIN, names, generation, "delete a chain")
    }

    fn change(
        &self,
        command: u8,
        attributes: AttributeWriter,
        generation: u32,
        action: &'static str,
    ) -> Result<(), Failure> {
        let other = |error: Malformed| Failure::Other(self.explain(action, &error.into()));
        let state = AttributeWriter::default().raw(BATCH_GENERATION, &generation.to_be_bytes());
        let begin = mark(BATCH_BEGIN, state.finish().map_err(other)?);
        let mut delete = Request::new(SUBSYSTEM, command, attributes.finish().map_err(other)?);
        delete.family = self.family;
        let end = mark(BATCH_END, Vec::new());
        match self.connection.exchange_batch(&[begin, delete, end]) {
            Ok(_) => Ok(()),
            Err(NfnetlinkError::Refused { code: STALE, .. }) => Err(Failure::Stale),
            Err(NfnetlinkError::Refused { code, .. }) if code == libc::ENOENT => Ok(()),
            Err(error) => Err(Failure::Other(self.explain(action, &error))),
        }
    }

    fn explain(&self, action: &'static str, error: &NfnetlinkError) -> IptablesError {
        let reason = match error {
            NfnetlinkError::Refused { code, .. } => {
                std::io::Error::from_raw_os_error(*code).to_string()
            }
            other => other.to_string(),
        };
        IptablesError::NfTables {
            netns: self.netns.id(),
            action,
            reason,
        }
    }
}

fn holds_nothing(table: &str, tables: &[Vec<u8>], chains: &[Vec<u8>]) -> Result<bool, Malformed> {
    // Chains, sets and other named objects; rules do not count here.
    let mut objects = 0;
    for part in tables.iter().map(|part| Attributes(part)) {
        if part.require(TABLE_NAME)?.text()? == table {
            objects = part.require(TABLE_USE)?.number()?;
        }
    }
    for part in chains.iter().map(|part| Attributes(part)) {
        if part.require(CHAIN_TABLE)?.text()? != table {
            continue;
        }
        let name = part.require(CHAIN_NAME)?.text()?;
        if !is_built_in(part, name)? || !is_idle_base_chain(part)? {
            return Ok(false);
        }
        objects = objects.saturating_sub(1);
    }
    Ok(objects == 0)
}

fn is_built_in(chain: Attributes<'_>, name: &str) -> Result<bool, Malformed> {
    Ok(BUILTIN_CHAINS.contains(&name) && chain.find(CHAIN_HOOK)?.is_some())
}

/// No rule, nothing refers to it, and it lets everything pass.
fn is_idle_base_chain(chain: Attributes<'_>) -> Result<bool, Malformed> {
    Ok(chain.require(CHAIN_POLICY)?.number()? == POLICY_ACCEPT
        && chain.require(CHAIN_USE)?.number()? == 0)
}

fn mark(kind: u16, attributes: Vec<u8>) -> Request {
    Request {
        kind,
        flags: FLAG_REQUEST,
        family: 0,
        resource: u16::from(SUBSYSTEM),
        attributes,
    }
}

/// `EINVAL`: no such subsystem. The others: the subsystem has no such family.
fn means_unsupported(code: i32) -> bool {
    matches!(
        code,
        libc::EINVAL | libc::ENOENT | libc::EOPNOTSUPP | libc::EAFNOSUPPORT
    )
}
