//! A mesh from the YAML files of a directory.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shared_proxy::state::local_xds::{self, LocalXdsError};
use shared_proxy::state::{Snapshot, SnapshotError};
use tokio::task::JoinHandle;

use super::ControlPlane;

/// How often the directory is looked at.
pub const POLL_INTERVAL: Duration = Duration::from_millis(500);

/// Why a directory is no mesh.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// The directory or a file in it cannot be read.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file is not a mesh.
    #[error(transparent)]
    File(#[from] LocalXdsError),
    /// The files contradict each other.
    #[error("the files of {path} together: {source}")]
    Together {
        /// The directory.
        path: PathBuf,
        /// How.
        source: Box<SnapshotError>,
    },
}

/// The files of a directory as they were when looked at: device, inode, length, and times of change of content and inode.
pub type Stamps = BTreeMap<PathBuf, (u64, u64, u64, i64, i64, i64, i64)>;

/// Which files there are. Those whose names end in `.yaml` or `.yml` and do not begin with a dot count; links are followed,
/// as Kubernetes mounts ConfigMaps with them.
///
/// # Errors
/// The directory cannot be read.
pub fn look(dir: &Path) -> Result<Stamps, DirectoryError> {
    let io = |source| DirectoryError::Io {
        path: dir.to_owned(),
        source,
    };
    let mut stamps = Stamps::new();
    for entry in std::fs::read_dir(dir).map_err(io)? {
        let path = entry.map_err(io)?.path();
        let hidden = path
            .file_name()
            .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
        let yaml = path
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml");
        // What vanished since is seen the next time.
        if let (true, Ok(m)) = (yaml && !hidden, std::fs::metadata(&path))
            && m.is_file()
        {
            let stamp = (
                m.dev(),
                m.ino(),
                m.len(),
                m.mtime(),
                m.mtime_nsec(),
                m.ctime(),
                m.ctime_nsec(),
            );
            stamps.insert(path, stamp);
        }
    }
    Ok(stamps)
}

/// The mesh of all files together.
///
/// # Errors
/// A file cannot be read or is not of the form, or two objects have one key or address.
pub fn load(dir: &Path, files: &Stamps) -> Result<Snapshot, DirectoryError> {
    let (mut workloads, mut services, mut policies) = (Vec::new(), Vec::new(), Vec::new());
    for path in files.keys() {
        let part = local_xds::load(path)?;
        workloads.extend(part.workloads().map(|w| (**w).clone()));
        services.extend(part.services().map(|s| (**s).clone()));
        policies.extend(part.policies().map(|p| (**p).clone()));
    }
    Snapshot::new(workloads, services, policies).map_err(|source| DirectoryError::Together {
        path: dir.to_owned(),
        source: Box::new(source),
    })
}

/// Publishes the directory's mesh, and again whenever its files change, until the task is aborted. The first mesh is in
/// force when this returns. A later one that is not usable is logged once and changes nothing. Must be called on a Tokio
/// runtime.
///
/// # Errors
/// The first mesh is not usable.
pub async fn publish(
    dir: PathBuf,
    control: ControlPlane,
) -> Result<JoinHandle<()>, DirectoryError> {
    let seen = look(&dir)?;
    put(&dir, &seen, &control)?;
    Ok(tokio::spawn(follow(dir, control, seen)))
}

async fn follow(dir: PathBuf, control: ControlPlane, mut seen: Stamps) {
    // Files are taken when two looks in a row find the same: what is being written is left alone until its writer pauses.
    let mut last = seen.clone();
    let mut complaint = String::new();
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let task = {
            let (dir, control) = (dir.clone(), control.clone());
            let (last, seen) = (last.clone(), seen.clone());
            // Reading may block, and encoding a large mesh takes a while.
            tokio::task::spawn_blocking(move || {
                let found = look(&dir)?;
                let due = found == last && found != seen;
                let put = due.then(|| put(&dir, &found, &control));
                Ok::<_, DirectoryError>((found, put))
            })
        };
        let error = match task.await {
            // The runtime is shutting down.
            Err(_) => return,
            Ok(Err(error)) => Some(error),
            Ok(Ok((found, put))) => {
                if put.is_some() {
                    seen.clone_from(&found);
                }
                last = found;
                match put {
                    None => continue,
                    Some(result) => result.err(),
                }
            }
        };
        let text = error.map(|error| error.to_string()).unwrap_or_default();
        if !text.is_empty() && text != complaint {
            tracing::error!(
                error = text,
                "the directory is not usable: the previous mesh stays in force"
            );
        }
        complaint = text;
    }
}

fn put(dir: &Path, files: &Stamps, control: &ControlPlane) -> Result<(), DirectoryError> {
    let mesh = load(dir, files)?;
    tracing::info!(dir = %dir.display(), files = files.len(), workloads = mesh.workload_count(), services = mesh.service_count(), policies = mesh.policy_count(), "mesh published");
    control.publish(mesh);
    Ok(())
}
