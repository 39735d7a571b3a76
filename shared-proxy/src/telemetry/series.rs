//! The time series of connections: one object per label set, and an end for those that nobody uses any more.
//!
//! Pods come and go, and their label sets with them. A series that no open connection holds and that has not changed for
//! long is dropped; it starts at 0 should it come back, which a scraper takes for a restart, as it is meant to.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant};

use super::labels::ConnectionLabels;

/// How many series are kept, and for how long without use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SeriesLimits {
    /// Time without an open connection and without a change after which a series is dropped.
    pub idle: Duration,
    /// Series that may exist. The ones that are unused for longest make room for others; those of open connections stay,
    /// so that open connections and this number bound the memory together.
    pub count: usize,
}

impl Default for SeriesLimits {
    /// An hour, which no scrape interval comes near, and 20 000 series, some 10 MB of exposition.
    fn default() -> Self {
        Self {
            idle: Duration::from_secs(3600),
            count: 20_000,
        }
    }
}

/// What is counted for one label set.
#[derive(Debug)]
pub(super) struct Series {
    pub labels: Arc<ConnectionLabels>,
    pub opened: AtomicU64,
    pub closed: AtomicU64,
    pub failed: AtomicU64,
    pub sent: AtomicU64,
    pub received: AtomicU64,
    /// Milliseconds since the table was made.
    last_use: AtomicU64,
}

/// The label sets that were seen and not forgotten.
#[derive(Debug)]
pub(super) struct SeriesTable {
    limits: SeriesLimits,
    began: Instant,
    expired: AtomicU64,
    series: RwLock<HashMap<Arc<ConnectionLabels>, Arc<Series>>>,
}

impl SeriesTable {
    pub fn new(limits: SeriesLimits) -> Self {
        Self {
            limits,
            began: Instant::now(),
            expired: AtomicU64::new(0),
            series: RwLock::default(),
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// The series of a label set. Whoever holds it keeps it from expiring.
    pub fn get(&self, labels: ConnectionLabels) -> Arc<Series> {
        let now = self.now();
        let known = self
            .series
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&labels)
            .cloned();
        if let Some(series) = known {
            series.last_use.store(now, Relaxed);
            return series;
        }
        let labels = Arc::new(labels);
        let mut table = self.series.write().unwrap_or_else(PoisonError::into_inner);
        if table.len() >= self.limits.count && !table.contains_key(&labels) {
            self.make_room(&mut table);
        }
        let series = table.entry(Arc::clone(&labels)).or_insert_with(|| {
            Arc::new(Series {
                labels,
                opened: AtomicU64::new(0),
                closed: AtomicU64::new(0),
                failed: AtomicU64::new(0),
                sent: AtomicU64::new(0),
                received: AtomicU64::new(0),
                last_use: AtomicU64::new(now),
            })
        });
        Arc::clone(series)
    }

    /// Says that a series has changed.
    pub fn used(&self, series: &Series) {
        series.last_use.store(self.now(), Relaxed);
    }

    /// Drops what was not used for long.
    pub fn expire(&self) {
        let idle = u64::try_from(self.limits.idle.as_millis()).unwrap_or(u64::MAX);
        let Some(before) = self.now().checked_sub(idle) else {
            return;
        };
        let mut table = self.series.write().unwrap_or_else(PoisonError::into_inner);
        let count = table.len();
        table.retain(|_, series| is_held(series) || series.last_use.load(Relaxed) > before);
        self.expired
            .fetch_add((count - table.len()) as u64, Relaxed);
    }

    /// Drops the sixteenth of the series that was unused for longest, so that not every new one has to look for room.
    fn make_room(&self, table: &mut HashMap<Arc<ConnectionLabels>, Arc<Series>>) {
        let mut unused: Vec<_> = table
            .values()
            .filter(|series| !is_held(series))
            .map(|series| (series.last_use.load(Relaxed), Arc::clone(&series.labels)))
            .collect();
        let wanted = (self.limits.count / 16).max(1).min(unused.len());
        if wanted == 0 {
            return;
        }
        unused.select_nth_unstable_by_key(wanted - 1, |(last_use, _)| *last_use);
        for (_, labels) in &unused[..wanted] {
            table.remove(labels);
        }
        self.expired.fetch_add(wanted as u64, Relaxed);
    }

    /// How many series were dropped.
    pub fn expired(&self) -> u64 {
        self.expired.load(Relaxed)
    }

    /// All series, in the order of their labels, so that two scrapes list them alike.
    pub fn sorted(&self) -> Vec<Arc<Series>> {
        let mut all: Vec<_> = self
            .series
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .values()
            .cloned()
            .collect();
        all.sort_by(|a, b| a.labels.cmp(&b.labels));
        all
    }
}

/// Whether somebody besides the table has it. New holders come only through the table, whose lock the caller has.
fn is_held(series: &Arc<Series>) -> bool {
    Arc::strong_count(series) > 1
}
