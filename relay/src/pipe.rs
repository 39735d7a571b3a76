//! Pipes, through which splice(2) moves bytes from one socket to another.
//!
//! A pipe is held by a direction of a connection only while bytes are in it, and is used again by another one after that:
//! making one costs more system calls than moving a request through it, and an idle connection should hold none.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{SysconfVar, pipe2, sysconf};

/// Capacity that is asked for, in bytes: what an unprivileged process may have by default.
pub const CAPACITY: usize = 1 << 20;
/// Pipes that are kept for the next connections; each is two descriptors, and no memory for data while it is empty.
pub const KEPT: usize = 64;

/// Largest capacity that an unprivileged process may ask for, in bytes (pipe(7)).
const LARGEST: &str = "/proc/sys/fs/pipe-max-size";

/// Both ends of a pipe.
#[derive(Debug)]
pub struct Pipe {
    pub(crate) read: OwnedFd,
    pub(crate) write: OwnedFd,
    /// How many pieces fit in. Pieces of a socket's data take a slot each, however short they are.
    pub(crate) slots: usize,
}

/// The empty pipes of a process.
#[derive(Debug)]
pub struct Pipes {
    idle: Mutex<Vec<Pipe>>,
    capacity: usize,
}

impl Pipes {
    /// None yet; they are made when they are needed, as large as this machine allows.
    pub fn new() -> Self {
        let largest = fs::read_to_string(LARGEST)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        Self {
            idle: Mutex::default(),
            capacity: largest.map_or(CAPACITY, |largest: usize| largest.min(CAPACITY)),
        }
    }

    /// How many are kept.
    pub fn idle(&self) -> usize {
        self.lock().len()
    }

    /// An empty pipe.
    pub(crate) fn take(&self) -> io::Result<Pipe> {
        let kept = self.lock().pop();
        match kept {
            Some(pipe) => Ok(pipe),
            None => Pipe::new(self.capacity),
        }
    }

    /// Keeps a pipe for others. It must be empty: the next one would get what is in it.
    pub(crate) fn give_back(&self, pipe: Pipe) {
        let mut idle = self.lock();
        if idle.len() < KEPT {
            idle.push(pipe);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Pipe>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for Pipes {
    fn default() -> Self {
        Self::new()
    }
}

impl Pipe {
    fn new(capacity: usize) -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_NONBLOCK | OFlag::O_CLOEXEC)?;
        // A process that has many pipes may be refused a large one; a small one works too.
        let asked = i32::try_from(capacity).unwrap_or(i32::MAX);
        let given = fcntl(&write, FcntlArg::F_SETPIPE_SZ(asked))
            .or_else(|_| fcntl(&write, FcntlArg::F_GETPIPE_SZ))?;
        let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
        let slots = i64::from(given) / page;
        Ok(Self {
            read,
            write,
            slots: usize::try_from(slots).unwrap_or_default(),
        })
    }
}
