//! Ending connections: first asked (drain), then made to (cut).
//!
//! A [`Drainer`] belongs to whoever ends things, a [`Signal`] to each task that must end. A signal is checked every time
//! its task is polled, which is on the byte path; so it costs two atomic operations and no lock there. Dropping the
//! signal says that the task is done.

use std::collections::HashMap;
use std::future::poll_fn;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use tokio::sync::Notify;

/// How long connections may live on after their listeners have closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Time until the connections that are left are cut. Zero cuts at once.
    pub deadline: Duration,
}

impl Drain {
    /// Cuts at once.
    pub const CUT: Drain = Drain {
        deadline: Duration::ZERO,
    };

    /// Lets connections end by themselves within `deadline`.
    pub fn within(deadline: Duration) -> Self {
        Self { deadline }
    }
}

/// What is asked of a task.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Phase {
    /// Go on.
    #[default]
    Open = 0,
    /// Take nothing more, finish what there is.
    Draining = 1,
    /// End, as it stands.
    Cut = 2,
}

/// Tells the holders of its signals to drain or to end, and waits for them.
#[derive(Debug, Clone, Default)]
pub struct Drainer {
    shared: Arc<Shared>,
}

/// One task's end of a [`Drainer`].
///
/// Belongs to one task at a time: it remembers one waker.
#[derive(Debug)]
pub struct Signal {
    number: u64,
    member: Arc<Member>,
    shared: Arc<Shared>,
}

/// Ends one task, apart from all the others of its drainer.
#[derive(Debug, Clone)]
pub struct Cutter {
    member: Arc<Member>,
}

#[derive(Debug, Default)]
struct Shared {
    members: Mutex<Members>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Members {
    phase: Phase,
    next: u64,
    by_number: HashMap<u64, Arc<Member>>,
}

#[derive(Debug)]
struct Member {
    phase: AtomicU8,
    waker: AtomicWaker,
}

impl Member {
    fn raise(&self, phase: Phase) {
        self.phase.fetch_max(phase as u8, Ordering::AcqRel);
        self.waker.wake();
    }
}

impl Shared {
    fn members(&self) -> MutexGuard<'_, Members> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drainer {
    /// A drainer without members, in phase [`Phase::Open`].
    pub fn new() -> Self {
        Self::default()
    }

    /// A signal for one more task. It starts in the drainer's phase.
    pub fn signal(&self) -> Signal {
        Signal::register(&self.shared)
    }

    /// How many signals are held.
    pub fn members(&self) -> usize {
        self.shared.members().by_number.len()
    }

    /// Asks every holder to finish. A phase is never taken back.
    pub fn drain(&self) {
        self.raise(Phase::Draining);
    }

    /// Makes every holder end.
    pub fn cut(&self) {
        self.raise(Phase::Cut);
    }

    /// Waits until no signal is held.
    pub async fn empty(&self) {
        loop {
            let left = self.shared.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.members() == 0 {
                return;
            }
            left.await;
        }
    }

    /// Asks all to finish, waits for them up to the deadline, cuts those that are left and waits for their end.
    pub async fn run(&self, drain: Drain) {
        if !drain.deadline.is_zero() {
            self.drain();
            if tokio::time::timeout(drain.deadline, self.empty())
                .await
                .is_ok()
            {
                return;
            }
        }
        self.cut();
        self.empty().await;
    }

    fn raise(&self, phase: Phase) {
        let mut members = self.shared.members();
        members.phase = members.phase.max(phase);
        for member in members.by_number.values() {
            member.raise(phase);
        }
    }
}

impl Signal {
    fn register(shared: &Arc<Shared>) -> Self {
        let mut members = shared.members();
        let member = Arc::new(Member {
            phase: AtomicU8::new(members.phase as u8),
            waker: AtomicWaker::new(),
        });
        let number = members.next;
        members.next += 1;
        members.by_number.insert(number, member.clone());
        drop(members);
        Self {
            number,
            member,
            shared: shared.clone(),
        }
    }

    /// What is asked of this task.
    pub fn phase(&self) -> Phase {
        match self.member.phase.load(Ordering::Acquire) {
            0 => Phase::Open,
            1 => Phase::Draining,
            _ => Phase::Cut,
        }
    }

    /// Ready once the phase is `phase` or a later one.
    pub fn poll_reached(&self, phase: Phase, cx: &mut Context<'_>) -> Poll<()> {
        self.member.waker.register(cx.waker());
        if self.phase() >= phase {
            Poll::Ready(())
        } else {
            Poll::Pending
        }
    }

    /// Waits until this task shall take nothing more.
    pub async fn draining(&self) {
        poll_fn(|cx| self.poll_reached(Phase::Draining, cx)).await;
    }

    /// Waits until this task shall end.
    pub async fn cut(&self) {
        poll_fn(|cx| self.poll_reached(Phase::Cut, cx)).await;
    }

    /// A handle that ends the holder of this signal alone.
    pub fn cutter(&self) -> Cutter {
        Cutter {
            member: self.member.clone(),
        }
    }
}

/// A signal for one more task of the same drainer.
impl Clone for Signal {
    fn clone(&self) -> Self {
        Self::register(&self.shared)
    }
}

impl Drop for Signal {
    fn drop(&mut self) {
        let mut members = self.shared.members();
        members.by_number.remove(&self.number);
        let empty = members.by_number.is_empty();
        drop(members);
        if empty {
            self.shared.left.notify_waiters();
        }
    }
}

impl Cutter {
    /// Makes the holder end.
    pub fn cut(&self) {
        self.member.raise(Phase::Cut);
    }
}

#[cfg(test)]
mod tests;
