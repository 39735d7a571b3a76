//! Errors of sets, and the kernel's error numbers in words.

use std::io;
use std::net::IpAddr;

use thiserror::Error;

use crate::netns::NetnsId;

/// What went wrong with a set.
#[derive(Debug, Error)]
pub enum IpsetError {
    /// The netlink socket of the namespace could not be opened.
    #[error("ipset in {netns}: cannot open a netfilter socket: {source}")]
    Open {
        /// The namespace.
        netns: NetnsId,
        /// Why.
        source: io::Error,
    },
    /// The conversation with the kernel failed.
    #[error("ipset {set}: {action}: {reason}")]
    Conversation {
        /// Set name; empty when all sets were asked for.
        set: String,
        /// What was being done.
        action: &'static str,
        /// Why.
        reason: String,
    },
    /// The kernel refused.
    #[error("ipset {set}: {action}{}: {}", of_member(*.member), in_words(*.code))]
    Refused {
        /// Set name.
        set: String,
        /// What was being done.
        action: &'static str,
        /// The entry that was refused; those before it in the same call took effect.
        member: Option<IpAddr>,
        /// Error number: an errno, or `IPSET_ERR_*` (from 4097 on).
        code: i32,
    },
    /// A set with this name exists, but is of another kind.
    #[error(
        "ipset {set}: exists as `{found}`, wanted `{wanted}`: remove it (ipset destroy {set}) or change the name"
    )]
    Conflict {
        /// Set name.
        set: String,
        /// What stands there.
        found: String,
        /// What was to be made.
        wanted: String,
    },
    /// The set is not there.
    #[error("ipset {set}: no such set")]
    Absent {
        /// Set name.
        set: String,
    },
    /// A name that no set can have.
    #[error("ipset name {name:?}: must be 1 to 31 bytes without NUL")]
    Name {
        /// The name.
        name: String,
    },
    /// A comment that no entry can have.
    #[error(
        "ipset {set}: comment {comment:?} of {ip}: must be at most 255 bytes without quotes and control characters"
    )]
    Comment {
        /// Set name.
        set: String,
        /// Entry.
        ip: IpAddr,
        /// The comment.
        comment: String,
    },
}

fn of_member(member: Option<IpAddr>) -> String {
    member.map_or(String::new(), |ip| format!(" {ip}"))
}

/// `IPSET_ERR_EXIST`: the entry is there already (add), or is not there (delete, test).
pub(super) const ERR_EXIST: i32 = 4103;

/// Numbers of linux/netfilter/ipset/ip_set.h and ip_set_hash.h.
fn in_words(code: i32) -> String {
    let text = match code {
        libc::EEXIST => "a set with this name exists",
        libc::ENOENT => "no such set",
        4097 => "the kernel speaks another version of the ipset protocol",
        4098 => {
            "this kernel has no such set type or revision: load the module (modprobe ip_set_hash_ip)"
        }
        4099 => "no more sets can be created (limit of the kernel)",
        4100 => "the set is in use: a firewall rule or another set refers to it",
        4101 => "a set with the new name exists",
        4102 => "the two sets are of different types",
        ERR_EXIST => "the entry is there already, or was not there",
        4104 => "invalid prefix length",
        4105 => "invalid netmask",
        4106 => "the set is of another address family",
        4107 => "the set was made without timeout support",
        4108 => "the set is referred to and cannot be renamed",
        4109 => "an IPv4 address is expected",
        4110 => "an IPv6 address is expected",
        4111 => "the set was made without counters",
        4112 => "the set was made without comments",
        4113 => "invalid mark mask",
        4114 => "the set was made without skbinfo",
        4352 => "the set is full",
        4353 => "the null address cannot be an entry",
        libc::EPERM => "not permitted: root (CAP_NET_ADMIN in this namespace) is needed",
        // The answer to a subsystem that is neither built in nor loaded.
        libc::EINVAL => "invalid request, or this kernel has no ipset: modprobe ip_set",
        _ if code < 4096 => return io::Error::from_raw_os_error(code).to_string(),
        _ => return format!("ipset error {code}"),
    };
    text.to_owned()
}
