//! The machine: a User-Mode Linux kernel, booted, bounded in time, and gone afterwards.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::INSIDE;
use crate::report::Report;

/// The kernel of Debian's package user-mode-linux, and its modules.
const KERNEL: &str = "/usr/bin/linux.uml";
const MODULES: &str = "/usr/lib/uml/modules";
/// The kernel traces its processes. Should it be killed alone, they would go on as root's processes of this machine, so
/// they get namespaces to do that in: they die with the kernel, which is the first process there, and whatever they do
/// until then stays there. Power off is for their machine, too.
const LAUNCH: [&str; 13] = [
    // Ends with this program, however that ends.
    "--pdeathsig",
    "KILL",
    "unshare",
    "--mount",
    "--net",
    "--pid",
    "--fork",
    "--kill-child",
    "--mount-proc",
    "sh",
    "-ec",
    "[ ! -e /proc/sysrq-trigger ] || mount --bind /dev/null /proc/sysrq-trigger; exec \"$@\"",
    "sh",
];
/// Memory of the machine; only what it touches is taken from this one.
const MEMORY: &str = "2048M";
/// How long everything may take, from power on to power off.
const LIMIT: Duration = Duration::from_secs(235);
/// Lines of the console that an error quotes.
const CONSOLE_LINES: usize = 80;

/// Boots the machine, runs the tests in it, and returns its report.
///
/// # Errors
/// When it cannot boot, does not end in time, or leaves no report of any test; with the end of its console.
pub fn run(tests: &[&str]) -> Result<Report> {
    for path in [KERNEL, MODULES] {
        if !Path::new(path).exists() {
            bail!("{path} does not exist: install User-Mode Linux (make deps)");
        }
    }
    let work = WorkDirectory::new()?;
    let report = work.0.join("report.json");
    let console = work.0.join("console");
    let init = work.0.join("init");
    fs::write(&init, init_script(&work.0, &report, tests)?)?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;

    let ended = Machine::boot(&work.0, &init, &File::create(&console)?)?.run(LIMIT)?;

    let report = Report::load(&report);
    let end_of_console = || {
        let text = fs::read(&console).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    };
    match (report, ended) {
        (Some(report), Some(_)) if !report.tests.is_empty() && report.exit_code.is_some() => {
            if report.exit_code != Some(0) {
                eprintln!("--- end of the machine's console:\n{}", end_of_console());
            }
            Ok(report)
        }
        (Some(report), ended) if !report.tests.is_empty() => {
            // What there is counts; the tests that are not in it have failed.
            let how = ended.map_or_else(
                || format!("did not end within {LIMIT:?}"),
                |status| format!("ended early ({status})"),
            );
            eprintln!(
                "the machine {how}; end of its console:\n{}",
                end_of_console()
            );
            Ok(report)
        }
        (_, Some(status)) => bail!(
            "the machine ended ({status}) without a report of any test; end of its console:\n{}",
            end_of_console()
        ),
        (_, None) => bail!(
            "the machine did not end within {LIMIT:?} and reported no test; end of its console:\n{}",
            end_of_console()
        ),
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

/// A running kernel, by the process that started it. Its processes are processes of this machine; all go when this is
/// dropped.
struct Machine(Child);

impl Machine {
    fn boot(work: &Path, init: &Path, console: &File) -> Result<Self> {
        let mut command = Command::new("setpriv");
        command
            .args(LAUNCH)
            .arg(KERNEL)
            .args([
                &format!("mem={MEMORY}"),
                "rootfstype=hostfs",
                "root=/dev/root",
                "rootflags=/",
                "ro",
                &format!("init={}", text(init)?),
                "con=null",
                "con0=fd:0,fd:1",
                &format!("uml_dir={}", text(work)?),
            ])
            // TMPDIR would say where the machine's memory is: it belongs on a tmpfs, which the kernel finds by itself.
            .env_remove("TMPDIR")
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console.try_clone()?);
        Ok(Self(command.spawn().context("setpriv")?))
    }

    /// Waits until it powers off, and says how it ended; none when it did not in time.
    fn run(mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let started = Instant::now();
        while started.elapsed() < limit {
            if let Some(status) = self.0.try_wait()? {
                return Ok(Some(status));
            }
            thread::sleep(Duration::from_millis(50));
        }
        Ok(None)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn init_script(work: &Path, report: &Path, tests: &[&str]) -> Result<String> {
    let this = std::env::current_exe().context("path of this program")?;
    let ambidex = Path::new(env!("CARGO_BIN_EXE_ambidex"));
    // The first may lie around the second, and would hide it.
    let directories = [ambidex.parent(), this.parent()];
    let readable: Vec<&str> = directories
        .into_iter()
        .flatten()
        .map(text)
        .collect::<Result<_>>()?;
    let mut suite = vec![
        quoted(text(&this)?),
        INSIDE.to_owned(),
        quoted(text(report)?),
    ];
    suite.extend(tests.iter().map(|name| quoted(name)));
    Ok(format!(
        "#!/bin/sh\nWORK={}\nREADABLE={}\nSUITE={}\n{}",
        quoted(text(work)?),
        quoted(&readable.join(" ")),
        quoted(&suite.join(" ")),
        include_str!("init.sh")
    ))
}

/// Paths end up on a kernel's command line and in mount options, which know no quotes.
fn text(path: &Path) -> Result<&str> {
    match path.to_str() {
        Some(text) if !text.contains([' ', ',', '\'', '"', '\n']) => Ok(text),
        _ => bail!(
            "{}: want a path without spaces, commas and quotes",
            path.display()
        ),
    }
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''"))
}
