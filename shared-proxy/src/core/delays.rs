//! What a hold costs: which connections began while their pod was held, and how long each of them waited.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::telemetry::Direction;

/// Connections of one hold that are remembered each; more of them are counted.
const REMEMBERED: usize = 10_000;

/// A connection that waits, or waited, because one of its ends is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delayed {
    /// Which end of it the held pod is, or would be.
    pub direction: Direction,
    /// Who opened it. Port 0 where only the address is known: of what comes out of a tunnel, and of tunnels.
    pub client: SocketAddr,
    /// Where it was to go.
    pub destination: SocketAddr,
    /// How long it has waited.
    pub waited: Duration,
}

/// What a hold has delayed so far. Clones are the same account, and outlive the hold.
#[derive(Debug, Clone, Default)]
pub struct Delays(Arc<Mutex<Account>>);

#[derive(Debug, Default)]
struct Account {
    waits: Vec<Wait>,
    more: u64,
}

#[derive(Debug)]
struct Wait {
    of: Subject,
    began: Instant,
    ended: Option<Instant>,
}

/// Whose wait it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Subject {
    pub(crate) direction: Direction,
    pub(crate) client: SocketAddr,
    pub(crate) destination: SocketAddr,
}

impl Delays {
    fn account(&self) -> MutexGuard<'_, Account> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Those that waited or wait, in the order of beginning.
    pub fn ones(&self) -> Vec<Delayed> {
        let now = Instant::now();
        let account = self.account();
        let waits = account.waits.iter().map(|wait| Delayed {
            direction: wait.of.direction,
            client: wait.of.client,
            destination: wait.of.destination,
            waited: wait.ended.unwrap_or(now).duration_since(wait.began),
        });
        waits.collect()
    }

    /// How many there are, those included that are only counted.
    pub fn count(&self) -> u64 {
        let account = self.account();
        account.more.saturating_add(account.waits.len() as u64)
    }

    fn begin(&self, of: Subject) -> Option<usize> {
        let mut account = self.account();
        if account.waits.len() >= REMEMBERED {
            account.more += 1;
            return None;
        }
        account.waits.push(Wait {
            of,
            began: Instant::now(),
            ended: None,
        });
        Some(account.waits.len() - 1)
    }

    fn end(&self, number: usize) {
        if let Some(wait) = self.account().waits.get_mut(number) {
            wait.ended = Some(Instant::now());
        }
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// One connection's waits, on every hold that it meets; they end when this is dropped.
#[derive(Debug)]
pub(super) struct Waiting {
    of: Subject,
    entered: Vec<(Delays, Option<usize>)>,
}

impl Waiting {
    pub(super) fn new(of: Subject) -> Self {
        Self {
            of,
            entered: Vec::new(),
        }
    }

    /// Enters the wait in these accounts; in those that have it already it stays one.
    pub(super) fn on<'a>(&mut self, holds: impl Iterator<Item = &'a Delays>) {
        for hold in holds {
            if !self.entered.iter().any(|(entered, _)| entered.is(hold)) {
                self.entered.push((hold.clone(), hold.begin(self.of)));
            }
        }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        for (hold, number) in &self.entered {
            number.iter().for_each(|number| hold.end(*number));
        }
    }
}
