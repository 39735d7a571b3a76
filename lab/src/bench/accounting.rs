//! CPU time, from /proc.

use std::io;

use serde::{Deserialize, Serialize};

/// CPU time in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Cpu {
    /// In user space.
    pub user: f64,
    /// In the kernel on behalf of processes.
    pub system: f64,
    /// In interrupt handlers, hard and soft. Zero for processes: the kernel does not say for whom it was.
    pub interrupts: f64,
}

impl Cpu {
    /// All of it.
    pub fn total(self) -> f64 {
        self.user + self.system + self.interrupts
    }

    /// What was used since `earlier`.
    pub fn since(self, earlier: Self) -> Self {
        Self {
            user: self.user - earlier.user,
            system: self.system - earlier.system,
            interrupts: self.interrupts - earlier.interrupts,
        }
    }

    /// Sum.
    pub fn plus(self, other: Self) -> Self {
        Self {
            user: self.user + other.user,
            system: self.system + other.system,
            interrupts: self.interrupts + other.interrupts,
        }
    }
}

/// Kernel ticks in a second.
pub(crate) fn ticks_per_second() -> f64 {
    nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK)
        .ok()
        .flatten()
        .map_or(100.0, |ticks| ticks as f64)
}

/// CPU time of the whole machine, without idle time (proc(5), /proc/stat).
pub fn machine() -> io::Result<Cpu> {
    parse_machine(&std::fs::read_to_string("/proc/stat")?)
        .ok_or_else(|| io::Error::other("/proc/stat has no line that begins with \"cpu \""))
}

/// Time since boot, in seconds over all processors, in which the hypervisor ran somebody else although there was work here
/// (proc(5), /proc/stat, field `steal`).
pub fn stolen() -> io::Result<f64> {
    parse_stolen(&std::fs::read_to_string("/proc/stat")?)
        .ok_or_else(|| io::Error::other("/proc/stat has no field for stolen time"))
}

fn parse_stolen(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: f64 = line.split_ascii_whitespace().nth(8)?.parse().ok()?;
    Some(ticks / ticks_per_second())
}

fn parse_machine(text: &str) -> Option<Cpu> {
    let line = text.lines().find(|line| line.starts_with("cpu "))?;
    let ticks: Vec<f64> = line
        .split_ascii_whitespace()
        .skip(1)
        .map_while(|field| field.parse().ok())
        .collect();
    // user nice system idle iowait irq softirq
    let &[user, nice, system, _, _, irq, softirq, ..] = ticks.as_slice() else {
        return None;
    };
    let second = ticks_per_second();
    Some(Cpu {
        user: (user + nice) / second,
        system: system / second,
        interrupts: (irq + softirq) / second,
    })
}

/// CPU time of one process with all its threads (proc(5), /proc/PID/stat).
pub fn process(pid: i32) -> io::Result<Cpu> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| io::Error::other(format!("{path}: {error}")))?;
    parse_process(&text).ok_or_else(|| io::Error::other(format!("{path} has an unknown format")))
}

/// CPU time of what a process has started and waited for, and of what those have (proc(5), /proc/PID/stat).
///
/// # Errors
/// When there is no such process.
pub fn children(pid: i32) -> io::Result<Cpu> {
    let path = format!("/proc/{pid}/stat");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| io::Error::other(format!("{path}: {error}")))?;
    parse_children(&text).ok_or_else(|| io::Error::other(format!("{path} has an unknown format")))
}

/// Time that the threads which a process has have run, in seconds. Finer than [`process`], which counts in ticks, but what
/// has ended is not in it: good for telling whether a process ran at all.
///
/// # Errors
/// When there is no such process, or the kernel keeps no statistics of its scheduler (proc(5), /proc/PID/schedstat).
pub fn ran(pid: i32) -> io::Result<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path().join("schedstat");
        // A thread may end meanwhile.
        let Ok(text) = std::fs::read_to_string(&path) else {
            continue;
        };
        let ran = text.split_ascii_whitespace().next();
        nanoseconds += ran
            .and_then(|ran| ran.parse::<f64>().ok())
            .ok_or_else(|| io::Error::other(format!("{} has an unknown format", path.display())))?;
    }
    Ok(nanoseconds / 1e9)
}

