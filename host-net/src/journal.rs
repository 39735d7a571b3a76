//! What this node's kernel may hold because of us, on disk.
//!
//! A [`Record`] is written before the first object of a plan is touched and replaced by what really stands once the
//! change is complete. So a process that dies at any moment leaves a record that covers everything it may have made,
//! and [`crate::engine::undo`] needs nothing else. Names and protocol numbers prove nothing about who made an object,
//! because chain, set and device names are the field's own; the journal does.
//!
//! One JSON file per plan, replaced atomically (written aside and renamed). Nothing waits for the disk: a process that dies
//! leaves its writes with the kernel, and when the machine stops, so do all objects that records are about. What such a stop
//! leaves half written is recognised as of another boot, and forgotten ([`forget_incomplete`]).

mod boot;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Metadata};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::iptables::Iptables;
use crate::netns::NetnsId;
use crate::plan::{Family, Plan, Step, Table};

pub use boot::{boot_id, forget_incomplete};

/// Suffix of a record's file.
const SUFFIX: &str = ".json";

/// Why the journal could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A file or the directory could not be read or written.
    #[error("journal {path}: {source}")]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A record is not readable as such.
    #[error(
        "journal {path} is damaged ({source}): compare the objects by hand, then delete the file"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// A plan name that cannot be a file name.
    #[error(
        "plan name {0:?}: only letters, digits, '-', '_' and '.' are allowed, and no '.' in front"
    )]
    Name(String),
}

/// Something that iptables-nft makes on first use and leaves behind, with hooks that every packet passes: a base
/// chain (`PREROUTING`, …), or the table around it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NftHook {
    /// `ip` or `ip6`.
    pub family: Family,
    /// The table.
    pub table: Table,
    /// The base chain; none stands for the table.
    pub chain: Option<String>,
}

/// What may exist in one network namespace because of one plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Every object that may exist, in the order of making. While a change is under way: the union of old and new.
    pub plan: Plan,
    /// The place's name in messages.
    pub place_label: String,
    /// Identity of the namespace.
    pub netns: NetnsId,
    /// A path by which the namespace can be opened, if it has one.
    pub netns_path: Option<PathBuf>,
    /// The kernel's boot identifier. A record of an earlier boot describes objects that no longer exist, even when
    /// the namespace's number is the same (the initial namespace has the same number at every boot).
    pub boot_id: String,
    /// Values of sysctls before the plan was first applied, by key.
    pub previous_sysctls: BTreeMap<String, String>,
    /// Objects that stood there, identical, before us. Never removed by us. A chain without its jump means that only
    /// the chain stood there.
    pub preexisting: Vec<Step>,
    /// nftables tables and base chains that exist because of us; deleted when empty and the plan is gone, and not
    /// before: connections whose addresses were translated need the hooks to the end.
    pub nft_caused: Vec<NftHook>,
    /// The variants of iptables that made it, and that have to remove it.
    pub iptables: Iptables,
}

/// A directory of records.
#[derive(Debug)]
pub struct Journal {
    dir: PathBuf,
    /// Tells it from the others of this process.
    number: u64,
    /// All readable records by file name with the file's identity: looking through the directory would cost each of many pods
    /// as much as there are pods.
    seen: Mutex<HashMap<String, (FileIdentity, Arc<Record>)>>,
}

/// Inode, size and time of change in nanoseconds: a replaced record differs in at least one.
type FileIdentity = (u64, u64, i128);

