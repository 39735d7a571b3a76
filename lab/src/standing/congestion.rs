//! The same TCP congestion control in every namespace, whatever the machine's own is.
//!
//! A connection takes the default of the namespace that its socket was made in, also where a capture's routes lead it, so
//! the default of each namespace is what has to be set. The kernel lets a namespace have only an algorithm that the
//! machine allows to everybody (`net.ipv4.tcp_allowed_congestion_control`, which is the machine's own and not a
//! namespace's). Where it does not, it is allowed for as long as one write takes, under a lock on that very file, and
//! then what was there before is written back: namespaces keep the default that they have got.

use std::fs::File;
use std::io;

use anyhow::{Context, Result};
use host_net::netns::Netns;
use host_net::sysctl;
use nix::fcntl::{Flock, FlockArg};

/// What every lab has: the default of Linux, so that numbers compare with those of others.
const WANTED: &str = "cubic";
const DEFAULT: &str = "net/ipv4/tcp_congestion_control";
const AVAILABLE: &str = "net/ipv4/tcp_available_congestion_control";
const ALLOWED: &str = "net/ipv4/tcp_allowed_congestion_control";

/// Makes a named network namespace of a lab, whose connections use cubic. Where that is not possible (a machine without
/// cubic, or one that does not let itself be changed) all namespaces have the machine's own, which results name.
///
/// # Errors
/// When the namespace cannot be made.
pub fn create_netns(name: &str) -> Result<()> {
    Netns::create_named(name).context("create network namespace")?;
    let netns = Netns::open(Netns::path_of(name))?;
    // Not fatal: the same for all labs of this machine, and named in the equality matrix of every benchmark.
    let _ = set_default(&netns);
    Ok(())
}

fn set_default(netns: &Netns) -> io::Result<()> {
    if sysctl::read(netns, DEFAULT)? == WANTED || sysctl::write(netns, DEFAULT, WANTED).is_ok() {
        return Ok(());
    }
    if !has(&sysctl::read(netns, AVAILABLE)?, WANTED) {
        return Err(io::Error::other(format!("this kernel has no {WANTED}")));
    }
    allowed_meanwhile(|| sysctl::write(netns, DEFAULT, WANTED))
}

/// Runs `work` while the machine allows cubic to every namespace.
fn allowed_meanwhile(work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    let machine = Netns::current()?;
    let file = File::open(format!("/proc/sys/{ALLOWED}"))?;
    // Two labs at once would else take each other's permission for what was there before.
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let before = sysctl::read(&machine, ALLOWED)?;
    if has(&before, WANTED) {
        return work();
    }
    sysctl::write(&machine, ALLOWED, &format!("{before} {WANTED}"))?;
    let done = work();
    sysctl::write(&machine, ALLOWED, &before)?;
    done
}

fn has(names: &str, name: &str) -> bool {
    names.split_ascii_whitespace().any(|word| word == name)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::thread;

    use super::*;

    fn machine(key: &str) -> String {
        sysctl::read(&Netns::current().unwrap(), key).unwrap()
    }

    #[test]
    fn many_namespaces_at_once_have_cubic_and_the_machine_is_as_before() {
        let before = (machine(ALLOWED), machine(DEFAULT));
        let make = || {
            for _ in 0..25 {
                let netns = Netns::create_unnamed().unwrap();
                set_default(&netns).unwrap();
                assert_eq!(sysctl::read(&netns, DEFAULT).unwrap(), WANTED);
            }
        };
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(make);
            }
        });
        assert_eq!(machine(DEFAULT), before.1);
        // Labs of other programs may be at it: each of them is done in microseconds.
        let restored = (0..1000).any(|_| machine(ALLOWED) == before.0 || has(&before.0, WANTED));
        assert!(restored, "{} is not {}", machine(ALLOWED), before.0);
    }
}
