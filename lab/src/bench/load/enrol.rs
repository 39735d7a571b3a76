//! Pods that are captured: how long the plugin's call takes, one pod after the other, all at once, or as they come.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use nix::unistd::Pid;

use super::process::output_of;
use super::servers::listening;
use super::{Latency, Measured, Target};
use crate::bench::accounting;
use crate::bench::case::Pace;
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
/// How long a pod that is still to come waits at a time: nobody who interrupts a run is to wait for all of them.
const LOOKS_EVERY: Duration = Duration::from_millis(200);
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
pub fn enrol(target: &Target<'_>, pods: u8, pace: Pace) -> Result<Measured> {
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
    let before = Work::so_far(lab)?;
    let begun = Instant::now();
    let refused = AtomicU32::new(0);
    let work = |pod: &Pod| add(lab, pod, &refused);
    let times = match pace {
        Pace::OneByOne => each(&extras, 1, work)?,
        Pace::AtOnce => each(&extras, extras.len(), work)?,
        Pace::PerSecond(many) => arriving(&extras, many, work)?,
    };
    let wall = begun.elapsed();
    let spent = Work::so_far(lab)?.since(before);
    let captured = captured(lab, &extras, node_captures)?;
    if let Some(at) = captured.iter().position(|captured| !captured) {
        bail!(
            "{} is not captured although the plugin succeeded",
            extras[at].name
        );
    }
    let latency = Latency::of(times.iter().map(|time| time.as_secs_f64() * 1e6).collect());
    let per_pod = |seconds: f64| seconds * 1e3 / f64::from(pods);
    let mut extra = BTreeMap::from([
        ("try_again_later", f64::from(refused.into_inner())),
        ("wall_ms", wall.as_secs_f64() * 1e3),
        ("cpu_ms", spent.total() * 1e3),
        ("agent_cpu_ms_per_pod", per_pod(spent.agent)),
        ("iptables_cpu_ms_per_pod", per_pod(spent.iptables)),
        ("plugin_cpu_ms_per_pod", per_pod(spent.plugin)),
        ("proxy_cpu_ms_per_pod", per_pod(spent.proxy)),
    ]);
    if pace == Pace::AtOnce {
        let processors = thread::available_parallelism()?.get() as f64;
        let busy = spent.total() / processors;
        extra.insert("wall_by_cpu", wall.as_secs_f64() / busy);
    }
    Ok(Measured {
        value: match pace {
            Pace::OneByOne | Pace::AtOnce => per_pod(wall.as_secs_f64()),
            // They come when they come: what is measured is how long each waits.
            Pace::PerSecond(_) => per_pod(times.iter().map(Duration::as_secs_f64).sum()),
        },
        work: f64::from(pods),
        latency_us: latency,
        extra: extra
            .into_iter()
            .map(|(key, value)| (key.to_owned(), value))
            .collect(),
        ..Measured::default()
    })
}

/// CPU time, in seconds, of the processes that capture pods.
#[derive(Debug, Clone, Copy)]
struct Work {
    agent: f64,
    /// What the agent starts: iptables-restore and its like.
    iptables: f64,
    /// The plugin's calls, which this process makes.
    plugin: f64,
    proxy: f64,
}

impl Work {
    fn so_far(lab: &Lab) -> Result<Self> {
        let pid = |daemon| {
            let process = lab.process(NODE, daemon);
            let process = process.with_context(|| format!("{daemon:?} does not run"))?;
            Ok::<_, anyhow::Error>(process.pid)
        };
        let (agent, proxy) = (pid(Daemon::Agent)?, pid(Daemon::Proxy)?);
        Ok(Self {
            agent: accounting::ran(agent)?,
            iptables: accounting::children(agent)?.total(),
            plugin: accounting::children(Pid::this().as_raw())?.total(),
            proxy: accounting::ran(proxy)?,
        })
    }

    fn since(self, earlier: Self) -> Self {
        Self {
            agent: self.agent - earlier.agent,
            iptables: self.iptables - earlier.iptables,
            plugin: self.plugin - earlier.plugin,
            proxy: self.proxy - earlier.proxy,
        }
    }

    fn total(self) -> f64 {
        self.agent + self.iptables + self.plugin + self.proxy
    }
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

/// Does `work` for each pod when it is due, so many in a second, and says how long after that it was done: a pod that waits
/// for those before it has waited.
fn arriving<T: Sync>(
    pods: &[T],
    per_second: u8,
    work: impl Fn(&T) -> Result<()> + Sync,
) -> Result<Vec<Duration>> {
    let begun = Instant::now();
    let work = &work;
    let arrive = |pod, nth: u32| {
        let due = begun + Duration::from_secs(1) * nth / u32::from(per_second.max(1));
        move || -> Result<Duration> {
            loop {
                interrupt::check()?;
                match due.saturating_duration_since(Instant::now()) {
                    Duration::ZERO => break,
                    left => thread::sleep(left.min(LOOKS_EVERY)),
                }
            }
            work(pod)?;
            Ok(due.elapsed())
        }
    };
    thread::scope(|scope| {
        let arrivals: Vec<_> = pods
            .iter()
            .zip(0..)
            .map(|(pod, nth)| scope.spawn(arrive(pod, nth)))
            .collect();
        arrivals
            .into_iter()
            .map(|arrival| match arrival.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    /// Nobody is faster than his work, nobody comes before he is due, and who waits for others has waited since then.
    #[test]
    fn who_waits_for_others_has_waited_since_he_was_due() {
        let (turn, work) = (Mutex::new(()), Duration::from_millis(120));
        let slow = |_: &u8| {
            let _turn = turn.lock();
            thread::sleep(work);
            Ok(())
        };
        let begun = Instant::now();
        let times = arriving(&[0; 5], 50, slow).unwrap();
        assert!(begun.elapsed() >= work * 5);
        assert!(times.iter().all(|time| *time >= work), "{times:?}");
        // Whoever is last was due after 80 ms at the latest and is done after 600.
        let longest = times.iter().max().unwrap();
        assert!(*longest >= Duration::from_millis(520), "{times:?}");
        let begun = Instant::now();
        let times = arriving(&[0; 5], 10, |_| Ok(())).unwrap();
        assert_eq!(times.len(), 5);
        assert!(begun.elapsed() >= Duration::from_millis(400));
        assert!(arriving(&[1], 1, |_: &u8| bail!("no")).is_err());
    }
}
