//! An experiment from its lab to its result.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;

use super::access::{Entries, Verdict};
use super::driver::{Driver, Records};
use super::file::Experiment;
use super::judge::{Seen, long_us};
use super::now_us;
use super::result::{FORMAT, Outcome};
use super::steps::Steps;
use super::timeline::timeline;
use super::wire::{Heard, KNOCK, Listener, Place, drain_time};
use crate::bench::environment::Environment;
use crate::bench::interrupt;
use crate::bench::resume::digest;
use crate::standing::{self, Daemon, Lab, Progress};
use crate::topology::{OUTSIDE, Programs};

/// How long a knock may take to be heard; it is repeated until then.
const HEARD_WITHIN: Duration = Duration::from_secs(60);
/// How long one knock may take.
const KNOCK_WITHIN: Duration = Duration::from_millis(200);
/// Proxies that have written nothing more for so long have written down all that has ended.
const QUIET: Duration = Duration::from_secs(15);
/// Time between two looks at their logs.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// An experiment as a user orders it.
#[derive(Debug, Clone)]
pub struct Order {
    /// What is to be done.
    pub experiment: Experiment,
    /// The programs that it is done with.
    pub programs: Programs,
    /// Where the results go.
    pub out: PathBuf,
    /// Version, profile and features of the programs, for the results.
    pub build: String,
}

/// Builds the lab, runs the load and the steps, judges, and writes the results. That something did not hold is in the
/// outcome and no error.
///
/// # Errors
/// When the lab cannot be built, the load cannot be run, or a device not be listened on;
/// [`interrupt::Interrupted`] when [`interrupt::listen`] was told to end.
pub fn run(order: &Order, progress: Progress<'_>) -> Result<Outcome> {
    let started = Instant::now();
    let experiment = &order.experiment;
    fs::create_dir_all(&order.out).with_context(|| format!("create {}", order.out.display()))?;
    let mut environment = Environment::of_this_machine();
    let spec = experiment.lab_spec(order.programs.clone());
    let lab = standing::up(&spec, &|_| {})?.scoped();
    progress(&format!("lab {} stands", lab.name()));
    let topology = lab.topology();
    if let Some((_, pod)) = topology.pods().next() {
        environment.ask_pod(&Netns::open(Netns::path_of(&pod.netns))?);
    }
    let records_dir = lab.dir().join("load");
    fs::create_dir_all(&records_dir).with_context(|| records_dir.display().to_string())?;
    let mut driver = Driver::start(&lab, experiment, &records_dir)?;
    let listeners = listen(&lab, experiment)?;
    driver.open()?;
    progress(&format!(
        "{} long-lived connections stand",
        experiment.load.long_lived.connections
    ));
    driver.load()?;
    let (begun, begun_us) = (Instant::now(), now_us());
    let mut script = Steps::new(&lab, &mut driver, begun, progress);
    let steps = script.run(experiment)?;
    let outside = script.outside;
    let ended_us = now_us();
    progress("everybody says something once more and ends");
    let records = driver.finish()?;
    thread::sleep(drain_time());
    let mut heard: Vec<(String, Place, Heard)> = Vec::new();
    for listener in listeners {
        let (device, place) = (listener.device.clone(), listener.place);
        heard.push((device, place, listener.finish()?));
    }
    let seen = Seen {
        experiment,
        topology: &topology,
        begun_us,
        ended_us,
        records: &records,
        steps: &steps,
        outside: &outside,
        heard: &heard,
    };
    let access = access(&lab, &seen)?;
    let outcome = judge(order, &seen, &environment, access, started)?;
    lab.down()?;
    outcome.store(&order.out)?;
    Ok(outcome)
}

