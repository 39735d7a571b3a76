//! Labs for scenarios: real namespaces, real agents, proxies and plugin calls, with an application in every pod.
//!
//! A scenario is a function that takes a [`Scene`] and runs once per [`Variant`]. Scenarios that leave a lab as they found
//! it share one per variant and test program ([`shared`]); the others build their own ([`own`]). Either way the lab goes
//! when its user does, also when a test program is killed: see [`guardian`].
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod authority;
pub mod guardian;
pub mod marked;
pub mod observe;
pub mod state;
pub mod wire;

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::ops::Deref;
use std::ops::RangeInclusive;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use host_net::netns::Netns;
use lab::standing::{self, Background, Daemon, Lab};
use lab::topology::{APPLICATION_PORT, LabSpec, Mode, NodeFlow, OUTSIDE, Pod, Programs, ipv6};
use lab::traffic::{Check, ClientOptions, Outcome};

use guardian::Guardian;

/// Ports that checks are made from, one after the other: above those that the kernel gives to others.
const CLIENT_PORTS: RangeInclusive<u16> = 61_000..=65_500;
/// Longest that a check may take. Far over what it needs, so that a loaded machine fails nothing.
const CHECK_LIMIT_MS: u64 = 60_000;
/// Lines of each log that a failed scenario prints.
const LOG_LINES: usize = 40;

/// One way of capturing. Every scenario runs in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Variant {
    /// Node capture; only first packets go through the overlay.
    NodeHybrid,
    /// Node capture; everything goes through the overlay.
    NodeTunnel,
    /// Capture inside each pod.
    Inpod,
}

impl Variant {
    /// A lab of this variant.
    pub fn spec(self) -> LabSpec {
        let mut spec = spec(if self.is_node() {
            Mode::Node
        } else {
            Mode::Inpod
        });
        if self == Variant::NodeTunnel {
            spec.node_flow = NodeFlow::Tunnel;
        }
        spec
    }

    /// Whether the node captures.
    pub fn is_node(self) -> bool {
        self != Variant::Inpod
    }

    /// Name of the capture in logs and metrics.
    pub fn capture(self) -> &'static str {
        if self.is_node() { "node" } else { "inpod" }
    }
}

/// A lab of this mode with a name of its own and logs that can be read line by line.
pub fn spec(mode: Mode) -> LabSpec {
    let programs = Programs::beside(Path::new(ambidex()));
    let mut spec = LabSpec::new(LabSpec::unique_name(), mode, programs);
    spec.daemon_env
        .insert("LOG_FORMAT".to_owned(), "json".to_owned());
    spec
}

/// The program.
pub fn ambidex() -> &'static str {
    env!("CARGO_BIN_EXE_ambidex")
}

/// A lab with applications.
#[derive(Debug)]
pub struct Stage {
    pub lab: Lab,
    servers: Mutex<BTreeMap<(String, u16), Background>>,
    guardian: Guardian,
    checks: AtomicUsize,
    /// Held by whoever changes what all proxies know, or listens on a device for exactly its own traffic.
    pub quiet: Mutex<()>,
}

/// What a scenario runs on.
pub enum Scene {
    /// Other scenarios run on it, too.
    Shared(&'static Stage),
    /// Goes with the scenario.
    Own(Box<Stage>),
}

/// A shared lab, or why it could not be built.
pub type SharedStage = Result<Stage, String>;

/// The lab of a variant that this program's scenarios share.
pub fn shared(variant: Variant) -> Scene {
    static STAGES: [OnceLock<SharedStage>; 3] = [const { OnceLock::new() }; 3];
    shared_in(&STAGES[variant as usize], || {
        let mut spec = variant.spec();
        spec.pods_per_node = 3;
        spec
    })
}

/// A lab that is built by whoever comes first. One that cannot be built fails all of its scenarios at once, not each after
/// a time limit.
pub fn shared_in(place: &'static OnceLock<SharedStage>, spec: impl FnOnce() -> LabSpec) -> Scene {
    let build = || {
        let built = catch_unwind(AssertUnwindSafe(|| Stage::build(&spec())));
        built.unwrap_or_else(|_| Err("see the first scenario that failed".to_owned()))
    };
    match place.get_or_init(build) {
        Ok(stage) => Scene::Shared(stage),
        Err(error) => panic!("the shared lab: {error}"),
    }
}

/// A lab for one scenario.
pub fn own(spec: &LabSpec) -> Scene {
    match Stage::build(spec) {
        Ok(stage) => Scene::Own(Box::new(stage)),
        Err(error) => panic!("{error}"),
    }
}

impl Deref for Scene {
    type Target = Stage;
    fn deref(&self) -> &Stage {
        match self {
            Scene::Shared(stage) => stage,
            Scene::Own(stage) => stage,
        }
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.print_logs();
        }
        if let Scene::Own(stage) = self {
            stage.guardian.dismiss();
            let removed = standing::down(&stage.lab.name());
            if !std::thread::panicking() {
                removed.expect("the lab is removed");
            }
        }
    }
}

