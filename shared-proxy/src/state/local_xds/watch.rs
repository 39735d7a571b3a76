//! Follows the file.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{LocalXdsError, load};
use crate::file_changes::FileChanges;
use crate::state::Store;

pub use crate::file_changes::POLL_INTERVAL;

/// Loads the file into the store, and again whenever it is written or replaced, until the task is aborted. The first load
/// is done before this returns, and its error is returned. A later error is logged once per version of the file and leaves
/// the store as it is.
///
/// Must be called on a Tokio runtime.
pub fn watch_file(
    path: impl Into<PathBuf>,
    store: Arc<Store>,
) -> Result<JoinHandle<()>, LocalXdsError> {
    let changes = FileChanges::of(path);
    store.replace(load(changes.path())?);
    Ok(tokio::spawn(follow(changes, store)))
}

async fn follow(mut changes: FileChanges, store: Arc<Store>) {
    loop {
        changes.next().await;
        let file = changes.path().to_owned();
        // Parsing a large file takes a while, and reading may block.
        match tokio::task::spawn_blocking(move || load(&file)).await {
            Ok(Ok(snapshot)) => {
                tracing::info!(path = %changes.path().display(), workloads = snapshot.workload_count(), services = snapshot.service_count(), policies = snapshot.policy_count(), "mesh state reloaded");
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
