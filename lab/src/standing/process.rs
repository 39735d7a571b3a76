//! Processes: started in a network namespace, recognised later in spite of reused pids, ended for certain.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::{Netns, NetnsId};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// Far over what a thread takes to run once, on a machine that is busy.
const STOPS_WITHIN: Duration = Duration::from_secs(20);

/// Time between two looks at a process that is expected to change.
const LOOK_EVERY: Duration = Duration::from_millis(5);

/// A process by pid and start time, which together never come again before a reboot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// Its pid in the pid namespace of the lab's builder.
    pub pid: i32,
    /// When it started, in clock ticks since boot (`/proc/PID/stat`, field 22).
    pub start_ticks: u64,
}

/// What `/proc/PID/stat` says.
struct Stat {
    state: char,
    parent: i32,
    start_ticks: u64,
}

impl Process {
    /// The process that has this pid, unless it has ended.
    pub fn of_pid(pid: i32) -> Option<Self> {
        let stat = stat(pid)?;
        (!ended(stat.state)).then_some(Self {
            pid,
            start_ticks: stat.start_ticks,
        })
    }

    /// Whether it runs (a zombie does not).
    pub fn is_alive(self) -> bool {
        // Our own ended children stay zombies until somebody asks for them.
        let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        Self::of_pid(self.pid) == Some(self)
    }

    /// Sends a signal, if it still runs. SIGSTOP has stopped all threads when this returns: each stops when it next runs.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.is_alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid), signal) {
            Ok(()) | Err(Errno::ESRCH) => {}
            Err(errno) => {
                return Err(errno)
                    .with_context(|| format!("send {signal} to process {}", self.pid));
            }
        }
        if signal != Signal::SIGSTOP {
            return Ok(());
        }
        let begun = Instant::now();
        while self.is_alive() && !self.is_stopped() {
            if begun.elapsed() > STOPS_WITHIN {
                bail!("process {} does not stop", self.pid);
            }
            thread::sleep(LOOK_EVERY);
        }
        Ok(())
    }

    /// Whether all threads are stopped.
    fn is_stopped(self) -> bool {
        let Ok(threads) = fs::read_dir(format!("/proc/{}/task", self.pid)) else {
            return false;
        };
        threads.flatten().all(|thread| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // After the name, which may have anything in it but is the last thing in parentheses. A thread that ended
            // meanwhile has none.
            stat.is_empty()
                || stat
                    .rsplit(") ")
                    .next()
                    .is_some_and(|rest| rest.starts_with('T'))
        })
    }

    /// Whether it has a handler for a signal. The first process of a pid namespace never gets a signal without one.
    pub fn handles(self, signal: Signal) -> bool {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
        let mask = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
        mask.is_some_and(|mask| mask >> (signal as i32 - 1) & 1 == 1)
    }

    /// Waits until it has ended; false if it still runs after `limit`.
    pub fn wait_gone(self, limit: Duration) -> bool {
        wait_until(limit, || !self.is_alive())
    }

    /// Its only child, if it has one: what `unshare --fork` started.
    pub fn only_child(self) -> Option<Process> {
        let child = all_pids()
            .into_iter()
            .find(|pid| stat(*pid).is_some_and(|stat| stat.parent == self.pid))?;
        Self::of_pid(child)
    }

    /// The network namespace of its main thread.
    fn netns(self) -> Option<NetnsId> {
        use std::os::unix::fs::MetadataExt;
        let metadata = fs::metadata(format!("/proc/{}/ns/net", self.pid)).ok()?;
        Some(NetnsId {
            dev: metadata.dev(),
            ino: metadata.ino(),
        })
    }
}

/// All processes whose main thread is in one of these network namespaces.
pub fn in_namespaces(namespaces: &[NetnsId]) -> Vec<Process> {
    let all = all_pids().into_iter().filter_map(Process::of_pid);
    all.filter(|process| {
        process
            .netns()
            .is_some_and(|netns| namespaces.contains(&netns))
    })
    .collect()
}

/// This process and those that wait for it: what must not be killed by a `lab down` typed inside the lab.
pub fn self_and_ancestors() -> BTreeSet<i32> {
    let mut pids = BTreeSet::new();
    let mut next = i32::try_from(std::process::id()).ok();
    while let Some(pid) = next.filter(|pid| *pid > 0 && !pids.contains(pid)) {
        pids.insert(pid);
        next = stat(pid).map(|stat| stat.parent);
    }
    pids
}

/// Whether this kernel and user may give a process its own mount and pid namespace.
pub fn can_isolate() -> bool {
    let mut trial = isolated(Path::new("true"), true);
    trial
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    trial.status().is_ok_and(|status| status.success())
}

/// A program in a mount and pid namespace of its own. Mounts made outside later (network namespaces) do get in, as into
/// an agent's pod on a cluster; with `own_proc` it sees the processes of its own pid namespace only.
pub fn isolated(program: &Path, own_proc: bool) -> Command {
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--propagation",
        "slave",
        "--pid",
        "--fork",
        "--kill-child",
    ]);
    if own_proc {
        command.arg("--mount-proc");
    }
    command.arg("--").arg(program);
    command
}

