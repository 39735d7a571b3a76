//! One variant's accounts, from its lab to its last number.

use std::net::TcpStream;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::idle::{self, Answering};
use super::objects::{self, Objects};
use super::process;
use super::syscalls::{self, Tool};
use super::{
    AroundLoad, AtPods, CostReport, CostSpec, DeviceCost, Ends, EnrolmentSteps, Idle, LoadCost,
    Percentiles, ProcessCost, ProcessState, VariantCost,
};
use crate::bench::accounting;
use crate::bench::case::{CLIENT, Case, Load};
use crate::bench::counters::{self, ISTIOIN, ISTIOOUT};
use crate::bench::interrupt;
use crate::bench::run::BenchSpec;
use crate::bench::stage::Stage;
use crate::bench::variant::Variant;
use crate::standing::{Daemon, Lab, Progress};

/// The wire between the nodes.
const WIRE: (&str, &str) = ("node1", "eth0");
/// Devices whose counters are taken: the wire, what leads to the proxies, the overlay, the client's and the server's pod.
const DEVICES: [(&str, &str); 9] = [
    WIRE,
    ("node1", "vethproxy"),
    ("node1", ISTIOOUT),
    ("node1", ISTIOIN),
    ("node1", "vethp1"),
    ("node2", "vethproxy"),
    ("node2", ISTIOOUT),
    ("node2", ISTIOIN),
    ("node2", "vethp1"),
];
/// What a process needs to be done with what it was just told.
const CALM: Duration = Duration::from_millis(500);
/// How long proxies may take to read a new file of workloads, which they look at twice a second.
const STATE_IS_READ_WITHIN: Duration = Duration::from_millis(1500);
/// Of the connections between different pods, at least this share has to leave a tunnel.
const TUNNELS_LEFT: f64 = 0.95;

/// Takes all accounts of a variant; before the first one, asks where they are taken.
pub(super) fn variant(
    spec: &CostSpec,
    variant: &Variant,
    report: &mut CostReport,
    progress: Progress<'_>,
) -> Result<VariantCost> {
    let stage = Stage::new(variant, &bench_spec(spec, variant))?;
    let lab: &Lab = &stage.lab;
    if report.variants.is_empty() {
        report.environment.ask_pod(&lab.netns(CLIENT)?);
        report.environment.ask_load();
    }
    let tool = report.syscall_tool;
    let mut cost = VariantCost {
        variant: variant.clone(),
        overlay: stage.overlay(),
        loads: Vec::new(),
        memory_around_load: Vec::new(),
        pods: Vec::new(),
        idle_connections: None,
        idle_tunnels: None,
    };
    let before = proxies(lab)?;
    for &case in &spec.cases {
        progress(&format!("{variant}: {case}"));
        let load = load(spec, &stage, case, tool).with_context(|| case.to_string())?;
        cost.loads.push(load);
    }
    if *variant == Variant::None {
        return Ok(cost);
    }
    let after = proxies(lab)?;
    wait(spec.settle.max(CALM))?;
    let settled = proxies(lab)?;
    for node in [0, 1] {
        cost.memory_around_load.push(AroundLoad {
            process: Daemon::Proxy.name(node as u8 + 1),
            before: before[node].memory,
            after: after[node].memory,
            settled: settled[node].memory,
        });
    }
    cost.pods = pods(spec, lab, variant, progress)?;
    if spec.idle_connections > 0 {
        progress(&format!(
            "{variant}: {} idle connections",
            spec.idle_connections
        ));
        cost.idle_connections = Some(idle_connections(spec, lab)?);
    }
    if spec.idle_tunnels > 0 {
        progress(&format!("{variant}: {} idle tunnels", spec.idle_tunnels));
        cost.idle_tunnels = Some(idle_tunnels(spec, lab, variant)?);
    }
    Ok(cost)
}

fn bench_spec(spec: &CostSpec, variant: &Variant) -> BenchSpec {
    BenchSpec {
        variants: vec![variant.clone()],
        cases: spec.cases.clone(),
        rounds: 1,
        seconds: spec.seconds,
        overlay: spec.overlay,
        programs: spec.programs.clone(),
        out: spec.out.clone(),
        build: spec.build.clone(),
        resume: false,
    }
}

