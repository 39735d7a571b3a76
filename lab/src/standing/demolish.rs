//! Removing a lab, whole or in pieces.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use nix::sys::signal::Signal;

use super::lock::Lock;
use super::process::{self, Process};
use super::record::Record;
use super::{cgroup, existing_netns};
use crate::topology::{lab_dir, spec};

/// Rounds of killing: a process may start another one between being seen and being killed.
const ROUNDS: u32 = 20;
/// How long killed processes may take to go, per round.
const GONE_WITHIN: Duration = Duration::from_secs(3);

/// Removes a lab and everything that belongs to it. Absence of all or of parts is fine.
///
/// # Errors
/// When something could not be removed; everything else is removed all the same.
pub fn down(name: &str) -> Result<()> {
    spec::validate_name(name)?;
    let _lock = Lock::take(name)?;
    demolish(name)
}

/// Whether anything of a lab exists.
pub fn remains(name: &str) -> Result<bool> {
    Ok(lab_dir(name).exists() || cgroup::exist(name) || !existing_netns(name)?.is_empty())
}

/// [`down`] for whoever has the lock.
pub fn demolish(name: &str) -> Result<()> {
    let mut errors = Vec::new();
    let mut attempt =
        |result: Result<()>| errors.extend(result.err().map(|error| format!("{error:#}")));
    let namespaces = existing_netns(name).unwrap_or_else(|error| {
        attempt(Err(error));
        Vec::new()
    });
    attempt(kill_all(name, &namespaces));
    for netns in &namespaces {
        attempt(Netns::delete_named(netns).context("delete network namespace"));
    }
    attempt(cgroup::remove_lab(name));
    let dir = lab_dir(name);
    match fs::remove_dir_all(&dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            attempt(Err(error).with_context(|| format!("remove {}", dir.display())));
        }
        _ => {}
    }
    if errors.is_empty() {
        return Ok(());
    }
    bail!("lab {name}: {}", errors.join("; "))
}

/// Kills what the record names, what is in the lab's control groups and what is in its network namespaces. They are
/// killed, not asked: whatever they would tidy up goes with the namespaces.
fn kill_all(name: &str, namespaces: &[String]) -> Result<()> {
    let recorded = Record::load(&lab_dir(name))
        .ok()
        .flatten()
        .map(|record| record.processes)
        .unwrap_or_default();
    // A name that a killed builder left without a namespace mounted on it is skipped.
    let ids: Vec<_> = namespaces
        .iter()
        .filter_map(|netns| Netns::open(Netns::path_of(netns)).ok())
        .map(|netns| netns.id())
        .collect();
    let spared = process::self_and_ancestors();
    for _ in 0..ROUNDS {
        let mut processes: BTreeSet<Process> = process::in_namespaces(&ids).into_iter().collect();
        processes.extend(recorded.values().filter(|process| process.is_alive()));
        processes.extend(cgroup::processes(name));
        processes.retain(|process| !spared.contains(&process.pid));
        if processes.is_empty() {
            return Ok(());
        }
        for process in &processes {
            process.signal(Signal::SIGKILL)?;
        }
        for process in processes {
            process.wait_gone(GONE_WITHIN);
        }
    }
    bail!("processes in its namespaces do not end")
}
