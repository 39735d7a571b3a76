//! The lab's control plane: `ambidex control` on the outside host.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::process::{self, Process};
use super::{LAB_ENV, Lab};
use crate::topology::OUTSIDE;

/// Name of the process in the record and of its log.
const NAME: &str = "control";
/// Where the field's control planes listen.
const PORT: u16 = 15012;
/// What it logs when it serves, and how long it may take to.
const STARTED: &str = "control plane started";
const SERVES_WITHIN: Duration = Duration::from_secs(20);
/// How long a killed process may take to go.
const GONE_WITHIN: Duration = Duration::from_secs(5);

impl Lab {
    /// Where the proxies get mesh and certificates from, in their environment.
    pub(super) fn sources(&self) -> Vec<(String, String)> {
        let path = |path: PathBuf| path.display().to_string();
        let variables = if self.spec().control_plane {
            let root = path(self.dir().join("ca/root-cert.pem"));
            vec![
                ("XDS_ADDRESS", format!("{OUTSIDE}:{PORT}")),
                ("XDS_ROOT_CA", root.clone()),
                ("CA_ROOT_CA", root),
            ]
        } else {
            vec![("LOCAL_XDS_PATH", path(self.workloads_path()))]
        };
        let owned = |(name, value): (&str, String)| (name.to_owned(), value);
        variables.into_iter().map(owned).collect()
    }

    /// Starts the control plane. It serves when this returns.
    ///
    /// # Errors
    /// When it runs already, cannot start, or does not say within 20 s that it serves.
    pub fn start_control(&self) -> Result<()> {
        if self.control().is_some() {
            bail!("the control plane runs already");
        }
        let spec = self.spec();
        let mut command = Command::new(&spec.programs.ambidex);
        command
            .arg("control")
            .arg("--dir")
            .arg(self.dir().join("mesh"))
            .arg("--ca-dir")
            .arg(self.dir().join("ca"))
            .args(["--listen", &format!("{OUTSIDE}:{PORT}")])
            .env(LAB_ENV, self.name())
            .envs(spec.daemon_env);
        let length = || std::fs::metadata(self.control_log()).map_or(0, |log| log.len());
        let before = usize::try_from(length()).unwrap_or(usize::MAX);
        let child = process::spawn_detached(&self.netns("out")?, &command, &self.control_log())?;
        let process = i32::try_from(child.id()).ok().and_then(Process::of_pid);
        let process = process.with_context(|| {
            format!(
                "the control plane ended at once: see {}",
                self.control_log().display()
            )
        })?;
        self.change_record(|record| {
            record.processes.insert(NAME.to_owned(), process);
        })?;
        let serves = || {
            let log = std::fs::read(self.control_log()).unwrap_or_default();
            String::from_utf8_lossy(log.get(before..).unwrap_or_default()).contains(STARTED)
        };
        if !process::wait_until(SERVES_WITHIN, || serves() || !process.is_alive()) || !serves() {
            bail!(
                "the control plane does not serve: see {}",
                self.control_log().display()
            );
        }
        Ok(())
    }

    /// The running control plane.
    pub fn control(&self) -> Option<Process> {
        let recorded = self.lock().record.processes.get(NAME).copied();
        recorded.filter(|process| process.is_alive())
    }

    /// Ends the control plane with SIGKILL.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill_control(&self) -> Result<()> {
        if let Some(process) = self.control() {
            process.signal(Signal::SIGKILL)?;
            if !process.wait_gone(GONE_WITHIN) {
                bail!("the control plane does not go");
            }
        }
        self.change_record(|record| {
            record.processes.remove(NAME);
        })
    }

    /// Log of the control plane.
    pub fn control_log(&self) -> PathBuf {
        self.dir().join("log").join(format!("{NAME}.log"))
    }
}
