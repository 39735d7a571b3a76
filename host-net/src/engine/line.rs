//! Who changes a namespace next.
//!
//! Changes in one namespace take turns. Changes that only add to what others share and touch nothing in common wait in a
//! list, too: whoever gets the turn carries out all that are in it, with one look at the kernel and one restore. So many
//! pods that come at once do not pay for each other's turns.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::sync::oneshot::{self, error::TryRecvError};
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};

use super::apply::{Applied, ApplyError, alone};
use super::together::{self, Change};
use crate::journal::Journal;
use crate::netns::NetnsId;
use crate::plan::{Place, Plan};

/// How many changes are carried out at once at most: the first of them waits for the last one.
const AT_ONCE: usize = 32;

/// Everybody who wants to look at or change one namespace.
pub(super) struct Line {
    turn: Arc<AsyncMutex<()>>,
    waiting: Mutex<VecDeque<Waiting>>,
}

/// The right to act on a namespace. Two plans of one namespace share built-in chains and sets: what one of them has looked
/// at must not change before it has acted on it.
pub(super) struct Turn {
    _alone: OwnedMutexGuard<()>,
    /// A line that nobody holds is forgotten.
    _line: Arc<Line>,
}

/// A change that whoever has the turn may carry out.
struct Waiting {
    change: Change,
    journal: u64,
    answer: oneshot::Sender<Result<Applied, ApplyError>>,
}

impl Line {
    pub(super) fn of(netns: NetnsId) -> Arc<Self> {
        static LINES: Mutex<Option<HashMap<NetnsId, Weak<Line>>>> = Mutex::new(None);
        let mut lines = LINES.lock().unwrap_or_else(PoisonError::into_inner);
        let lines = lines.get_or_insert_default();
        if let Some(line) = lines.get(&netns).and_then(Weak::upgrade) {
            return line;
        }
        lines.retain(|_, line| line.strong_count() > 0);
        let line = Arc::new(Self {
            turn: Arc::default(),
            waiting: Mutex::default(),
        });
        lines.insert(netns, Arc::downgrade(&line));
        line
    }

    pub(super) async fn turn(self: &Arc<Self>) -> Turn {
        Turn {
            _alone: Arc::clone(&self.turn).lock_owned().await,
            _line: Arc::clone(self),
        }
    }

    /// Carries a change out, together with those that wait; or waits until somebody has.
    pub(super) async fn apply(
        self: &Arc<Self>,
        place: &Place,
        from: &Plan,
        to: &Plan,
        journal: &Journal,
    ) -> Result<Applied, ApplyError> {
        let (answer, mut answered) = oneshot::channel();
        self.waiting().push_back(Waiting {
            change: Change {
                place: place.clone(),
                from: from.clone(),
                to: to.clone(),
            },
            journal: journal.number(),
            answer,
        });
        let turn = tokio::select! {
            biased;
            answered = &mut answered => match answered {
                Ok(result) => return result,
                Err(_) => self.turn().await,
            },
            turn = self.turn() => turn,
        };
        let turn = Arc::new(turn);
        loop {
            match answered.try_recv() {
                Ok(result) => return result,
                Err(TryRecvError::Empty) => self.lead(&turn, journal).await,
                // Whoever had taken it on was stopped in the middle.
                Err(TryRecvError::Closed) => return alone(place, from, to, journal, &turn).await,
            }
        }
    }

    /// Carries out the first changes that wait.
    async fn lead(&self, turn: &Arc<Turn>, journal: &Journal) {
        let (changes, answers): (Vec<Change>, Vec<_>) =
            self.next(journal.number()).into_iter().unzip();
        let results = together::apply(&changes, journal, turn).await;
        for (answer, result) in answers.into_iter().zip(results) {
            // Nobody waits for it any more: then it is the journal's.
            let _ = answer.send(result);
        }
    }

    /// Takes the first change of a journal that waits, and those after it that have nothing in common with it or with each
    /// other.
    fn next(&self, journal: u64) -> Vec<(Change, oneshot::Sender<Result<Applied, ApplyError>>)> {
        let mut waiting = self.waiting();
        let (mut taken, mut rest) = (Vec::new(), VecDeque::new());
        let mut objects = together::Objects::default();
        for one in waiting.drain(..) {
            if one.answer.is_closed() {
                continue;
            }
            let fits = one.journal == journal && taken.len() < AT_ONCE && objects.take(&one.change);
            match fits {
                true => taken.push((one.change, one.answer)),
                false => rest.push_back(one),
            }
        }
        *waiting = rest;
        taken
    }

    fn waiting(&self) -> MutexGuard<'_, VecDeque<Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