/// Starts a command in a network namespace and a session of its own, with output appended to `log`.
pub fn spawn_detached(netns: &Netns, command: &Command, log: &Path) -> Result<Child> {
    let output = File::options().create(true).append(true).open(log);
    let output = output.with_context(|| log.display().to_string())?;
    let errors = output
        .try_clone()
        .context("duplicate the log's descriptor")?;
    let mut session = Command::new("setsid");
    session.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => session.env(key, value),
            None => session.env_remove(key),
        };
    }
    session.stdin(Stdio::null()).stdout(output).stderr(errors);
    let child = netns.run(|| session.spawn())?;
    child.with_context(|| format!("start {}", command.get_program().display()))
}

/// A finished command.
#[derive(Debug, Clone)]
pub struct Captured {
    /// Exit code; 128 and the signal's number if a signal ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Captured {
    /// Requires exit code 0.
    ///
    /// # Errors
    /// With all output when it is another.
    pub fn success(self, what: &str) -> Result<Self> {
        if self.code != 0 {
            bail!(
                "{what}: exit code {}\n{}{}",
                self.code,
                self.stdout,
                self.stderr
            );
        }
        Ok(self)
    }
}

/// Runs a command in a network namespace to its end, with `input` on standard input.
///
/// # Errors
/// When it cannot start or is not done in time; it is killed then.
pub fn run_captured(
    netns: &Netns,
    command: &mut Command,
    input: &str,
    limit: Duration,
) -> Result<Captured> {
    let what = format!("{}", command.get_program().display());
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = netns
        .run(|| command.spawn())?
        .with_context(|| format!("start {what}"))?;
    let stdin = child.stdin.take();
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let feed = thread::spawn({
        let input = input.to_owned();
        // A command that does not read its input is its own business.
        move || stdin.map(|mut stdin| stdin.write_all(input.as_bytes()))
    });
    // Waited for by a thread that sleeps until it ends: whoever times a command sees no step of a poll in the times.
    let pid = Pid::from_raw(i32::try_from(child.id()).context("a pid")?);
    let (ended, end) = mpsc::channel();
    let waiter = thread::spawn(move || ended.send(child.wait()));
    let status = match end.recv_timeout(limit) {
        Ok(status) => status.with_context(|| format!("wait for {what}"))?,
        Err(_) => {
            // Its pid is its own until the waiter has it, which takes another turn.
            let _ = kill(pid, Signal::SIGKILL);
            let _ = waiter.join();
            bail!("{what} was not done after {limit:?}");
        }
    };
    let _ = feed.join();
    let text = |thread: thread::JoinHandle<String>| thread.join().unwrap_or_default();
    Ok(Captured {
        code: exit_code(status),
        stdout: text(stdout),
        stderr: text(stderr),
    })
}

/// Exit code as a shell gives it.
pub fn exit_code(status: std::process::ExitStatus) -> i32 {
    status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(1)
}

/// Waits until something is so; false if it is not after `limit`.
pub fn wait_until(limit: Duration, mut so: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + limit;
    loop {
        if so() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        thread::sleep(LOOK_EVERY);
    }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn all_pids() -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .collect()
}

fn ended(state: char) -> bool {
    matches!(state, 'Z' | 'X')
}

fn stat(pid: i32) -> Option<Stat> {
    parse_stat(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)
}

/// The second field is the program's name in parentheses and may itself contain anything.
fn parse_stat(text: &str) -> Option<Stat> {
    let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?.chars().next()?;
    let parent = fields.next()?.parse().ok()?;
    let start_ticks = fields.nth(17)?.parse().ok()?;
    Some(Stat {
        state,
        parent,
        start_ticks,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn stat_of_a_program_with_an_evil_name() {
        let text = "42 (a) Z 1 (b)) S 7 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 99 100";
        let stat = parse_stat(text).unwrap();
        assert_eq!(
            (stat.state, stat.parent, stat.start_ticks),
            ('S', 7, 123_456)
        );
    }

    #[test]
    fn an_ended_child_is_not_alive_and_its_pid_with_another_start_time_is_another_process() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let process = Process::of_pid(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(process.is_alive());
        let earlier = Process {
            start_ticks: process.start_ticks - 1,
            ..process
        };
        assert!(!earlier.is_alive());
        earlier.signal(Signal::SIGKILL).unwrap();
        assert!(
            process.is_alive(),
            "a process that only has the same pid was killed"
        );
        process.signal(Signal::SIGKILL).unwrap();
        assert!(process.wait_gone(Duration::from_secs(5)));
        let _ = child.wait();
    }

    #[test]
    fn a_handler_is_seen_once_it_is_installed() {
        let script = "trap : USR1; while :; do sleep 0.05; done";
        let mut child = Command::new("sh").args(["-c", script]).spawn().unwrap();
        let process = Process::of_pid(i32::try_from(child.id()).unwrap()).unwrap();
        assert!(wait_until(Duration::from_secs(5), || process.handles(Signal::SIGUSR1)));
        assert!(!process.handles(Signal::SIGUSR2));
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn a_command_that_does_not_end_is_killed_in_time() {
        let here = Netns::current().unwrap();
        let limit = Duration::from_millis(100);
        let error = run_captured(&here, Command::new("sleep").arg("60"), "", limit).unwrap_err();
        assert!(
            error.to_string().contains("not done after 100ms"),
            "{error}"
        );
    }
}
