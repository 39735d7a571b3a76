//! What a capture costs beyond time per request: processor time of every process, context switches, system calls, packets
//! and bytes on the wire; memory per pod, connection and tunnel; kernel objects; the steps of an enrolment.
//!
//! One variant after the other, each in a lab of its own, so that nothing shares the machine with what is measured.
//! [`process`], [`syscalls`] and [`objects`] read, [`idle`] holds connections, `measure` puts them in order, [`gates`]
//! judges, [`table`] prints. Keys of cost.json carry their unit; everything in it that is "per" something is a quotient
//! of numbers that are in it, too, or of differences of those.

pub mod gates;
pub mod idle;
mod measure;
pub mod objects;
pub mod process;
pub mod syscalls;
pub mod table;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::accounting::Cpu;
use super::case::Case;
use super::counters::Counters;
use super::environment::Environment;
use super::interrupt::{self, Interrupted};
use super::report::Ended;
use super::variant::Variant;
use crate::standing::Progress;
use crate::topology::{MOST_PODS, Overlay, Programs};
use gates::Gate;
use objects::Objects;
use process::{Descriptors, Memory, Switches};
use syscalls::Tool;

/// Name of the file.
pub const COST: &str = "cost.json";

/// An accounting as a user orders it.
#[derive(Debug, Clone)]
pub struct CostSpec {
    /// Variants, in the order in which they are measured.
    pub variants: Vec<Variant>,
    /// Numbers of captured pods on one node at which memory and objects are read, ascending.
    pub pods: Vec<u8>,
    /// Connections between one pair of pods that are held open.
    pub idle_connections: u32,
    /// Tunnels between as many pairs of pods.
    pub idle_tunnels: u32,
    /// Cases whose cost is taken.
    pub cases: Vec<Case>,
    /// Seconds that one of them takes; system calls are counted in another run of the same length.
    pub seconds: u64,
    /// How long memory that is not needed any more may take to be given back.
    pub settle: Duration,
    /// Overlay of the node capture.
    pub overlay: Overlay,
    /// The programs that are measured.
    pub programs: Programs,
    /// Where cost.json goes.
    pub out: PathBuf,
    /// Version, profile and features of the programs.
    pub build: String,
}

/// All that was found. The content of cost.json.
#[derive(Debug, Clone, Serialize)]
pub struct CostReport {
    /// Format of this file; raised when a field changes its meaning.
    pub format: u32,
    /// Version, profile and features of ambidex.
    pub build: String,
    /// How it ended.
    pub ended: Ended,
    /// Environment.
    pub environment: Environment,
    /// What counted system calls; none when nothing here can.
    pub syscall_tool: Option<Tool>,
    /// Why nothing can, or what to mind about the tool.
    pub syscall_note: Option<String>,
    /// One entry per variant, as far as it was reached.
    pub variants: Vec<VariantCost>,
    /// The limits and whether they are kept.
    pub gates: Vec<Gate>,
    /// Time that everything took.
    pub seconds_taken: f64,
}

/// What one variant costs.
#[derive(Debug, Clone, Serialize)]
pub struct VariantCost {
    /// Variant.
    pub variant: Variant,
    /// Overlay device of the node capture.
    pub overlay: Option<String>,
    /// Under load.
    pub loads: Vec<LoadCost>,
    /// Memory around all the load. Empty without a mesh, as is everything below.
    pub memory_around_load: Vec<AroundLoad>,
    /// At each number of pods.
    pub pods: Vec<AtPods>,
    /// Connections of one pair of pods, which share tunnels.
    pub idle_connections: Option<Idle>,
    /// Connections of different pairs of pods, each with a tunnel of its own where there are tunnels.
    pub idle_tunnels: Option<Idle>,
}

