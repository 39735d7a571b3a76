//! Asking for single workloads and services.

use std::collections::{BTreeSet, HashMap};

use futures_util::future::{BoxFuture, FutureExt};
use shared_proxy::state::{NetworkAddress, NetworkRange, OnDemand};
use tokio::sync::{mpsc, oneshot};

/// Asks a running client for resources. Clones ask the same client.
#[derive(Debug, Clone)]
pub struct Demands {
    asking: mpsc::UnboundedSender<Demand>,
}

/// Somebody waits for a resource.
#[derive(Debug)]
pub(super) struct Demand {
    name: String,
    answered: oneshot::Sender<()>,
}

impl Demands {
    pub(super) fn new() -> (Self, mpsc::UnboundedReceiver<Demand>) {
        let (asking, asked) = mpsc::unbounded_channel();
        (Self { asking }, asked)
    }

    /// Waits until the control plane has answered for a name: the store holds what it stands for, or there is nothing. A
    /// workload or service that was found is followed from there on. Names are `network/ip`, `namespace/hostname` or a
    /// workload's uid.
    ///
    /// While the control plane is not reachable this does not return; the caller limits the wait. False: the client has
    /// ended.
    pub async fn ask(&self, name: impl Into<String>) -> bool {
        let (answered, answer) = oneshot::channel();
        let demand = Demand {
            name: name.into(),
            answered,
        };
        self.asking.send(demand).is_ok() && answer.await.is_ok()
    }
}

impl OnDemand for Demands {
    fn ask(&self, name: String) -> BoxFuture<'_, ()> {
        async move {
            if !Demands::ask(self, name).await {
                // A client that has ended answers nothing: not "there is no such thing".
                std::future::pending::<()>().await;
            }
        }
        .boxed()
    }
}

/// What was asked for.
#[derive(Debug, Default)]
pub(super) struct Pending {
    waiting: HashMap<String, Vec<oneshot::Sender<()>>>,
    /// Names that exist, and are followed.
    found: BTreeSet<String>,
}

impl Pending {
    /// The name to ask the server for, unless it is asked already or the answer is there.
    pub(super) fn add(&mut self, demand: Demand) -> Option<String> {
        let Demand { name, answered } = demand;
        if self.found.contains(&name) {
            let _ = answered.send(());
            return None;
        }
        let waiting = self.waiting.entry(name.clone()).or_default();
        waiting.push(answered);
        (waiting.len() == 1).then_some(name)
    }

    /// Wakes those who wait for these names, and for addresses in these ranges. Returns the names that need not be followed because nothing has them: an
    /// endless row of wrong addresses would otherwise be followed for ever.
    pub(super) fn answered(
        &mut self,
        present: &[String],
        ranges: &[NetworkRange],
        absent: &[String],
    ) -> Vec<String> {
        for name in present.iter().cloned().chain(self.waiting_in(ranges)) {
            if let Some(waiting) = self.waiting.remove(&name) {
                wake(waiting);
                self.found.insert(name);
            }
        }
        let mut forgotten = Vec::new();
        for name in absent {
            let waiting = self.waiting.remove(name);
            if self.found.remove(name) || waiting.is_some() {
                forgotten.push(name.clone());
            }
            wake(waiting.unwrap_or_default());
        }
        forgotten
    }

    /// Names of addresses in these ranges that somebody waits for. A service is sent under its own name, whatever it was
    /// asked for by: the ranges are the only sign.
    fn waiting_in(&self, ranges: &[NetworkRange]) -> Vec<String> {
        if ranges.is_empty() {
            return Vec::new();
        }
        let inside = |name: &&String| {
            let address = name.parse::<NetworkAddress>();
            address.is_ok_and(|address| ranges.iter().any(|range| range.contains(&address)))
        };
        self.waiting.keys().filter(inside).cloned().collect()
    }

    /// All names that a new stream asks for.
    pub(super) fn followed(&self) -> impl Iterator<Item = String> {
        self.found.iter().chain(self.waiting.keys()).cloned()
    }
}

fn wake(waiting: Vec<oneshot::Sender<()>>) {
    for waiter in waiting {
        // Whoever gave up does not listen any more.
        let _ = waiter.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn demand(name: &str) -> (Demand, oneshot::Receiver<()>) {
        let (answered, answer) = oneshot::channel();
        let name = name.to_owned();
        (Demand { name, answered }, answer)
    }

    #[test]
    fn a_name_is_asked_for_once_and_answers_all_who_wait() {
        let mut pending = Pending::default();
        let (first, mut one) = demand("/10.0.0.1");
        let (second, mut two) = demand("/10.0.0.1");
        assert_eq!(pending.add(first).as_deref(), Some("/10.0.0.1"));
        assert_eq!(pending.add(second), None);
        assert!(one.try_recv().is_err());
        assert!(
            pending
                .answered(&["uid".into(), "/10.0.0.1".into()], &[], &[])
                .is_empty()
        );
        assert!(one.try_recv().is_ok() && two.try_recv().is_ok());
        // Known from here on, and asked for again on the next stream.
        let (third, mut three) = demand("/10.0.0.1");
        assert_eq!(pending.add(third), None);
        assert!(three.try_recv().is_ok());
        assert_eq!(pending.followed().collect::<Vec<_>>(), ["/10.0.0.1"]);
    }

    #[test]
    fn what_does_not_exist_releases_and_is_not_followed() {
        let mut pending = Pending::default();
        let (first, mut one) = demand("/10.9.9.9");
        pending.add(first);
        assert_eq!(
            pending.answered(&[], &[], &["/10.9.9.9".into()]),
            ["/10.9.9.9"]
        );
        assert!(one.try_recv().is_ok());
        assert_eq!(pending.followed().count(), 0);
        let (again, _two) = demand("/10.9.9.9");
        assert!(pending.add(again).is_some());
    }

    #[test]
    fn a_range_answers_for_the_addresses_in_it_and_for_no_others() {
        let mut pending = Pending::default();
        let (inside, mut one) = demand("/10.2.3.4");
        let (outside, mut two) = demand("/10.3.0.1");
        let (elsewhere, mut three) = demand("west/10.2.3.4");
        let (name, mut four) = demand("a/10.2.3.4.example");
        for demand in [inside, outside, elsewhere, name] {
            assert!(pending.add(demand).is_some());
        }
        let range = "/10.2.0.0/16".parse().expect("a range");
        assert!(
            pending
                .answered(&["a/web".into()], &[range], &[])
                .is_empty()
        );
        assert!(one.try_recv().is_ok());
        for waits in [&mut two, &mut three, &mut four] {
            assert!(waits.try_recv().is_err());
        }
        assert!(pending.add(demand("/10.2.3.4").0).is_none(), "followed");
    }
}
