//! One benchmark: a lab per variant, all standing at once, measured in turns.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::accounting::{self, Cpu};
use super::case::{CLIENT, Case, Path};
use super::load::{self, Running, Servers};
use super::proof::{self, PROOF_PORT, Proof, Scene};
use super::report::{Environment, Report, Sample};
use super::variant::Variant;
use crate::standing::{self, Daemon, Progress, ScopedLab};
use crate::topology::{LabSpec, Overlay, Programs};
use crate::traffic::TrafficCommand;

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
}

/// A lab with its servers.
struct Stage {
    variant: Variant,
    // Servers end before the lab is removed: fields are dropped in this order.
    _servers: Vec<Servers>,
    _traffic: Vec<Running>,
    lab: ScopedLab,
}

/// Runs a benchmark: proofs first, then the rounds. A proof that does not hold, or a sample with errors, is an error; what
/// was measured until then is in results.json all the same.
pub fn run(spec: &BenchSpec, progress: Progress<'_>) -> Result<Report> {
    if spec.variants.is_empty() || spec.cases.is_empty() || spec.rounds == 0 || spec.seconds == 0 {
        bail!("nothing to measure: want at least one variant, case, round and second");
    }
    fs::create_dir_all(&spec.out).with_context(|| format!("create {}", spec.out.display()))?;
    let started = Instant::now();
    let mut report = Report::new(spec, Environment::of_this_machine());

    let mut stages = Vec::new();
    for &variant in &spec.variants {
        progress(&format!("lab for {variant}: building"));
        stages.push(Stage::new(variant, spec, progress)?);
    }
    report.overlay = stages.iter().find_map(Stage::overlay);

    let outcome = prove(spec, &stages, &mut report, progress)
        .and_then(|()| measure(spec, &stages, &mut report, started, progress));
    report.seconds_taken = started.elapsed().as_secs_f64();
    report.store(&spec.out)?;
    outcome?;
    Ok(report)
}

fn prove(
    spec: &BenchSpec,
    stages: &[Stage],
    report: &mut Report,
    progress: Progress<'_>,
) -> Result<()> {
    let paths: Vec<Path> = [Path::CrossNode, Path::SameNode]
        .into_iter()
        .filter(|path| spec.cases.iter().any(|c| c.path == *path))
        .collect();
    for stage in stages {
        for &path in &paths {
            let proof = stage
                .prove(spec, path)
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
    proof::require(&report.proofs)
}

fn measure(
    spec: &BenchSpec,
    stages: &[Stage],
    report: &mut Report,
    started: Instant,
    progress: Progress<'_>,
) -> Result<()> {
    for stage in stages {
        for case in &spec.cases {
            // Opens tunnels, fills caches, starts the worker's CPU.
            stage
                .sample(*case, 1, 0)
                .with_context(|| format!("warm-up of {} {case}", stage.variant))?;
        }
    }
    let begun = Instant::now();
    for round in 0..spec.rounds {
        for case in &spec.cases {
            for turn in 0..stages.len() {
                let stage = &stages[(turn + round) % stages.len()];
                let sample = stage
                    .sample(*case, spec.seconds, round)
                    .with_context(|| format!("round {round} of {} {case}", stage.variant))?;
                report.samples.push(sample);
            }
        }
        let done = (round + 1) as f64 / spec.rounds as f64;
        let left = Duration::from_secs_f64(begun.elapsed().as_secs_f64() * (1.0 - done) / done);
        progress(&format!(
            "round {} of {} done after {} s, about {} s to go",
            round + 1,
            spec.rounds,
            started.elapsed().as_secs(),
            left.as_secs()
        ));
        report.store(&spec.out)?;
    }
    Ok(())
}

impl Stage {
    fn new(variant: Variant, spec: &BenchSpec, progress: Progress<'_>) -> Result<Self> {
        let lab_spec = variant.lab(LabSpec::unique_name(), spec.overlay, spec.programs.clone());
        let lab = standing::up(&lab_spec, progress)?.scoped();
        let mut servers = Vec::new();
        let mut traffic = Vec::new();
        for path in [Path::CrossNode, Path::SameNode] {
            let netns = lab.netns(path.server())?;
            servers.push(Servers::start(
                &netns,
                &lab.dir().join("servers").join(path.server()),
            )?);
            let ambidex = spec
                .programs
                .ambidex
                .to_str()
                .context("the path of the program is not UTF-8")?;
            let command = TrafficCommand::server(PROOF_PORT).to_json()?;
            traffic.push(Running::start(
                &netns,
                ambidex,
                &["lab", "traffic", &command],
            )?);
        }
        let stage = Self {
            variant,
            _servers: servers,
            _traffic: traffic,
            lab,
        };
        stage.wait_for_servers()?;
        Ok(stage)
    }

    /// Waits until all servers of all pods listen.
    fn wait_for_servers(&self) -> Result<()> {
        let wanted = [
            load::BULK_PORT,
            crate::topology::APPLICATION_PORT,
            PROOF_PORT,
        ];
        let deadline = Instant::now() + Duration::from_secs(10);
        for path in [Path::CrossNode, Path::SameNode] {
            let netns = self.lab.netns(path.server())?;
            while !listening(&netns, &wanted)? {
                if Instant::now() > deadline {
                    bail!(
                        "the servers in {} do not all listen on {wanted:?} after 10 s",
                        path.server()
                    );
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(())
    }

    fn prove(&self, spec: &BenchSpec, path: Path) -> Result<Proof> {
        Scene {
            topology: &self.lab.topology(),
            ambidex: &spec.programs.ambidex,
            directory: self.lab.dir().join("captures"),
        }
        .prove(self.variant, path)
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

    fn sample(&self, case: Case, seconds: u64, round: usize) -> Result<Sample> {
        let topology = self.lab.topology();
        let (_, server) = topology
            .pod(case.path.server())
            .context("the lab has no server pod")?;
        let client = self.lab.netns(CLIENT)?;
        let (machine, proxies, before) = (accounting::machine()?, self.proxies()?, Instant::now());
        let measured = load::run(case.load, &client, server.ip, seconds)?;
        let (proxies, machine) = (
            self.proxies()?.since(proxies),
            accounting::machine()?.since(machine),
        );
        if measured.errors > 0 {
            bail!(
                "{} requests failed: a sample with errors is none",
                measured.errors
            );
        }
        Ok(Sample {
            variant: self.variant,
            case,
            round,
            value: measured.value,
            work: measured.work,
            latency_us: measured.latency_us,
            proxies_cpu: proxies,
            machine_cpu: machine,
            wall_seconds: before.elapsed().as_secs_f64(),
        })
    }
}

/// Whether all `ports` are listened on in a namespace (proc(5), /proc/net/tcp, state 0A).
fn listening(netns: &host_net::netns::Netns, ports: &[u16]) -> Result<bool> {
    let text = netns.run(|| {
        ["tcp", "tcp6"]
            .map(|table| {
                fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default()
            })
            .concat()
    })?;
    let mut open: BTreeMap<u16, bool> = ports.iter().map(|port| (*port, false)).collect();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (Some(local), Some(_), Some("0A")) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let port = local
            .rsplit_once(':')
            .and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        if let Some(state) = port.and_then(|port| open.get_mut(&port)) {
            *state = true;
        }
    }
    Ok(open.into_values().all(|is_open| is_open))
}
