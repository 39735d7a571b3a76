//! Waits between attempts.

use std::time::Duration;

use rand::Rng;

/// Waits that double, each shortened or lengthened a little at random so that proxies that lost one server together do not
/// come back together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// First wait.
    pub first: Duration,
    /// Longest wait.
    pub longest: Duration,
    /// By which part of itself a wait may differ.
    pub jitter: f64,
}

impl Default for Backoff {
    /// The field's: 10 ms, doubled up to 15 s.
    fn default() -> Self {
        Self {
            first: Duration::from_millis(10),
            longest: Duration::from_secs(15),
            jitter: 0.2,
        }
    }
}

impl Backoff {
    /// The wait after the `failures`-th failure in a row, from 1.
    pub fn wait(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let wait = self.first.saturating_mul(1 << doublings).min(self.longest);
        if self.jitter > 0.0 {
            wait.mul_f64(1.0 + rand::rng().random_range(-self.jitter..=self.jitter))
        } else {
            wait
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_vary_by_a_fifth() {
        let backoff = Backoff::default();
        for (failures, millis) in [
            (1, 10),
            (2, 20),
            (5, 160),
            (11, 10_240),
            (12, 15_000),
            (90, 15_000),
        ] {
            let wait = backoff.wait(failures).as_secs_f64() * 1000.0;
            let middle = f64::from(millis);
            assert!(
                (0.79 * middle..=1.21 * middle).contains(&wait),
                "{failures}: {wait}"
            );
        }
    }
}
