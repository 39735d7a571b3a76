//! What a process costs while it runs: memory, context switches, descriptors; from /proc.

use std::fs;
use std::io;

use serde::{Deserialize, Serialize};

/// Memory of a process (proc(5), /proc/PID/smaps_rollup).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Resident pages, shared ones counted whole.
    pub rss_kib: u64,
    /// Resident pages, shared ones divided by the processes that share them.
    pub pss_kib: u64,
    /// Resident pages that belong to no file: heap and stacks.
    pub anonymous_kib: u64,
}

/// Context switches of a process with all threads that it has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switches {
    /// It waited for something.
    pub voluntary: u64,
    /// The scheduler took the processor away.
    pub involuntary: u64,
}

/// Open descriptors of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptors {
    /// All.
    pub descriptors: u64,
    /// Those that are sockets.
    pub sockets: u64,
}

impl Switches {
    /// What came since `earlier`. A thread that ended in between took its own with it.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            voluntary: self.voluntary.saturating_sub(earlier.voluntary),
            involuntary: self.involuntary.saturating_sub(earlier.involuntary),
        }
    }
}

/// Memory of a process.
///
/// # Errors
/// When there is no such process, or the kernel has no smaps_rollup.
pub fn memory(pid: i32) -> io::Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = named(&path, fs::read_to_string(&path))?;
    let kib = |key: &str| number_after(&text, key);
    match (kib("Rss:"), kib("Pss:"), kib("Anonymous:")) {
        (Some(rss_kib), Some(pss_kib), Some(anonymous_kib)) => Ok(Memory {
            rss_kib,
            pss_kib,
            anonymous_kib,
        }),
        _ => Err(io::Error::other(format!("{path} has an unknown format"))),
    }
}

/// Context switches of a process so far.
///
/// # Errors
/// When there is no such process.
pub fn switches(pid: i32) -> io::Result<Switches> {
    let path = format!("/proc/{pid}/task");
    let mut sum = Switches::default();
    for task in named(&path, fs::read_dir(&path))?.flatten() {
        // A thread may end while this looks at it.
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let of = |key: &str| number_after(&status, key).unwrap_or(0);
        sum.voluntary += of("voluntary_ctxt_switches:");
        sum.involuntary += of("nonvoluntary_ctxt_switches:");
    }
    Ok(sum)
}

/// Open descriptors of a process.
///
/// # Errors
/// When there is no such process.
pub fn descriptors(pid: i32) -> io::Result<Descriptors> {
    let path = format!("/proc/{pid}/fd");
    let mut found = Descriptors::default();
    for entry in named(&path, fs::read_dir(&path))?.flatten() {
        found.descriptors += 1;
        let is_socket =
            fs::read_link(entry.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:"));
        found.sockets += u64::from(is_socket);
    }
    Ok(found)
}

/// The number behind a key at the beginning of a line.
fn number_after(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_ascii_whitespace().next()?.parse().ok()
}

fn named<T>(path: &str, result: io::Result<T>) -> io::Result<T> {
    result.map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn what_this_process_takes_shows() {
        let pid = i32::try_from(std::process::id()).unwrap();
        let (memory_before, open_before) = (memory(pid).unwrap(), descriptors(pid).unwrap());
        let block = vec![1_u8; 64 << 20];
        let sockets: Vec<_> = (0..64)
            .map(|_| std::net::UdpSocket::bind("127.0.0.1:0").unwrap())
            .collect();
        let files: Vec<_> = (0..64)
            .map(|_| fs::File::open("/proc/self/stat").unwrap())
            .collect();
        let (memory_after, open_after) = (memory(pid).unwrap(), descriptors(pid).unwrap());
        // Other tests run in this process at the same time.
        assert!(memory_after.anonymous_kib >= memory_before.anonymous_kib + (48 << 10));
        assert!(memory_after.rss_kib >= memory_after.pss_kib);
        assert!(open_after.sockets >= 64 && open_after.descriptors >= 128);
        assert!(open_after.descriptors >= open_before.descriptors);
        drop((block, sockets, files));

        let before = switches(pid).unwrap();
        for _ in 0..20 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(switches(pid).unwrap().since(before).voluntary >= 20);
    }
}