/// A case under load.
#[derive(Debug, Clone, Serialize)]
pub struct LoadCost {
    /// Case.
    pub case: Case,
    /// What the numbers per operation are divided by: `MB` (1,000,000 bytes of payload), `request` or `connection`.
    pub operation: &'static str,
    /// How many there were.
    pub operations: f64,
    /// Result in the case's unit.
    pub value: f64,
    /// That unit.
    pub value_unit: &'static str,
    /// Time taken.
    pub wall_seconds: f64,
    /// Processor time of the machine, with interrupts.
    pub machine_cpu_seconds: Cpu,
    /// Processor time of the machine per operation, in microseconds.
    pub machine_cpu_us_per_operation: f64,
    /// Processor time of both proxies per operation, in microseconds.
    pub proxies_cpu_us_per_operation: f64,
    /// Each proxy and agent.
    pub processes: Vec<ProcessCost>,
    /// Context switches of both proxies per operation.
    pub proxies_switches_per_operation: f64,
    /// System calls of both proxies per operation, from a run in which nothing was timed.
    pub proxies_syscalls_per_operation: Option<f64>,
    /// Devices that carried something.
    pub devices: Vec<DeviceCost>,
    /// Packets on the wire between the nodes per operation, both directions.
    pub wire_packets_per_operation: f64,
    /// Bytes on that wire per operation, with all headers of the packets.
    pub wire_bytes_per_operation: f64,
    /// The same per byte of payload, where the payload is known.
    pub wire_bytes_per_payload_byte: Option<f64>,
}

/// A process under load.
#[derive(Debug, Clone, Serialize)]
pub struct ProcessCost {
    /// `proxy1`, `agent2`.
    pub process: String,
    /// Processor time. The kernel charges interrupts to nobody.
    pub cpu_seconds: Cpu,
    /// Context switches.
    pub switches: Switches,
}

/// A device under load.
#[derive(Debug, Clone, Serialize)]
pub struct DeviceCost {
    /// `node1 eth0`: where it is and its name.
    pub device: String,
    /// What passed, as the device's own end sees it.
    pub counters: Counters,
}

/// Memory of a process before, right after and some time after load.
#[derive(Debug, Clone, Serialize)]
pub struct AroundLoad {
    /// `proxy1`.
    pub process: String,
    /// Before.
    pub before: Memory,
    /// When the last load had ended.
    pub after: Memory,
    /// After the settling time.
    pub settled: Memory,
}

/// A process as it is.
#[derive(Debug, Clone, Serialize)]
pub struct ProcessState {
    /// Memory.
    pub memory: Memory,
    /// Descriptors.
    pub descriptors: Descriptors,
}

/// A node with some captured pods that do nothing.
#[derive(Debug, Clone, Serialize)]
pub struct AtPods {
    /// How many.
    pub pods: usize,
    /// Its proxy.
    pub proxy: ProcessState,
    /// Its agent.
    pub agent: ProcessState,
    /// Network namespaces of the whole lab. Capture makes none.
    pub namespaces: usize,
    /// Objects in the node's namespace that each pod's capture added since the number before.
    pub node_objects_per_pod: Objects,
    /// Objects in the proxy's namespace, likewise.
    pub proxy_objects_per_pod: Objects,
    /// Objects in the namespace of the pod that was captured last, beyond those it had before.
    pub pod_objects: Objects,
    /// The enrolments since the number before, one after the other.
    pub enrolment: Option<EnrolmentSteps>,
}

/// Percentiles of times of several enrolments.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Percentiles {
    /// How many.
    pub samples: usize,
    /// Half took at most this.
    pub p50: f64,
    /// 99 of 100 took at most this; with less than 100 samples the largest.
    pub p99: f64,
    /// The largest.
    pub max: f64,
}

/// Steps of enrolments. `plugin` contains `total`, which contains the others.
#[derive(Debug, Clone, Serialize)]
pub struct EnrolmentSteps {
    /// The CNI plugin's whole call, as a container runtime waits for it: its process, its event, the agent's work.
    pub plugin_us: Percentiles,
    /// The agent's work.
    pub total_us: Percentiles,
    /// Writing the list of pods to the disk.
    pub record_us: Percentiles,
    /// From the announcement to the proxy to its acknowledgement.
    pub announce_us: Percentiles,
    /// Facts and plans.
    pub plan_us: Percentiles,
    /// Journal and kernel objects.
    pub apply_us: Percentiles,
}

