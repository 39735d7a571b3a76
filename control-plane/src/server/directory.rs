//! A mesh from the YAML files of a directory. Only what changes is read, encoded and sent again.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use shared_proxy::state::local_xds::{self, LocalXdsError};
use shared_proxy::state::{
    Change, NamespacedHostname, Policy, Service, Snapshot, SnapshotError, Workload,
};
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

/// The objects of one file.
#[derive(Debug, Default)]
struct Part {
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    services: BTreeMap<NamespacedHostname, Arc<Service>>,
    policies: BTreeMap<Arc<str>, Arc<Policy>>,
}

impl Part {
    fn load(path: &Path) -> Result<Self, LocalXdsError> {
        let file = local_xds::load(path)?;
        let workloads = file.workloads().cloned();
        let services = file.services().cloned();
        let policies = file.policies().cloned();
        Ok(Self {
            workloads: workloads.map(|w| (Arc::clone(&w.uid), w)).collect(),
            services: services.map(|s| (s.key(), s)).collect(),
            policies: policies.map(|p| (p.key().into(), p)).collect(),
        })
    }
}

impl Part {
    /// Keeps the objects of an earlier reading that are the same: the mesh holds those.
    fn share(&mut self, before: &Self) {
        fn share<K: Ord, V: PartialEq>(
            objects: &mut BTreeMap<K, Arc<V>>,
            before: &BTreeMap<K, Arc<V>>,
        ) {
            for (key, object) in objects {
                if let Some(held) = before.get(key).filter(|held| *held == object) {
                    *object = Arc::clone(held);
                }
            }
        }
        share(&mut self.workloads, &before.workloads);
        share(&mut self.services, &before.services);
        share(&mut self.policies, &before.policies);
    }
}

/// A directory's mesh, and the files that it was made of.
#[derive(Debug, Default)]
pub struct Directory {
    dir: PathBuf,
    stamps: Stamps,
    parts: BTreeMap<PathBuf, Part>,
    mesh: Snapshot,
}

impl Directory {
    /// A directory of which nothing has been read.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self {
            dir: dir.into(),
            ..Self::default()
        }
    }

    /// The mesh of all files together, as it was read last.
    pub fn mesh(&self) -> &Snapshot {
        &self.mesh
    }

    /// Reads the files that are not as they were when they were read last, and says how many there are and what that
    /// changes in the mesh.
    ///
    /// # Errors
    /// A file cannot be read or is not of the form, or two objects have one key or address. Then nothing has changed, and
    /// the next call tries again.
    pub fn read(&mut self, files: &Stamps) -> Result<(usize, Vec<Change>), DirectoryError> {
        let mut read = BTreeMap::new();
        for (path, stamp) in files {
            if self.stamps.get(path) != Some(stamp) {
                let mut part = Part::load(path)?;
                if let Some(before) = self.parts.get(path) {
                    part.share(before);
                }
                read.insert(path.clone(), part);
            }
        }
        let gone = self.parts.keys().filter(|path| !files.contains_key(*path));
        let before: Vec<&Part> = gone
            .chain(read.keys())
            .filter_map(|path| self.parts.get(path))
            .collect();
        let parts: Vec<&Part> = read.values().collect();
        let mut removals = Vec::new();
        let mut arrivals = Vec::new();
        compare(
            before.iter().map(|part| &part.services),
            parts.iter().map(|part| &part.services),
            |key| removals.push(Change::RemoveService(key.clone())),
            |service| arrivals.push(Change::Service(Arc::clone(service))),
        );
        compare(
            before.iter().map(|part| &part.policies),
            parts.iter().map(|part| &part.policies),
            |key| removals.push(Change::RemovePolicy(Arc::clone(key))),
            |policy| arrivals.push(Change::Policy(Arc::clone(policy))),
        );
        // Last, because a workload names services and policies.
        compare(
            before.iter().map(|part| &part.workloads),
            parts.iter().map(|part| &part.workloads),
            |uid| removals.push(Change::RemoveWorkload(Arc::clone(uid))),
            |workload| arrivals.push(Change::Workload(Arc::clone(workload))),
        );
        // What changes is taken out first: an address may go from one object to another, an object from file to file.
        removals.append(&mut arrivals);
        let mesh = self
            .mesh
            .updated_strictly(removals.iter().cloned())
            .map_err(|source| DirectoryError::Together {
                path: self.dir.clone(),
                source: Box::new(source),
            })?;
        self.mesh = mesh;
        self.parts.retain(|path, _| files.contains_key(path));
        let count = read.len();
        self.parts.extend(read);
        self.stamps.clone_from(files);
        Ok((count, removals))
    }
}

/// Tells the objects that some files held and do not hold any more, and those that they hold in another form or more often
/// than before. One that is different is told of in both ways.
fn compare<'a, K: Ord + 'a, V: PartialEq + 'a>(
    before: impl Iterator<Item = &'a BTreeMap<K, Arc<V>>>,
    after: impl Iterator<Item = &'a BTreeMap<K, Arc<V>>>,
    mut removed: impl FnMut(&K),
    mut arrived: impl FnMut(&Arc<V>),
) {
    let mut before: BTreeMap<&K, &Arc<V>> = before.flatten().collect();
    for (key, object) in after.flatten() {
        let same = |held: &&Arc<V>| Arc::ptr_eq(held, object) || *held == object;
        if before.get(key).is_some_and(same) {
            // Only once: a second file that holds it is a contradiction.
            before.remove(key);
        } else {
            arrived(object);
        }
    }
    before.into_keys().for_each(&mut removed);
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
    let mut directory = Directory::new(dir);
    put(&mut directory, &seen, &control)?;
    Ok(tokio::spawn(follow(directory, control, seen)))
}

async fn follow(mut directory: Directory, control: ControlPlane, mut seen: Stamps) {
    // Files are taken when two looks in a row find the same: what is being written is left alone until its writer pauses.
    let mut last = seen.clone();
    let mut complaint = String::new();
    let mut ticks = tokio::time::interval(POLL_INTERVAL);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let control = control.clone();
        // Reading may block, and encoding a large mesh takes a while.
        let task = tokio::task::spawn_blocking(move || {
            let result = look(&directory.dir).and_then(|found| {
                let due = found == last && found != seen;
                last = found;
                if due {
                    seen.clone_from(&last);
                    put(&mut directory, &seen, &control)?;
                }
                Ok(due)
            });
            (directory, last, seen, result)
        });
        // Ended with the runtime otherwise.
        let Ok(done) = task.await else { return };
        let result;
        (directory, last, seen, result) = done;
        let error = match result {
            // Nothing was tried: a complaint still holds.
            Ok(false) => continue,
            Ok(true) => None,
            Err(error) => Some(error),
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

fn put(
    directory: &mut Directory,
    files: &Stamps,
    control: &ControlPlane,
) -> Result<(), DirectoryError> {
    let (read, changes) = directory.read(files)?;
    let mesh = directory.mesh();
    tracing::info!(dir = %directory.dir.display(), files = files.len(), read, changes = changes.len(), workloads = mesh.workload_count(), services = mesh.service_count(), policies = mesh.policy_count(), "mesh published");
    control.update(mesh.clone(), &changes);
    Ok(())
}

#[cfg(test)]
mod tests;
