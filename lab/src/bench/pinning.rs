//! Which processors may do what, the same in every variant.
//!
//! Clients have one processor and servers another, so that the scheduler does not decide anew in each sample whether both
//! ends share one. Proxies, agents and the kernel's own work have all: a proxy starts as many threads as there are
//! processors, and one that was held on a single processor would be another proxy than the one that people run.

use std::io;
use std::thread;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

/// An end of the measured connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Where the load is made.
    Client,
    /// Where it is answered.
    Server,
}

/// Processors by their numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Pinning {
    /// Of clients.
    pub clients: Vec<usize>,
    /// Of servers.
    pub servers: Vec<usize>,
    /// Of proxies, agents and everything else: all that this process may use.
    pub proxies: Vec<usize>,
}

/// What every lab of a benchmark is given: of the processors that this process may use, the first for clients and the
/// second for servers; with one processor there is no choice.
///
/// # Errors
/// When the kernel does not tell.
pub fn policy() -> io::Result<Pinning> {
    let all = allowed(0)?;
    Ok(Pinning {
        clients: all.iter().take(1).copied().collect(),
        servers: all.get(1).or(all.first()).into_iter().copied().collect(),
        proxies: all,
    })
}

/// Processors that a process may use; 0 is the calling thread.
///
/// # Errors
/// When there is no such process.
pub fn allowed(pid: i32) -> io::Result<Vec<usize>> {
    let set = sched_getaffinity(Pid::from_raw(pid))?;
    let all = 0..CpuSet::count();
    Ok(all
        .filter(|cpu| set.is_set(*cpu).unwrap_or(false))
        .collect())
}

/// Does `work` on an end's processors, in a thread of its own; processes that it starts stay there.
///
/// # Errors
/// When the kernel refuses the processors.
pub fn on<T: Send>(end: End, work: impl FnOnce() -> T + Send) -> Result<T> {
    let policy = policy().context("processors of this process")?;
    let wanted = match end {
        End::Client => policy.clients,
        End::Server => policy.servers,
    };
    let mut set = CpuSet::new();
    for &cpu in &wanted {
        set.set(cpu)?;
    }
    let done = thread::scope(|scope| {
        let worker = scope.spawn(|| {
            sched_setaffinity(Pid::from_raw(0), &set)
                .with_context(|| format!("use of the processors {wanted:?}"))?;
            Ok(work())
        });
        worker.join()
    });
    match done {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_end_has_its_processor_and_what_it_starts_stays_there() {
        let policy = policy().unwrap();
        assert_eq!(policy.proxies, allowed(0).unwrap());
        if policy.proxies.len() > 1 {
            assert_ne!(policy.clients, policy.servers);
        }
        for (end, wanted) in [
            (End::Client, &policy.clients),
            (End::Server, &policy.servers),
        ] {
            assert_eq!(&on(end, || allowed(0)).unwrap().unwrap(), wanted);
            let mut sleep = std::process::Command::new("sleep");
            let mut child = on(end, || sleep.arg("10").spawn()).unwrap().unwrap();
            let seen = allowed(i32::try_from(child.id()).unwrap());
            child.kill().unwrap();
            child.wait().unwrap();
            assert_eq!(&seen.unwrap(), wanted);
        }
        assert_eq!(
            allowed(0).unwrap(),
            policy.proxies,
            "the caller itself stays free"
        );
    }
}