fn judge(
    order: &Order,
    seen: &Seen<'_>,
    environment: &Environment,
    access: Verdict,
    started: Instant,
) -> Result<Outcome> {
    let (packets, errors) = (seen.packets(), seen.errors());
    let assertions = seen.judge(&access, &packets, &errors);
    let records: &Records = seen.records;
    Ok(Outcome {
        format: FORMAT,
        experiment: order.experiment.clone(),
        build: order.build.clone(),
        commit: commit(),
        program: digest(&order.programs.ambidex),
        begun_us: seen.begun_us,
        seconds_taken: started.elapsed().as_secs_f64(),
        environment: serde_json::to_value(environment)?,
        holds: assertions.iter().all(|one| one.holds),
        assertions,
        steps: seen.steps.to_vec(),
        load: seen.load(),
        timeline: timeline(
            records,
            seen.begun_us,
            long_us(&order.experiment.assertions),
        ),
        errors,
        outside_the_mesh: seen.outside_the_mesh(),
        access,
        devices: packets.devices,
        clear: packets.clear,
    })
}

/// Listens on both ends of the wire between the nodes, on their wires to the outside, and on the veths of all pods that
/// take part; each listener has heard a knock when this returns.
fn listen(lab: &Lab, experiment: &Experiment) -> Result<Vec<Listener>> {
    let topology = lab.topology();
    let mut listeners = Vec::new();
    for (place, node) in [Place::Wire, Place::FarEnd]
        .into_iter()
        .zip(&topology.nodes)
    {
        let netns = lab.netns(&node.name)?;
        listeners.push(Listener::start(&netns, &node.name, "eth0", place, None)?);
        listeners.push(Listener::start(
            &netns,
            &node.name,
            "eth1",
            Place::Wire,
            None,
        )?);
    }
    // From uncaptured pods to each other and to the outside, and from nodes to their pods: what no capture touches.
    let plain: Vec<_> = topology
        .pods()
        .filter(|(_, pod)| pod.capture.is_none())
        .collect();
    let mut knocks = Vec::new();
    for (_, pod) in &plain {
        let others = plain.iter().filter(|(_, other)| other.ip != pod.ip);
        knocks.extend(others.map(|(_, other)| (pod.name.clone(), other.ip)));
        knocks.push((pod.name.clone(), OUTSIDE));
    }
    for name in experiment.talkers() {
        let (node, pod) = topology
            .pod(name)
            .with_context(|| format!("no pod {name}"))?;
        let netns = lab.netns(&node.name)?;
        listeners.push(Listener::start(
            &netns,
            &node.name,
            &pod.veth,
            Place::Pod,
            Some(pod.ip),
        )?);
        knocks.push((node.name.clone(), pod.ip));
    }
    let deadline = Instant::now() + HEARD_WITHIN;
    loop {
        for (from, to) in &knocks {
            let at = (*to, KNOCK).into();
            // Nobody serves there: that it is refused, or nothing comes back, is what is expected.
            let _ = lab
                .netns(from)?
                .run(|| std::net::TcpStream::connect_timeout(&at, KNOCK_WITHIN))?;
        }
        let deaf: Vec<&str> = listeners
            .iter()
            .filter(|listener| listener.knocks() == 0)
            .map(|listener| listener.device.as_str())
            .collect();
        if deaf.is_empty() {
            return Ok(listeners);
        }
        interrupt::check()?;
        if Instant::now() >= deadline {
            bail!("nothing is heard on {}", deaf.join(", "));
        }
        thread::sleep(LOOK_EVERY);
    }
}

/// Reads the proxies' logs until they have all that they are to have, or nothing more comes.
fn access(lab: &Lab, seen: &Seen<'_>) -> Result<Verdict> {
    let expected = seen.expected();
    let (mut last, mut since) = (Verdict::default(), Instant::now());
    loop {
        let mut entries = Entries::default();
        for node in &seen.topology.nodes {
            entries.read(&lab.log_path(node.index, Daemon::Proxy))?;
        }
        let verdict = entries.judge(&expected);
        if verdict != last {
            (last, since) = (verdict, Instant::now());
        }
        if last.missing == 0 || since.elapsed() >= QUIET {
            return Ok(last);
        }
        interrupt::check()?;
        thread::sleep(LOOK_EVERY);
    }
}

/// The commit that the working directory is at.
fn commit() -> Option<String> {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        output
            .status
            .success()
            .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
    };
    let commit = git(&["rev-parse", "--short=12", "HEAD"])?;
    let changed = git(&["status", "--porcelain", "--untracked-files=no"])?;
    Some(if changed.is_empty() {
        commit
    } else {
        format!("{commit}+")
    })
}
