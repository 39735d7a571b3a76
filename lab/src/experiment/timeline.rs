//! Latency and errors second by second.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::driver::Records;
use super::engine::Kind;

/// One second of load. Latencies are in milliseconds.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Second {
    /// Which one; before 0 the long-lived connections were made.
    pub second: i64,
    /// New connections that began in it.
    pub new: u64,
    /// Those of them that failed.
    pub new_failed: u64,
    /// Those of them that took long.
    pub new_delayed: u64,
    /// Median of the time that they took.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_p50_ms: Option<f64>,
    /// 99th percentile.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_p99_ms: Option<f64>,
    /// The longest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub new_max_ms: Option<f64>,
    /// Messages of long-lived connections that were answered.
    pub messages: u64,
    /// Mean of the time to their answers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_mean_ms: Option<f64>,
    /// The longest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message_max_ms: Option<f64>,
    /// Long-lived connections that broke.
    pub broken: u64,
}

/// All seconds in which something happened. `begun_us` is when the load began, `over_us` what is long.
pub fn timeline(records: &Records, begun_us: u64, over_us: u64) -> Vec<Second> {
    let begun = begun_us as i64;
    let second_of = |us: u64| (us as i64 - begun).div_euclid(1_000_000);
    let mut seconds: BTreeMap<i64, (Second, Vec<u64>)> = BTreeMap::new();
    for connection in &records.connections {
        if connection.kind != Kind::New {
            if let Some(broken) = &connection.broken {
                seconds.entry(second_of(broken.at_us)).or_default().0.broken += 1;
            }
            continue;
        }
        let (second, took) = seconds.entry(second_of(connection.begun_us)).or_default();
        second.new += 1;
        second.new_failed += u64::from(connection.broken.is_some());
        if let Some(us) = connection.took_us {
            second.new_delayed += u64::from(us > over_us);
            took.push(us);
        }
    }
    for said in records.seconds.values().filter(|said| said.messages > 0) {
        let (second, _) = seconds
            .entry(second_of(said.second.saturating_mul(1_000_000)))
            .or_default();
        // Seconds of the clock and of the load do not begin together: a second of the load may have two of the clock.
        let before = second.message_mean_ms.unwrap_or_default() * second.messages as f64;
        second.messages += said.messages;
        second.message_mean_ms = Some((before + said.sum_us as f64 / 1e3) / second.messages as f64);
        let worst = second.message_max_ms.unwrap_or_default();
        second.message_max_ms = Some(worst.max(said.worst_us as f64 / 1e3));
    }
    let finished = seconds.into_iter().map(|(number, (mut second, mut took))| {
        took.sort_unstable();
        second.second = number;
        second.new_p50_ms = percentile(&took, 0.5);
        second.new_p99_ms = percentile(&took, 0.99);
        second.new_max_ms = percentile(&took, 1.0);
        second
    });
    finished.collect()
}

/// The nearest-rank percentile of sorted times in microseconds, in milliseconds.
pub fn percentile(sorted: &[u64], share: f64) -> Option<f64> {
    let rank = (sorted.len() as f64 * share).ceil() as usize;
    let at = rank.clamp(1, sorted.len().max(1)) - 1;
    sorted.get(at).map(|us| *us as f64 / 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_there_were() {
        let took: Vec<u64> = (1..=100).map(|n| n * 1000).collect();
        assert_eq!(percentile(&took, 0.5), Some(50.0));
        assert_eq!(percentile(&took, 0.99), Some(99.0));
        assert_eq!(percentile(&took, 1.0), Some(100.0));
        assert_eq!(percentile(&took[..1], 0.5), Some(1.0));
        assert_eq!(percentile(&[], 0.5), None);
    }
}