/// A number for the proxy at each end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ends {
    /// The proxy on the client's node.
    pub client: f64,
    /// The proxy on the server's node.
    pub server: f64,
}

/// Connections that are open and silent.
#[derive(Debug, Clone, Serialize)]
pub struct Idle {
    /// How many were opened after some for warming up.
    pub connections: u64,
    /// How many were opened before for warming up, and stay open until the last reading.
    pub warm_up: u64,
    /// RSS of the proxies that each one adds while it is open, in KiB.
    pub open_kib: Ends,
    /// Sockets of the proxies that each one adds while it is open.
    pub open_sockets: Ends,
    /// RSS that is left of each when it is closed and the settling time has passed, in KiB: tunnels without streams,
    /// and what was not given back.
    pub unused_kib: Ends,
    /// Sockets that are left of each then: tunnels.
    pub unused_sockets: Ends,
}

impl Percentiles {
    /// Of some samples; none of none.
    pub fn of(samples: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = samples.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let max = *sorted.last()?;
        // Nearest rank.
        let at = |share: f64| {
            let rank = (share * sorted.len() as f64).ceil() as usize;
            sorted[rank.clamp(1, sorted.len()) - 1]
        };
        Some(Self {
            samples: sorted.len(),
            p50: at(0.50),
            p99: at(0.99),
            max,
        })
    }
}

impl CostReport {
    fn store(&self, directory: &std::path::Path) -> Result<()> {
        let path = directory.join(COST);
        let temporary = path.with_extension("json.tmp");
        fs::write(&temporary, serde_json::to_vec_pretty(self)?)
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("write {}", path.display()))
    }
}

