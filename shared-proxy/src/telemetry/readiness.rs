//! What the process still waits for before it can serve.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The tasks of a start-up. Ready means that every registered task is done; register all of them before the first probe
/// can arrive, because a process without tasks is ready.
#[derive(Debug, Clone, Default)]
pub struct Readiness {
    tasks: Arc<Mutex<Tasks>>,
}

#[derive(Debug, Default)]
struct Tasks {
    next: u64,
    pending: BTreeMap<u64, String>,
}

impl Readiness {
    /// No task: ready.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a task. Two tasks may have the same name; both must be done.
    pub fn register(&self, name: impl Into<String>) -> ReadinessTask {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let id = tasks.next;
        tasks.next += 1;
        tasks.pending.insert(id, name.into());
        ReadinessTask {
            tasks: Arc::clone(&self.tasks),
            id,
        }
    }

    /// Names of the tasks that are not done, sorted; empty = ready.
    pub fn pending(&self) -> Vec<String> {
        let tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        let mut names: Vec<String> = tasks.pending.values().cloned().collect();
        names.sort();
        names
    }
}

/// One task. Dropping it without [`ReadinessTask::done`] leaves it pending for ever: a start-up step that died must not
/// make the process look ready.
#[derive(Debug)]
#[must_use = "the process is not ready before the task is done"]
pub struct ReadinessTask {
    tasks: Arc<Mutex<Tasks>>,
    id: u64,
}

impl ReadinessTask {
    /// Marks the task as done.
    pub fn done(self) {
        self.tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pending
            .remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_only_when_every_task_is_done() {
        let readiness = Readiness::new();
        let listeners = readiness.register("listeners");
        let state = readiness.register("state");
        let second = readiness.register("listeners");
        assert_eq!(readiness.pending(), ["listeners", "listeners", "state"]);
        listeners.done();
        state.done();
        assert_eq!(readiness.pending(), ["listeners"]);
        second.done();
        assert!(readiness.pending().is_empty());
    }

    #[test]
    fn a_task_that_died_keeps_the_process_unready() {
        let readiness = Readiness::new();
        drop(readiness.register("certificates"));
        assert_eq!(readiness.pending(), ["certificates"]);
    }
}
