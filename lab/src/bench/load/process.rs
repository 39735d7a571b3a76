//! Programs in a namespace, started and ended for certain.

use std::io::Read;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;

use crate::bench::interrupt;
use crate::bench::pinning::{self, End};

/// Time that a process may take to end when asked to.
const ENDS_WITHIN: Duration = Duration::from_secs(3);
/// Time between two looks at a process: the bench itself should use no CPU to speak of.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// A process that ends with its guard.
#[derive(Debug)]
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Asked first: nginx ends its workers, which would stay if it was killed.
        if self.end().is_err() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

impl Running {
    /// Guards a process.
    pub fn new(child: Child) -> Self {
        Self(child)
    }

    /// Starts a program in a namespace on one end's processor, with its output thrown away.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(netns: &Netns, end: End, program: &str, arguments: &[&str]) -> Result<Self> {
        spawn(
            netns,
            Some(end),
            program,
            arguments,
            Stdio::null,
            Stdio::null,
        )
        .map(Self)
    }

    /// Its pid.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it does not end; it is killed then.
    pub fn stop(mut self) -> Result<()> {
        self.end().map(|_| ())
    }

    fn end(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let deadline = Instant::now() + ENDS_WITHIN;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        bail!("process {pid} did not end within {ENDS_WITHIN:?} of SIGTERM")
    }
}

fn spawn(
    netns: &Netns,
    end: Option<End>,
    program: &str,
    arguments: &[&str],
    stdout: fn() -> Stdio,
    stderr: fn() -> Stdio,
) -> Result<Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(stdout())
        .stderr(stderr());
    let mut start = || netns.run(|| command.spawn());
    let started = match end {
        // A process keeps the processors of the thread that started it.
        Some(end) => pinning::on(end, start)??,
        None => start()?,
    };
    started.with_context(|| format!("cannot start {program}: is it installed? (`make deps`)"))
}

/// Runs a program in a namespace to its end and returns what it printed.
///
/// # Errors
/// When it fails, with what it wrote; when it takes longer than `limit`; and [`interrupt::check`]'s.
pub fn output_of(
    netns: &Netns,
    program: &str,
    arguments: &[impl AsRef<str>],
    limit: Duration,
) -> Result<String> {
    output(netns, None, program, arguments, limit)
}

/// As [`output_of`], on the client's processor.
///
/// # Errors
/// As those of [`output_of`].
pub fn output_of_client(
    netns: &Netns,
    program: &str,
    arguments: &[impl AsRef<str>],
    limit: Duration,
) -> Result<String> {
    output(netns, Some(End::Client), program, arguments, limit)
}

fn output(
    netns: &Netns,
    end: Option<End>,
    program: &str,
    arguments: &[impl AsRef<str>],
    limit: Duration,
) -> Result<String> {
    let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    let mut child = spawn(netns, end, program, &arguments, Stdio::piped, Stdio::piped)?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let mut running = Running(child);
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
        interrupt::check()?;
        if Instant::now() >= deadline {
            bail!(
                "{program} {} did not end within {limit:?}",
                arguments.join(" ")
            );
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let text = |thread: JoinHandle<String>| thread.join().unwrap_or_default();
    let (stdout, stderr) = (text(stdout), text(stderr));
    if !status.success() {
        bail!(
            "{program} {} ended with {status}: {}",
            arguments.join(" "),
            [stdout.trim(), stderr.trim()].join(" ").trim()
        );
    }
    Ok(stdout)
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read until an error is all that there is to show.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