impl Stage {
    fn build(spec: &LabSpec) -> Result<Self, String> {
        let guardian = Guardian::of(&spec.name);
        let lab = standing::up(spec, &|_| {}).map_err(|error| format!("{error:#}"))?;
        let stage = Self {
            lab,
            servers: Mutex::default(),
            guardian,
            checks: AtomicUsize::new(0),
            quiet: Mutex::new(()),
        };
        let topology = stage.lab.topology();
        let mut targets: Vec<&str> = topology.pods().map(|(_, pod)| pod.name.as_str()).collect();
        targets.push("out");
        std::thread::scope(|scope| {
            for target in targets {
                scope.spawn(|| stage.serve(target, APPLICATION_PORT));
            }
        });
        Ok(stage)
    }

    /// Starts the traffic server in a target, unless it serves on this port already.
    pub fn serve(&self, target: &str, port: u16) {
        let key = (target.to_owned(), port);
        if self.servers.lock().unwrap().contains_key(&key) {
            return;
        }
        let server = self.lab.serve(target, port).expect("a server listens");
        self.servers.lock().unwrap().insert(key, server);
    }

    /// Creates a pod anew, uncaptured, with its application.
    pub fn recreate(&self, pod: &str) {
        self.lab.destroy_pod(pod).unwrap();
        self.servers
            .lock()
            .unwrap()
            .retain(|(target, _), _| target != pod);
        self.lab.create_pod(pod).unwrap();
        self.serve(pod, APPLICATION_PORT);
    }

    /// A pod.
    pub fn pod(&self, name: &str) -> Pod {
        let topology = self.lab.topology();
        topology.pod(name).expect("the pod exists").1.clone()
    }

    /// Address of a pod, or of the outside host.
    pub fn ip(&self, target: &str) -> Ipv4Addr {
        if target == "out" {
            OUTSIDE
        } else {
            self.pod(target).ip
        }
    }

    /// The IPv6 address of a target in a lab that has them.
    pub fn ip6(&self, target: &str) -> Ipv6Addr {
        ipv6::twin(self.ip(target))
    }

    /// The application in a target, by IPv6.
    pub fn at6(&self, target: &str) -> SocketAddr {
        (self.ip6(target), APPLICATION_PORT).into()
    }

    /// The application in a target.
    pub fn at(&self, target: &str) -> SocketAddr {
        (self.ip(target), APPLICATION_PORT).into()
    }

    /// Index of a pod's node.
    pub fn node_of(&self, pod: &str) -> u8 {
        let topology = self.lab.topology();
        topology.pod(pod).expect("the pod exists").0.index
    }

    /// SPIFFE identity of a pod.
    pub fn identity(&self, pod: &str) -> String {
        let pod = self.pod(pod);
        format!(
            "spiffe://cluster.local/ns/{}/sa/{}",
            pod.namespace, pod.service_account
        )
    }

    /// The port that was not used for longest.
    fn client_port(&self) -> u16 {
        let (first, count) = (*CLIENT_PORTS.start(), CLIENT_PORTS.len());
        let checks = self.checks.fetch_add(1, Ordering::Relaxed);
        first + u16::try_from(checks % count).unwrap()
    }

