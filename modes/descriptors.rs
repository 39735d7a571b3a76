//! The table of open files of a daemon: large from the start.
//!
//! The kernel doubles a process's table when it is full, at 256, 512, 1,024 descriptors and so on, and in a process with
//! threads it waits each time until no other processor may still read the old one (`synchronize_rcu` in `fs/file.c`): 10
//! to 30 ms in which nothing in the process opens a socket. A proxy with in-pod capture comes by those sizes while pods
//! are enrolled, any proxy while connections come. A table never becomes smaller, so it is made once, before work begins.

use std::os::fd::AsFd;

use nix::fcntl::{FcntlArg, fcntl};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd;

/// Descriptors that fit without another wait: 200 pods with five listeners each, and 7,000 connections with two sockets.
/// It takes 8 bytes of the kernel's memory for each.
pub(crate) const ROOM: u64 = 16_384;

/// Raises the limit of open files to what this process may have, says what it is, and makes the table large. What cannot
/// be had is done without: the limit then shows where descriptors run out.
pub fn make_room() {
    match raised() {
        Ok((before, limit)) => {
            if limit < ROOM {
                tracing::warn!(
                    before,
                    limit,
                    needed = ROOM,
                    "few file descriptors: connections beyond them are not accepted; raise the hard limit (ulimit -Hn)"
                );
            } else {
                tracing::info!(before, limit, "limit of file descriptors");
            }
            enlarge(limit);
        }
        Err(error) => tracing::warn!(%error, "the limit of file descriptors stays as it is"),
    }
}

/// The limit before and after raising it.
fn raised() -> nix::Result<(u64, u64)> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok((soft, hard))
}

fn enlarge(limit: u64) {
    let last = ROOM.min(limit).saturating_sub(1);
    // Whatever is open: a copy with a high number makes the table reach to it.
    if let (Ok(last), Ok(file)) = (i32::try_from(last), std::fs::File::open("/proc/self/stat"))
        && let Ok(copy) = fcntl(file.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(last))
    {
        let _ = unistd::close(copy);
    }
}
