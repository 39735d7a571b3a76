//! One builder or remover of a lab at a time.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};

use crate::topology::LABS_DIR;

/// Held while a lab is built or removed. The kernel lets go of it when the process dies.
pub struct Lock {
    path: PathBuf,
    _file: Flock<File>,
}

impl Lock {
    /// Takes the lock of a lab.
    ///
    /// # Errors
    /// When somebody has it, rather than waiting for minutes on a build.
    pub fn take(lab: &str) -> Result<Self> {
        let path = Path::new(LABS_DIR).join(format!(".{lab}.lock"));
        loop {
            fs::create_dir_all(LABS_DIR).with_context(|| format!("create {LABS_DIR}"))?;
            let file = match File::options()
                .create(true)
                .truncate(false)
                .write(true)
                .open(&path)
            {
                // The last lab went, and the directory with it.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                other => other.with_context(|| path.display().to_string())?,
            };
            let file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(
                |(_, errno)| match errno {
                    Errno::EWOULDBLOCK => {
                        anyhow::anyhow!("lab {lab} is being built or removed by another process")
                    }
                    other => anyhow::Error::from(other).context(format!("lock {}", path.display())),
                },
            )?;
            // The file may have been removed, by the one who had the lock, between opening and locking.
            let locked = file.metadata().context("lock file")?.ino();
            if fs::metadata(&path).is_ok_and(|current| current.ino() == locked) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        // Leaves the machine as it was when no lab is left; fails, as it should, when there is one.
        let _ = fs::remove_dir(LABS_DIR);
    }
}
