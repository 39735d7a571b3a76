//! The ipset subsystem of nfnetlink: numbers, requests and answers (linux/netfilter/ipset/ip_set.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::nfnetlink::{Attribute, AttributeWriter, Attributes, Malformed};
use crate::plan::Family;

pub(super) const SUBSYSTEM: u8 = 6;

/// Version 6 is what every kernel that matters speaks (2.6.39 and later); 7 adds nothing needed here.
const PROTOCOL: u8 = 6;

pub(super) const CREATE: u8 = 2;
pub(super) const DESTROY: u8 = 3;
pub(super) const FLUSH: u8 = 4;
pub(super) const SWAP: u8 = 6;
pub(super) const LIST: u8 = 7;
pub(super) const ADD: u8 = 9;
pub(super) const DEL: u8 = 10;
pub(super) const TEST: u8 = 11;
pub(super) const TYPE: u8 = 13;

const ATTR_PROTOCOL: u16 = 1;
pub(super) const ATTR_SETNAME: u16 = 2;
const ATTR_TYPENAME: u16 = 3;
const ATTR_SETNAME2: u16 = 3;
const ATTR_REVISION: u16 = 4;
const ATTR_FAMILY: u16 = 5;
const ATTR_FLAGS: u16 = 6;
const ATTR_DATA: u16 = 7;
const ATTR_ADT: u16 = 8;
const ATTR_LINENO: u16 = 9;

// Inside ATTR_DATA.
const DATA_IP: u16 = 1;
const DATA_TIMEOUT: u16 = 6;
const DATA_FLAGS: u16 = 8;
const DATA_LINENO: u16 = 9;
const DATA_NETMASK: u16 = 20;
const DATA_COMMENT: u16 = 26;
const DATA_REFERENCES: u16 = 25;
const IP_V4: u16 = 1;
const IP_V6: u16 = 2;

const CREATE_WITH_COUNTERS: u32 = 1 << 3;
const CREATE_WITH_COMMENT: u32 = 1 << 4;
const CREATE_WITH_SKBINFO: u32 = 1 << 6;
const LIST_NAMES: u32 = 1 << 1;
const LIST_HEADERS: u32 = 1 << 2;

const HASH_IP: &str = "hash:ip";
/// The latest revision of `hash:ip` that is known to behave as assumed here (6: bucket size, bitmask).
const LATEST_REVISION: u8 = 6;
const INET: u8 = 2;
const INET6: u8 = 10;

/// Size of one message of a batch. An attribute holds 64 KiB; half of it keeps the error, which quotes the whole
/// request, within any receive buffer.
const BATCH_BYTES: usize = 32 * 1024;

/// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
fn family_number(family: Family) -> u8 {
    match family {
        Family::V4 => INET,
        Family::V6 => INET6,
    }
}

/// A family as `ipset` spells it.
pub(super) fn family_word(family: Family) -> &'static str {
    match family {
        Family::V4 => "inet",
        Family::V6 => "inet6",
    }
}

fn command() -> AttributeWriter {
    AttributeWriter::default().byte(ATTR_PROTOCOL, PROTOCOL)
}

pub(super) fn of_set(set: &str) -> Result<Vec<u8>, Malformed> {
    command().text(ATTR_SETNAME, set).finish()
}

pub(super) fn of_two_sets(a: &str, b: &str) -> Result<Vec<u8>, Malformed> {
    command()
        .text(ATTR_SETNAME, a)
        .text(ATTR_SETNAME2, b)
        .finish()
}

pub(super) fn names_of_all_sets() -> Result<Vec<u8>, Malformed> {
    command().number(ATTR_FLAGS, LIST_NAMES).finish()
}

pub(super) fn header_of(set: &str) -> Result<Vec<u8>, Malformed> {
    command()
        .text(ATTR_SETNAME, set)
        .number(ATTR_FLAGS, LIST_HEADERS)
        .finish()
}