impl Journal {
    /// Opens the journal in `dir`, which is created if absent.
    ///
    /// # Errors
    /// When the directory cannot be created or is not a directory.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, JournalError> {
        let dir = dir.as_ref().to_path_buf();
        fs::create_dir_all(&dir).map_err(at(&dir))?;
        fs::read_dir(&dir).map_err(at(&dir))?;
        forget_incomplete(&dir, SUFFIX).map_err(at(&dir))?;
        static OPENED: AtomicU64 = AtomicU64::new(0);
        let journal = Self {
            dir,
            number: OPENED.fetch_add(1, Ordering::Relaxed),
            seen: Mutex::default(),
        };
        for name in journal.list()? {
            if let Err(error) = journal.cached(&name) {
                tracing::warn!(%error, "journal record left out");
            }
        }
        Ok(journal)
    }

    /// Which of this process's journals it is.
    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// The record of the plan `name`, if there is one.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged, or the name is not a plan name.
    pub fn load(&self, name: &str) -> Result<Option<Record>, JournalError> {
        Ok(self.cached(name)?.map(|record| (*record).clone()))
    }

    /// Names of all records, sorted.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn list(&self) -> Result<Vec<String>, JournalError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.dir).map_err(at(&self.dir))? {
            let file = entry.map_err(at(&self.dir))?.file_name();
            if let Some(name) = file.to_str().and_then(|f| f.strip_suffix(SUFFIX))
                && valid(name)
            {
                names.push(name.to_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// All readable records, except `but`, of the namespace `netns`. Damaged ones are left out: they must not keep
    /// other plans from being applied or removed. Sorted by name.
    ///
    /// The directory was read when it was opened; since then, what this journal wrote, loaded and forgot was added and taken
    /// away. Two programs that write to one directory at the same time do not hear of each other's records here: that is
    /// what the agent's lock is for.
    pub fn others_in(&self, netns: NetnsId, but: &str) -> Vec<Arc<Record>> {
        let seen = lock(&self.seen);
        let mut records: Vec<Arc<Record>> = seen
            .values()
            .filter(|(_, record)| record.netns == netns && record.plan.name != but)
            .map(|(_, record)| Arc::clone(record))
            .collect();
        drop(seen);
        records.sort_by(|a, b| a.plan.name.cmp(&b.plan.name));
        records
    }

    /// Writes `record` under its plan's name. On return it is what every later reader finds, whoever is killed; a crash in
    /// between leaves the previous record.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn store(&self, record: &Record) -> Result<(), JournalError> {
        let path = self.path(&record.plan.name)?;
        // The process number keeps two programs that share the directory from writing into one file.
        let aside = self
            .dir
            .join(format!(".{}.{}.tmp", record.plan.name, std::process::id()));
        let text = serde_json::to_vec_pretty(record).map_err(|source| JournalError::Damaged {
            path: path.clone(),
            source,
        })?;
        // The inode goes along with the name.
        let written = File::create(&aside).and_then(|mut file| {
            file.write_all(&text)?;
            fs::rename(&aside, &path)?;
            file.metadata()
        });
        match written {
            Ok(meta) => {
                let entry = (identity(&meta), Arc::new(record.clone()));
                lock(&self.seen).insert(record.plan.name.clone(), entry);
                Ok(())
            }
            Err(source) => {
                let _ = fs::remove_file(&aside);
                Err(JournalError::Io { path, source })
            }
        }
    }

    /// Deletes the record of the plan `name`; none is fine.
    ///
    /// # Errors
    /// When the file cannot be deleted.
    pub fn forget(&self, name: &str) -> Result<(), JournalError> {
        let path = self.path(name)?;
        match fs::remove_file(&path) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                Err(JournalError::Io { path, source })
            }
            _ => {
                lock(&self.seen).remove(name);
                Ok(())
            }
        }
    }

    fn cached(&self, name: &str) -> Result<Option<Arc<Record>>, JournalError> {
        let path = self.path(name)?;
        let identity = match fs::metadata(&path) {
            Ok(meta) => identity(&meta),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                lock(&self.seen).remove(name);
                return Ok(None);
            }
            Err(source) => return Err(JournalError::Io { path, source }),
        };
        if let Some((known, record)) = lock(&self.seen).get(name)
            && *known == identity
        {
            return Ok(Some(Arc::clone(record)));
        }
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(JournalError::Io { path, source }),
        };
        let record: Arc<Record> = serde_json::from_slice(&text)
            .map(Arc::new)
            .map_err(|source| JournalError::Damaged { path, source })?;
        lock(&self.seen).insert(name.to_owned(), (identity, Arc::clone(&record)));
        Ok(Some(record))
    }

    fn path(&self, name: &str) -> Result<PathBuf, JournalError> {
        if valid(name) {
            Ok(self.dir.join(format!("{name}{SUFFIX}")))
        } else {
            Err(JournalError::Name(name.to_owned()))
        }
    }
}

fn identity(meta: &Metadata) -> FileIdentity {
    (
        meta.ino(),
        meta.size(),
        i128::from(meta.ctime()) * 1_000_000_000 + i128::from(meta.ctime_nsec()),
    )
}

fn valid(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

fn at(path: &Path) -> impl Fn(io::Error) -> JournalError {
    let path = path.to_path_buf();
    move |source| JournalError::Io {
        path: path.clone(),
        source,
    }
}

/// A poisoned lock means that another thread panicked while it read; the cache itself is never half-written.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
