//! The accounts of all pods: in memory, and one file per pod.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use host_net::journal::{boot_id, forget_incomplete};
use serde::{Deserialize, Serialize};

use super::metrics::Counters;
use super::{Class, Ledger, Outcome};
use crate::agent::draining::now;

/// Suffix of a pod's file.
const SUFFIX: &str = ".json";
/// Changes of one pod that are remembered.
const OF_ONE_POD: usize = 16;
/// Pods of which changes are remembered, those that are gone included; whose last change is the oldest goes first.
const PODS: usize = 1000;

/// Everything that is remembered of changes.
#[derive(Debug)]
pub(crate) struct Ledgers {
    dir: PathBuf,
    pods: Mutex<BTreeMap<String, Vec<Ledger>>>,
    pub(super) counters: Counters,
}

/// A pod's accounts as its file has them.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// The kernel's boot identifier: no connection survives a reboot.
    boot_id: String,
    ledgers: Vec<Ledger>,
}

impl Ledgers {
    /// Reads what an earlier agent left in `state_dir`. What cannot be read is an account less, no reason not to start.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join("ledgers");
        let at = |error: io::Error| io::Error::other(format!("{}: {error}", dir.display()));
        fs::create_dir_all(&dir).map_err(at)?;
        forget_incomplete(&dir, SUFFIX)?;
        let (mut pods, boot) = (BTreeMap::new(), boot_id());
        for entry in fs::read_dir(&dir).map_err(at)? {
            let path = entry.map_err(at)?.path();
            // The mark of the boot is no account.
            if !path.as_os_str().to_string_lossy().ends_with(SUFFIX) {
                continue;
            }
            let text = fs::read(&path).unwrap_or_default();
            match serde_json::from_slice::<Stored>(&text) {
                Ok(stored) if stored.boot_id == boot => {
                    if let Some(first) = stored.ledgers.first() {
                        pods.insert(first.uid.clone(), stored.ledgers);
                    }
                }
                Ok(_) => drop(fs::remove_file(&path)),
                Err(error) => {
                    tracing::warn!(file = %path.display(), %error, "an account of changes cannot be read and is removed");
                    drop(fs::remove_file(&path));
                }
            }
        }
        Ok(Self {
            dir,
            pods: Mutex::new(pods),
            counters: Counters::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Vec<Ledger>>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the pod that an operator means, by UID or name, the oldest first. A pod may be gone since.
    pub(crate) fn of(&self, wanted: &str) -> Vec<Ledger> {
        let pods = self.lock();
        if let Some(ledgers) = pods.get(wanted) {
            return ledgers.clone();
        }
        let is_meant = |ledger: &&Ledger| {
            let name = ledger.pod.split_once('/').map(|(_, name)| name);
            ledger.pod == wanted || name == Some(wanted)
        };
        let mut found: Vec<Ledger> = pods.values().flatten().filter(is_meant).cloned().collect();
        found.sort_by_key(|ledger| ledger.at);
        found
    }

    /// Adds the account of a change. What a change before it left open is not its own any more: it is as it stands.
    pub(crate) fn add(&self, mut ledger: Ledger) {
        ledger.connections.retain(|line| line.class != Class::Proxy);
        self.counters.changed(&ledger);
        let uid = ledger.uid.clone();
        let mut pods = self.lock();
        let ledgers = pods.entry(uid.clone()).or_default();
        if ledger.result == Outcome::Done {
            for before in ledgers.iter_mut() {
                before.over = true;
                before.connections.clear();
            }
        }
        ledgers.push(ledger);
        let excess = ledgers.len().saturating_sub(OF_ONE_POD);
        ledgers.drain(..excess);
        self.write(&uid, ledgers);
        if pods.len() > PODS {
            let last = |ledgers: &[Ledger]| ledgers.last().map(|ledger| ledger.at);
            let oldest = pods.iter().min_by_key(|(_, ledgers)| last(ledgers));
            if let Some(oldest) = oldest.map(|(uid, _)| uid.clone()) {
                pods.remove(&oldest);
                drop(fs::remove_file(self.path(&oldest)));
            }
        }
    }

    /// Notes which kept connections have ended, of those that are present in the pod; none: the pod cannot be looked into.
    pub(crate) fn look(&self, uid: &str, present: &BTreeSet<(SocketAddr, SocketAddr)>) {
        self.amend(uid, |ledger, counters| {
            // From then on they are cut.
            if ledger.until.is_some_and(|until| now() >= until) {
                return;
            }
            let from = ledger.from;
            let kept = |class, by| class == Class::Kept && by == from;
            for line in &mut ledger.connections {
                let gone = kept(line.class, line.by)
                    && !line.ended
                    && !present.contains(&(line.local, line.peer));
                if gone {
                    line.ended = true;
                    ledger.drained += 1;
                    ledger.open -= 1;
                    counters.ended(Ended::Drained, 1);
                }
            }
        });
    }

    /// Nothing is left of the capture that the pod had: what was open by it is reset.
    pub(crate) fn end(&self, uid: &str) {
        self.amend(uid, |ledger, counters| {
            let from = ledger.from;
            let mut reset = 0;
            for line in &mut ledger.connections {
                if line.class == Class::Kept && line.by == from && !line.ended {
                    line.ended = true;
                    reset += 1;
                }
            }
            ledger.open = ledger.open.saturating_sub(reset);
            ledger.reset += reset;
            counters.ended(Ended::Reset, reset);
            ledger.over = true;
        });
    }

    /// Changes a pod's account that is not over, if it has one, and writes it if that made a difference.
    fn amend(&self, uid: &str, change: impl FnOnce(&mut Ledger, &Counters)) {
        let mut pods = self.lock();
        let Some(ledgers) = pods.get_mut(uid) else {
            return;
        };
        let going_on = |ledger: &&mut Ledger| !ledger.over && ledger.result == Outcome::Done;
        let Some(ledger) = ledgers.iter_mut().rev().find(going_on) else {
            return;
        };
        let before = (ledger.open, ledger.over);
        change(ledger, &self.counters);
        if (ledger.open, ledger.over) != before {
            self.write(uid, ledgers);
        }
    }

    /// A full disk costs the account that survives, nothing else.
    fn write(&self, uid: &str, ledgers: &[Ledger]) {
        let stored = Stored {
            boot_id: boot_id(),
            ledgers: ledgers.to_vec(),
        };
        let aside = self.dir.join(format!(".{uid}.tmp"));
        let written = serde_json::to_vec(&stored)
            .map_err(io::Error::other)
            .and_then(|text| fs::write(&aside, text))
            .and_then(|()| fs::rename(&aside, self.path(uid)));
        if let Err(error) = written {
            tracing::warn!(uid, %error, "an account of a change is not on disk");
        }
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.dir.join(format!("{uid}{SUFFIX}"))
    }
}

/// What becomes of a connection that was kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    Drained,
    Reset,
}

pub(super) fn millis_now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
    })
}
