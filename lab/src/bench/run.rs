//! One benchmark: a lab per variant, all standing at once, measured in turns.

use std::fs;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::accounting::{self, Cpu};
use super::case::{CLIENT, Case, Load, Path};
use super::counters::{self, Counters, ISTIOIN, ISTIOOUT};
use super::environment::Environment;
use super::interrupt::{self, Interrupted};
use super::load::{self, Servers};
use super::proof;
use super::report::{Ended, Report, Sample};
use super::variant::Variant;
use crate::standing::{self, Daemon, Progress, ScopedLab};
use crate::topology::{LabSpec, Overlay, Programs};

/// Seconds of the unmeasured run that each variant makes of each case.
const WARM_UP_SECONDS: u64 = 1;
/// Of a bulk stream with the flow `tunnel`, at least this share passes through `istioout` while it is measured.
const TUNNEL_SHARE: f64 = 0.95;
/// With the flow `hybrid`, at most this share. Retransmitted first packets count.
const HYBRID_SHARE: f64 = 0.01;

/// A benchmark as a user orders it.
#[derive(Debug, Clone)]
pub struct BenchSpec {
    /// Variants, in the order in which they are printed.
    pub variants: Vec<Variant>,
    /// Cases.
    pub cases: Vec<Case>,
    /// Rounds; in each one every variant is measured once in every case.
    pub rounds: usize,
    /// Seconds that one sample takes.
    pub seconds: u64,
    /// Overlay of the node capture.
    pub overlay: Overlay,
    /// The programs that are measured.
    pub programs: Programs,
    /// Where results.json goes.
    pub out: PathBuf,
    /// Version, profile and features of the programs, for the report.
    pub build: String,
}

/// A lab with its servers.
struct Stage {
    variant: Variant,
    // Servers end before the lab is removed: fields are dropped in this order.
    _servers: Vec<Servers>,
    lab: ScopedLab,
}

/// Runs a benchmark: labs, proofs and warm-up first, then the rounds. What was found until an error is in results.json all
/// the same.
///
/// # Errors
/// When a proof does not hold, a sample has errors or took another path than was proven, or a lab cannot be built;
/// [`Interrupted`] when [`interrupt::listen`] was told to end.
pub fn run(spec: &BenchSpec, progress: Progress<'_>) -> Result<Report> {
    if spec.variants.is_empty() || spec.cases.is_empty() || spec.rounds == 0 || spec.seconds == 0 {
        bail!("nothing to measure: want at least one variant, case, round and second");
    }
    fs::create_dir_all(&spec.out).with_context(|| format!("create {}", spec.out.display()))?;
    let started = Instant::now();
    let mut report = Report::new(spec, Environment::of_this_machine());
    report.store(&spec.out)?;
    let outcome = set_up(spec, &mut report, progress)
        .and_then(|stages| measure(spec, &stages, &mut report, started, progress));
    // A tool that was interrupted together with this process may have failed before the signal was noted here.
    let outcome = match interrupt::check() {
        Err(interrupted) => Err(interrupted.into()),
        Ok(()) => outcome,
    };
    report.ended = match &outcome {
        Ok(()) => Ended::Finished,
        Err(error) if error.is::<Interrupted>() => Ended::Interrupted,
        Err(error) => Ended::Failed(format!("{error:#}")),
    };
    report.seconds_taken = started.elapsed().as_secs_f64();
    report.store(&spec.out)?;
    outcome.map(|()| report)
}

/// Builds all labs at once, proves the path in each and warms it up.
fn set_up(spec: &BenchSpec, report: &mut Report, progress: Progress<'_>) -> Result<Vec<Stage>> {
    let paths: Vec<Path> = [Path::CrossNode, Path::SameNode]
        .into_iter()
        .filter(|path| spec.cases.iter().any(|case| case.path == *path))
        .collect();
    let built = in_parallel(&spec.variants, progress, |&variant, say| {
        let begun = Instant::now();
        let stage = Stage::new(variant, spec)?;
        say(format!(
            "{variant}: lab {} stands after {:.1} s",
            stage.lab.name(),
            begun.elapsed().as_secs_f64()
        ));
        Ok(stage)
    });
    let stages = built.into_iter().collect::<Result<Vec<_>>>()?;
    report.overlay = stages.iter().find_map(Stage::overlay);
    if let Some(stage) = stages.first() {
        report.environment.ask_pod(&stage.lab.netns(CLIENT)?);
    }

    // One after the other: packets must not be missed, and only what is proven is warmed up.
    for stage in &stages {
        for &path in &paths {
            interrupt::check()?;
            let proof = proof::prove(&stage.lab, stage.variant, path)
                .with_context(|| format!("proof of {} {path}", stage.variant))?;
            progress(&format!(
                "{} {path}: {}",
                stage.variant,
                if proof.holds() {
                    "proven"
                } else {
                    "NOT PROVEN"
                }
            ));
            report.proofs.push(proof);
        }
    }
    proof::require(&report.proofs)?;
    let warm = in_parallel(&stages, progress, |stage, _| {
        for case in &spec.cases {
            stage
                .sample(*case, WARM_UP_SECONDS, 0)
                .with_context(|| format!("warm-up of {} {case}", stage.variant))?;
        }
        Ok(())
    });
    warm.into_iter().collect::<Result<()>>()?;
    report.environment.ask_load();
    Ok(stages)
}

