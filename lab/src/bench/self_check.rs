//! Whether the benchmark can be believed: a variant against itself must show no difference, and one that is delayed on
//! purpose must.
//!
//! Two labs of the same variant are measured in turns, as a benchmark does it, and each round has two of its own: processes
//! of one and the same program differ for as long as they live, by where they lie in memory and on which processors they
//! have settled, which would be found and is no difference of variants. For each case the main result, the machine's CPU
//! time per unit of work and the median latency are compared by [`sign_flip`], over all of them together by [`holm`]: if
//! both are the same, a difference is found in at most 5 of 100 runs of the whole check. The injected delay is a
//! [`DelayLine`](super::delay::DelayLine) before the application of both labs, which is ordered to delay in the second only.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::case::Case;
use super::environment::Environment;
use super::interrupt;
use super::pace::{self, Pace};
use super::report::{Report, Sample};
use super::run::{BenchSpec, set_up, turns};
use super::stage::Stage;
use super::statistics::{Estimate, bootstrap, holm, sign_flip};
use super::summary::per_unit;
use super::variant::Variant;
use crate::standing::Progress;

/// The whole check may find a difference that is not there with this probability.
pub const LEVEL: f64 = 0.05;
/// Name of the file with every sample.
pub const FILE: &str = "self-check.json";

/// What is compared in a case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Measure {
    /// The main result.
    Value,
    /// CPU seconds of the machine per unit of work.
    MachineCpu,
    /// The 50th percentile of latency.
    Latency,
}

impl Measure {
    const ALL: [Self; 3] = [Self::Value, Self::MachineCpu, Self::Latency];

    fn of(self, sample: &Sample) -> Option<f64> {
        match self {
            Self::Value => Some(sample.value),
            Self::MachineCpu => Some(per_unit(sample, sample.machine_cpu)),
            Self::Latency => sample.latency_us.map(|latency| latency.p50),
        }
    }

    fn higher_is_better(self, case: Case) -> bool {
        match self {
            Self::Value => case.higher_is_better(),
            Self::MachineCpu | Self::Latency => false,
        }
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Value => "result",
            Self::MachineCpu => "machine CPU",
            Self::Latency => "latency p50",
        })
    }
}

/// One comparison of the two labs.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Case.
    pub case: Case,
    /// What is compared.
    pub measure: Measure,
    /// The second lab's relative to the first's.
    pub ratio: Estimate,
    /// Probability of such a difference by chance, in this comparison.
    pub p: f64,
    /// The same over all comparisons together.
    pub p_of_all: f64,
}

impl Comparison {
    /// Whether the labs differ.
    pub fn differs(&self) -> bool {
        self.p_of_all <= LEVEL
    }

    /// Whether they differ, and the second is the worse.
    pub fn second_is_worse(&self) -> bool {
        let lower = self.ratio.value < 1.0;
        self.differs() && lower == self.measure.higher_is_better(self.case)
    }
}

/// What the check found.
#[derive(Debug, Clone, Serialize)]
pub struct SelfCheck {
    /// Version, profile and features of ambidex.
    pub build: String,
    /// Where.
    pub environment: Environment,
    /// The variant of both labs.
    pub variant: Variant,
    /// What the second lab was delayed by, in microseconds.
    pub injected_us: Option<u128>,
    /// Rounds.
    pub rounds: usize,
    /// Seconds of one sample.
    pub seconds_per_sample: u64,
    /// Comparisons.
    pub comparisons: Vec<Comparison>,
    /// Samples of both labs.
    pub samples: [Vec<Sample>; 2],
    /// Time that everything took.
    pub seconds_taken: f64,
}

impl SelfCheck {
    /// Whether the check came out as it must: with a delay, that it was detected; without, that there is no difference.
    pub fn passed(&self) -> bool {
        match self.injected_us {
            Some(_) => self.comparisons.iter().any(Comparison::second_is_worse),
            None => !self.comparisons.iter().any(Comparison::differs),
        }
    }

    /// The line to print.
    pub fn verdict(&self) -> String {
        let count = self.comparisons.len();
        let smallest = self
            .comparisons
            .iter()
            .map(|c| c.p_of_all)
            .fold(1.0, f64::min);
        let found = match (self.injected_us, self.passed()) {
            (Some(_), true) => "injected delay: detected",
            (Some(_), false) => "injected delay: NOT detected",
            (None, true) => "self-check: no difference",
            (None, false) => "self-check: the same variant DIFFERS from itself",
        };
        format!(
            "{found} ({count} comparisons of {} rounds at {:.0} % together, smallest corrected p {smallest:.3})",
            self.rounds,
            (1.0 - LEVEL) * 100.0
        )
    }
}

