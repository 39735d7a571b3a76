//! Live probes, by turns: their rate does not grow with the number of pods.

use std::collections::BTreeMap;

use host_net::netns::Netns;

use super::found::Found;
use crate::agent::verify::live::{self, Trouble};
use crate::agent::{Agent, Pod};

/// Live probes in a sweep: half of them for suspects while there are that many.
const PROBES: usize = 30;
/// Of those, for pods of which nothing is suspected.
const REGULAR: usize = 15;
/// Failures of a pod's probe in a row before it counts: one may have met a proxy that was just being replaced.
const FAILURES: u32 = 2;

/// Whose turn it is.
#[derive(Default)]
pub(super) struct Turns {
    /// Failures in a row of each suspect's probe, by UID.
    suspects: BTreeMap<String, u32>,
    /// UID of the pod that was probed last of those that are not suspected.
    last: String,
}

impl Turns {
    /// Has a pod probed in the next sweep.
    pub(super) fn suspect(&mut self, uid: &str) {
        self.suspects.entry(uid.to_owned()).or_default();
    }

    /// Whether a probe has failed that does not count yet.
    pub(super) fn are_in_doubt(&self) -> bool {
        let in_doubt = |failures: &u32| (1..FAILURES).contains(failures);
        self.suspects.values().any(in_doubt)
    }

    /// The pods to be probed, of those whose namespace is known.
    fn next<'a>(&mut self, pods: &[(&'a Pod, &'a Netns)]) -> Vec<(&'a Pod, &'a Netns)> {
        self.suspects
            .retain(|uid, _| pods.iter().any(|(pod, _)| pod.uid == *uid));
        let (mut turn, mut others): (Vec<_>, Vec<_>) = pods
            .iter()
            .copied()
            .partition(|(pod, _)| self.suspects.contains_key(&pod.uid));
        // Those that failed longest come last: they are known to be broken.
        turn.sort_by_key(|(pod, _)| self.suspects.get(&pod.uid).copied());
        turn.truncate(PROBES - REGULAR);
        others.sort_by(|(a, _), (b, _)| {
            let turn = |pod: &Pod| pod.uid <= self.last;
            (turn(a), &a.uid).cmp(&(turn(b), &b.uid))
        });
        others.truncate(REGULAR);
        if let Some((pod, _)) = others.last() {
            self.last.clone_from(&pod.uid);
        }
        turn.extend(others);
        turn
    }
}

impl Agent {
    /// Probes the next pods in turn, and those that are suspected.
    pub(super) async fn probe_some(
        &self,
        turns: &mut Turns,
        pods: &[(&Pod, &Netns)],
        found: &mut Found,
    ) {
        let asked = turns.next(pods).into_iter().map(|(pod, netns)| async move {
            let families = self.captured_families(pod);
            (&pod.uid, live::probe(pod, netns, &families).await)
        });
        for (uid, outcome) in futures_util::future::join_all(asked).await {
            let Err(trouble) = outcome else {
                turns.suspects.remove(uid);
                found.proven.insert(uid.clone());
                continue;
            };
            let failures = turns.suspects.entry(uid.clone()).or_default();
            *failures = failures.saturating_add(1);
            if *failures < FAILURES {
                continue;
            }
            // Where there is no proxy, nothing is led past it.
            if matches!(trouble, Trouble::NotTaken(_)) && !found.pods.contains_key(uid) {
                found.passed_by.insert(uid.clone());
            }
            found.add(uid, vec![trouble.to_string()]);
        }
    }
}
