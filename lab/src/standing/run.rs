//! Running programs in a lab: for a user (`lab exec`), to their end, or in the background; and the traffic tool.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use super::process::{self, Captured};
use super::{LAB_ENV, Lab};
use crate::traffic::{ClientOptions, Outcome, TrafficCommand};

/// How long a server may take to listen.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
/// What a client's process may take on top of the time that its check has.
const CLIENT_OVERHEAD: Duration = Duration::from_secs(10);

/// Runs a program in a target of a lab with this process's terminal. Returns its exit code.
///
/// # Errors
/// When there is no such lab or target, or the program cannot start.
pub fn exec(name: &str, target: &str, argv: &[String]) -> Result<i32> {
    let lab = Lab::open(name)?;
    let mut command = lab.command(target, argv)?;
    let spawned = lab.netns(target)?.run(|| command.spawn())?;
    let mut child = spawned.with_context(|| format!("start {}", argv.join(" ")))?;
    Ok(process::exit_code(
        child.wait().context("wait for the program")?,
    ))
}

/// A program that runs until this is dropped.
#[derive(Debug)]
pub struct Background {
    child: Child,
    log: PathBuf,
    log_start: u64,
}

impl Background {
    /// Its pid, which is also its process group.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it wrote, both streams.
    pub fn output(&self) -> String {
        let bytes = fs::read(&self.log).unwrap_or_default();
        let start = usize::try_from(self.log_start)
            .unwrap_or(usize::MAX)
            .min(bytes.len());
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Waits until it wrote `text`.
    ///
    /// # Errors
    /// When it ends before, or does not within `limit`; with all that it wrote.
    pub fn wait_for(&mut self, text: &str, limit: Duration) -> Result<()> {
        let mut ended = false;
        let written = process::wait_until(limit, || {
            // Asked before the output is read, so that what it wrote last is not missed.
            ended = !matches!(self.child.try_wait(), Ok(None));
            self.output().contains(text) || ended
        });
        if written && self.output().contains(text) {
            return Ok(());
        }
        let how = if ended { "ended" } else { "ran on" };
        bail!(
            "process {} {how} without writing {text:?}:\n{}",
            self.child.id(),
            self.output()
        )
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Ok(group) = i32::try_from(self.child.id()) {
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
        let _ = self.child.wait();
    }
}

impl Lab {
    /// Runs a program in a target to its end.
    ///
    /// # Errors
    /// When it cannot start or is not done within `limit`; not when its exit code is not 0.
    pub fn run(&self, target: &str, argv: &[&str], limit: Duration) -> Result<Captured> {
        let mut command = self.command(target, argv)?;
        process::run_captured(&self.netns(target)?, &mut command, "", limit)
    }

    /// Starts a program in a target, with its output in `log/LABEL.log` of the lab's directory.
    ///
    /// # Errors
    /// When it cannot start.
    pub fn spawn(&self, target: &str, label: &str, argv: &[&str]) -> Result<Background> {
        let log = self
            .dir()
            .join("log")
            .join(format!("{}.log", label.replace('/', "_")));
        let log_start = fs::metadata(&log).map_or(0, |metadata| metadata.len());
        let child =
            process::spawn_detached(&self.netns(target)?, &self.command(target, argv)?, &log)?;
        Ok(Background {
            child,
            log,
            log_start,
        })
    }

    /// Starts the traffic server in a target and waits until it listens.
    ///
    /// # Errors
    /// When it does not.
    pub fn serve(&self, target: &str, port: u16) -> Result<Background> {
        let json = TrafficCommand::server(port).to_json()?;
        let program = self.traffic_program();
        let label = format!("traffic-{target}-{port}");
        let mut server = self.spawn(target, &label, &[&program, "lab", "traffic", &json])?;
        server.wait_for("listening", LISTENS_WITHIN)?;
        Ok(server)
    }

    /// Makes a check from a target.
    ///
    /// # Errors
    /// When the tool cannot run; a failed check is in the outcome.
    pub fn traffic(&self, target: &str, options: &ClientOptions) -> Result<Outcome> {
        let json = TrafficCommand::Client(options.clone()).to_json()?;
        let limit = Duration::from_millis(options.timeout_ms) + CLIENT_OVERHEAD;
        let done = self.run(
            target,
            &[&self.traffic_program(), "lab", "traffic", &json],
            limit,
        )?;
        let outcome = done
            .stdout
            .lines()
            .next_back()
            .and_then(|line| serde_json::from_str(line).ok());
        outcome.with_context(|| {
            format!(
                "traffic from {target} gave no result: {}{}",
                done.stdout, done.stderr
            )
        })
    }

    /// A program with the environment that a target's node has, so that `ambidex` there speaks to that node's agent.
    fn command(&self, target: &str, argv: &[impl AsRef<str>]) -> Result<Command> {
        let Some((program, arguments)) = argv.split_first() else {
            bail!("no program to run in {target}")
        };
        let mut command = Command::new(program.as_ref());
        command.args(arguments.iter().map(AsRef::as_ref));
        if let Some(directory) = self.spec().programs.ambidex.parent() {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{path}", directory.display()));
        }
        match self.topology().target(target) {
            Some((_, _, Some(node))) => command.envs(self.environment(node)),
            _ => command.env(LAB_ENV, self.name()),
        };
        Ok(command)
    }

    fn traffic_program(&self) -> String {
        self.spec().programs.ambidex.display().to_string()
    }
}