/// What the cost of a load is divided by, and how much of its work that is. None where pods or proxies come and go:
/// those have accounts of their own here.
pub(super) fn operation(load: Load) -> Option<(&'static str, f64)> {
    match load {
        Load::Bulk { .. } => Some(("MB", 1e6)),
        Load::RequestResponse { .. } => Some(("request", 1.0)),
        Load::NewConnections | Load::FirstByte | Load::Cold => Some(("connection", 1.0)),
        Load::Idle { .. } | Load::Enrol { .. } | Load::Restart { .. } => None,
    }
}

/// One case: once for everything that is timed, and once more for system calls.
fn load(spec: &CostSpec, stage: &Stage, case: Case, tool: Option<Tool>) -> Result<LoadCost> {
    let lab: &Lab = &stage.lab;
    // Certificates, tunnels and caches, as before every sample of the benchmark.
    stage.sample(case, 1, 0)?;
    let pids = lab.pids();
    let mut before = Vec::new();
    for (name, &pid) in &pids {
        before.push((
            name,
            pid,
            accounting::process(pid)?,
            process::switches(pid)?,
        ));
    }
    let devices = DEVICES.map(|(place, device)| (place, device, lab.netns(place)));
    let read = || -> Result<Vec<counters::Counters>> {
        let each = devices.iter().map(|(_, device, netns)| match netns {
            Ok(netns) => counters::of(netns, device),
            Err(error) => bail!("{error:#}"),
        });
        each.collect()
    };
    let devices_before = read()?;
    let sample = stage.sample(case, spec.seconds, 0)?;
    let devices_after = read()?;

    let (operation, size) =
        operation(case.load).with_context(|| format!("{case} has no cost per operation"))?;
    let operations = sample.work / size;
    let mut processes = Vec::new();
    for (name, pid, cpu, switches) in before {
        processes.push(ProcessCost {
            process: name.clone(),
            cpu_seconds: accounting::process(pid)?.since(cpu),
            switches: process::switches(pid)?.since(switches),
        });
    }
    let proxies = |of: fn(&ProcessCost) -> f64| -> f64 {
        let all = processes.iter();
        all.filter(|process| process.process.starts_with("proxy"))
            .map(of)
            .sum()
    };
    let moved: Vec<_> = devices_before
        .iter()
        .zip(&devices_after)
        .map(|(before, after)| after.since(*before))
        .collect();
    let wire = moved[0];
    let wire_bytes = (wire.tx_bytes + wire.rx_bytes) as f64;
    Ok(LoadCost {
        case,
        operation,
        operations,
        value: sample.value,
        value_unit: case.load.unit(),
        wall_seconds: sample.wall_seconds,
        machine_cpu_seconds: sample.machine_cpu,
        machine_cpu_us_per_operation: sample.machine_cpu.total() * 1e6 / operations,
        proxies_cpu_us_per_operation: proxies(|process| process.cpu_seconds.total()) * 1e6
            / operations,
        proxies_switches_per_operation: proxies(|process| {
            (process.switches.voluntary + process.switches.involuntary) as f64
        }) / operations,
        proxies_syscalls_per_operation: count_syscalls(spec, stage, case, tool, size)?,
        devices: DEVICES
            .iter()
            .zip(&moved)
            .filter(|(_, moved)| moved.rx_packets + moved.tx_packets > 0)
            .map(|((place, device), moved)| DeviceCost {
                device: format!("{place} {device}"),
                counters: *moved,
            })
            .collect(),
        wire_packets_per_operation: (wire.tx_packets + wire.rx_packets) as f64 / operations,
        wire_bytes_per_operation: wire_bytes / operations,
        wire_bytes_per_payload_byte: matches!(case.load, Load::Bulk { .. })
            .then_some(wire_bytes / sample.work),
        processes,
    })
}

fn count_syscalls(
    spec: &CostSpec,
    stage: &Stage,
    case: Case,
    tool: Option<Tool>,
    size: f64,
) -> Result<Option<f64>> {
    let lab: &Lab = &stage.lab;
    let pids: Vec<i32> = lab
        .pids()
        .into_iter()
        .filter(|(name, _)| name.starts_with("proxy"))
        .map(|(_, pid)| pid)
        .collect();
    let Some(tool) = tool.filter(|_| !pids.is_empty()) else {
        return Ok(None);
    };
    let (calls, sample) = syscalls::count(tool, &pids, lab.dir(), || {
        stage.sample(case, spec.seconds, 0)
    })?;
    Ok(Some(calls as f64 / (sample.work / size)))
}

