//! How long the steps of enrolments took: `GET /v1/enrolments` on the agent's socket.
//!
//! Samples and not buckets, so that whoever asks can form any percentile. The last ones are kept, which is enough for a
//! node that starts all its pods at once.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Enrolments that are remembered.
const KEPT: usize = 1024;

/// Times of one enrolment that succeeded, in microseconds.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnrolmentTimes {
    /// UID of the pod.
    pub uid: String,
    /// Writing the list of pods to the disk: before the first object, and when all is done.
    pub record_us: u64,
    /// From the announcement to the proxy until its acknowledgement (ZDS Add to Ack): listeners, or the announcement,
    /// and the certificate stand.
    pub announce_us: u64,
    /// Asking the kernel for facts and planning.
    pub plan_us: u64,
    /// Applying the plans: journal, and every kernel object of the pod.
    pub apply_us: u64,
    /// All of it since the plugin's event was found valid, with waiting for other events of the pod.
    pub total_us: u64,
}

/// The last enrolments.
#[derive(Debug, Default)]
pub(super) struct Timings(Mutex<VecDeque<EnrolmentTimes>>);

impl Timings {
    pub(super) fn note(&self, times: EnrolmentTimes) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(times);
    }

    /// From the oldest to the latest.
    pub(super) fn all(&self) -> Vec<EnrolmentTimes> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.iter().cloned().collect()
    }
}

/// A duration in the unit of [`EnrolmentTimes`].
pub(super) fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_are_kept() {
        let timings = Timings::default();
        for total_us in 0..2000 {
            timings.note(EnrolmentTimes {
                total_us,
                ..EnrolmentTimes::default()
            });
        }
        let kept: Vec<u64> = timings.all().iter().map(|times| times.total_us).collect();
        assert_eq!(kept, (976..2000).collect::<Vec<_>>());
    }
}