pub(super) fn type_query(family: Family) -> Result<Vec<u8>, Malformed> {
    command()
        .text(ATTR_TYPENAME, HASH_IP)
        .byte(ATTR_FAMILY, family_number(family))
        .finish()
}

/// The revision to create with: the kernel's latest that is known here.
pub(super) fn revision_from(answer: &[u8]) -> Result<u8, Malformed> {
    let latest = Attributes(answer).require(ATTR_REVISION)?.byte()?;
    Ok(latest.min(LATEST_REVISION))
}

pub(super) fn create(
    set: &str,
    revision: u8,
    family: Family,
    comments: bool,
) -> Result<Vec<u8>, Malformed> {
    let mut data = AttributeWriter::default();
    if comments {
        data = data.number(DATA_FLAGS, CREATE_WITH_COMMENT);
    }
    command()
        .text(ATTR_SETNAME, set)
        .text(ATTR_TYPENAME, HASH_IP)
        .byte(ATTR_REVISION, revision)
        .byte(ATTR_FAMILY, family_number(family))
        .nested(ATTR_DATA, data)
        .finish()
}

/// One entry of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Element<'a> {
    pub(super) ip: IpAddr,
    pub(super) comment: Option<&'a str>,
}

impl Element<'_> {
    fn encode(&self) -> AttributeWriter {
        let ip = match self.ip {
            IpAddr::V4(ip) => AttributeWriter::default().network_bytes(IP_V4, ip.octets()),
            IpAddr::V6(ip) => AttributeWriter::default().network_bytes(IP_V6, ip.octets()),
        };
        let data = AttributeWriter::default().nested(DATA_IP, ip);
        match self.comment {
            Some(comment) => data.text(DATA_COMMENT, comment),
            None => data,
        }
    }
}

pub(super) fn test(set: &str, ip: IpAddr) -> Result<Vec<u8>, Malformed> {
    let element = Element { ip, comment: None };
    command()
        .text(ATTR_SETNAME, set)
        .nested(ATTR_DATA, element.encode())
        .finish()
}

/// Requests that carry many entries each, with the index of the first entry of each. Entries are numbered from 1 by
/// their "line", which is how an error tells which one was refused.
pub(super) fn batches(
    set: &str,
    elements: &[Element<'_>],
) -> Result<Vec<(usize, Vec<u8>)>, Malformed> {
    let mut requests = Vec::new();
    let mut first = 0;
    while first < elements.len() {
        let mut list = AttributeWriter::default();
        let mut count = 0u32;
        for element in &elements[first..] {
            let data = element.encode().number(DATA_LINENO, count + 1);
            if count > 0 && list.len() + data.len() > BATCH_BYTES {
                break;
            }
            list.extend(AttributeWriter::default().nested(ATTR_DATA, data));
            count += 1;
        }
        let request = command()
            .text(ATTR_SETNAME, set)
            .nested(ATTR_ADT, list)
            .number(ATTR_LINENO, 0)
            .finish()?;
        requests.push((first, request));
        first += count as usize;
    }
    Ok(requests)
}

/// Index within the batch of the entry that the kernel refused, from the request that it quotes: it writes the line
/// number of the culprit into the request's own line attribute.
pub(super) fn refused_index(quoted: &[u8]) -> Option<usize> {
    let line = Attributes(quoted).find(ATTR_LINENO).ok()??.number().ok()?;
    usize::try_from(line).ok()?.checked_sub(1)
}

/// What kind of set it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetHeader {
    /// Type as `ipset` spells it, e.g. `hash:ip`.
    pub type_name: String,
    /// Address family: 2 for inet, 10 for inet6, 0 for types without.
    pub family: u8,
    /// Revision of the type.
    pub revision: u8,
    /// Whether entries can carry comments.
    pub comments: bool,
    /// Other create options that change behaviour, in `ipset`'s words, e.g. `timeout 60`.
    pub options: Vec<String>,
    /// How many firewall rules and other sets refer to it.
    pub references: u32,
}