/// Takes the accounts of all variants. What was found until an error is in cost.json all the same.
///
/// # Errors
/// When a lab cannot be built, a load fails, or a connection that is to be held does not carry bytes; [`Interrupted`]
/// when [`interrupt::listen`] was told to end.
pub fn run(spec: &CostSpec, progress: Progress<'_>) -> Result<CostReport> {
    if spec.variants.is_empty() || spec.cases.is_empty() || spec.seconds == 0 {
        bail!("nothing to measure: want at least one variant, case and second");
    }
    let mut cases = spec.cases.iter();
    if let Some(case) = cases.find(|case| measure::operation(case.load).is_none()) {
        bail!(
            "{case} is no load whose cost per operation is taken: memory and enrolments are, without it"
        );
    }
    if !spec.pods.is_sorted() || spec.pods.iter().any(|pods| *pods > MOST_PODS) {
        bail!(
            "numbers of pods {:?}: want them ascending, and at most {MOST_PODS}",
            spec.pods
        );
    }
    fs::create_dir_all(&spec.out).with_context(|| format!("create {}", spec.out.display()))?;
    // For the daemons, too, which are started by this process: thousands of connections are held.
    crate::traffic::raise_descriptor_limit();
    let started = Instant::now();
    let tool = syscalls::find();
    let mut report = CostReport {
        format: 1,
        build: spec.build.clone(),
        ended: Ended::Running,
        environment: Environment::of_this_machine(),
        syscall_tool: tool.as_ref().ok().copied(),
        syscall_note: match &tool {
            Ok(Tool::Perf) => None,
            Ok(Tool::Strace) => Some(
                "strace stops a process at each call: under it fewer bytes and requests share a call"
                    .to_owned(),
            ),
            Err(why) => Some(why.clone()),
        },
        variants: Vec::new(),
        gates: Vec::new(),
        seconds_taken: 0.0,
    };
    let mut outcome = Ok(());
    for (index, variant) in spec.variants.iter().enumerate() {
        progress(&format!(
            "{variant}: variant {} of {}",
            index + 1,
            spec.variants.len()
        ));
        outcome = interrupt::check().map_err(Into::into).and_then(|()| {
            let cost = measure::variant(spec, variant, &mut report, progress)
                .with_context(|| format!("cost of {variant}"))?;
            report.gates.extend(gates::of(&cost));
            report.variants.push(cost);
            report.seconds_taken = started.elapsed().as_secs_f64();
            report.store(&spec.out)
        });
        if outcome.is_err() {
            break;
        }
    }
    // A tool that was interrupted together with this process may have failed before the signal was noted here.
    if let Err(interrupted) = interrupt::check() {
        outcome = Err(interrupted.into());
    }
    report.ended = match &outcome {
        Ok(()) => Ended::Finished,
        Err(error) if error.is::<Interrupted>() => Ended::Interrupted,
        Err(error) => Ended::Failed(format!("{error:#}")),
    };
    report.seconds_taken = started.elapsed().as_secs_f64();
    report.store(&spec.out)?;
    outcome.map(|()| report)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let hundred = Percentiles::of((1..=100).rev().map(f64::from)).unwrap();
        assert_eq!((hundred.p50, hundred.p99, hundred.max), (50.0, 99.0, 100.0));
        let one = Percentiles::of([7.0]).unwrap();
        assert_eq!((one.p50, one.p99, one.max), (7.0, 7.0, 7.0));
        assert_eq!(Percentiles::of([]), None);
    }

    fn cost(variant: Variant, announce_us: f64, rss_kib: u64, tunnel_kib: f64) -> VariantCost {
        let percentiles = Percentiles::of([announce_us]).unwrap();
        let ends = |client| Ends {
            client,
            server: 1.0,
        };
        let state = ProcessState {
            memory: Memory {
                rss_kib,
                ..Memory::default()
            },
            descriptors: Descriptors::default(),
        };
        VariantCost {
            variant,
            overlay: None,
            loads: Vec::new(),
            memory_around_load: Vec::new(),
            pods: vec![AtPods {
                pods: gates::PODS,
                proxy: state.clone(),
                agent: state,
                namespaces: 1,
                node_objects_per_pod: Objects::default(),
                proxy_objects_per_pod: Objects::default(),
                pod_objects: Objects::default(),
                enrolment: Some(EnrolmentSteps {
                    plugin_us: percentiles,
                    total_us: percentiles,
                    record_us: percentiles,
                    announce_us: percentiles,
                    plan_us: percentiles,
                    apply_us: percentiles,
                }),
            }],
            idle_connections: None,
            idle_tunnels: Some(Idle {
                connections: gates::TUNNELS,
                warm_up: 1,
                open_kib: ends(99.0),
                open_sockets: ends(2.0),
                unused_kib: ends(tunnel_kib),
                unused_sockets: ends(1.0),
            }),
        }
    }

    #[test]
    fn gates_are_judged_by_what_was_found() {
        let found = |cost: &VariantCost| -> Vec<gates::Status> {
            gates::of(cost).iter().map(|gate| gate.status).collect()
        };
        use gates::Status::{Met, Missed, NotMeasured};
        let good = cost(Variant::Inpod, 10_000.0, 30 * 1024, 24.0);
        assert_eq!(found(&good), [Met; 3]);
        let bad = cost(Variant::Inpod, 10_001.0, 30 * 1024 + 1, 24.1);
        assert_eq!(found(&bad), [Missed; 3]);
        let mut fewer = good.clone();
        fewer.pods[0].pods = gates::PODS - 1;
        fewer.idle_tunnels = None;
        assert_eq!(found(&fewer), [NotMeasured; 3]);
        assert!(found(&cost(Variant::Relay, 0.0, 0, 0.0)).is_empty());
        let mut broken = good;
        broken.idle_tunnels.as_mut().unwrap().unused_kib.server = f64::INFINITY;
        assert_eq!(found(&broken)[0], Missed);
    }
}
