//! Follows the file that holds the lists.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokio::task::JoinHandle;

use super::{RevocationError, Revocations};
use crate::file_changes::FileChanges;

/// Loads the file, and again whenever it is written or replaced, until the task is aborted. An error of the first load is
/// returned, but that there is no such file yet: it may be mounted later, and nothing is revoked until then. A later
/// error, and that the file has gone, is logged once per version of the file and leaves the last good lists in force.
///
/// Must be called on a Tokio runtime.
///
/// # Errors
/// The file is there, but cannot be read or holds something else.
pub fn follow_file(
    path: impl Into<PathBuf>,
    revocations: Arc<Revocations>,
) -> Result<JoinHandle<()>, RevocationError> {
    let changes = FileChanges::of(path);
    match load(changes.path(), &revocations) {
        Err(RevocationError::File { path, source }) if source.kind() == io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), "there are no revocation lists yet: nothing is revoked until they come");
        }
        loaded => loaded?,
    }
    Ok(tokio::spawn(follow(changes, revocations)))
}

async fn follow(mut changes: FileChanges, revocations: Arc<Revocations>) {
    loop {
        changes.next().await;
        let path = changes.path().to_owned();
        let lists = Arc::clone(&revocations);
        // Reading may block, and every standing tunnel is looked at.
        match tokio::task::spawn_blocking(move || load(&path, &lists)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                revocations.metrics.failed_load();
                tracing::error!(%error, "the revocation lists are not usable: the last good ones stay in force");
            }
            // The runtime is shutting down.
            Err(_) => return,
        }
    }
}

fn load(path: &Path, revocations: &Revocations) -> Result<(), RevocationError> {
    let bytes = std::fs::read(path).map_err(|source| RevocationError::File {
        path: path.to_owned(),
        source,
    })?;
    revocations
        .replace(&bytes)
        .map_err(|error| RevocationError::InFile {
            path: path.to_owned(),
            error: Box::new(error),
        })?;
    tracing::info!(path = %path.display(), revoked = revocations.revoked(), "revocation lists loaded");
    Ok(())
}
