//! What the samples come to: one line per case and variant, and what a reader must know of each.

use serde::{Deserialize, Serialize};

use super::accounting::Cpu;
use super::case::Case;
use super::load::Latency;
use super::report::{Report, Sample};
use super::statistics::bootstrap;
use super::statistics::drift::{self, drift};
use super::statistics::{Estimate, Summary};
use super::variant::Variant;

/// Others that had more than this share of the processors during a sample make it doubtful.
pub const FOREIGN_LIMIT: f64 = 0.05;

/// A variant relative to another one in the same case: medians over the rounds, intervals over pairs of the same round.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Relative {
    /// Of the main result.
    pub value: Estimate,
    /// Of the proxies' CPU time per unit of work; none where one of the two has no proxies.
    pub proxies_cpu: Option<Estimate>,
    /// Of the machine's CPU time per unit of work.
    pub machine_cpu: Option<Estimate>,
}

/// What the samples of a variant in a case come to.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Case.
    pub case: Case,
    /// Variant.
    pub variant: Variant,
    /// Number of samples.
    pub samples: usize,
    /// In the case's unit.
    pub value: Summary,
    /// Relative to no mesh.
    pub of_none: Option<Relative>,
    /// Relative to the relay, the bound.
    pub of_relay: Option<Relative>,
    /// Medians of the samples' percentiles of latency.
    pub latency_us: Option<Latency>,
    /// CPU seconds of the proxies per GB, or per 1,000 operations.
    pub proxies_cpu: Option<Summary>,
    /// CPU seconds of the machine per GB, or per 1,000 operations.
    pub machine_cpu: Summary,
    /// By which share the second half of the rounds differs from the first; none with few rounds.
    pub drift: Option<f64>,
    /// Largest share of the processors that others had during a sample.
    pub foreign: f64,
    /// Largest share of the processors that the hypervisor took away during a sample.
    pub stolen: f64,
}

/// The series that a case's drift is judged by: no mesh, or the first variant where that was not measured.
pub fn baseline(report: &Report) -> Option<&Variant> {
    let none = report.variants.iter().find(|v| **v == Variant::None);
    none.or(report.variants.first())
}

/// A case in which the baseline itself was not the same at the end as at the beginning, with its drift.
pub fn drifted(report: &Report) -> Vec<(Case, f64)> {
    let Some(baseline) = baseline(report) else {
        return Vec::new();
    };
    let lines = report
        .summary
        .iter()
        .filter(|line| line.variant == *baseline);
    lines
        .filter_map(|line| Some((line.case, line.drift?)))
        .filter(|(_, drift)| drift.abs() > drift::LIMIT)
        .collect()
}

/// One line per case and variant that has samples.
pub fn summarize(report: &Report) -> Vec<Line> {
    let processors = report.environment.processors.max(1) as f64;
    let mut lines = Vec::new();
    for &case in &report.cases {
        let none = report.of(&Variant::None, case);
        let relay = report.of(&Variant::Relay, case);
        for variant in &report.variants {
            let mut samples = report.of(variant, case);
            samples.sort_by_key(|sample| sample.round);
            let (Some(value), Some(machine_cpu)) = (
                summary(&samples, |sample| Some(sample.value)),
                summary(&samples, |sample| {
                    Some(per_unit(sample, sample.machine_cpu))
                }),
            ) else {
                continue;
            };
            let latency = |percentile: fn(Latency) -> Option<f64>| {
                summary(&samples, |sample| percentile(sample.latency_us?))
                    .map(|percentiles| percentiles.median)
            };
            let largest = |seconds: fn(&Sample) -> f64| {
                let shares = samples
                    .iter()
                    .map(|sample| seconds(sample) / (sample.wall_seconds * processors));
                shares.fold(0.0, f64::max)
            };
            let values: Vec<f64> = samples.iter().map(|sample| sample.value).collect();
            lines.push(Line {
                case,
                variant: variant.clone(),
                samples: samples.len(),
                value,
                of_none: relative(&samples, &none),
                of_relay: relative(&samples, &relay),
                latency_us: latency(|latency| Some(latency.p50))
                    .zip(latency(|latency| Some(latency.p99)))
                    .map(|(p50, p99)| Latency {
                        p50,
                        p99,
                        p999: latency(|latency| latency.p999),
                    }),
                proxies_cpu: (*variant != Variant::None)
                    .then(|| summary(&samples, |s| Some(per_unit(s, s.proxies_cpu))))
                    .flatten(),
                machine_cpu,
                drift: drift(&values),
                foreign: largest(|sample| sample.foreign_seconds),
                stolen: largest(|sample| sample.stolen_seconds),
            });
        }
    }
    lines
}

