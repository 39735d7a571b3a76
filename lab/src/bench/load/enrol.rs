//! Pods that are captured: how long the plugin's call takes, one pod after the other or all at once.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;

use super::process::output_of;
use super::servers::listening;
use super::{Latency, Measured, Target};
use crate::bench::accounting;
use crate::bench::interrupt;
use crate::standing::{Daemon, Lab};
use crate::topology::Pod;

/// The node on which pods are captured.
const NODE: u8 = 1;
/// What a proxy listens on in the namespace of a pod with in-pod capture.
const LISTENERS: [u16; 3] = [15001, 15006, 15008];
/// The set of captured pods of the node capture.
const CAPTURED: &str = "ztunnel-pods-ips";
/// The plugin's error "try again later" (CNI specification 1.0.0, error code 11): the agent has more to do than it can in
/// the time that the plugin waits.
const TRY_AGAIN: &str = "\"code\":11,";
/// How often the plugin is called for a pod at most.
const MOST_TRIES: u32 = 10;
/// How long after it said so: a runtime leaves the node time, too.
const RETRIES_AFTER: Duration = Duration::from_secs(1);
/// What the kernel needs to take 200 namespaces down, and the proxies to read that the pods are gone (they look twice a
/// second): none of it is to run beside the next sample.
const REMOVED_WITHIN: Duration = Duration::from_secs(1);
/// How many pods are let go at a time when the sample is over.
const AT_A_TIME: usize = 8;

/// Makes as many pods as are wanted, beside those that the lab was built with.
pub fn prepare(target: &Target<'_>, pods: u8) -> Result<()> {
    let missing = usize::from(pods).saturating_sub(extras(&target.stage.lab).len());
    if let missing @ 1.. = u8::try_from(missing)? {
        target.stage.lab.create_pods(NODE, missing)?;
    }
    Ok(())
}

/// Has the pods captured, and looks in the kernel whether they are.
pub fn enrol(target: &Target<'_>, pods: u8, at_once: bool) -> Result<Measured> {
    let lab = &target.stage.lab;
    let mut extras = extras(lab);
    extras.truncate(pods.into());
    if extras.len() != usize::from(pods) {
        bail!("the lab has {} pods to capture, want {pods}", extras.len());
    }
    let node_captures = target.stage.variant.is_node();
    if captured(lab, &extras, node_captures)?.contains(&true) {
        bail!("a pod is captured before it was asked for");
    }
    let daemons = |daemon| {
        let process = lab.process(NODE, daemon);
        Ok::<f64, anyhow::Error>(accounting::ran(
            process
                .with_context(|| format!("{daemon:?} does not run"))?
                .pid,
        )?)
    };
    let ran = [daemons(Daemon::Agent)?, daemons(Daemon::Proxy)?];
    let begun = Instant::now();
    let workers = if at_once { extras.len() } else { 1 };
    let refused = AtomicU32::new(0);
    let times = each(&extras, workers, |pod| add(lab, pod, &refused))?;
    let wall = begun.elapsed();
    let ran = [
        daemons(Daemon::Agent)? - ran[0],
        daemons(Daemon::Proxy)? - ran[1],
    ];
    let captured = captured(lab, &extras, node_captures)?;
    if let Some(at) = captured.iter().position(|captured| !captured) {
        bail!(
            "{} is not captured although the plugin succeeded",
            extras[at].name
        );
    }
    let latency = Latency::of(times.iter().map(|time| time.as_secs_f64() * 1e6).collect());
    let per_pod = |seconds: f64| seconds * 1e3 / f64::from(pods);
    let extra = [
        ("try_again_later", f64::from(refused.into_inner())),
        ("wall_ms", wall.as_secs_f64() * 1e3),
        ("agent_cpu_ms_per_pod", per_pod(ran[0])),
        ("proxy_cpu_ms_per_pod", per_pod(ran[1])),
    ];
    Ok(Measured {
        value: per_pod(wall.as_secs_f64()),
        work: f64::from(pods),
        latency_us: latency,
        extra: extra.map(|(key, value)| (key.to_owned(), value)).into(),
        ..Measured::default()
    })
}

/// Calls the plugin, again when it says so, as a container runtime does.
fn add(lab: &Lab, pod: &Pod, refused: &AtomicU32) -> Result<()> {
    let mut tries = 1;
    loop {
        match lab.add_pod(&pod.name) {
            Err(error) if tries < MOST_TRIES && format!("{error:#}").contains(TRY_AGAIN) => {
                interrupt::check()?;
                tries += 1;
                refused.fetch_add(1, Ordering::Relaxed);
                thread::sleep(RETRIES_AFTER);
            }
            done => return done,
        }
    }
}

/// Lets the pods go and removes them: the next case is to find the lab as it was built.
pub fn clean_up(target: &Target<'_>) -> Result<()> {
    let lab = &target.stage.lab;
    each(&extras(lab), AT_A_TIME, |pod| lab.del_pod(&pod.name))?;
    lab.remove_created_pods(NODE)?;
    thread::sleep(REMOVED_WITHIN);
    Ok(())
}

/// The pods that the lab was not built with.
fn extras(lab: &Lab) -> Vec<Pod> {
    let topology = lab.topology();
    let built = usize::from(lab.spec().pods_per_node);
    let pods = topology.node(NODE).map(|node| node.pods.as_slice());
    let pods = pods.unwrap_or_default().iter();
    // The pod that is never captured is the last one.
    let mut extras: Vec<Pod> = pods.skip(built).cloned().collect();
    extras.pop();
    extras
}

/// Does `work` for all pods with this many at a time, and says how long each took.
fn each(
    pods: &[Pod],
    workers: usize,
    work: impl Fn(&Pod) -> Result<()> + Sync,
) -> Result<Vec<Duration>> {
    let (next, times) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let worker = || -> Result<()> {
        while let Some(pod) = pods.get(next.fetch_add(1, Ordering::Relaxed)) {
            interrupt::check()?;
            let begun = Instant::now();
            work(pod)?;
            let taken = begun.elapsed();
            times
                .lock()
                .unwrap_or_else(|poisoned| poisoned.into_inner())
                .push(taken);
        }
        Ok(())
    };
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| match worker.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
    })?;
    Ok(times
        .into_inner()
        .unwrap_or_else(|poisoned| poisoned.into_inner()))
}

/// Which pods are captured, as the kernel has it: in the node's set, or with the proxy's listeners in their namespaces.
fn captured(lab: &Lab, pods: &[Pod], node_captures: bool) -> Result<Vec<bool>> {
    if node_captures {
        let node = lab.netns(&format!("node{NODE}"))?;
        let text = output_of(&node, "ipset", &["list", CAPTURED], Duration::from_secs(5))?;
        let members: Vec<&str> = text
            .lines()
            .filter_map(|line| line.split_ascii_whitespace().next())
            .collect();
        let is_member = |pod: &Pod| members.contains(&pod.ip.to_string().as_str());
        return Ok(pods.iter().map(is_member).collect());
    }
    pods.iter()
        .map(|pod| listening(&Netns::open(Netns::path_of(&pod.netns))?, &LISTENERS))
        .collect()
}
