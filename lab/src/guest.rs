//! A machine in a process: a User-Mode Linux kernel that boots on this machine's root file system in two seconds, runs
//! one command and powers off. It has what the kernel around it may lack (geneve), one processor, and iptables-legacy
//! only.
//!
//! Its processes are processes of this machine, traced by the kernel's. They get namespaces to be that in, so that
//! nothing of them is left, however the kernel or whoever booted it ends.

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context, Result, bail};

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
/// Lines of the console that an error quotes.
const CONSOLE_LINES: usize = 80;
/// Files in the work directory.
const CONSOLE: &str = "console";
const CODE: &str = "code";

/// What is booted.
#[derive(Debug, Clone, Copy)]
pub struct GuestSpec<'a> {
    /// The one directory that the machine can write to, under the same path there as here. It has to exist, and takes
    /// the console and the exit code, too.
    pub work: &'a Path,
    /// Directories that have to be readable although they may lie under `/run` or `/tmp`, which are the machine's own.
    pub readable: &'a [&'a Path],
    /// Memory of the machine, as the kernel takes it (`2048M`); only what it touches is taken from this one.
    pub memory: &'a str,
    /// Program and arguments that the machine runs.
    pub command: &'a [String],
}

/// A running machine. All its processes go when this is dropped.
///
/// It has to be booted by a thread that lives as long as it does: the kernel ends it with that thread.
#[derive(Debug)]
pub struct Guest {
    launcher: Child,
    work: PathBuf,
}

/// Whether a machine can be booted here.
///
/// # Errors
/// Says what is missing.
pub fn require() -> Result<()> {
    for path in [KERNEL, MODULES] {
        if !Path::new(path).exists() {
            bail!("{path} does not exist: install User-Mode Linux (make deps)");
        }
    }
    Ok(())
}

impl Guest {
    /// Boots the machine.
    ///
    /// # Errors
    /// When there is no kernel, or something cannot be started or written.
    pub fn boot(spec: &GuestSpec<'_>) -> Result<Self> {
        require()?;
        let work = text(spec.work)?;
        let init = spec.work.join("init");
        fs::write(&init, init_script(spec)?).with_context(|| init.display().to_string())?;
        fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
        let console = spec.work.join(CONSOLE);
        let console = File::create(&console).with_context(|| console.display().to_string())?;
        let mut command = Command::new("setpriv");
        command
            .args(LAUNCH)
            .arg(KERNEL)
            .args([
                &format!("mem={}", spec.memory),
                "rootfstype=hostfs",
                "root=/dev/root",
                "rootflags=/",
                "ro",
                &format!("init={}", text(&init)?),
                "con=null",
                "con0=fd:0,fd:1",
                &format!("uml_dir={work}"),
            ])
            // TMPDIR would say where the machine's memory is: it belongs on a tmpfs, which the kernel finds by itself.
            .env_remove("TMPDIR")
            // A Ctrl-C is for whoever booted it, who may want to save something first.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console);
        Ok(Self {
            launcher: command.spawn().context("setpriv")?,
            work: spec.work.to_path_buf(),
        })
    }

    /// How the machine ended, once it has.
    ///
    /// # Errors
    /// When the operating system does not tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.launcher.try_wait()?)
    }

    /// Exit code of the command, once it has ended; none when the machine ended before it did.
    pub fn code(&self) -> Option<u8> {
        let code = fs::read_to_string(self.work.join(CODE)).ok()?;
        code.trim().parse().ok()
    }

    /// The last lines of the console.
    pub fn end_of_console(&self) -> String {
        let text = fs::read(self.work.join(CONSOLE)).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).replace('\r', "");
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_LINES)..].join("\n")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.launcher.kill();
        let _ = self.launcher.wait();
    }
}

fn init_script(spec: &GuestSpec<'_>) -> Result<String> {
    let readable: Vec<&str> = spec
        .readable
        .iter()
        .map(|path| text(path))
        .collect::<Result<_>>()?;
    let command: Vec<String> = spec.command.iter().map(|word| quoted(word)).collect();
    Ok(format!(
        "#!/bin/sh\nWORK={}\nREADABLE={}\nCOMMAND={}\n{}",
        quoted(text(spec.work)?),
        quoted(&readable.join(" ")),
        quoted(&command.join(" ")),
        include_str!("guest/init.sh")
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_command_reaches_the_machine_as_it_is() {
        let command = ["echo", "it's", "a b", "$HOME"].map(str::to_owned);
        let spec = GuestSpec {
            work: Path::new("/work"),
            readable: &[],
            memory: "64M",
            command: &command,
        };
        let script = init_script(&spec).unwrap();
        let assignment = script
            .lines()
            .find(|line| line.starts_with("COMMAND="))
            .unwrap();
        let told = Command::new("sh")
            .args(["-ec", &format!("{assignment}\neval \"$COMMAND\"")])
            .output()
            .unwrap();
        assert_eq!(String::from_utf8_lossy(&told.stdout), "it's a b $HOME\n");
        let spaces = GuestSpec {
            work: Path::new("/a b"),
            ..spec
        };
        assert!(init_script(&spaces).is_err());
    }
}
