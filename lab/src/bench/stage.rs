//! A lab of one variant with its servers, and a sample taken in it.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::accounting::{self, Cpu};
use super::case::{CLIENT, Case, Load, Path, Way};
use super::counters::{self, Counters, ISTIOIN, ISTIOOUT};
use super::foreign;
use super::interrupt;
use super::load::{self, Servers, Target};
use super::report::Sample;
use super::run::BenchSpec;
use super::variant::Variant;
use crate::standing::{self, Daemon, ScopedLab};
use crate::topology::LabSpec;

/// Of a bulk stream with the flow `tunnel`, at least this share passes through `istioout` while it is measured.
const TUNNEL_SHARE: f64 = 0.95;
/// With the flow `hybrid`, at most this share. Retransmitted first packets count.
const HYBRID_SHARE: f64 = 0.01;

/// No proxy passes on a request and its answer in less time than this, in seconds: two wakeups take more.
const LEAST_PER_OPERATION: f64 = 2e-6;

/// A lab with its servers.
#[derive(Debug)]
pub struct Stage {
    /// What is measured in it.
    pub variant: Variant,
    // Servers end before the lab is removed: fields are dropped in this order.
    servers: Vec<Servers>,
    /// The lab.
    pub lab: ScopedLab,
}

impl Stage {
    /// Builds the lab of a variant and starts the servers in it.
    ///
    /// # Errors
    /// When the lab cannot be built or a server does not listen.
    pub fn new(variant: &Variant, spec: &BenchSpec) -> Result<Self> {
        Self::behind(variant, spec, None)
    }