/// Does `work` for all items, each in a thread of its own; results are in the order of the items.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    progress: Progress<'_>,
    work: impl Fn(&T, &dyn Fn(String)) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    thread::scope(|scope| {
        let (sender, lines) = mpsc::channel();
        let work = &work;
        let threads: Vec<_> = items
            .iter()
            .map(|item| {
                let sender = sender.clone();
                // A line that nobody reads any more is not missed.
                scope.spawn(move || work(item, &|line| drop(sender.send(line))))
            })
            .collect();
        drop(sender);
        for line in lines {
            progress(&line);
        }
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
}

/// In which order variants are measured in a round: each one comes first, second and so on equally often, so that what a
/// machine does in the course of a minute favours none.
fn turns(round: usize, variants: usize) -> impl Iterator<Item = usize> {
    (0..variants).map(move |turn| (turn + round) % variants)
}

fn measure(
    spec: &BenchSpec,
    stages: &[Stage],
    report: &mut Report,
    started: Instant,
    progress: Progress<'_>,
) -> Result<()> {
    let begun = Instant::now();
    let steps = spec.rounds * spec.cases.len();
    for round in 0..spec.rounds {
        for (index, case) in spec.cases.iter().enumerate() {
            let mut line = Vec::new();
            for turn in turns(round, stages.len()) {
                interrupt::check()?;
                let stage = &stages[turn];
                let begun_seconds = started.elapsed().as_secs_f64();
                let mut sample = stage
                    .sample(*case, spec.seconds, round)
                    .with_context(|| format!("round {} of {} {case}", round + 1, stage.variant))?;
                sample.begun_seconds = begun_seconds;
                line.push(format!(
                    "{} {}",
                    stage.variant,
                    case.load.show(sample.value)
                ));
                report.samples.push(sample);
            }
            let done = round * spec.cases.len() + index + 1;
            let left = begun.elapsed().as_secs_f64() / done as f64 * (steps - done) as f64;
            progress(&format!(
                "round {}/{} {case}: {} {}; {left:.0} s to go",
                round + 1,
                spec.rounds,
                line.join(", "),
                case.load.unit(),
            ));
            report.seconds_taken = started.elapsed().as_secs_f64();
            report.store(&spec.out)?;
        }
    }
    Ok(())
}

impl Stage {
    fn new(variant: Variant, spec: &BenchSpec) -> Result<Self> {
        let lab_spec = variant.lab(LabSpec::unique_name(), spec.overlay, spec.programs.clone());
        let lab = standing::up(&lab_spec, &|_| {})?.scoped();
        let mut servers = Vec::new();
        for path in [Path::CrossNode, Path::SameNode] {
            let directory = lab.dir().join("servers").join(path.server());
            servers.push(Servers::start(&lab.netns(path.server())?, &directory)?);
        }
        let stage = Self {
            variant,
            _servers: servers,
            lab,
        };
        stage.wait_for_servers()?;
        Ok(stage)
    }

    /// Waits until all servers of all pods listen.
    fn wait_for_servers(&self) -> Result<()> {
        let wanted = [load::BULK_PORT, crate::topology::APPLICATION_PORT];
        let deadline = Instant::now() + Duration::from_secs(10);
        for path in [Path::CrossNode, Path::SameNode] {
            let netns = self.lab.netns(path.server())?;
            while !load::listening(&netns, &wanted)? {
                interrupt::check()?;
                if Instant::now() > deadline {
                    bail!(
                        "the servers in {} do not all listen on {wanted:?} after 10 s",
                        path.server()
                    );
                }
                thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    /// The overlay device that this lab uses, if it uses one.
    fn overlay(&self) -> Option<String> {
        let netns = self.lab.netns("node1").ok()?;
        let text = load::output_of(
            &netns,
            "ip",
            &["-d", "-j", "link", "show", "istioout"],
            Duration::from_secs(5),
        )
        .ok()?;
        let json: serde_json::Value = serde_json::from_str(&text).ok()?;
        json[0]["linkinfo"]["info_kind"].as_str().map(str::to_owned)
    }

    fn proxies(&self) -> Result<Cpu> {
        let mut sum = Cpu::default();
        if self.variant != Variant::None {
            for node in [1, 2] {
                let proxy = self
                    .lab
                    .process(node, Daemon::Proxy)
                    .with_context(|| format!("proxy{node} does not run"))?;
                sum = sum.plus(accounting::process(proxy.pid)?);
            }
        }
        Ok(sum)
    }

    /// Counters of the overlay: `istioout` on the client's node, `istioin` on the server's.
    fn overlays(&self, path: Path) -> Result<[Counters; 2]> {
        let server = match path {
            Path::CrossNode => "node2",
            Path::SameNode => "node1",
        };
        Ok([
            counters::of(&self.lab.netns("node1")?, ISTIOOUT)?,
            counters::of(&self.lab.netns(server)?, ISTIOIN)?,
        ])
    }

    fn sample(&self, case: Case, seconds: u64, round: usize) -> Result<Sample> {
        let topology = self.lab.topology();
        let (_, server) = topology
            .pod(case.path.server())
            .context("the lab has no server pod")?;
        let client = self.lab.netns(CLIENT)?;
        let overlays = self.overlays(case.path)?;
        let (machine, stolen) = (accounting::machine()?, accounting::stolen()?);
        let (proxies, before) = (self.proxies()?, Instant::now());
        let measured = load::run(case.load, &client, server.ip, seconds)?;
        let sample = Sample {
            variant: self.variant,
            case,
            round,
            begun_seconds: 0.0,
            value: measured.value,
            work: measured.work,
            latency_us: measured.latency_us,
            proxies_cpu: self.proxies()?.since(proxies),
            machine_cpu: accounting::machine()?.since(machine),
            stolen_seconds: accounting::stolen()? - stolen,
            wall_seconds: before.elapsed().as_secs_f64(),
            overlays: {
                let after = self.overlays(case.path)?;
                [after[0].since(overlays[0]), after[1].since(overlays[1])]
            },
        };
        if measured.errors > 0 {
            bail!(
                "{} of {} requests failed: a sample with errors is none",
                measured.errors,
                measured.work
            );
        }
        took_the_path(&sample)?;
        Ok(sample)
    }
}

/// Whether what was measured took the path that was proven before, as far as can be told without touching the load.
fn took_the_path(sample: &Sample) -> Result<()> {
    let [istioout, _] = sample.overlays;
    if sample.variant != Variant::None && sample.proxies_cpu.total() == 0.0 {
        bail!("the proxies used no CPU: the load did not pass through them");
    }
    if !sample.variant.is_node() {
        if sample.overlays != [Counters::default(); 2] {
            bail!("packets passed through the overlay: {:?}", sample.overlays);
        }
    } else if istioout.tx_packets == 0 {
        bail!("no packet passed through istioout");
    }
    if sample.case.load == Load::Bulk {
        let share = istioout.tx_bytes as f64 / sample.work;
        let wrong = match sample.variant {
            Variant::NodeTunnel => share < TUNNEL_SHARE,
            Variant::NodeHybrid => share > HYBRID_SHARE,
            Variant::None | Variant::Relay | Variant::Inpod => false,
        };
        if wrong {
            bail!(
                "{:.2} % of the bytes passed through istioout, which is not the flow that was proven",
                share * 100.0
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_measured_at_every_turn_equally_often() {
        let mut seen = [[0; 4]; 4];
        for round in 0..8 {
            for (turn, variant) in turns(round, 4).enumerate() {
                seen[variant][turn] += 1;
            }
        }
        assert_eq!(seen, [[2; 4]; 4]);
    }

    #[test]
    fn a_sample_that_took_another_path_is_refused() {
        let sample = |variant, tx_bytes: u64, cpu| Sample {
            variant,
            case: Case {
                path: Path::CrossNode,
                load: Load::Bulk,
            },
            round: 0,
            begun_seconds: 0.0,
            value: 1.0,
            work: 1e9,
            latency_us: None,
            proxies_cpu: Cpu {
                user: cpu,
                ..Cpu::default()
            },
            machine_cpu: Cpu::default(),
            stolen_seconds: 0.0,
            wall_seconds: 1.0,
            overlays: [
                Counters {
                    tx_bytes,
                    tx_packets: tx_bytes.min(1),
                    ..Counters::default()
                },
                Counters::default(),
            ],
        };
        let fine = |variant, tx_bytes, cpu| took_the_path(&sample(variant, tx_bytes, cpu)).is_ok();
        assert!(fine(Variant::None, 0, 0.0) && !fine(Variant::None, 1, 0.0));
        assert!(fine(Variant::Inpod, 0, 1.0) && !fine(Variant::Inpod, 0, 0.0));
        assert!(fine(Variant::NodeHybrid, 1_000, 1.0));
        assert!(
            !fine(Variant::NodeHybrid, 1_000_000_000, 1.0) && !fine(Variant::NodeHybrid, 0, 1.0)
        );
        assert!(fine(Variant::NodeTunnel, 1_010_000_000, 1.0));
        assert!(!fine(Variant::NodeTunnel, 1_000, 1.0));
    }
}
