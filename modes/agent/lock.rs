//! One agent for one state directory: two of them, or an agent and an undo without it, would take each other's objects
//! away.

use std::fs::{File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};

/// Time between two attempts.
const ASK_EVERY: Duration = Duration::from_millis(20);

/// Why the state directory could not be had.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// An agent, or a program that a killed agent had started, holds it.
    #[error("{0} is held: an agent runs, or starts, or ends")]
    Held(PathBuf),
    /// The file cannot be made or locked.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
}

/// Holds the state directory until dropped, or until the process ends in whatever way.
#[derive(Debug)]
pub struct StateLock {
    _file: File,
}

impl StateLock {
    /// Takes `agent.lock` in `state_dir`, waiting for up to `wait`.
    pub fn take(state_dir: &Path, wait: Duration) -> Result<Self, LockError> {
        let path = state_dir.join("agent.lock");
        let failed = |error| LockError::Io(path.clone(), error);
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(failed)?;
        // The programs that this process starts inherit it: an iptables-restore that outlives a killed agent may still
        // change rules, so nobody else may look at them before it is done.
        fcntl(&file, FcntlArg::F_SETFD(FdFlag::empty())).map_err(|e| failed(e.into()))?;
        let deadline = Instant::now() + wait;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Self { _file: file }),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                    std::thread::sleep(ASK_EVERY);
                }
                Err(TryLockError::WouldBlock) => return Err(LockError::Held(path)),
                Err(TryLockError::Error(error)) => return Err(failed(error)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_child_that_outlives_its_parent_keeps_the_lock() {
        let directory = tempfile::tempdir().unwrap();
        let lock = StateLock::take(directory.path(), Duration::ZERO).unwrap();
        let held = StateLock::take(directory.path(), Duration::ZERO).unwrap_err();
        assert!(held.to_string().contains("agent.lock"), "{held}");
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        drop(lock);
        assert!(StateLock::take(directory.path(), Duration::ZERO).is_err());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(StateLock::take(directory.path(), Duration::from_secs(5)).is_ok());
    }
}
