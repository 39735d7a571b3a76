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

/// Raises the limit of open files to what this process may have, and makes its table large. What cannot be had is done
/// without: the limit then shows where descriptors run out, and says so there.
pub fn make_room() {
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else {
        return;
    };
    let raised = soft < hard && setrlimit(Resource::RLIMIT_NOFILE, hard, hard).is_ok();
    let limit = if raised { hard } else { soft };
    let last = ROOM.min(limit).saturating_sub(1);
    // Whatever is open: a copy with a high number makes the table reach to it.
    if let (Ok(last), Ok(file)) = (i32::try_from(last), std::fs::File::open("/proc/self/stat"))
        && let Ok(copy) = fcntl(file.as_fd(), FcntlArg::F_DUPFD_CLOEXEC(last))
    {
        let _ = unistd::close(copy);
    }
}
