//! One proxy replaces another while clients open connections all the time: what they see of it, in each capture.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

mod harness;
mod runtime;

use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::{Stage, eventually, own};
use host_net::netns::Netns;
use lab::standing::{Daemon, Lab};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rstest::rstest;
use runtime::Sandbox;

/// Far over what a daemon takes to start here, and over the gap of the node capture.
const SOON: Duration = Duration::from_secs(40);
/// Where the applications of the probes listen.
const PORT: u16 = 8094;
/// How long one attempt may take.
const ATTEMPT: Duration = Duration::from_secs(20);
/// How long a node capture's clients may wait while it goes over to another proxy: far over the one second after which a first
/// packet is sent again, because on a busy machine it may be lost more than once.
const NODE_GAP: Duration = Duration::from_secs(35);
/// Connections that may be in the old proxy's hands when the node changes over: each probe has one at a time.
const FEW: usize = 3;
/// Time between two attempts: short against any gap that matters, and no burden for a small machine.
const EVERY: Duration = Duration::from_millis(2);

/// In-pod, both proxies listen in every pod while one replaces the other, and no client notices: the kernel gives new
/// connections to either, what waits in the old one's queue is taken, and its connections end by themselves.
///
/// On the node, everything leads to one proxy at a time. What begins while the node's objects change over loses its first
/// packet, which is sent again after a second, and reaches the new proxy then: there is a gap, measured and bounded here. Nothing
/// passes in the clear meanwhile; connections through the old proxy are reset.
#[rstest]
fn a_proxy_replaces_another(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    spec.proxy_args = ["--drain-seconds", "3"].map(str::to_owned).to_vec();
    let scene = own(&spec);
    let lab = &scene.lab;
    let place = Sandbox::wired(lab, "other1", [10, 244, 1, 105].into());
    let place = Netns::open(&place.netns).unwrap();
    let (ends, closes) = (AtomicBool::new(false), AtomicBool::new(false));
    let (out, back) = (Probe::default(), Probe::default());
    let (mut started, mut replaced) = (Duration::ZERO, Duration::ZERO);
    // Ends after the probes have.
    let mut successor = None;
    // Flags are raised also when a check fails, so that no thread goes on.
    std::thread::scope(|applications| {
        let _closes = Raise(&closes);
        for pod in ["pod1-1", "pod2-1"] {
            serve(applications, &scene, pod, &closes);
        }
        std::thread::scope(|scope| {
            let _ends = Raise(&ends);
            out.run(scope, &scene, "pod1-1", "pod2-1", &ends);
            back.run(scope, &scene, "pod2-1", "pod1-1", &ends);
            let ok = || out.succeeded().min(back.succeeded());
            eventually("the probes go", SOON, || ok() > 50);
            assert_eq!(
                (out.failed(), back.failed()),
                (0, 0),
                "before anything happens"
            );

            let began = Instant::now();
            successor = Some(start_proxy(lab, &place));
            eventually("the successor serves", SOON, || is_ready(&place));
            started = began.elapsed();
            let at = ok();
            eventually("connections while there are two", SOON, || ok() > at + 50);

            let began = Instant::now();
            let old = lab.process(1, Daemon::Proxy).unwrap();
            old.signal(Signal::SIGTERM).unwrap();
            assert!(old.wait_gone(Duration::from_secs(10)));
            replaced = began.elapsed();
            let at = ok();
            eventually("connections through the successor alone", SOON, || {
                ok() > at + 100
            });
        });
    });
    drop(successor);
    let gap = out.gap().max(back.gap());
    println!(
        "{variant:?}: the successor took {started:?} to serve, the old proxy {replaced:?} to end; of {} and {} connections {} \
         and {} failed, the longest gaps are {:?} and {:?}",
        out.succeeded() + out.failed(),
        back.succeeded() + back.failed(),
        out.failed(),
        back.failed(),
        out.gap(),
        back.gap(),
    );
    if variant.is_node() {
        assert!(gap < NODE_GAP, "{gap:?}");
        // The one that the old proxy was serving at that moment.
        assert!(out.failed() <= FEW && back.failed() <= FEW);
    } else {
        assert!(gap < Duration::from_secs(2), "{gap:?}");
        assert_eq!(
            (out.failed(), back.failed()),
            (0, 0),
            "{:?} {:?}",
            out.errors(),
            back.errors()
        );
    }
}

struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// A proxy of the test's own, killed when it goes.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = kill(pid, Signal::SIGKILL);
        let _ = self.0.wait();
    }
}

/// Starts another proxy of node1 in a namespace of its own, as a pod that replaces another has one.
fn start_proxy(lab: &Lab, place: &Netns) -> Running {
    let log = File::create(lab.dir().join("log").join("successor.log")).unwrap();
    let mut command = Command::new(harness::ambidex());
    command
        .args(["proxy", "--drain-seconds", "1"])
        .envs(lab.environment(1))
        .stdout(log.try_clone().unwrap())
        .stderr(log);
    Running(place.run(|| command.spawn()).unwrap().unwrap())
}

/// Whether the proxy in a namespace says that it is ready.
fn is_ready(place: &Netns) -> bool {
    let ask = || -> std::io::Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, 15021))?;
        stream.write_all(b"GET /healthz/ready HTTP/1.1\r\nHost: proxy\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    };
    let answer = place.run(ask).unwrap();
    answer.is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// An application that says one byte to everybody.
fn serve<'s>(scope: &'s Scope<'s, '_>, scene: &Stage, target: &str, ends: &'s AtomicBool) {
    let netns = scene.lab.netns(target).unwrap();
    let listener = netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)));
    let listener = listener.unwrap().unwrap();
    listener.set_nonblocking(true).unwrap();
    scope.spawn(move || {
        while !ends.load(Ordering::Relaxed) {
            match listener.accept() {
                Ok((mut stream, _)) => drop(stream.write_all(b"x")),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    });
}

/// Opens connections one after the other.
#[derive(Default)]
struct Probe(Mutex<Vec<(Instant, Result<(), String>)>>);

impl Probe {
    fn run<'s>(
        &'s self,
        scope: &'s Scope<'s, '_>,
        scene: &Stage,
        from: &str,
        to: &str,
        ends: &'s AtomicBool,
    ) {
        let netns = scene.lab.netns(from).unwrap();
        let to: SocketAddr = (scene.ip(to), PORT).into();
        scope.spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let result = netns.run(|| attempt(to)).unwrap();
                let result = result.map_err(|error| error.to_string());
                self.0.lock().unwrap().push((Instant::now(), result));
                std::thread::sleep(EVERY);
            }
        });
    }

    fn succeeded(&self) -> usize {
        let all = self.0.lock().unwrap();
        all.iter().filter(|(_, result)| result.is_ok()).count()
    }

    fn failed(&self) -> usize {
        self.errors().len()
    }

    fn errors(&self) -> Vec<String> {
        let all = self.0.lock().unwrap();
        all.iter()
            .filter_map(|(_, result)| result.clone().err())
            .collect()
    }

    /// The longest time between two successes: the attempts wait for each other.
    fn gap(&self) -> Duration {
        let all = self.0.lock().unwrap();
        let good: Vec<Instant> = all
            .iter()
            .filter_map(|(at, result)| result.is_ok().then_some(*at))
            .collect();
        let gaps = good.windows(2).map(|pair| pair[1] - pair[0]);
        gaps.max().unwrap_or_default()
    }
}

fn attempt(to: SocketAddr) -> std::io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&to, ATTEMPT)?;
    stream.set_read_timeout(Some(ATTEMPT))?;
    stream.read_exact(&mut [0])
}
