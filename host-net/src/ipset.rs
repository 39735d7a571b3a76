//! Sets of addresses of one family (`ipset`, type `hash:ip`), through the kernel's own netlink protocol.
//!
//! Own code in place of `libipset`: errors are numbers, many entries go in one message, two sets can be swapped, and
//! nothing has to be installed. Feature `libipset` has the C library as a second implementation for a differential test.

mod error;
mod protocol;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::net::IpAddr;

pub use crate::netlink::Made;
pub use error::IpsetError;
pub use protocol::{Listing, SetEntry, SetHeader};

use crate::netns::Netns;
use crate::nfnetlink::{Connection, FLAG_CREATE, FLAG_EXCL, Malformed, NfnetlinkError, Request};
use crate::plan::{Family, Member, Set};
use error::ERR_EXIST;
use protocol::Element;

/// Longest set name, in bytes (`IPSET_MAXNAMELEN` less the terminator).
const NAME_BYTES: usize = 31;
/// Longest comment, in bytes (`IPSET_MAX_COMMENT_SIZE`).
const COMMENT_BYTES: usize = 255;

/// What became of an entry that was to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Removal {
    /// It is gone.
    Removed,
    /// It was not there, or the set is not.
    Absent,
    /// It was left alone: its comment names another owner.
    OwnedByOther {
        /// The comment found.
        comment: Option<String>,
    },
}

/// The sets of one network namespace. Calls block for microseconds and may come from any thread.
pub struct Ipset {
    connection: Connection,
}

impl Ipset {
    /// Opens a netlink socket in `netns`.
    pub fn open(netns: &Netns) -> Result<Self, IpsetError> {
        let connection = Connection::open(netns).map_err(|source| IpsetError::Open {
            netns: netns.id(),
            source,
        })?;
        Ok(Self { connection })
    }

    /// Creates a set as `ipset create NAME hash:ip [family inet6] [comment]` does. A set with the same name, type, family and options
    /// is accepted; any other is a [`IpsetError::Conflict`].
    pub fn create(&self, set: &Set) -> Result<Made, IpsetError> {
        const ACTION: &str = "create";
        let name = checked(&set.name)?;
        let types = self.request(
            name,
            ACTION,
            protocol::TYPE,
            0,
            protocol::type_query(set.family),
        )?;
        let answer = types.first().map_or(&[][..], Vec::as_slice);
        let revision = protocol::revision_from(answer).map_err(|e| garbled(name, ACTION, e))?;
        let attributes = protocol::create(name, revision, set.family, set.comments);
        let flags = FLAG_CREATE | FLAG_EXCL;
        match self.request(name, ACTION, protocol::CREATE, flags, attributes) {
            Ok(_) => Ok(Made::Created),
            Err(IpsetError::Refused { code, .. }) if code == libc::EEXIST => {
                self.accept_existing(set)
            }
            Err(error) => Err(error),
        }
    }

    fn accept_existing(&self, set: &Set) -> Result<Made, IpsetError> {
        let absent = || IpsetError::Absent {
            set: set.name.clone(),
        };
        let found = self.header(&set.name)?.ok_or_else(absent)?;
        if found.is_hash_of(set.family)
            && found.options.is_empty()
            && found.comments == set.comments
        {
            return Ok(Made::Existed);
        }
        let comment = if set.comments { " comment" } else { "" };
        let family = protocol::family_word(set.family);
        Err(IpsetError::Conflict {
            set: set.name.clone(),
            found: found.definition(),
            wanted: format!("hash:ip family {family}{comment}"),
        })
    }

    /// Destroys a set with its entries; false when there is none. Refused while a firewall rule refers to it.
    pub fn destroy(&self, set: &str) -> Result<bool, IpsetError> {
        self.if_present(set, "destroy", protocol::DESTROY)
    }

    /// Removes all entries of a set; false when there is no such set.
    pub fn flush(&self, set: &str) -> Result<bool, IpsetError> {
        self.if_present(set, "flush", protocol::FLUSH)
    }

    /// Exchanges the contents of two sets of the same type, atomically for the packets that consult them.
    pub fn swap(&self, a: &str, b: &str) -> Result<(), IpsetError> {
        let attributes = protocol::of_two_sets(checked(a)?, checked(b)?);
        self.request(a, "swap", protocol::SWAP, 0, attributes)?;
        Ok(())
    }