/// Memory of a process in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Memory {
    /// Resident: of what is shared with other processes, all.
    pub rss_kib: u64,
    /// Of what is shared with other processes, its part only.
    pub pss_kib: u64,
}

/// Memory of a process (proc(5), /proc/PID/smaps_rollup).
///
/// # Errors
/// When there is no such process.
pub fn memory(pid: i32) -> io::Result<Memory> {
    let path = format!("/proc/{pid}/smaps_rollup");
    let text = std::fs::read_to_string(&path)
        .map_err(|error| io::Error::other(format!("{path}: {error}")))?;
    parse_memory(&text).ok_or_else(|| io::Error::other(format!("{path} has an unknown format")))
}

fn parse_memory(text: &str) -> Option<Memory> {
    let kib = |label: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(label))?;
        line.trim().strip_suffix(" kB")?.parse().ok()
    };
    Some(Memory {
        rss_kib: kib("Rss:")?,
        pss_kib: kib("Pss:")?,
    })
}

fn parse_process(text: &str) -> Option<Cpu> {
    parse_ticks(text, 11)
}

fn parse_children(text: &str) -> Option<Cpu> {
    parse_ticks(text, 13)
}

/// User time at this field behind the name, and system time behind it.
fn parse_ticks(text: &str, user: usize) -> Option<Cpu> {
    // The second field is the program's name in parentheses and may contain anything.
    let (_, after_name) = text.rsplit_once(") ")?;
    let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
    let ticks = |index: usize| fields.get(index)?.parse::<f64>().ok();
    let second = ticks_per_second();
    Some(Cpu {
        user: ticks(user)? / second,
        system: ticks(user + 1)? / second,
        interrupts: 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_is_understood() {
        let machine =
            parse_machine("cpu  100 50 30 9999 9 7 13 0 0 0\ncpu0 1 1 1 1 1 1 1\n").unwrap();
        assert_eq!(
            parse_stolen("cpu  1 2 3 4 5 6 7 80 0 0\n"),
            Some(80.0 / ticks_per_second())
        );
        let second = ticks_per_second();
        assert_eq!(
            (machine.user, machine.system, machine.interrupts),
            (150.0 / second, 30.0 / second, 20.0 / second)
        );
        let process = parse_process("7 (a) b) S 1 7 7 0 -1 0 0 0 0 0 250 50 0 0 20 0 1").unwrap();
        assert_eq!(
            (process.user, process.system),
            (250.0 / second, 50.0 / second)
        );
    }

    #[test]
    fn memory_is_understood() {
        let text = "55d0-7ffe ---p 00000000 00:00 0  [rollup]\nRss:     1234 kB\nPss:      567 kB\nPss_Anon: 1 kB\n";
        let memory = parse_memory(text).unwrap();
        assert_eq!((memory.rss_kib, memory.pss_kib), (1234, 567));
        assert_eq!(parse_memory("Rss: 1 kB\n"), None);
    }

    #[test]
    fn a_busy_process_is_charged() {
        let pid = std::process::id() as i32;
        let (before, machine_before) = (process(pid).unwrap(), machine().unwrap());
        let mut state = 1u64;
        // The machine's account is kept in ticks and may be behind: six times what is asked for.
        while process(pid).unwrap().since(before).total() < 0.3 {
            for _ in 0..100_000 {
                state = std::hint::black_box(
                    state
                        .wrapping_mul(6_364_136_223_846_793_005)
                        .wrapping_add(1),
                );
            }
        }
        assert!(machine().unwrap().since(machine_before).total() >= 0.05);
        assert!(ran(pid).unwrap() >= 0.05);
    }
}
