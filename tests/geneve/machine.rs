//! The machine that the suite runs in: booted, bounded in time, and gone afterwards.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use lab::guest::{Guest, GuestSpec};

use crate::INSIDE;
use crate::report::Report;

const MEMORY: &str = "2048M";
/// How long everything may take, from power on to power off.
const LIMIT: Duration = Duration::from_secs(235);

/// Boots the machine, runs the tests in it, and returns its report.
///
/// # Errors
/// When it cannot boot, does not end in time, or leaves no report of any test; with the end of its console.
pub fn run(tests: &[&str]) -> Result<Report> {
    let work = WorkDirectory::new()?;
    let report = work.0.join("report.json");
    let this = std::env::current_exe().context("path of this program")?;
    // The first may lie around the second, and would hide it.
    let directories = [
        Path::new(env!("CARGO_BIN_EXE_ambidex")).parent(),
        this.parent(),
    ];
    let readable: Vec<&Path> = directories.into_iter().flatten().collect();
    let mut suite = vec![
        this.display().to_string(),
        INSIDE.to_owned(),
        report.display().to_string(),
    ];
    suite.extend(tests.iter().map(|name| (*name).to_owned()));
    let mut machine = Guest::boot(&GuestSpec {
        work: &work.0,
        readable: &readable,
        memory: MEMORY,
        command: &suite,
    })?;

    let started = Instant::now();
    let mut ended = None;
    while ended.is_none() && started.elapsed() < LIMIT {
        thread::sleep(Duration::from_millis(50));
        ended = machine.ended()?;
    }
    let how = ended.map_or_else(
        || format!("did not end within {LIMIT:?}"),
        |status| format!("ended early ({status})"),
    );
    let console = machine.end_of_console();
    match Report::load(&report) {
        Some(report) if !report.tests.is_empty() => {
            if ended.is_none() || report.exit_code.is_none() {
                // What there is counts; the tests that are not in it have failed.
                eprintln!("the machine {how}; end of its console:\n{console}");
            } else if report.exit_code != Some(0) {
                eprintln!("--- end of the machine's console:\n{console}");
            }
            Ok(report)
        }
        _ => bail!("the machine {how} and reported no test; end of its console:\n{console}"),
    }
}

/// A directory for one run, removed with it.
struct WorkDirectory(PathBuf);

impl WorkDirectory {
    fn new() -> Result<Self> {
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("geneve-{}", std::process::id()));
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for WorkDirectory {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("{}: {error}", self.0.display());
        }
    }
}