/// Memory, objects and enrolments at each number of pods on the first node, from daemons that have just started.
fn pods(
    spec: &CostSpec,
    lab: &Lab,
    variant: &Variant,
    progress: Progress<'_>,
) -> Result<Vec<AtPods>> {
    let mut names: Vec<String> = captured_pods(lab, 1);
    for pod in &names {
        lab.del_pod(pod)?;
    }
    for node in [1, 2] {
        lab.restart(node, Daemon::Agent)?;
        lab.restart(node, Daemon::Proxy)?;
    }
    for node in [1, 2] {
        lab.wait_ready(node, progress)?;
    }
    let (host, proxy) = (lab.netns("node1")?, lab.netns("proxy1")?);
    let mut done = 0;
    let mut found = Vec::new();
    for &wanted in &spec.pods {
        let wanted = usize::from(wanted);
        let missing = u8::try_from(wanted.saturating_sub(names.len()))?;
        if missing > 0 {
            progress(&format!("{variant}: {wanted} pods"));
            names.extend(lab.create_pods(1, missing)?);
        }
        let fresh = &names[done..wanted.max(done)];
        let last = fresh.last().map(|pod| lab.netns(pod)).transpose()?;
        let in_last = || last.as_ref().map_or(Ok(Objects::default()), Objects::of);
        let before = (Objects::of(&host)?, Objects::of(&proxy)?, in_last()?);
        let mut plugin = Vec::new();
        for pod in fresh {
            interrupt::check()?;
            let begun = Instant::now();
            lab.add_pod(pod)?;
            plugin.push(begun.elapsed().as_secs_f64() * 1e6);
        }
        wait(CALM)?;
        found.push(AtPods {
            pods: wanted,
            proxy: state(lab, 1, Daemon::Proxy)?,
            agent: state(lab, 1, Daemon::Agent)?,
            namespaces: objects::namespaces(&lab.name())?,
            node_objects_per_pod: Objects::of(&host)?.more_per(before.0, fresh.len()),
            proxy_objects_per_pod: Objects::of(&proxy)?.more_per(before.1, fresh.len()),
            pod_objects: in_last()?.more_per(before.2, 1),
            enrolment: steps(lab, fresh, plugin)?,
        });
        done = wanted.max(done);
    }
    // What comes next connects pods that are captured.
    for pod in names.iter().skip(done) {
        lab.add_pod(pod)?;
    }
    Ok(found)
}

/// What the agent says about the enrolments of these pods.
fn steps(lab: &Lab, pods: &[String], plugin: Vec<f64>) -> Result<Option<EnrolmentSteps>> {
    let Some(plugin_us) = Percentiles::of(plugin) else {
        return Ok(None);
    };
    let (status, body) = lab.ask_agent(1, "/v1/enrolments")?;
    if status != 200 {
        bail!("GET /v1/enrolments of agent1: {status} {body}");
    }
    let all: Vec<Value> = serde_json::from_str(&body).context("answer of agent1")?;
    let topology = lab.topology();
    let uids: Vec<&str> = pods
        .iter()
        .filter_map(|pod| Some(topology.pod(pod)?.1.uid.as_str()))
        .collect();
    let of = |key: &str| -> Result<Percentiles> {
        let times = all
            .iter()
            .filter(|times| times["uid"].as_str().is_some_and(|uid| uids.contains(&uid)));
        let found = Percentiles::of(times.filter_map(|times| times[key].as_f64()));
        found
            .filter(|found| found.samples >= pods.len())
            .with_context(|| {
                format!(
                    "agent1 does not know {key} of all {} enrolments",
                    pods.len()
                )
            })
    };
    Ok(Some(EnrolmentSteps {
        plugin_us,
        total_us: of("total_us")?,
        record_us: of("record_us")?,
        announce_us: of("announce_us")?,
        plan_us: of("plan_us")?,
        apply_us: of("apply_us")?,
    }))
}

fn captured_pods(lab: &Lab, node: u8) -> Vec<String> {
    let topology = lab.topology();
    let pods = topology.node(node).into_iter().flat_map(|node| &node.pods);
    pods.filter(|pod| pod.capture.is_some())
        .map(|pod| pod.name.clone())
        .collect()
}

fn idle_connections(spec: &CostSpec, lab: &Lab) -> Result<Idle> {
    let to = "pod2-1".to_owned();
    let pairs = vec![("pod1-1".to_owned(), to.clone()); count(spec.idle_connections)];
    hold(spec, lab, &[to], &pairs)
}

