//! Results: results.json with every sample, and the table that is printed.

use std::path::Path as FilePath;
use std::process::Command;

use anyhow::{Context, Result};
use comfy_table::{CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use super::accounting::Cpu;
use super::case::{Case, Load};
use super::proof::Proof;
use super::run::BenchSpec;
use super::statistics::Summary;
use super::variant::Variant;

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
    /// Result in the case's unit.
    pub value: f64,
    /// Work done: bytes or requests.
    pub work: f64,
    /// Latency at the 50th and 99th percentile, in microseconds.
    pub latency_us: Option<(f64, f64)>,
    /// CPU time of both proxies, in seconds. Work of the kernel in interrupts is not in it.
    pub proxies_cpu: Cpu,
    /// CPU time of the whole machine, in seconds.
    pub machine_cpu: Cpu,
    /// Time that the sample took, in seconds.
    pub wall_seconds: f64,
}

impl Sample {
    /// Work in the units that CPU time is divided by: GB, or thousands.
    fn work_units(&self) -> f64 {
        self.work
            / if self.case.load == Load::Bulk {
                1e9
            } else {
                1e3
            }
    }
}

/// Where and with what it was measured.
#[derive(Debug, Clone, Serialize)]
pub struct Environment {
    /// Kernel release.
    pub kernel: String,
    /// Processor model.
    pub processor: String,
    /// Processors.
    pub processors: usize,
    /// Version of ambidex.
    pub ambidex: String,
    /// Versions of the tools that made the load.
    pub tools: Vec<String>,
    /// TCP congestion control in force.
    pub congestion_control: String,
}

impl Environment {
    /// Asks this machine.
    pub fn of_this_machine() -> Self {
        let read = |path: &str| {
            std::fs::read_to_string(path)
                .unwrap_or_default()
                .trim()
                .to_owned()
        };
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| {
                line.strip_prefix("model name")
                    .and_then(|rest| rest.split_once(": "))
            })
            .map(|(_, name)| name.to_owned())
            .unwrap_or_default();
        let first_line = |program: &str, argument: &str| {
            let output = Command::new(program).arg(argument).output().ok()?;
            let text = [output.stdout, output.stderr].concat();
            Some(
                String::from_utf8_lossy(&text)
                    .lines()
                    .next()?
                    .trim()
                    .to_owned(),
            )
        };
        Self {
            kernel: read("/proc/sys/kernel/osrelease"),
            processor,
            processors: std::thread::available_parallelism().map_or(0, usize::from),
            ambidex: env!("CARGO_PKG_VERSION").to_owned(),
            tools: [
                ("iperf3", "--version"),
                ("wrk", "--version"),
                ("nginx", "-v"),
                ("tcpdump", "--version"),
            ]
            .into_iter()
            .filter_map(|(program, argument)| first_line(program, argument))
            .collect(),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control"),
        }
    }
}