/// Runs the check. `spec` has one variant; with a delay, every case must be one that talks to the application that is
/// delayed, which is the one that answers requests.
///
/// # Errors
/// As [`super::run()`]; and when there are too few rounds to find anything, which would pass for equality.
pub fn run(spec: &BenchSpec, delay: Option<Duration>, progress: Progress<'_>) -> Result<SelfCheck> {
    let [variant] = spec.variants.as_slice() else {
        bail!("a variant is checked against itself: want exactly one");
    };
    let needed = sign_flip::rounds_needed(spec.cases.len() * Measure::ALL.len(), LEVEL);
    if spec.rounds < needed {
        bail!(
            "{} rounds can find no difference in {} cases: want at least {needed}",
            spec.rounds,
            spec.cases.len()
        );
    }
    std::fs::create_dir_all(&spec.out).with_context(|| format!("create {}", spec.out.display()))?;
    let started = Instant::now();
    let twice = BenchSpec {
        variants: vec![variant.clone(), variant.clone()],
        ..spec.clone()
    };
    let build = |index: usize, variant: &Variant| {
        let line = delay.map(|delay| if index == 0 { Duration::ZERO } else { delay });
        Stage::behind(variant, spec, line)
    };
    let mut samples = [Vec::new(), Vec::new()];
    let mut pace = Pace::default();
    let mut environment = None;
    for round in 0..spec.rounds {
        let mut setting = Report::new(&twice, Environment::of_this_machine());
        let stages = set_up(&twice, &mut setting, progress, &build)?;
        measure(spec, &stages, round, &mut samples, &mut pace, progress)?;
        environment.get_or_insert(setting.environment);
    }
    let environment = environment.context("no round was measured")?;
    let check = SelfCheck {
        build: spec.build.clone(),
        environment,
        variant: variant.clone(),
        injected_us: delay.map(|delay| delay.as_micros()),
        rounds: spec.rounds,
        seconds_per_sample: spec.seconds,
        comparisons: compare(&spec.cases, &samples),
        samples,
        seconds_taken: started.elapsed().as_secs_f64(),
    };
    let file = spec.out.join(FILE);
    std::fs::write(&file, serde_json::to_vec_pretty(&check)?)
        .with_context(|| format!("write {}", file.display()))?;
    Ok(check)
}

/// Measures one round.
fn measure(
    spec: &BenchSpec,
    stages: &[Stage],
    round: usize,
    samples: &mut [Vec<Sample>; 2],
    pace: &mut Pace,
    progress: Progress<'_>,
) -> Result<()> {
    for (index, &case) in spec.cases.iter().enumerate() {
        let begun = Instant::now();
        for turn in turns(round, stages.len()) {
            interrupt::check()?;
            let sample = stages[turn].sample(case, spec.seconds, round);
            samples[turn].push(sample.with_context(|| format!("round {} of {case}", round + 1))?);
        }
        pace.took(case, begun.elapsed());
        let later = (round + 1..spec.rounds).flat_map(|_| spec.cases.iter().copied());
        let left = pace.left(spec.cases[index + 1..].iter().copied().chain(later));
        let value = |of: &[Sample]| of.last().map_or(String::new(), |s| case.show(s.value));
        progress(&format!(
            "round {}/{} {case}: {} and {} {}; {} to go",
            round + 1,
            spec.rounds,
            value(&samples[0]),
            value(&samples[1]),
            case.unit(),
            pace::show(left.unwrap_or_default())
        ));
    }
    Ok(())
}

/// Compares the samples of two labs, the second with the first.
pub fn compare(cases: &[Case], samples: &[Vec<Sample>; 2]) -> Vec<Comparison> {
    let mut comparisons = Vec::new();
    for &case in cases {
        for measure in Measure::ALL {
            let of = |lab: &[Sample]| -> Vec<Option<f64>> {
                let of_case = lab.iter().filter(|sample| sample.case == case);
                of_case.map(|sample| measure.of(sample)).collect()
            };
            let both = of(&samples[1]).into_iter().zip(of(&samples[0]));
            let Some(pairs) = both
                .map(|(second, first)| second.zip(first))
                .collect::<Option<Vec<_>>>()
            else {
                continue;
            };
            if let Some(ratio) = bootstrap::ratio(&pairs) {
                let p = sign_flip::p_value(&pairs);
                comparisons.push(Comparison {
                    case,
                    measure,
                    ratio,
                    p,
                    p_of_all: p,
                });
            }
        }
    }
    let alone: Vec<f64> = comparisons.iter().map(|comparison| comparison.p).collect();
    for (comparison, p) in comparisons.iter_mut().zip(holm::adjusted(&alone)) {
        comparison.p_of_all = p;
    }
    comparisons
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::examples;
    use crate::bench::verdict::RELAY_CASE;

    fn check(second: &[f64], injected_us: Option<u128>) -> SelfCheck {
        let first = [10.0, 10.2, 9.9, 10.1, 10.0, 9.8, 10.1, 10.0];
        let samples = [&first[..], second].map(|values| {
            let values = [(Variant::Inpod, values)];
            examples::report(&[Variant::Inpod], &[RELAY_CASE], &values).samples
        });
        SelfCheck {
            build: String::new(),
            environment: Environment::of_this_machine(),
            variant: Variant::Inpod,
            injected_us,
            rounds: 8,
            seconds_per_sample: 1,
            comparisons: compare(&[RELAY_CASE], &samples),
            samples,
            seconds_taken: 0.0,
        }
    }

    #[test]
    fn noise_is_no_difference_and_a_slower_lab_is_one() {
        let same = check(&[10.1, 10.0, 10.0, 9.9, 10.2, 10.0, 9.9, 10.1], None);
        assert!(same.passed(), "{same:?}");
        assert_eq!(same.comparisons.len(), 2, "there is no latency");
        let slower = [9.0, 9.1, 9.0, 9.2, 8.9, 9.0, 9.1, 9.0];
        let differs = check(&slower, None);
        assert!(!differs.passed() && differs.verdict().contains("DIFFERS"));
        assert!(
            check(&slower, Some(1000))
                .verdict()
                .starts_with("injected delay: detected")
        );
    }

    #[test]
    fn a_delayed_lab_that_is_faster_shows_no_delay() {
        let faster = check(
            &[11.0, 11.1, 11.0, 11.2, 10.9, 11.0, 11.1, 11.0],
            Some(1000),
        );
        assert!(!faster.passed() && faster.comparisons[0].differs());
    }
}
