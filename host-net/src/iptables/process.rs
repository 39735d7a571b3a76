//! One iptables program, started in a network namespace, with a limit on its time.

use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use super::IptablesError;
use crate::netns::Netns;

/// Far above what a restore takes (milliseconds; 0.6 s on the slowest kernel known) plus the wait for the lock.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// `iptables-legacy` takes an exclusive lock on this file (default `/run/xtables.lock`, one for the whole machine).
const LOCK_VARIABLE: &str = "XTABLES_LOCKFILE";

/// The namespace's own file: a lock that is shared by exactly those who change rules in the same namespace, whatever
/// their mount namespace, and that leaves nothing behind.
const NAMESPACE_LOCK: &str = "/proc/self/ns/net";

/// What a program left.
pub(super) struct Finished {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// Runs `program` in `netns` to its end. A status other than success is not an error here.
pub(super) fn run(
    netns: &Netns,
    program: &'static str,
    args: &[&str],
    input: &str,
) -> Result<Finished, IptablesError> {
    run_within(netns, program, args, input, TIME_LIMIT)
}

fn run_within(
    netns: &Netns,
    program: &'static str,
    args: &[&str],
    input: &str,
    limit: Duration,
) -> Result<Finished, IptablesError> {
    let start = |source| IptablesError::Start { program, source };
    let mut command = Command::new(program);
    command
        .args(args)
        .env("LC_ALL", "C")
        .env("PATH", search_path())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    if !shares_the_machine_lock(netns) {
        command.env(LOCK_VARIABLE, NAMESPACE_LOCK);
    }
    let child = netns
        .run(|| command.spawn())
        .map_err(|source| IptablesError::Netns {
            netns: netns.id(),
            action: "enter",
            source,
        })?
        .map_err(start)?;
    let (status, stdout, stderr) = finish(child, input.to_owned(), limit).map_err(start)?;
    match status {
        Some(status) => Ok(Finished {
            status,
            stdout,
            stderr,
        }),
        None => Err(IptablesError::Timeout {
            program,
            netns: netns.id(),
            seconds: limit.as_secs(),
        }),
    }
}

/// Other writers of the machine's main namespace (a service proxy, a firewall) use the default lock; only there it has
/// to be the same one. An operator's own choice of the lock file is left alone.
fn shares_the_machine_lock(netns: &Netns) -> bool {
    if std::env::var_os(LOCK_VARIABLE).is_some() {
        return true;
    }
    let main = std::fs::metadata("/proc/1/ns/net");
    main.is_ok_and(|main| (main.dev(), main.ino()) == (netns.id().dev, netns.id().ino))
}

/// A CNI plugin is started with little or no PATH.
fn search_path() -> String {
    let inherited = std::env::var("PATH").unwrap_or_default();
    let separator = if inherited.is_empty() { "" } else { ":" };
    format!("{inherited}{separator}/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")
}

/// Feeds the child, collects what it says, and waits; no status when it had to be killed. The pipes have a thread
/// each, so that neither side can block the other. After a kill their threads are left to end by themselves: a
/// grandchild may hold the pipes.
fn finish(
    mut child: Child,
    input: String,
    limit: Duration,
) -> io::Result<(Option<ExitStatus>, String, String)> {
    let deadline = Instant::now() + limit;
    if let Some(mut stdin) = child.stdin.take() {
        // A child that fails early closes its end: its status tells more than the broken pipe.
        thread::spawn(move || {
            let _ = stdin.write_all(input.as_bytes());
        });
    }
    let stdout = child.stdout.take().map(collect);
    let stderr = child.stderr.take().map(collect);
    let mut texts = [String::new(), String::new()];
    for (text, receiver) in texts.iter_mut().zip([stdout, stderr]) {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.map(|receiver| receiver.recv_timeout(left)) {
            Some(Ok(collected)) => *text = collected,
            Some(Err(_)) => break,
            None => {}
        }
    }
    let [stdout, stderr] = texts;
    let mut pause = Duration::from_micros(100);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((Some(status), stdout, stderr));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok((None, stdout, stderr));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = pipe.read_to_end(&mut bytes);
        let _ = sender.send(String::from_utf8_lossy(&bytes).into_owned());
    });
    receiver
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn a_program_that_does_not_end_is_killed_and_named() {
        let here = Netns::current().unwrap();
        let started = Instant::now();
        let limit = Duration::from_millis(200);
        let result = run_within(&here, "sleep", &["30"], "", limit);
        assert!(started.elapsed() < Duration::from_secs(5));
        let error = result.err().unwrap().to_string();
        assert!(error.starts_with("sleep in net:["), "{error}");
        assert!(error.contains("killed after"), "{error}");
    }

    #[test]
    fn long_input_and_output_do_not_block_each_other() {
        let here = Netns::current().unwrap();
        let input = "0123456789abcdef\n".repeat(40_000);
        let finished = run(&here, "cat", &[], &input).unwrap();
        assert!(finished.status.success());
        assert_eq!(finished.stdout, input);
    }

    #[test]
    fn a_missing_program_names_the_package() {
        let here = Netns::current().unwrap();
        let error = run(&here, "ambidex-no-such-program", &[], "").err();
        let error = error.unwrap().to_string();
        assert!(error.contains("ambidex-no-such-program"), "{error}");
        assert!(error.contains("apt-get install iptables"), "{error}");
    }
}
