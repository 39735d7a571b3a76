//! Pods to look at: each at most once at a time, the ones that failed again after a while, for as long as they fail.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// Wait after the first failure.
const FIRST_RETRY: Duration = Duration::from_millis(200);
/// Longest wait.
const LONGEST_RETRY: Duration = Duration::from_secs(15);

/// How long one waits that failed again after so many failures.
fn wait_after(failures: u32) -> Duration {
    (FIRST_RETRY * 2_u32.saturating_pow(failures.min(16))).min(LONGEST_RETRY)
}

#[derive(Debug)]
struct Entry {
    due: Instant,
    /// Failures in a row.
    failures: u32,
    /// Somebody has it.
    taken: bool,
    /// It is to be looked at again although somebody had it meanwhile.
    again: bool,
    /// Because it changed.
    anew: bool,
}

/// The queue.
#[derive(Debug)]
pub(super) struct Queue<K> {
    entries: Mutex<BTreeMap<K, Entry>>,
    changed: Notify,
}

impl<K> Default for Queue<K> {
    fn default() -> Self {
        Self {
            entries: Mutex::new(BTreeMap::new()),
            changed: Notify::new(),
        }
    }
}

impl<K: Ord + Clone> Queue<K> {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<K, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has this one looked at now: something has changed, so earlier failures say nothing.
    pub(super) fn push(&self, key: K) {
        self.insert(key, true);
    }

    /// The same, but one that failed keeps its wait.
    pub(super) fn remind(&self, key: K) {
        self.insert(key, false);
    }

    fn insert(&self, key: K, anew: bool) {
        let now = Instant::now();
        {
            let mut entries = self.lock();
            let entry = entries.entry(key).or_insert(Entry {
                due: now,
                failures: 0,
                taken: false,
                again: false,
                anew: false,
            });
            if entry.taken {
                entry.again = true;
                entry.anew |= anew;
            } else if anew {
                entry.due = now;
                entry.failures = 0;
            }
        }
        self.changed.notify_waiters();
    }

    /// Takes the next one that is due, and waits for it.
    pub(super) async fn next(&self) -> K {
        loop {
            let changed = self.changed.notified();
            let mut changed = std::pin::pin!(changed);
            // Before the look, so that nothing that comes after it is missed.
            changed.as_mut().enable();
            let next_due = {
                let mut entries = self.lock();
                let waiting = entries.iter_mut().filter(|(_, entry)| !entry.taken);
                match waiting.min_by_key(|(_, entry)| entry.due) {
                    Some((key, entry)) if entry.due <= Instant::now() => {
                        entry.taken = true;
                        (entry.again, entry.anew) = (false, false);
                        return key.clone();
                    }
                    Some((_, entry)) => Some(entry.due),
                    None => None,
                }
            };
            match next_due {
                Some(due) => tokio::select! {
                    () = sleep_until(due) => {}
                    () = changed => {}
                },
                None => changed.await,
            }
        }
    }

    /// Gives one back: done, or to be tried again.
    pub(super) fn done(&self, key: &K, succeeded: bool) {
        {
            let mut entries = self.lock();
            let Some(entry) = entries.get_mut(key) else {
                return;
            };
            entry.taken = false;
            match (entry.again, succeeded) {
                (false, true) => drop(entries.remove(key)),
                (true, true) | (_, false) if succeeded || entry.anew => {
                    entry.due = Instant::now();
                    entry.failures = 0;
                }
                _ => {
                    entry.due = Instant::now() + wait_after(entry.failures);
                    entry.failures += 1;
                }
            }
        }
        self.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::Arc;

    use super::*;

    #[test]
    fn waits_double_up_to_a_limit() {
        assert_eq!(wait_after(0), FIRST_RETRY);
        assert_eq!(wait_after(1), 2 * FIRST_RETRY);
        assert_eq!(wait_after(5), 32 * FIRST_RETRY);
        assert_eq!(wait_after(8), LONGEST_RETRY);
        assert_eq!(wait_after(u32::MAX), LONGEST_RETRY);
    }

    fn is_due(queue: &Queue<&'static str>, key: &'static str) -> bool {
        queue.lock()[key].due <= Instant::now()
    }

    #[tokio::test]
    async fn one_that_fails_waits_and_only_a_change_ends_that() {
        let queue = Queue::default();
        queue.push("a");
        let begun = Instant::now();
        for _ in 0..3 {
            assert_eq!(queue.next().await, "a");
            // What an agent told of it itself does not hurry it.
            queue.remind("a");
            queue.done(&"a", false);
        }
        assert!(begun.elapsed() >= FIRST_RETRY + 2 * FIRST_RETRY);
        queue.remind("a");
        assert!(!is_due(&queue, "a"));
        queue.push("a");
        assert!(is_due(&queue, "a"));
        queue.next().await;
        queue.push("a");
        queue.done(&"a", false);
        assert!(is_due(&queue, "a"), "it changed while somebody had it");
    }

    #[tokio::test]
    async fn nobody_else_gets_one_that_is_taken_and_its_changes_are_not_lost() {
        let queue = Arc::new(Queue::default());
        queue.push("a");
        assert_eq!(queue.next().await, "a");
        queue.push("a");
        queue.push("b");
        assert_eq!(queue.next().await, "b");
        let other = Arc::clone(&queue);
        let waiting = tokio::spawn(async move { other.next().await });
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert!(!waiting.is_finished());
        queue.done(&"a", true);
        assert_eq!(waiting.await.unwrap(), "a");
        queue.done(&"a", true);
        queue.done(&"b", true);
        assert!(queue.lock().is_empty());
    }
}