    /// The same with a delay line before the application that answers requests, where there is to be one.
    ///
    /// # Errors
    /// As [`Stage::new`].
    pub fn behind(variant: &Variant, spec: &BenchSpec, line: Option<Duration>) -> Result<Self> {
        let lab_spec = variant.lab(LabSpec::unique_name(), spec.overlay, spec.programs.clone());
        // Daemons and servers keep this process's limit.
        crate::traffic::raise_descriptor_limit();
        let lab = standing::up(&lab_spec, &|_| {});
        let lab = match variant {
            Variant::External(proxy) => lab.with_context(|| {
                format!(
                    "no lab with {} in the place of `ambidex proxy`: does it speak ZDS, as a client on INPOD_UDS?",
                    proxy.program.display()
                )
            }),
            _ => lab,
        };
        let lab = lab?.scoped();
        let mut servers = Vec::new();
        for path in [Path::CrossNode, Path::SameNode] {
            let directory = lab.dir().join("servers").join(path.server());
            servers.push(Servers::start(
                &lab.netns(path.server())?,
                &directory,
                line,
            )?);
        }
        let stage = Self {
            variant: variant.clone(),
            servers,
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

    /// Pids of all servers, for what is to be known of them.
    pub fn server_pids(&self) -> Vec<u32> {
        self.servers.iter().flat_map(Servers::pids).collect()
    }

    /// The overlay device that this lab uses, if it uses one.
    pub fn overlay(&self) -> Option<String> {
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

    /// CPU time that the proxies of both nodes have used since they started.
    ///
    /// # Errors
    /// When one does not run.
    pub fn proxies(&self) -> Result<Cpu> {
        let mut sum = Cpu::default();
        for pid in self.proxy_pids()? {
            sum = sum.plus(accounting::process(pid)?);
        }
        Ok(sum)
    }

    /// Pids of the proxies of node 1 and 2; of none where there is no mesh.
    ///
    /// # Errors
    /// When one does not run.
    pub fn proxy_pids(&self) -> Result<Vec<i32>> {
        if self.variant == Variant::None {
            return Ok(Vec::new());
        }
        let pid = |node| {
            let proxy = self.lab.process(node, Daemon::Proxy);
            Ok(proxy
                .with_context(|| format!("proxy{node} does not run"))?
                .pid)
        };
        [1, 2].into_iter().map(pid).collect()
    }

    /// Seconds that the proxies' threads have run.
    fn proxies_ran(&self) -> Result<f64> {
        let mut sum = 0.0;
        for pid in self.proxy_pids()? {
            sum += accounting::ran(pid)?;
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

    /// Measures a case once.
    ///
    /// # Errors
    /// When the load fails or took another path than was proven. If a daemon has ended, that is said, too.
    pub fn sample(&self, case: Case, seconds: u64, round: usize) -> Result<Sample> {
        let sample = self.sample_of(case, seconds, round);
        sample.map_err(|error| self.with_cause(error))
    }

    /// An error with the daemon that has ended, if one has: what failed then failed for that.
    pub fn with_cause(&self, error: anyhow::Error) -> anyhow::Error {
        match self.lab.ended_daemon() {
            // An interruption is known by its type, and ends everything at any time.
            Some(ended) if !error.is::<interrupt::Interrupted>() => error.context(ended),
            _ => error,
        }
    }

    fn sample_of(&self, case: Case, seconds: u64, round: usize) -> Result<Sample> {
        let topology = self.lab.topology();
        let (_, server) = topology
            .pod(case.path.server())
            .context("the lab has no server pod")?;
        let target = Target {
            stage: self,
            path: case.path,
            client: self.lab.netns(CLIENT)?,
            server: server.ip,
            seconds,
        };
        load::prepare(case.load, &target)?;
        let overlays = self.overlays(case.path)?;
        let (machine, stolen) = (accounting::machine()?, accounting::stolen()?);
        let foreign = foreign::Reading::take()?;
        let ran = self.proxies_ran()?;
        let (proxies, before) = (self.proxies()?, Instant::now());
        let measured = load::run(case.load, &target)?;
        let mut sample = Sample {
            variant: self.variant.clone(),
            case,
            round,
            begun_seconds: 0.0,
            value: measured.value,
            work: measured.work,
            latency_us: measured.latency_us,
            extra: measured.extra,
            proxies_cpu: match measured.proxies_cpu {
                Some(cpu) => cpu,
                None => self.proxies()?.since(proxies),
            },
            machine_cpu: accounting::machine()?.since(machine),
            foreign_seconds: 0.0,
            stolen_seconds: accounting::stolen()? - stolen,
            wall_seconds: before.elapsed().as_secs_f64(),
            overlays: {
                let after = self.overlays(case.path)?;
                [after[0].since(overlays[0]), after[1].since(overlays[1])]
            },
        };
        sample.foreign_seconds = foreign::Reading::take()?.since(foreign);
        if measured.errors > 0 {
            bail!(
                "{} of {} requests failed: a sample with errors is none",
                measured.errors,
                measured.work
            );
        }
        took_the_path(&sample, self.proxies_ran()? - ran)?;
        load::clean_up(case.load, &target)?;
        Ok(sample)
    }
}

/// Whether what was measured took the path that was proven before, as far as can be told without touching the load.
/// `ran` is the time that the proxies' threads ran meanwhile, in seconds.
fn took_the_path(sample: &Sample, ran: f64) -> Result<()> {
    let [istioout, _] = sample.overlays;
    let least = match sample.case.load {
        Load::Bulk { .. } => 1e-3,
        // No payload: the load itself looks whether pods are captured.
        Load::Enrol { .. } => return Ok(()),
        // One of the proxies is another process than before: the load itself sees to it that somebody notices.
        Load::Restart { .. } => f64::NEG_INFINITY,
        _ => LEAST_PER_OPERATION * sample.work,
    };
    if sample.variant != Variant::None && ran < least {
        bail!("the proxies ran for {ran:.6} s only: the load did not pass through them");
    }
    if !sample.variant.is_node() {
        if sample.overlays != [Counters::default(); 2] {
            bail!("packets passed through the overlay: {:?}", sample.overlays);
        }
    } else if istioout.tx_packets == 0 {
        bail!("no packet passed through istioout");
    }
    if let Load::Bulk { way, .. } = sample.case.load {
        // The answers of a pod's connections come back to it through the same device.
        let bytes = match way {
            Way::Up => istioout.tx_bytes,
            Way::Down => istioout.rx_bytes,
        };
        let share = bytes as f64 / sample.work;
        let wrong = match sample.variant {
            Variant::NodeTunnel => share < TUNNEL_SHARE,
            Variant::NodeHybrid | Variant::NodeDirect => share > HYBRID_SHARE,
            Variant::None | Variant::Relay | Variant::Inpod | Variant::External(_) => false,
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
    fn a_sample_that_took_another_path_is_refused() {
        let sample = |variant, tx_bytes: u64, cpu| Sample {
            variant,
            case: Case {
                path: Path::CrossNode,
                load: Load::ALL[0],
            },
            round: 0,
            begun_seconds: 0.0,
            value: 1.0,
            work: 1e9,
            latency_us: None,
            extra: Default::default(),
            proxies_cpu: Cpu {
                user: cpu,
                ..Cpu::default()
            },
            machine_cpu: Cpu::default(),
            foreign_seconds: 0.0,
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
        let fine =
            |variant, tx_bytes, cpu| took_the_path(&sample(variant, tx_bytes, cpu), cpu).is_ok();
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
