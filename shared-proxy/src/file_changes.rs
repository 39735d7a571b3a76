//! Tells when a file has been written or replaced.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often a file is looked at. Polling sees what inotify misses: a file on a network or overlay file system, and one
/// that is a symbolic link into a directory that is swapped, as Kubernetes mounts ConfigMaps.
pub const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// What changes when a file is written or replaced: device, inode, length, times of modification and of change of the
/// inode. The last sees also a replacement that carries an old modification time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    length: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// None: there is no such file, or it cannot be looked at.
    fn of(path: &Path) -> Option<Self> {
        fs::metadata(path).ok().as_ref().map(Self::from_metadata)
    }

    fn from_metadata(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The versions of one file, as they come.
#[derive(Debug)]
pub(crate) struct FileChanges {
    path: PathBuf,
    seen: Option<Stamp>,
    last_look: Option<Stamp>,
    ticks: Option<Interval>,
}

impl FileChanges {
    /// Takes the file as it is for known. To be made before the file is read for the first time: what is written
    /// meanwhile is a change then.
    pub(crate) fn of(path: impl Into<PathBuf>) -> Self {
        let path = path.into();
        let seen = Stamp::of(&path);
        Self {
            path,
            seen,
            last_look: seen,
            ticks: None,
        }
    }

    /// Which file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Waits for the next version of the file; its removal is one. A version counts when two looks in a row find the
    /// same: a file that is being written in place is left alone until its writer pauses.
    pub(crate) async fn next(&mut self) {
        loop {
            let ticks = self.ticks.get_or_insert_with(|| {
                let mut ticks = interval(POLL_INTERVAL);
                ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
                ticks
            });
            ticks.tick().await;
            let stamp = Stamp::of(&self.path);
            let settled = stamp == std::mem::replace(&mut self.last_look, stamp);
            if settled && stamp != self.seen {
                self.seen = stamp;
                return;
            }
        }
    }
}
