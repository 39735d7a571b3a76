//! How long the rest of a run will take.

use std::collections::BTreeMap;
use std::time::Duration;

use super::case::Case;

/// Times that steps took, by case: a step is one case in one round with all its variants.
#[derive(Debug, Default)]
pub struct Pace(BTreeMap<Case, (f64, u32)>);

impl Pace {
    /// Notes a step.
    pub fn took(&mut self, case: Case, time: Duration) {
        let entry = self.0.entry(case).or_default();
        *entry = (entry.0 + time.as_secs_f64(), entry.1 + 1);
    }

    /// Time for these steps: for each the mean of its case, or of all cases while its own has not been measured; none
    /// before anything has.
    pub fn left(&self, steps: impl IntoIterator<Item = Case>) -> Option<Duration> {
        let (time, count) = self
            .0
            .values()
            .fold((0.0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1));
        if count == 0 {
            return None;
        }
        let mean = |(time, count): (f64, u32)| time / f64::from(count);
        let step = |case| self.0.get(&case).copied().map_or(mean((time, count)), mean);
        Some(Duration::from_secs_f64(steps.into_iter().map(step).sum()))
    }
}

/// A time for reading: `45 s`, `12 min`, `2 h 5 min`.
pub fn show(time: Duration) -> String {
    let seconds = time.as_secs_f64().round() as u64;
    match (seconds + 30) / 60 {
        _ if seconds < 100 => format!("{seconds} s"),
        minutes if minutes < 100 => format!("{minutes} min"),
        minutes => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::{Load, Path};

    #[test]
    fn what_is_left_depends_on_the_cases_that_are() {
        let case = |load| Case {
            path: Path::CrossNode,
            load,
        };
        let [slow, fast, unknown] = [Load::ALL[0], Load::ALL[1], Load::ALL[2]].map(case);
        let mut pace = Pace::default();
        assert_eq!(pace.left([slow]), None);
        pace.took(slow, Duration::from_secs(30));
        pace.took(fast, Duration::from_secs(10));
        assert_eq!(pace.left([slow, slow, fast]), Some(Duration::from_secs(70)));
        assert_eq!(pace.left([unknown]), Some(Duration::from_secs(20)));
        assert_eq!(pace.left([]), Some(Duration::ZERO));
    }

    #[test]
    fn times_are_short_to_read() {
        let shown = [45, 99, 100, 3600, 7500].map(|seconds| show(Duration::from_secs(seconds)));
        assert_eq!(shown, ["45 s", "99 s", "2 min", "60 min", "2 h 5 min"]);
    }
}
