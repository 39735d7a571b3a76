//! Counting a process's system calls, with perf or else strace. Never while something is timed: both cost, strace much.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// The tracepoint that every system call passes.
const EVENT: &str = "raw_syscalls:sys_enter";
/// Time that a tool takes to attach to all threads.
const ATTACHES_WITHIN: Duration = Duration::from_millis(500);
const ENDS_WITHIN: Duration = Duration::from_secs(10);

/// A tool that counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Tool {
    /// `perf stat` on a tracepoint.
    Perf,
    /// `strace -c`: stops the process at each call, so that it makes fewer of them, and other ones.
    Strace,
}

/// The best tool that works here, tried and not believed.
///
/// # Errors
/// Says why none does.
pub fn find() -> Result<Tool, String> {
    let perf = Command::new("perf")
        .args(["stat", "-x,", "-e", EVENT, "--", "true"])
        .output();
    match perf {
        Ok(output) if parse_perf(&String::from_utf8_lossy(&output.stderr)).is_some() => {
            return Ok(Tool::Perf);
        }
        _ => {}
    }
    let strace = Command::new("strace").args(["-c", "-f", "true"]).output();
    match strace {
        Ok(output) if parse_strace(&String::from_utf8_lossy(&output.stderr)).is_some() => {
            Ok(Tool::Strace)
        }
        _ => Err(format!(
            "neither perf (with the event {EVENT}) nor strace works here: system calls are not counted"
        )),
    }
}

/// Counts the system calls of processes while `work` is done. `scratch` is a directory for the tool's output.
///
/// # Errors
/// When `work` fails, or the tool does not count.
pub fn count<T>(
    tool: Tool,
    pids: &[i32],
    scratch: &Path,
    work: impl FnOnce() -> Result<T>,
) -> Result<(u64, T)> {
    let path = scratch.join("syscalls");
    let output = File::create(&path).with_context(|| path.display().to_string())?;
    let words: Vec<String> = pids.iter().map(i32::to_string).collect();
    let mut command = match tool {
        Tool::Perf => {
            let mut command = Command::new("perf");
            command.args(["stat", "-x,", "-e", EVENT, "-p", &words.join(",")]);
            command
        }
        Tool::Strace => {
            let mut command = Command::new("strace");
            command.args(["-c", "-f"]);
            words.iter().for_each(|pid| {
                command.args(["-p", pid]);
            });
            command
        }
    };
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(output)
        .spawn()
        .with_context(|| format!("start {tool:?}"))?;
    let mut counting = Counting { child, path };
    thread::sleep(ATTACHES_WITHIN);
    let done = work()?;
    let text = counting.end()?;
    let counted = match tool {
        Tool::Perf => parse_perf(&text),
        Tool::Strace => parse_strace(&text),
    };
    let counted = counted.with_context(|| format!("{tool:?} counted nothing: {}", text.trim()))?;
    Ok((counted, done))
}

/// The tool at work; asked to end with it.
struct Counting {
    child: std::process::Child,
    path: PathBuf,
}

impl Counting {
    fn end(&mut self) -> Result<String> {
        kill(
            Pid::from_raw(i32::try_from(self.child.id())?),
            Signal::SIGINT,
        )?;
        let deadline = Instant::now() + ENDS_WITHIN;
        while self.child.try_wait()?.is_none() {
            if Instant::now() >= deadline {
                bail!("the counting tool did not end within {ENDS_WITHIN:?}");
            }
            thread::sleep(Duration::from_millis(10));
        }
        fs::read_to_string(&self.path).with_context(|| self.path.display().to_string())
    }
}

impl Drop for Counting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `2931,,raw_syscalls:sys_enter,…`; `<not supported>` and the like are no number.
fn parse_perf(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(EVENT))?;
    line.split(',')
        .next()?
        .parse()
        .ok()
        .filter(|&count| count > 0)
}

/// `100.00    0.000123           4        29         1 total`
fn parse_strace(text: &str) -> Option<u64> {
    let line = text.lines().rfind(|line| line.ends_with(" total"))?;
    let calls = line.split_ascii_whitespace().nth(3)?;
    calls.parse().ok().filter(|&count| count > 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn what_the_tools_print_is_understood() {
        assert_eq!(
            parse_perf("29,,raw_syscalls:sys_enter,1834,100.00,,\n"),
            Some(29)
        );
        assert_eq!(
            parse_perf("<not supported>,,raw_syscalls:sys_enter,0,100.00,,\n"),
            None
        );
        assert_eq!(parse_perf("event syntax error: 'raw_syscalls'"), None);
        let strace = "% time seconds usecs/call calls errors syscall\n------ ---\n\
                      100.00    0.000123           4        29         1 total\n";
        assert_eq!(parse_strace(strace), Some(29));
        assert_eq!(parse_strace("strace: attach: not permitted"), None);
    }

    #[test]
    fn calls_of_a_running_process_are_counted() {
        let Ok(tool) = find() else {
            return;
        };
        let scratch = tempfile::tempdir().unwrap();
        let mut busy = Command::new("sh")
            .args(["-c", "while :; do sleep 0.01; done"])
            .spawn()
            .unwrap();
        let pids = [i32::try_from(busy.id()).unwrap()];
        let counted = count(tool, &pids, scratch.path(), || {
            thread::sleep(Duration::from_millis(300));
            Ok(())
        });
        let failed = count(tool, &pids, scratch.path(), || -> Result<()> {
            bail!("no load")
        });
        busy.kill().unwrap();
        busy.wait().unwrap();
        assert!(counted.unwrap().0 > 20);
        assert!(failed.is_err());
    }
}
