//! Network namespaces: open, enter for one closure, create and delete by name.
//!
//! `setns` is per thread and a socket belongs for life to the namespace it was created in. So work in another
//! namespace is a synchronous closure on one thread ([`Netns::run`]), never something that awaits.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The kernel's identity of a namespace: device and inode of its nsfs file. Two paths or descriptors name the same
/// namespace exactly when these are equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of nsfs.
    pub dev: u64,
    /// Inode of the namespace.
    pub ino: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.ino)
    }
}

impl fmt::Debug for Netns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.id.fmt(f)
    }
}

/// An open network namespace. Cheap to clone; the descriptor keeps the namespace alive.
#[derive(Clone)]
pub struct Netns {
    fd: Arc<OwnedFd>,
    id: NetnsId,
}
