//! One program that writes or reads rules, started in a network namespace, with a limit on its time.

use std::fs::File;
use std::io::{self, Read, Seek, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};

use super::IptablesError;
use crate::netns::Netns;

/// Far above what a restore takes (milliseconds; 0.6 s on the slowest kernel known) plus the wait for the lock.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// Where programs are looked for when PATH does not name them.
const SEARCHED: [&str; 5] = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// `iptables-legacy` takes an exclusive lock on this file (default `/run/xtables.lock`, one for the whole machine).
const LOCK_VARIABLE: &str = "XTABLES_LOCKFILE";

/// The namespace's own file: a lock that is shared by exactly those who change rules in the same namespace, whatever
/// their mount namespace, and that leaves nothing behind.
const NAMESPACE_LOCK: &str = "/proc/self/ns/net";

/// What a program left.
pub(crate) struct Finished {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Runs `program` in `netns` to its end. A status other than success is not an error here.
pub(crate) fn run(
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
    let mut stderr = in_memory("").map_err(start)?;
    let (said, stdout) = UnixStream::pair().map_err(start)?;
    let mut command = Command::new(found(program));
    command
        .args(args)
        .env("LC_ALL", "C")
        .stdin(in_memory(input).map_err(start)?)
        .stdout(OwnedFd::from(stdout))
        .stderr(stderr.try_clone().map_err(start)?);
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
    // With it goes this process's copy of the child's end, so that its exit is the end of what it says.
    drop(command);
    let (status, stdout) = finish(child, said, limit).map_err(start)?;
    let stderr = text_of(&mut stderr).map_err(start)?;
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

/// The program's path, looked for where the standard library would, and where a CNI plugin, which is started with little
/// or no PATH, would not find it. By a path, and with the environment's PATH as it is, a program is started without a copy of
/// this process: that takes milliseconds, and is paid for each pod.
fn found(program: &str) -> PathBuf {
    let inherited = std::env::var_os("PATH").unwrap_or_default();
    let usual = SEARCHED.iter().map(PathBuf::from);
    std::env::split_paths(&inherited)
        .filter(|place| place.is_absolute())
        .chain(usual)
        .map(|place| place.join(program))
        .find(|path| path.is_file())
        // The error of starting it says that it is missing.
        .unwrap_or_else(|| PathBuf::from(program))
}

/// A file in memory: unlike a pipe, nobody has to stand by to feed or to empty it.
fn in_memory(text: &str) -> io::Result<File> {
    let mut file = File::from(memfd_create(c"iptables", MFdFlags::MFD_CLOEXEC)?);
    file.write_all(text.as_bytes())?;
    file.rewind()?;
    Ok(file)
}

fn text_of(file: &mut File) -> io::Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Collects what the child says, and waits for it; no status when it had to be killed. A grandchild may hold the socket
/// longer than the child lives: it is not waited for beyond the limit.
fn finish(
    mut child: Child,
    mut said: UnixStream,
    limit: Duration,
) -> io::Result<(Option<ExitStatus>, String)> {
    let deadline = Instant::now() + limit;
    let mut text = Vec::new();
    let mut buffer = [0; 16 << 10];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            break;
        }
        said.set_read_timeout(Some(left))?;
        match said.read(&mut buffer) {
            Ok(0) => break,
            Ok(length) => text.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let text = String::from_utf8_lossy(&text).into_owned();
    let mut pause = Duration::from_micros(100);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok((Some(status), text));
        }
        if Instant::now() >= deadline {
            child.kill()?;
            child.wait()?;
            return Ok((None, text));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
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