    /// Adds entries, all in one message per set (about 400 entries with comments each; more go in several messages).
    /// An entry that exists gets the comment given here: the address has a new owner. Stops at the first entry that
    /// the kernel refuses; those before it stay.
    pub fn add(&self, members: &[Member]) -> Result<(), IpsetError> {
        for member in members {
            checked_comment(member)?;
        }
        for (set, elements) in by_set(members) {
            self.batch(set, "add", protocol::ADD, &elements)?;
        }
        Ok(())
    }

    /// Removes one entry if its comment is the one given (see [`Ipset::del_all`]).
    pub fn del(&self, member: &Member) -> Result<Removal, IpsetError> {
        let removals = self.del_all(std::slice::from_ref(member))?;
        Ok(removals.into_iter().next().unwrap_or(Removal::Absent))
    }

    /// Removes those entries whose comment still is the one given; an address that was given to another pod
    /// meanwhile keeps its entry. Returns what became of each, in order. The kernel has no conditional removal: the
    /// sets are listed first, so two writers that race for one address must be kept apart by the caller.
    pub fn del_all(&self, members: &[Member]) -> Result<Vec<Removal>, IpsetError> {
        let mut present: BTreeMap<&str, Vec<Member>> = BTreeMap::new();
        for member in members {
            if let Entry::Vacant(unseen) = present.entry(&member.set) {
                unseen.insert(self.list(&member.set)?.unwrap_or_default());
            }
        }
        let mut removals = Vec::with_capacity(members.len());
        let mut doomed: Vec<&Member> = Vec::new();
        for member in members {
            let entries = &present[member.set.as_str()];
            let at = entries.binary_search_by_key(&member.ip, |entry| entry.ip);
            removals.push(match at {
                Err(_) => Removal::Absent,
                Ok(at) if entries[at].comment == effective(&member.comment) => {
                    doomed.push(member);
                    Removal::Removed
                }
                Ok(at) => Removal::OwnedByOther {
                    comment: entries[at].comment.clone(),
                },
            });
        }
        for (set, elements) in by_set(doomed) {
            self.batch(set, "delete", protocol::DEL, &elements)?;
        }
        Ok(removals)
    }

