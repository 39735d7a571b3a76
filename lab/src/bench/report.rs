//! Results: results.json with every sample.

use std::collections::BTreeMap;
use std::path::Path as FilePath;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::accounting::Cpu;
use super::case::Case;
use super::counters::Counters;
use super::environment::Environment;
use super::equality::Property;
use super::load::Latency;
use super::proof::Proof;
use super::resume;
use super::run::BenchSpec;
use super::summary::{Line, summarize};
use super::variant::Variant;
use crate::topology::Overlay;

/// Name of the results file.
pub const RESULTS: &str = "results.json";
/// Format of the results file.
pub const FORMAT: u32 = 2;

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
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
    /// CPU time of processes that are not the benchmark's, in seconds over all processors; a lower bound.
    pub foreign_seconds: f64,
    /// Time that the hypervisor gave to others, in seconds over all processors.
    pub stolen_seconds: f64,
    /// Time that the sample took, in seconds.
    pub wall_seconds: f64,
    /// What passed through `istioout` on the client's node and `istioin` on the server's node meanwhile.
    pub overlays: [Counters; 2],
}

/// How a benchmark ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ended {
    /// Not yet, or it was killed: samples are those up to the last round that is complete.
    Running,
    /// With everything measured.
    Finished,
    /// By a signal.
    Interrupted,
    /// With this error, or with something missing.
    Failed(String),
    /// With everything measured, on a machine that could not tell.
    Void(String),
}

/// All that a benchmark found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Format of this file; raised when a field changes its meaning.
    pub format: u32,
    /// Version, profile and features of ambidex.
    pub build: String,
    /// Digest of the program that was measured: a benchmark is not continued by another one.
    pub program: String,
    /// Runs that this was measured in: one, and one for each time that it was continued.
    pub sessions: u32,
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
    /// What was equal between the variants, and what was not.
    pub equality: Vec<Property>,
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
            format: FORMAT,
            build: spec.build.clone(),
            program: resume::digest(&spec.programs.ambidex),
            sessions: 1,
            ended: Ended::Running,
            environment,
            variants: spec.variants.clone(),
            cases: spec.cases.clone(),
            rounds: spec.rounds,
            seconds_per_sample: spec.seconds,
            overlay_ordered: spec.overlay,
            overlay: None,
            equality: Vec::new(),
            proofs: Vec::new(),
            summary: Vec::new(),
            samples: Vec::new(),
            seconds_taken: 0.0,
        }
    }

    /// Reads a results file.
    ///
    /// # Errors
    /// When it cannot be read, or has another format.
    pub fn load(file: &FilePath) -> Result<Self> {
        let text = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        let of_any: serde_json::Value = serde_json::from_slice(&text)
            .with_context(|| format!("{} is not JSON", file.display()))?;
        let format = &of_any["format"];
        if *format != FORMAT {
            bail!(
                "{} has format {format}, this program reads {FORMAT}",
                file.display()
            );
        }
        serde_json::from_value(of_any)
            .with_context(|| format!("{} is not a report of a benchmark", file.display()))
    }

    /// Writes results.json, at once or not at all, with the summary of what has been measured.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn store(&mut self, directory: &FilePath) -> Result<()> {
        self.summary = summarize(self);
        let path = directory.join(RESULTS);
        let temporary = path.with_extension("json.tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    /// Samples of a variant in a case, in the order of measuring.
    pub fn of(&self, variant: &Variant, case: Case) -> Vec<&Sample> {
        self.samples
            .iter()
            .filter(|sample| sample.variant == *variant && sample.case == case)
            .collect()
    }
}

#[cfg(test)]
pub(crate) mod examples;
