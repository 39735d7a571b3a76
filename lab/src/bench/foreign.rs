//! Load on the machine that is not the benchmark's.
//!
//! The kernel's own count of busy time, less the time of this process and of all its descendants, is somebody else's: labs,
//! daemons, servers and load tools are all descendants of the benchmark. Time in interrupts cannot be told apart; with a
//! load running nearly all of it is the load's packets, so it is taken for the benchmark's. Where the kernel charges
//! interrupts to the process that they hit, that process is somebody else's as seldom as it runs. What is found is
//! therefore a lower bound, good to the kernel's tick times the number of processes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;

use super::accounting;

/// Readings of the machine's and the benchmark's own CPU time, in seconds, at one moment.
#[derive(Debug, Clone, Copy)]
pub struct Reading {
    machine: f64,
    own: f64,
}

impl Reading {
    /// Reads both.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn take() -> io::Result<Self> {
        let cpu = accounting::machine()?;
        Ok(Self {
            machine: cpu.user + cpu.system,
            own: of_tree(std::process::id())?,
        })
    }

    /// CPU time of others since `earlier`, in seconds over all processors.
    pub fn since(self, earlier: Self) -> f64 {
        let all = self.machine - earlier.machine;
        (all - (self.own - earlier.own)).max(0.0)
    }
}

/// CPU time of a process and of its descendants, with those that ended and were waited for.
fn of_tree(root: u32) -> io::Result<f64> {
    let mut processes: BTreeMap<u32, Process> = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let pid = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok());
        let Some(pid) = pid else { continue };
        // A process that ends meanwhile is in the time of the one that waited for it.
        let text = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        if let Some(process) = parse(&text) {
            processes.insert(pid, process);
        }
    }
    let mut tree = BTreeSet::from([root]);
    loop {
        let more: Vec<u32> = processes
            .iter()
            .filter(|(pid, process)| !tree.contains(pid) && tree.contains(&process.parent))
            .map(|(pid, _)| *pid)
            .collect();
        if more.is_empty() {
            break;
        }
        tree.extend(more);
    }
    let ticks: u64 = tree
        .iter()
        .filter_map(|pid| processes.get(pid))
        .map(|process| process.ticks)
        .sum();
    Ok(ticks as f64 / accounting::ticks_per_second())
}

struct Process {
    parent: u32,
    ticks: u64,
}

/// Fields 4 and 14 to 17 of /proc/PID/stat (proc(5)): parent, own time and that of children that were waited for.
fn parse(text: &str) -> Option<Process> {
    let (_, after_name) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let ticks = fields
        .get(11..15)?
        .iter()
        .map(|field| field.parse::<u64>().ok());
    Some(Process {
        parent: fields.get(1)?.parse().ok()?,
        ticks: ticks.sum::<Option<u64>>()?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// Work and not time: on a busy machine little of a second is a process's own. Some tenths of a second of a processor.
    const WORK: &str = "i=0; while [ $i -lt 300000 ]; do i=$((i+1)); done";

    #[test]
    fn time_of_descendants_is_not_foreign_also_after_they_ended() {
        let before = of_tree(std::process::id()).unwrap();
        let status = Command::new("sh").args(["-c", WORK]).status();
        assert!(status.unwrap().success());
        let own = of_tree(std::process::id()).unwrap() - before;
        assert!(own >= 0.1, "{own}");
    }

    #[test]
    fn time_of_strangers_is() {
        let (first, began) = (Reading::take().unwrap(), Instant::now());
        // Forked twice, so that its parent is not this process; it ends by itself.
        let twice = format!("({WORK}) >/dev/null 2>&1 &");
        let status = Command::new("sh").args(["-c", &twice]).status();
        assert!(status.unwrap().success());
        loop {
            std::thread::sleep(Duration::from_millis(50));
            let (found, wall) = (
                Reading::take().unwrap().since(first),
                began.elapsed().as_secs_f64(),
            );
            assert!(found <= 256.0 * wall, "{found} in {wall}");
            if found >= 0.05 {
                return;
            }
            assert!(wall < 120.0, "{found} in {wall}");
        }
    }
}
