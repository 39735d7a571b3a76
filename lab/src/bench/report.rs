//! Results: results.json with every sample.

use std::collections::BTreeMap;
use std::path::Path as FilePath;

use anyhow::{Context, Result};
use serde::Serialize;

use super::accounting::Cpu;
use super::case::Case;
use super::counters::Counters;
use super::environment::Environment;
use super::load::Latency;
use super::proof::Proof;
use super::run::BenchSpec;
use super::statistics::Summary;
use super::variant::Variant;
use crate::topology::Overlay;

/// Name of the results file.
pub const RESULTS: &str = "results.json";

/// One measurement.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// Variant.
    pub variant: Variant,
    /// Case.
    pub case: Case,
    /// Round, from 0.
    pub round: usize,
    /// When it began, in seconds after the benchmark did.
    pub begun_seconds: f64,
    /// Result in the case's unit.
    pub value: f64,
    /// Work done: bytes or requests.
    pub work: f64,
    /// Latency, where the case has one.
    pub latency_us: Option<Latency>,
    /// Numbers that the case has beyond these, with their unit in the name.
    pub extra: BTreeMap<String, f64>,
    /// CPU time of both proxies, in seconds. Work of the kernel in interrupts is not in it.
    pub proxies_cpu: Cpu,
    /// CPU time of the whole machine, in seconds: clients and servers, too.
    pub machine_cpu: Cpu,
    /// Time that the hypervisor gave to others, in seconds over all processors.
    pub stolen_seconds: f64,
    /// Time that the sample took, in seconds.
    pub wall_seconds: f64,
    /// What passed through `istioout` on the client's node and `istioin` on the server's node meanwhile.
    pub overlays: [Counters; 2],
}

impl Sample {
    /// Work in the units that CPU time is divided by: GB, or thousands.
    fn work_units(&self) -> f64 {
        self.work / self.case.load.work_unit_size()
    }
}

/// How a benchmark ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// Not yet, or it was killed: samples are those up to the last round that is complete.
    Running,
    /// With everything measured.
    Finished,
    /// By a signal.
    Interrupted,
    /// With this error.
    Failed(String),
}

/// What the samples of a variant in a case come to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Line {
    /// Case.
    pub case: Case,
    /// Variant.
    pub variant: Variant,
    /// Number of samples.
    pub samples: usize,
    /// In the case's unit.
    pub value: Summary,
    /// Median relative to the median of no mesh in the same case.
    pub ratio_to_none: Option<f64>,
    /// Medians of the samples' percentiles of latency.
    pub latency_us: Option<Latency>,
    /// CPU seconds of the proxies per GB, or per 1,000 operations.
    pub proxies_cpu: Option<Summary>,
    /// CPU seconds of the machine per GB, or per 1,000 operations.
    pub machine_cpu: Summary,
}

/// All that a benchmark found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Format of this file; raised when a field changes its meaning.
    pub format: u32,
    /// Version, profile and features of ambidex.
    pub build: String,
    /// How it ended. What is here is true in any case, but complete only if it finished.
    pub ended: Ended,
    /// Environment.
    pub environment: Environment,
    /// Variants, in order.
    pub variants: Vec<Variant>,
    /// Cases, in order.
    pub cases: Vec<Case>,
    /// Rounds ordered.
    pub rounds: usize,
    /// Seconds of one sample.
    pub seconds_per_sample: u64,
    /// Overlay that was ordered: auto takes geneve if the kernel has it.
    pub overlay_ordered: Overlay,
    /// Overlay device of the node capture: geneve or vxlan. None when no variant has one.
    pub overlay: Option<String>,
    /// Proofs of the path.
    pub proofs: Vec<Proof>,
    /// Medians and ranges, one line per case and variant.
    pub summary: Vec<Line>,
    /// Every sample, in the order of measuring.
    pub samples: Vec<Sample>,
    /// Time that everything took.
    pub seconds_taken: f64,
}

impl Report {
    /// A report without samples.
    pub fn new(spec: &BenchSpec, environment: Environment) -> Self {
        Self {
            format: 1,
            build: spec.build.clone(),
            ended: Ended::Running,
            environment,
            variants: spec.variants.clone(),
            cases: spec.cases.clone(),
            rounds: spec.rounds,
            seconds_per_sample: spec.seconds,
            overlay_ordered: spec.overlay,
            overlay: None,
            proofs: Vec::new(),
            summary: Vec::new(),
            samples: Vec::new(),
            seconds_taken: 0.0,
        }
    }

    /// Writes results.json, at once or not at all, with the summary of what has been measured.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&mut self, directory: &FilePath) -> Result<()> {
        self.summary = self.summarize();
        let path = directory.join(RESULTS);
        let temporary = path.with_extension("json.tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    fn of(&self, variant: &Variant, case: Case) -> Vec<&Sample> {
        self.samples
            .iter()
            .filter(|sample| sample.variant == *variant && sample.case == case)
            .collect()
    }

    /// One line per case and variant that has samples.
    pub fn summarize(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for &case in &self.cases {
            let none = summary(&self.of(&Variant::None, case), |sample| Some(sample.value));
            for variant in &self.variants {
                let samples = self.of(variant, case);
                let per_unit = |cpu: fn(&Sample) -> Cpu| {
                    summary(&samples, |sample| {
                        Some(cpu(sample).total() / sample.work_units())
                    })
                };
                let (Some(value), Some(machine_cpu)) = (
                    summary(&samples, |sample| Some(sample.value)),
                    per_unit(|sample| sample.machine_cpu),
                ) else {
                    continue;
                };
                let latency = |percentile: fn(Latency) -> Option<f64>| {
                    summary(&samples, |sample| percentile(sample.latency_us?))
                        .map(|percentiles| percentiles.median)
                };
                lines.push(Line {
                    case,
                    variant: variant.clone(),
                    samples: samples.len(),
                    value,
                    ratio_to_none: none.map(|none| value.median / none.median),
                    latency_us: latency(|latency| Some(latency.p50))
                        .zip(latency(|latency| Some(latency.p99)))
                        .map(|(p50, p99)| Latency {
                            p50,
                            p99,
                            p999: latency(|latency| latency.p999),
                        }),
                    proxies_cpu: (*variant != Variant::None)
                        .then(|| per_unit(|sample| sample.proxies_cpu))
                        .flatten(),
                    machine_cpu,
                });
            }
        }
        lines
    }
}

fn summary(samples: &[&Sample], value: impl Fn(&Sample) -> Option<f64>) -> Option<Summary> {
    let values: Option<Vec<f64>> = samples.iter().map(|sample| value(sample)).collect();
    Summary::of(&values?)
}