fn idle_tunnels(spec: &CostSpec, lab: &Lab, variant: &Variant) -> Result<Idle> {
    let from = captured_pods(lab, 1);
    let mut to = captured_pods(lab, 2);
    let wanted = count(spec.idle_tunnels).div_ceil(from.len());
    if wanted > to.len() {
        let more = u8::try_from(wanted - to.len())
            .context("too few pods for so many tunnels: order more of them")?;
        for pod in lab.create_pods(2, more)? {
            lab.add_pod(&pod)?;
            to.push(pod);
        }
    }
    to.truncate(wanted);
    // What earlier connections left behind would be used again, and make these look cheap.
    for node in [1, 2] {
        lab.restart(node, Daemon::Proxy)?;
    }
    for node in [1, 2] {
        lab.wait_ready(node, &|_| {})?;
    }
    wait(STATE_IS_READ_WITHIN)?;
    let pairs: Vec<(String, String)> = to
        .iter()
        .flat_map(|to| from.iter().map(|from| (from.clone(), to.clone())))
        .take(count(spec.idle_tunnels))
        .collect();
    let idle = hold(spec, lab, &to, &pairs)?;
    let has_tunnels = !matches!(variant, Variant::Relay | Variant::External(_));
    if has_tunnels && idle.unused_sockets.client < TUNNELS_LEFT {
        bail!(
            "only {:.0} % of the connections left a tunnel: they were not tunnelled",
            idle.unused_sockets.client * 100.0
        );
    }
    Ok(idle)
}

/// Opens all connections, reads the proxies, closes them, waits, and reads again. A twentieth is opened before the first
/// reading and closed after the last, so that what a proxy allocates once counts for none.
fn hold(
    spec: &CostSpec,
    lab: &Lab,
    servers: &[String],
    pairs: &[(String, String)],
) -> Result<Idle> {
    let answering = Answering::start(lab, servers)?;
    let warm_up = (pairs.len() / 20).max(1);
    let open = |pairs: &[(String, String)]| -> Result<Vec<TcpStream>> {
        let each = pairs.iter().map(|(from, to)| idle::open(lab, from, to));
        each.collect()
    };
    let (first, rest) = pairs.split_at(warm_up.min(pairs.len()));
    if rest.is_empty() {
        bail!(
            "{} connections are too few to tell what one costs",
            pairs.len()
        );
    }
    let warm = open(first)?;
    wait(CALM)?;
    let before = proxies(lab)?;
    let held = open(rest)?;
    wait(CALM)?;
    let during = proxies(lab)?;
    drop(held);
    wait(spec.settle.max(CALM))?;
    let after = proxies(lab)?;
    // Until here: they are in all three readings, and so in no difference.
    drop((warm, answering));
    let per = |now: &[ProcessState; 2], of: fn(&ProcessState) -> u64| {
        let each =
            |end: usize| (of(&now[end]) as f64 - of(&before[end]) as f64) / rest.len() as f64;
        Ends {
            client: each(0),
            server: each(1),
        }
    };
    let rss = |state: &ProcessState| state.memory.rss_kib;
    let sockets = |state: &ProcessState| state.descriptors.sockets;
    Ok(Idle {
        connections: rest.len() as u64,
        warm_up: first.len() as u64,
        open_kib: per(&during, rss),
        open_sockets: per(&during, sockets),
        unused_kib: per(&after, rss),
        unused_sockets: per(&after, sockets),
    })
}

/// The proxies of both nodes; of a lab without any, nothing.
fn proxies(lab: &Lab) -> Result<[ProcessState; 2]> {
    Ok([state(lab, 1, Daemon::Proxy)?, state(lab, 2, Daemon::Proxy)?])
}

fn state(lab: &Lab, node: u8, daemon: Daemon) -> Result<ProcessState> {
    if lab.spec().mode == crate::topology::Mode::None {
        return Ok(ProcessState {
            memory: process::Memory::default(),
            descriptors: process::Descriptors::default(),
        });
    }
    let process = lab
        .process(node, daemon)
        .with_context(|| format!("{} does not run", daemon.name(node)))?;
    Ok(ProcessState {
        memory: process::memory(process.pid)?,
        descriptors: process::descriptors(process.pid)?,
    })
}

fn count(number: u32) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

/// Sleeps, but not past the wish for an end.
fn wait(time: Duration) -> Result<()> {
    let until = Instant::now() + time;
    while Instant::now() < until {
        interrupt::check()?;
        thread::sleep(Duration::from_millis(50).min(time));
    }
    Ok(())
}
