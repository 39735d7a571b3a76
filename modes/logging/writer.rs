//! Log lines on their way to a descriptor: gathered in memory, written many at a time by a thread of its own.
//!
//! A line costs the thread that logs it a copy under a lock, and only the first one of a batch wakes the writer. A proxy
//! writes a line for each connection: one write and one wake-up for each of them would be a twentieth of its work.

use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use tracing_subscriber::fmt::MakeWriter;

/// How long the writer waits for more lines after the first one.
const GATHER: Duration = Duration::from_millis(10);
/// Bytes that may wait. What comes while a reader of the log stalls for that long is lost, and counted.
const LIMIT: usize = 8 << 20;
/// A buffer that grew larger than this, in bytes, is not kept for the next batch.
const KEPT: usize = 64 << 10;
/// How long the end of the program waits for the last lines: a stalled reader must not keep it.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// Where the subscriber writes. Clones write to the same log.
#[derive(Debug, Clone)]
pub(super) struct Lines {
    shared: Arc<Shared>,
}

/// Ends the writer when dropped, after everything that was logged is written.
#[derive(Debug)]
pub(super) struct Guard {
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    waiting: Mutex<Waiting>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    /// Since the last batch.
    lost: u64,
    lost_in_all: u64,
    ending: bool,
    ended: bool,
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts the writer.
///
/// # Errors
/// The thread cannot be started.
pub(super) fn start(sink: impl Write + Send + 'static) -> io::Result<(Lines, Guard)> {
    let shared = Arc::new(Shared::default());
    let writer = shared.clone();
    thread::Builder::new()
        .name("log".to_owned())
        .spawn(move || write(&writer, sink))?;
    let lines = Lines {
        shared: shared.clone(),
    };
    Ok((lines, Guard { shared }))
}

impl Lines {
    /// How many lines were lost.
    pub(super) fn lost_in_all(&self) -> u64 {
        self.shared.waiting().lost_in_all
    }
}

fn write(shared: &Shared, mut sink: impl Write) {
    let mut batch = Vec::new();
    loop {
        let waiting = shared.waiting();
        let idle = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.ending;
        let waiting = shared
            .changed
            .wait_while(waiting, idle)
            .unwrap_or_else(PoisonError::into_inner);
        let gathering = |waiting: &mut Waiting| !waiting.ending;
        let mut waiting = match shared
            .changed
            .wait_timeout_while(waiting, GATHER, gathering)
        {
            Ok((waiting, _)) => waiting,
            Err(poisoned) => poisoned.into_inner().0,
        };
        std::mem::swap(&mut batch, &mut waiting.lines);
        let (lost, ending) = (std::mem::take(&mut waiting.lost), waiting.ending);
        drop(waiting);
        if lost > 0 {
            batch.extend_from_slice(format!("{lost} lines of the log were lost\n").as_bytes());
        }
        // There is nowhere to say that the log cannot be written.
        let _ = sink.write_all(&batch).and_then(|()| sink.flush());
        batch.clear();
        batch.shrink_to(KEPT);
        if ending {
            shared.waiting().ended = true;
            shared.changed.notify_all();
            return;
        }
    }
}

impl Write for &Lines {
    /// Takes one line, whole or not at all.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut waiting = self.shared.waiting();
        if waiting.lines.len() + line.len() > LIMIT {
            waiting.lost += 1;
            waiting.lost_in_all += 1;
            return Ok(line.len());
        }
        let first = waiting.lines.is_empty();
        waiting.lines.extend_from_slice(line);
        drop(waiting);
        if first {
            self.shared.changed.notify_all();
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> &'a Self {
        self
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        let mut waiting = self.shared.waiting();
        waiting.ending = true;
        self.shared.changed.notify_all();
        // Whether it ended or time was up: the program ends.
        let _ = self
            .shared
            .changed
            .wait_timeout_while(waiting, LAST_WORDS, |waiting| !waiting.ended);
    }
}

#[cfg(test)]
mod tests;