/// CPU seconds per GB, or per thousand operations.
pub fn per_unit(sample: &Sample, cpu: Cpu) -> f64 {
    cpu.total() / (sample.work / sample.case.load.work_unit_size())
}

fn relative(samples: &[&Sample], others: &[&Sample]) -> Option<Relative> {
    let pairs = |number: fn(&Sample) -> f64| -> Vec<(f64, f64)> {
        let of_round = |round| others.iter().find(|other| other.round == round);
        samples
            .iter()
            .filter_map(|sample| Some((number(sample), number(of_round(sample.round)?))))
            .collect()
    };
    Some(Relative {
        value: bootstrap::ratio(&pairs(|sample| sample.value))?,
        proxies_cpu: bootstrap::ratio(&pairs(|sample| per_unit(sample, sample.proxies_cpu))),
        machine_cpu: bootstrap::ratio(&pairs(|sample| per_unit(sample, sample.machine_cpu))),
    })
}

fn summary(samples: &[&Sample], value: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
    let values: Option<Vec<f64>> = samples.iter().map(|sample| value(sample)).collect();
    Summary::of(&values?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::examples;
    use crate::bench::verdict::RELAY_CASE;

    #[test]
    fn ratios_are_of_the_same_rounds_and_have_intervals() {
        let report = examples::report(
            &[Variant::None, Variant::Relay, Variant::Inpod],
            &[RELAY_CASE],
            &[
                // The machine halves its speed in the last two rounds.
                (Variant::None, &[10.0, 10.0, 5.0, 5.0]),
                (Variant::Relay, &[8.0, 8.0, 4.0, 4.0]),
                (Variant::Inpod, &[4.0, 4.0, 2.0, 2.0]),
            ],
        );
        let lines = summarize(&report);
        let inpod = &lines[2];
        let of_none = inpod.of_none.unwrap();
        assert_eq!(of_none.value.value, 0.4);
        let [low, high] = of_none.value.interval.unwrap();
        assert!((low - 0.4).abs() < 1e-9 && (high - 0.4).abs() < 1e-9);
        assert_eq!(of_none.proxies_cpu, None, "no mesh has no proxies");
        let of_relay = inpod.of_relay.unwrap();
        assert_eq!(of_relay.value.value, 0.5);
        assert_eq!(of_relay.proxies_cpu.unwrap().value, 1.0);
        assert_eq!(lines[0].drift, Some(-0.5));
        let mut report = report;
        report.summary = lines;
        assert_eq!(drifted(&report), [(RELAY_CASE, -0.5)]);
    }

    #[test]
    fn work_of_others_is_a_share_of_all_processors() {
        let mut report = examples::report(
            &[Variant::None],
            &[RELAY_CASE],
            &[(Variant::None, &[10.0, 10.0])],
        );
        report.environment.processors = 2;
        report.samples[1].foreign_seconds = 0.5;
        report.samples[0].stolen_seconds = 0.2;
        let line = &summarize(&report)[0];
        assert_eq!((line.foreign, line.stolen), (0.25, 0.1));
    }
}
