//! Follows the file.

use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinHandle;

use super::{LocalXdsError, load};
use crate::state::Store;

/// How often the file is looked at. Polling sees what inotify misses: a file on a network or overlay file system, and one
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
    fn of(path: &PathBuf) -> Option<Self> {
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

/// Loads the file into the store, and again whenever it is written or replaced, until the task is aborted. The first load
/// is done before this returns, and its error is returned. A later error is logged once per version of the file and leaves
/// the store as it is.
///
/// Must be called on a Tokio runtime.
pub fn watch_file(
    path: impl Into<PathBuf>,
    store: Arc<Store>,
) -> Result<JoinHandle<()>, LocalXdsError> {
    let path = path.into();
    let stamp = Stamp::of(&path);
    store.replace(load(&path)?);
    Ok(tokio::spawn(follow(path, store, stamp)))
}

async fn follow(path: PathBuf, store: Arc<Store>, mut seen: Option<Stamp>) {
    // A version of the file is taken when two looks in a row find the same: a file that is being written in place is left
    // alone until its writer pauses.
    let mut last_look = seen;
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let stamp = Stamp::of(&path);
        let settled = stamp == std::mem::replace(&mut last_look, stamp);
        if !settled || stamp == seen {
            continue;
        }
        seen = stamp;
        let file = path.clone();
        // Parsing a large file takes a while, and reading may block.
        match tokio::task::spawn_blocking(move || load(&file)).await {
            Ok(Ok(snapshot)) => {
                tracing::info!(path = %path.display(), workloads = snapshot.workload_count(), services = snapshot.service_count(), policies = snapshot.policy_count(), "mesh state reloaded");
                store.replace(snapshot);
            }
            Ok(Err(error)) => {
                tracing::error!(%error, "the mesh state file is not usable: the previous state stays in force");
            }
            // The runtime is shutting down.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests;