impl SetHeader {
    /// The type and options as `ipset create` takes them, sizes left out.
    pub fn definition(&self) -> String {
        let mut words = vec![self.type_name.clone()];
        match self.family {
            2 => words.push("family inet".to_owned()),
            10 => words.push("family inet6".to_owned()),
            _ => {}
        }
        words.extend(self.options.iter().cloned());
        if self.comments {
            words.push("comment".to_owned());
        }
        words.join(" ")
    }

    /// `hash:ip` of this family: the only type whose entries this crate reads and writes.
    pub fn is_hash_of(&self, family: Family) -> bool {
        self.type_name == HASH_IP && self.family == family_number(family)
    }
}

/// One entry of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SetEntry {
    /// Its (first) address, when it has one.
    pub ip: Option<IpAddr>,
    /// Its comment.
    pub comment: Option<String>,
    /// The entry as the kernel encodes it: a canonical form for sets of any type.
    pub encoded: Vec<u8>,
}

/// A set with its entries, put together from the parts of a dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// What kind of set it is.
    pub header: SetHeader,
    /// Its entries in the kernel's order, which means nothing.
    pub entries: Vec<SetEntry>,
}

/// Reads the answer to a listing of one set.
pub(super) fn listing_from(parts: &[Vec<u8>]) -> Result<Option<Listing>, Malformed> {
    let mut header = None;
    let mut entries = Vec::new();
    for part in parts {
        let part = Attributes(part);
        if header.is_none() {
            header = Some(header_from(part)?);
        }
        if let Some(list) = part.find(ATTR_ADT)? {
            for element in list.nested() {
                entries.push(entry_from(element?)?);
            }
        }
    }
    Ok(header.map(|header| Listing { header, entries }))
}

fn header_from(part: Attributes<'_>) -> Result<SetHeader, Malformed> {
    let mut options = Vec::new();
    let mut flags = 0;
    let mut references = 0;
    for attribute in part.require(ATTR_DATA)?.nested() {
        let attribute = attribute?;
        match attribute.kind {
            DATA_TIMEOUT => options.push(format!("timeout {}", attribute.number()?)),
            DATA_NETMASK => options.push(format!("netmask {}", attribute.byte()?)),
            DATA_FLAGS => flags = attribute.number()?,
            DATA_REFERENCES => references = attribute.number()?,
            _ => {}
        }
    }
    if flags & CREATE_WITH_COUNTERS != 0 {
        options.push("counters".to_owned());
    }
    if flags & CREATE_WITH_SKBINFO != 0 {
        options.push("skbinfo".to_owned());
    }
    Ok(SetHeader {
        type_name: part.require(ATTR_TYPENAME)?.text()?.to_owned(),
        family: part.require(ATTR_FAMILY)?.byte()?,
        revision: part.require(ATTR_REVISION)?.byte()?,
        comments: flags & CREATE_WITH_COMMENT != 0,
        options,
        references,
    })
}

fn entry_from(element: Attribute<'_>) -> Result<SetEntry, Malformed> {
    let mut ip = None;
    let mut comment = None;
    for attribute in element.nested() {
        let attribute = attribute?;
        match attribute.kind {
            DATA_IP => {
                if let Some(v4) = attribute.nested().find(IP_V4)? {
                    ip = Some(Ipv4Addr::from(v4.bytes::<4>()?).into());
                } else if let Some(v6) = attribute.nested().find(IP_V6)? {
                    ip = Some(Ipv6Addr::from(v6.bytes::<16>()?).into());
                }
            }
            DATA_COMMENT => comment = Some(attribute.text()?.to_owned()),
            _ => {}
        }
    }
    Ok(SetEntry {
        ip,
        comment,
        encoded: element.value.to_vec(),
    })
}

/// Reads the answer to [`names_of_all_sets`].
pub(super) fn names_from(parts: &[Vec<u8>]) -> Result<Vec<String>, Malformed> {
    let name = |part: &Vec<u8>| {
        let name = Attributes(part).require(ATTR_SETNAME)?;
        name.text().map(str::to_owned)
    };
    parts.iter().map(name).collect()
}
