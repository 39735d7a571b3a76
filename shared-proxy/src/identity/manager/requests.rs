//! Who may ask the CA next, when more want to than may at one time.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

/// How urgent a request is, the most urgent first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Urgency {
    /// A connection waits for the certificate.
    Waited,
    /// There is no certificate yet, and nobody has asked for it.
    Missing,
    /// There is one in force.
    Renewal,
}

/// What makes one identity's request urgent. It may change while the request waits for its turn.
#[derive(Debug, Default)]
pub(super) struct Demand {
    waiting: AtomicUsize,
    served: AtomicBool,
}

impl Demand {
    /// Counts somebody who waits for the certificate, until the returned value is dropped.
    pub(super) fn wait(self: &Arc<Self>) -> Waiting {
        self.waiting.fetch_add(1, Ordering::AcqRel);
        Waiting(Arc::clone(self))
    }

    /// There is a certificate; from now on it is renewed.
    pub(super) fn serve(&self) {
        self.served.store(true, Ordering::Release);
    }

    fn urgency(&self) -> Urgency {
        if self.waiting.load(Ordering::Acquire) > 0 {
            Urgency::Waited
        } else if self.served.load(Ordering::Acquire) {
            Urgency::Renewal
        } else {
            Urgency::Missing
        }
    }
}

/// Somebody who waits.
#[derive(Debug)]
pub(super) struct Waiting(Arc<Demand>);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::AcqRel);
    }
}

/// Lets a number of requests run at one time. The others wait in a queue, which the most urgent one leaves first, and of
/// equally urgent ones the one that came first.
pub(super) struct Requests {
    state: Mutex<State>,
}

struct State {
    /// More than 0 only while nobody is in the queue.
    free: usize,
    queue: Vec<Queued>,
}

struct Queued {
    demand: Arc<Demand>,
    turn: oneshot::Sender<Permit>,
}

impl Requests {
    pub(super) fn new(concurrent: usize) -> Arc<Self> {
        let state = State {
            free: concurrent.max(1),
            queue: Vec::new(),
        };
        Arc::new(Self {
            state: Mutex::new(state),
        })
    }

    /// Waits for this request's turn. It lasts until the returned value is dropped.
    pub(super) async fn turn(self: &Arc<Self>, demand: &Arc<Demand>) -> Option<Permit> {
        let turn = {
            let mut state = self.state();
            if state.free > 0 {
                state.free -= 1;
                return Some(Permit(Arc::clone(self)));
            }
            let (sender, turn) = oneshot::channel();
            state.queue.push(Queued {
                demand: Arc::clone(demand),
                turn: sender,
            });
            turn
        };
        // What is in the queue is taken out to be sent to, or because nobody receives any more.
        turn.await.ok()
    }

    fn release(self: &Arc<Self>) {
        let next = {
            let mut state = self.state();
            // Whoever was forgotten meanwhile does not wait any more.
            state.queue.retain(|queued| !queued.turn.is_closed());
            let queue = state.queue.iter().enumerate();
            let most_urgent = queue.min_by_key(|(_, queued)| queued.demand.urgency());
            match most_urgent.map(|(index, _)| index) {
                Some(index) => state.queue.remove(index),
                None => {
                    state.free += 1;
                    return;
                }
            }
        };
        // A permit that nobody takes is dropped here, or with the channel, and released again by that.
        drop(next.turn.send(Permit(Arc::clone(self))));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A request's turn.
pub(super) struct Permit(Arc<Requests>);

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.release();
    }
}

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use tokio::sync::mpsc;
    use tokio::task::JoinHandle;

    use super::*;

    /// Queues a request that says its name when its turn has come, and holds it for no longer.
    async fn queue(
        requests: &Arc<Requests>,
        demand: &Arc<Demand>,
        name: &'static str,
        said: &mpsc::UnboundedSender<&'static str>,
    ) -> JoinHandle<()> {
        let before = requests.state().queue.len();
        let task = tokio::spawn({
            let (requests, demand, said) = (Arc::clone(requests), Arc::clone(demand), said.clone());
            async move {
                let _permit = requests.turn(&demand).await;
                said.send(name).unwrap();
            }
        });
        while requests.state().queue.len() == before {
            tokio::task::yield_now().await;
        }
        task
    }

    fn demand(served: bool) -> Arc<Demand> {
        let demand = Arc::new(Demand::default());
        if served {
            demand.serve();
        }
        demand
    }

    #[tokio::test]
    async fn who_is_waited_for_goes_first_and_renewals_go_last() {
        let requests = Requests::new(1);
        let running = requests.turn(&demand(false)).await;
        let (say, mut said) = mpsc::unbounded_channel();
        let (renewal, late) = (demand(true), demand(true));
        queue(&requests, &renewal, "renewal", &say).await;
        queue(&requests, &demand(false), "warm", &say).await;
        queue(&requests, &demand(false), "warm too", &say).await;
        queue(&requests, &late, "waited for since", &say).await;
        let urgent = demand(false);
        let _first = urgent.wait();
        queue(&requests, &urgent, "waited for", &say).await;
        // Who comes to wait makes a request urgent that is in the queue; who gives up takes that back.
        let _second = late.wait();
        drop(renewal.wait());
        drop((running, say));
        let mut order = Vec::new();
        while let Some(name) = said.recv().await {
            order.push(name);
        }
        assert_eq!(
            order,
            [
                "waited for since",
                "waited for",
                "warm",
                "warm too",
                "renewal"
            ]
        );
        assert_eq!(requests.state().free, 1);
    }

    #[tokio::test]
    async fn no_turn_is_lost_with_who_is_forgotten() {
        let requests = Requests::new(2);
        let running = [
            requests.turn(&demand(false)).await,
            requests.turn(&demand(false)).await,
        ];
        let (say, mut said) = mpsc::unbounded_channel();
        for name in ["forgotten", "forgotten too"] {
            queue(&requests, &demand(false), name, &say).await.abort();
        }
        queue(&requests, &demand(true), "kept", &say).await;
        drop((running, say));
        assert_eq!(said.recv().await, Some("kept"));
        assert_eq!(said.recv().await, None);
        assert_eq!(requests.state().free, 2);
    }
}