    /// Makes a check from a target and returns what was found, good or bad.
    pub fn attempt(&self, from: &str, to: SocketAddr, check: Check, limit: Duration) -> Outcome {
        let timeout_ms = u64::try_from(limit.as_millis()).unwrap();
        let options = ClientOptions {
            to,
            timeout_ms,
            from_port: Some(self.client_port()),
            check,
        };
        self.lab
            .traffic(from, &options)
            .expect("the traffic tool runs")
    }

    /// Makes a check that must succeed.
    pub fn check(&self, from: &str, to: SocketAddr, check: Check) -> Outcome {
        let limit = Duration::from_millis(CHECK_LIMIT_MS);
        let outcome = self.attempt(from, to, check, limit);
        assert!(outcome.ok, "from {from}: {outcome:#?}");
        outcome
    }

    /// Who the application at `to` says that `from` is.
    pub fn seen(&self, from: &str, to: SocketAddr) -> IpAddr {
        let outcome = self.check(from, to, Check::Who);
        outcome.seen.expect("the server said who").ip()
    }

    /// Makes an attempt that must fail soon, by the peer's or the proxy's doing and not by a time limit.
    pub fn refused(&self, from: &str, to: SocketAddr) -> Outcome {
        let outcome = self.attempt(from, to, Check::Who, Duration::from_secs(10));
        assert!(!outcome.ok, "from {from} to {to} passes: {outcome:#?}");
        assert_ne!(
            outcome.saw,
            Some(lab::traffic::Saw::Timeout),
            "from {from} to {to} hangs: {outcome:#?}"
        );
        outcome
    }

    /// The canonical network state of a target.
    pub fn dump(&self, target: &str) -> String {
        dump(&self.lab.netns(target).unwrap())
    }

    /// Listens in a target and remembers whether anybody came.
    pub fn witness(&self, target: &str, port: u16) -> Witness {
        let netns = self.lab.netns(target).unwrap();
        #[allow(
            clippy::disallowed_methods,
            reason = "an application of a test, no part of the proxy"
        )]
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)));
        let listener = listener.unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        Witness(listener)
    }

    /// Prints the ends of all logs. For a failed scenario.
    pub fn print_logs(&self) {
        for node in [1, 2] {
            for daemon in [Daemon::Agent, Daemon::Proxy] {
                let path = self.lab.log_path(node, daemon);
                let text = std::fs::read(&path).unwrap_or_default();
                let text = String::from_utf8_lossy(&text);
                let lines: Vec<&str> = text.lines().collect();
                let end = &lines[lines.len().saturating_sub(LOG_LINES)..];
                eprintln!("--- end of {}:\n{}", path.display(), end.join("\n"));
            }
        }
    }
}

/// An application that only notices whether anybody connects.
#[derive(Debug)]
pub struct Witness(TcpListener);

impl Witness {
    /// Whether somebody connected since the last question.
    pub fn saw_somebody(&self) -> bool {
        let mut saw = false;
        while self.0.accept().is_ok() {
            saw = true;
        }
        saw
    }
}

/// The canonical network state of a namespace.
pub fn dump(netns: &Netns) -> String {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let dumped = runtime.unwrap().block_on(host_net::dump::dump(netns));
    dumped.unwrap().to_string()
}

/// Fails with the lines that differ.
pub fn assert_same_dump(what: &str, before: &str, after: &str) {
    let missing: Vec<&str> = before
        .lines()
        .filter(|line| !after.lines().any(|other| other == *line))
        .collect();
    let additional: Vec<&str> = after
        .lines()
        .filter(|line| !before.lines().any(|other| other == *line))
        .collect();
    assert!(
        before == after,
        "{what} differs: gone: {missing:#?}, left: {additional:#?}"
    );
}

/// Waits until something is so; panics with `what` if it is not in time.
pub fn eventually(what: &str, limit: Duration, mut so: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + limit;
    while !so() {
        assert!(
            std::time::Instant::now() < deadline,
            "not within {limit:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}