    /// Whether the address is in the set.
    pub fn test(&self, set: &str, ip: IpAddr) -> Result<bool, IpsetError> {
        let attributes = protocol::test(checked(set)?, ip);
        match self.request(set, "test", protocol::TEST, 0, attributes) {
            Ok(_) => Ok(true),
            Err(IpsetError::Refused {
                code: ERR_EXIST, ..
            }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// The entries of a set, sorted by address; none when there is no such set. An error for a set that is not
    /// `hash:ip`: see [`Ipset::listing`].
    pub fn list(&self, set: &str) -> Result<Option<Vec<Member>>, IpsetError> {
        let Some(listing) = self.listing(set)? else {
            return Ok(None);
        };
        let of_addresses = |family| listing.header.is_hash_of(family);
        if !Family::BOTH.into_iter().any(of_addresses) {
            return Err(IpsetError::Conflict {
                set: set.to_owned(),
                found: listing.header.definition(),
                wanted: "hash:ip".to_owned(),
            });
        }
        let member = |entry: SetEntry| {
            Some(Member {
                set: set.to_owned(),
                ip: entry.ip?,
                comment: entry.comment,
            })
        };
        let mut members: Vec<Member> = listing.entries.into_iter().filter_map(member).collect();
        members.sort_by_key(|member| member.ip);
        Ok(Some(members))
    }

    /// A set of any type with its entries; none when there is no such set.
    pub fn listing(&self, set: &str) -> Result<Option<Listing>, IpsetError> {
        self.dump_one(set, protocol::of_set(checked(set)?))
    }

    /// What kind of set it is; none when there is no such set.
    pub fn header(&self, set: &str) -> Result<Option<SetHeader>, IpsetError> {
        let listing = self.dump_one(set, protocol::header_of(checked(set)?))?;
        Ok(listing.map(|listing| listing.header))
    }

    /// Names of all sets of the namespace, sorted.
    pub fn sets(&self) -> Result<Vec<String>, IpsetError> {
        const ACTION: &str = "list all sets";
        let attributes = protocol::names_of_all_sets().map_err(|e| garbled("", ACTION, e))?;
        let request = Request::new(protocol::SUBSYSTEM, protocol::LIST, attributes).dump();
        let parts = self.connection.exchange(&request);
        let parts = parts.map_err(|error| explain("", ACTION, error, |_| None))?;
        let mut names = protocol::names_from(&parts).map_err(|e| garbled("", ACTION, e))?;
        names.sort();
        Ok(names)
    }

    fn dump_one(
        &self,
        set: &str,
        attributes: Result<Vec<u8>, Malformed>,
    ) -> Result<Option<Listing>, IpsetError> {
        const ACTION: &str = "list";
        let attributes = attributes.map_err(|e| garbled(set, ACTION, e))?;
        let request = Request::new(protocol::SUBSYSTEM, protocol::LIST, attributes).dump();
        match self.connection.exchange(&request) {
            Ok(parts) => protocol::listing_from(&parts).map_err(|e| garbled(set, ACTION, e)),
            Err(NfnetlinkError::Refused { code, .. }) if code == libc::ENOENT => Ok(None),
            Err(error) => Err(explain(set, ACTION, error, |_| None)),
        }
    }

    fn if_present(&self, set: &str, action: &'static str, command: u8) -> Result<bool, IpsetError> {
        let attributes = protocol::of_set(checked(set)?);
        // Without the flag an absent set is a success.
        match self.request(set, action, command, FLAG_EXCL, attributes) {
            Ok(_) => Ok(true),
            Err(IpsetError::Refused { code, .. }) if code == libc::ENOENT => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn batch(
        &self,
        set: &str,
        action: &'static str,
        command: u8,
        elements: &[Element<'_>],
    ) -> Result<(), IpsetError> {
        let requests = protocol::batches(checked(set)?, elements);
        for (first, attributes) in requests.map_err(|e| garbled(set, action, e))? {
            let request = Request::new(protocol::SUBSYSTEM, command, attributes);
            let refused = |quoted: &[u8]| {
                let at = first + protocol::refused_index(quoted)?;
                elements.get(at).map(|element| element.ip)
            };
            self.connection
                .exchange(&request)
                .map_err(|error| explain(set, action, error, refused))?;
        }
        Ok(())
    }

    fn request(
        &self,
        set: &str,
        action: &'static str,
        command: u8,
        flags: u16,
        attributes: Result<Vec<u8>, Malformed>,
    ) -> Result<Vec<Vec<u8>>, IpsetError> {
        let attributes = attributes.map_err(|e| garbled(set, action, e))?;
        let request = Request::new(protocol::SUBSYSTEM, command, attributes).with_flags(flags);
        let answer = self.connection.exchange(&request);
        answer.map_err(|error| explain(set, action, error, |_| None))
    }
}

/// Entries grouped by set, sets and entries in the order of first appearance.
fn by_set<'a>(members: impl IntoIterator<Item = &'a Member>) -> Vec<(&'a str, Vec<Element<'a>>)> {
    let mut groups: Vec<(&str, Vec<Element<'_>>)> = Vec::new();
    for member in members {
        let element = Element {
            ip: member.ip,
            comment: member.comment.as_deref(),
        };
        match groups.iter_mut().find(|(set, _)| *set == member.set) {
            Some((_, elements)) => elements.push(element),
            None => groups.push((&member.set, vec![element])),
        }
    }
    groups
}

/// The kernel stores no empty comments.
fn effective(comment: &Option<String>) -> Option<String> {
    comment.clone().filter(|text| !text.is_empty())
}

fn checked(name: &str) -> Result<&str, IpsetError> {
    if name.is_empty() || name.len() > NAME_BYTES || name.contains('\0') {
        return Err(IpsetError::Name {
            name: name.to_owned(),
        });
    }
    Ok(name)
}

/// The kernel would cut a comment at a NUL, and `ipset save` cannot write one with quotes so that it can be read back.
fn checked_comment(member: &Member) -> Result<(), IpsetError> {
    match &member.comment {
        Some(comment)
            if comment.len() > COMMENT_BYTES
                || comment.contains(|c: char| c == '"' || c.is_control()) =>
        {
            Err(IpsetError::Comment {
                set: member.set.clone(),
                ip: member.ip,
                comment: comment.clone(),
            })
        }
        _ => Ok(()),
    }
}

fn garbled(set: &str, action: &'static str, malformed: Malformed) -> IpsetError {
    IpsetError::Conversation {
        set: set.to_owned(),
        action,
        reason: malformed.to_string(),
    }
}

fn explain(
    set: &str,
    action: &'static str,
    error: NfnetlinkError,
    member: impl Fn(&[u8]) -> Option<IpAddr>,
) -> IpsetError {
    match error {
        NfnetlinkError::Refused { code, quoted } => IpsetError::Refused {
            set: set.to_owned(),
            action,
            member: member(&quoted),
            code,
        },
        other => IpsetError::Conversation {
            set: set.to_owned(),
            action,
            reason: other.to_string(),
        },
    }
}