/// All that a benchmark found.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Format of this file; raised when a field changes its meaning.
    pub format: u32,
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
    /// Overlay device of the node capture: geneve or vxlan.
    pub overlay: Option<String>,
    /// Proofs of the path.
    pub proofs: Vec<Proof>,
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
            environment,
            variants: spec.variants.clone(),
            cases: spec.cases.clone(),
            rounds: spec.rounds,
            seconds_per_sample: spec.seconds,
            overlay: None,
            proofs: Vec::new(),
            samples: Vec::new(),
            seconds_taken: 0.0,
        }
    }

    /// Writes results.json, at once or not at all.
    pub fn store(&self, directory: &FilePath) -> Result<()> {
        let path = directory.join(RESULTS);
        let temporary = path.with_extension("json.tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(self)?)
            .and_then(|()| std::fs::rename(&temporary, &path))
            .with_context(|| format!("write {}", path.display()))
    }

    fn of(&self, variant: Variant, case: Case) -> Vec<&Sample> {
        self.samples
            .iter()
            .filter(|sample| sample.variant == variant && sample.case == case)
            .collect()
    }

    /// Median of a variant relative to the median of no mesh in the same case.
    fn ratio(&self, variant: Variant, case: Case) -> Option<f64> {
        let median = |variant| {
            let values: Vec<f64> = self
                .of(variant, case)
                .iter()
                .map(|sample| sample.value)
                .collect();
            Summary::of(&values).map(|summary| summary.median)
        };
        Some(median(variant)? / median(Variant::None)?)
    }

    /// The table: one row per case and variant.
    pub fn table(&self) -> Table {
        let mut table = Table::new();
        table
            .load_style(presets::NOTHING)
            .set_content_arrangement(ContentArrangement::Disabled);
        table.set_header([
            "CASE",
            "VARIANT",
            "MEDIAN",
            "MIN-MAX",
            "UNIT",
            "OF NONE",
            "PROXIES' CPU s",
            "MACHINE'S CPU s",
            "PER",
        ]);
        for &case in &self.cases {
            for &variant in &self.variants {
                let samples = self.of(variant, case);
                let summary = |value: &dyn Fn(&Sample) -> f64| {
                    Summary::of(
                        &samples
                            .iter()
                            .map(|sample| value(sample))
                            .collect::<Vec<_>>(),
                    )
                };
                let Some(value) = summary(&|sample| sample.value) else {
                    continue;
                };
                let number = |summary: Option<Summary>| {
                    summary.map_or_else(String::new, |s| format!("{:.3}", s.median))
                };
                let digits = if case.load == Load::Bulk { 2 } else { 0 };
                let proxies = (variant != Variant::None)
                    .then(|| summary(&|sample| sample.proxies_cpu.total() / sample.work_units()))
                    .flatten();
                table.add_row([
                    case.to_string(),
                    variant.to_string(),
                    format!("{:.digits$}", value.median),
                    format!("{:.digits$}-{:.digits$}", value.min, value.max),
                    case.load.unit().to_owned(),
                    self.ratio(variant, case)
                        .map_or_else(String::new, |ratio| format!("{ratio:.2}")),
                    number(proxies),
                    number(summary(&|sample| {
                        sample.machine_cpu.total() / sample.work_units()
                    })),
                    case.load.work_unit().to_owned(),
                ]);
            }
        }
        for column in [2, 3, 5, 6, 7] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::Path;

    #[test]
    fn medians_and_ratios_come_from_the_samples() {
        let case = Case {
            path: Path::CrossNode,
            load: Load::Bulk,
        };
        let spec = BenchSpec {
            variants: vec![Variant::None, Variant::Inpod],
            cases: vec![case],
            rounds: 3,
            seconds: 1,
            overlay: crate::topology::Overlay::Auto,
            programs: crate::topology::Programs::beside(FilePath::new("/x/ambidex")),
            out: "/x".into(),
        };
        let mut report = Report::new(&spec, Environment::of_this_machine());
        for (variant, values) in [
            (Variant::None, [10.0, 12.0, 8.0]),
            (Variant::Inpod, [4.0, 5.0, 99.0]),
        ] {
            for (round, value) in values.into_iter().enumerate() {
                report.samples.push(Sample {
                    variant,
                    case,
                    round,
                    value,
                    work: 2e9,
                    latency_us: None,
                    proxies_cpu: Cpu {
                        user: 1.0,
                        system: 2.0,
                        interrupts: 0.0,
                    },
                    machine_cpu: Cpu {
                        user: 4.0,
                        system: 2.0,
                        interrupts: 2.0,
                    },
                    wall_seconds: 1.0,
                });
            }
        }
        assert_eq!(report.ratio(Variant::Inpod, case), Some(0.5));
        let text = report.table().to_string();
        let line = text.lines().find(|line| line.contains("inpod")).unwrap();
        for part in ["5.00", "4.00-99.00", "0.50", "1.500", "4.000"] {
            assert!(line.contains(part), "{part} in {line}");
        }
    }
}
