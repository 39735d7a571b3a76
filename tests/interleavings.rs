//! Set-up, enrolment, unenrolment, replaced proxies, restarted agents and removal in any order and at the same time: what is
//! there in the end is what is to be there, line by line.
//!
//! A sequence is random; its seed is printed, and `AMBIDEX_SEED` in the environment repeats it. Sequences follow each other in one
//! lab, so that each begins where the one before ended.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use harness::{Scene, own, spec};
use lab::standing::{Daemon, Lab};
use lab::topology::{Mode, NodeFlow};
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rstest::rstest;
use runtime::successor::Successor;
use runtime::{Done, Sandbox, ambidex, diff_is_empty};

/// Far over what anything here takes, for machines that are busy.
const SOON: Duration = Duration::from_secs(120);
/// Steps of a sequence.
const STEPS: usize = 7;
const PODS: [&str; 3] = ["pod1-1", "pod1-2", "pod1-3"];
/// The second place for a proxy.
const OTHER: ([u8; 4], &str) = ([10, 244, 1, 105], "other1");

/// How many sequences each capture gets: there are four.
fn sequences() -> u64 {
    match std::env::var("AMBIDEX_TEST_SUITE").as_deref() {
        Ok("all") => 25,
        _ => 1,
    }
}

/// How a pod is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Since {
    /// The plugin called before it ran.
    Birth,
    /// It ran already.
    Later,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The runtime's ADD.
    Add(usize),
    /// The runtime's DEL.
    Del(usize),
    /// An operator enrols a running pod.
    Enrol(usize),
    Unenrol(usize),
    /// An operator takes a pod's capture away.
    Undo(usize),
    /// The agent is killed, or asked to end, and started.
    Agent {
        killed: bool,
    },
    /// Another proxy comes where the one is, or in the other place; before the one has gone, or after.
    Proxy {
        moves: bool,
        overlaps: bool,
    },
    /// Everything is taken away, and set up again.
    Remove,
}

impl Step {
    fn random(random: &mut StdRng) -> Self {
        let pod = random.random_range(0..PODS.len());
        match random.random_range(0..20) {
            0..4 => Step::Add(pod),
            4..7 => Step::Del(pod),
            7..10 => Step::Enrol(pod),
            10..12 => Step::Unenrol(pod),
            12 => Step::Undo(pod),
            13..16 => Step::Agent {
                killed: random.random(),
            },
            16..19 => {
                let moves = random.random();
                Step::Proxy {
                    moves,
                    // Two in one place want the same ports.
                    overlaps: moves && random.random(),
                }
            }
            _ => Step::Remove,
        }
    }

    /// Whether it is about one pod, and which.
    fn pod(self) -> Option<usize> {
        match self {
            Step::Add(pod)
            | Step::Del(pod)
            | Step::Enrol(pod)
            | Step::Unenrol(pod)
            | Step::Undo(pod) => Some(pod),
            _ => None,
        }
    }

    /// Whether both may go on at the same time with one outcome: it must not depend on which of them is first.
    fn goes_with(self, other: Self) -> bool {
        match (self.pod(), other.pod()) {
            (Some(one), Some(other)) => one != other,
            (Some(_), None) => other != Step::Remove,
            _ => false,
        }
    }
}

/// What is to be there.
#[derive(Debug, Clone, Default)]
struct Model {
    captured: BTreeMap<usize, Since>,
    elsewhere: bool,
}

impl Model {
    fn take(&mut self, step: Step) {
        match step {
            Step::Add(pod) => {
                self.captured.entry(pod).or_insert(Since::Birth);
            }
            Step::Enrol(pod) => {
                self.captured.entry(pod).or_insert(Since::Later);
            }
            Step::Del(pod) | Step::Unenrol(pod) | Step::Undo(pod) => {
                self.captured.remove(&pod);
            }
            Step::Proxy { moves, .. } => self.elsewhere ^= moves,
            Step::Remove => self.captured.clear(),
            Step::Agent { .. } => {}
        }
    }
}

/// Lines of a namespace's dump, in an order of their own.
type Lines = Vec<String>;

fn lines(dump: &str) -> Lines {
    let mut lines: Lines = dump.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

/// What has to be taken from and added to one list of lines for the other.
#[derive(Debug, Clone, Default)]
struct Change {
    gone: Lines,
    come: Lines,
}

impl Change {
    fn between(before: &Lines, after: &Lines) -> Self {
        let beyond = |these: &Lines, those: &Lines| {
            let mut rest = those.clone();
            let is_new = |line: &&String| match rest.iter().position(|other| other == *line) {
                Some(at) => {
                    rest.swap_remove(at);
                    false
                }
                None => true,
            };
            these.iter().filter(is_new).cloned().collect()
        };
        Self {
            gone: beyond(before, after),
            come: beyond(after, before),
        }
    }

    fn apply(&self, lines: &mut Lines) {
        for line in &self.gone {
            if let Some(at) = lines.iter().position(|other| other == line) {
                lines.remove(at);
            }
        }
        lines.extend(self.come.iter().cloned());
        lines.sort();
    }

    fn is_none(&self) -> bool {
        self.gone.is_empty() && self.come.is_empty()
    }
}

/// All places that a capture of node1 touches.
const PLACES: [&str; 6] = ["node1", "proxy1", "other1", "pod1-1", "pod1-2", "pod1-3"];

fn everywhere(world: &World<'_>) -> BTreeMap<&'static str, Lines> {
    let dump = |place: &&'static str| {
        let dump = match *place {
            "other1" => {
                let netns = host_net::netns::Netns::open(&world.other.netns).unwrap();
                harness::dump(&netns)
            }
            place => harness::dump(&world.lab.netns(place).unwrap()),
        };
        (*place, lines(&dump))
    };
    PLACES.iter().map(dump).collect()
}

/// The node as it is, and who serves it.
struct World<'a> {
    lab: &'a Lab,
    other: Sandbox,
    successor: std::sync::Mutex<Option<Successor>>,
}

impl<'a> World<'a> {
    fn sandbox(&self, pod: usize) -> Sandbox {
        Sandbox::of(self.lab, PODS[pod])
    }

    /// What a runtime or an operator does until it is done: a daemon may be away just then.
    fn insist(what: &str, mut attempt: impl FnMut() -> Done) {
        let deadline = Instant::now() + SOON;
        loop {
            let done = attempt();
            if done.code == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: {done:?}");
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    fn take(&self, step: Step) {
        let lab = self.lab;
        let operator = |arguments: &str| {
            let run = || ambidex(lab, arguments);
            Self::insist(arguments, run);
        };
        match step {
            Step::Add(pod) => Self::insist("ADD", || self.sandbox(pod).call(lab, "ADD")),
            Step::Del(pod) => self.delete(pod),
            Step::Enrol(pod) => {
                let it = self.sandbox(pod);
                operator(&format!(
                    "enrol {}/{} --netns {} --uid {} --service-account {}",
                    it.namespace,
                    it.name,
                    it.netns.display(),
                    it.uid,
                    it.service_account
                ));
            }
            Step::Unenrol(pod) => self.part_with(pod, "unenrol --wait"),
            Step::Undo(pod) => self.part_with(pod, "undo"),
            Step::Agent { killed } => {
                self.end_agent(killed);
                lab.start(1, Daemon::Agent).unwrap();
                self.wait_ready();
            }
            Step::Proxy { moves, overlaps } => self.replace_proxy(moves, overlaps),
            Step::Remove => {
                operator("undo --node");
                self.end_agent(false);
                lab.start(1, Daemon::Agent).unwrap();
                self.wait_ready();
            }
        }
    }

    /// Until the agent does not know the pod any more: one that still drains is captured again as one that was running.
    fn part_with(&self, pod: usize, how: &str) {
        let it = self.sandbox(pod);
        let deadline = Instant::now() + SOON;
        while runtime_knows(self.lab, &it.uid) {
            let done = ambidex(self.lab, &format!("{how} {}/{}", it.namespace, it.name));
            assert!(Instant::now() < deadline, "{how} {}: {done:?}", it.name);
        }
    }

    /// Without an agent a DEL is done, and the next agent is to find the namespace gone. It stays here, so DEL comes again.
    fn delete(&self, pod: usize) {
        let it = self.sandbox(pod);
        let deadline = Instant::now() + SOON;
        loop {
            Self::insist("DEL", || it.call(self.lab, "DEL"));
            if !runtime_knows(self.lab, &it.uid) {
                return;
            }
            assert!(Instant::now() < deadline, "DEL leaves {}", it.name);
        }
    }

    fn end_agent(&self, killed: bool) {
        match killed {
            true => self.lab.kill(1, Daemon::Agent).unwrap(),
            false => self.lab.stop(1, Daemon::Agent).unwrap(),
        }
    }

    fn replace_proxy(&self, moves: bool, overlaps: bool) {
        let lab = self.lab;
        let mut successor = self.successor.lock().unwrap();
        let is_elsewhere = successor.is_some();
        if !overlaps {
            self.end_proxy(&mut successor);
        }
        let old = successor.take();
        if is_elsewhere == moves {
            lab.start(1, Daemon::Proxy).unwrap();
        } else {
            *successor = Some(Successor::start(lab, self.other.clone()));
        }
        if overlaps {
            // The one that came last is served when the other one goes, or a moment before.
            std::thread::sleep(Duration::from_millis(500));
            match old {
                Some(old) => drop(old),
                None => lab.kill(1, Daemon::Proxy).unwrap(),
            }
        }
        drop(successor);
        self.wait_ready();
    }

    fn end_proxy(&self, successor: &mut Option<Successor>) {
        match successor {
            Some(other) => other.kill(),
            None => self.lab.kill(1, Daemon::Proxy).unwrap(),
        }
    }

    fn wait_ready(&self) {
        harness::eventually("the node is ready", SOON, || self.lab.is_ready(1));
    }
}

/// Whether the agent knows a pod, asked until it answers.
fn runtime_knows(lab: &Lab, uid: &str) -> bool {
    let deadline = Instant::now() + SOON;
    loop {
        let done = ambidex(lab, "get pods -o json");
        if done.code == 0 {
            return done.stdout.contains(uid);
        }
        assert!(Instant::now() < deadline, "{done:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// States that were seen one by one, of which any other one consists.
struct Reference {
    removed: BTreeMap<&'static str, Lines>,
    set_up: BTreeMap<&'static str, Lines>,
    of_pods: BTreeMap<(usize, Since), BTreeMap<&'static str, Change>>,
    proxy: [(String, String); 2],
}

impl Reference {
    fn of(world: &World<'_>) -> Self {
        let topology = world.lab.topology();
        let node = topology.node(1).unwrap();
        let proxy = [
            (node.proxy_veth.clone(), node.proxy_ip.to_string()),
            (world.other.veth(), world.other.ip.to_string()),
        ];
        ambidex(world.lab, "undo --node").with_code(0);
        let removed = everywhere(world);
        world.end_agent(false);
        world.lab.start(1, Daemon::Agent).unwrap();
        world.wait_ready();
        let set_up = everywhere(world);
        let mut of_pods = BTreeMap::new();
        for pod in 0..PODS.len() {
            for (since, come, go) in [
                (Since::Birth, Step::Add(pod), Step::Del(pod)),
                (Since::Later, Step::Enrol(pod), Step::Unenrol(pod)),
            ] {
                world.take(come);
                let now = everywhere(world);
                let change = |place| (place, Change::between(&set_up[place], &now[place]));
                of_pods.insert((pod, since), PLACES.into_iter().map(change).collect());
                world.take(go);
                settle(world, &set_up, "a pod is gone again");
            }
        }
        Self {
            removed,
            set_up,
            of_pods,
            proxy,
        }
    }

    fn wanted(&self, model: &Model) -> BTreeMap<&'static str, Lines> {
        let mut wanted = self.set_up.clone();
        for (pod, since) in &model.captured {
            for (place, change) in &self.of_pods[&(*pod, *since)] {
                change.apply(wanted.get_mut(place).unwrap());
            }
        }
        if model.elsewhere {
            self.swap_proxies(&mut wanted);
        }
        wanted
    }

    /// As if the proxy were in the other place.
    fn swap_proxies(&self, wanted: &mut BTreeMap<&'static str, Lines>) {
        for lines in wanted.values_mut() {
            for line in lines.iter_mut() {
                *line = self.swapped(line);
            }
            lines.sort();
        }
        let there = wanted.remove("other1").unwrap();
        let here = wanted.insert("proxy1", there).unwrap();
        wanted.insert("other1", here);
    }

    fn swapped(&self, line: &str) -> String {
        let [one, other] = &self.proxy;
        let pairs = [
            (&one.0, &other.0),
            (&other.0, &one.0),
            (&one.1, &other.1),
            (&other.1, &one.1),
        ];
        let is_of_a_word = |c: char| c.is_ascii_alphanumeric() || c == '.';
        let parts = line.split_inclusive(|c: char| !is_of_a_word(c));
        parts
            .map(|part| {
                let word = part.trim_end_matches(|c: char| !is_of_a_word(c));
                let new = pairs.iter().find(|(old, _)| *old == word);
                let new = new.map_or(word, |(_, new)| new.as_str());
                format!("{new}{}", &part[word.len()..])
            })
            .collect()
    }
}

/// Waits until everything is as wanted: what drains takes its time.
fn settle(world: &World<'_>, wanted: &BTreeMap<&'static str, Lines>, what: &str) {
    let deadline = Instant::now() + SOON;
    loop {
        let found = everywhere(world);
        let changes = wanted
            .iter()
            .map(|(place, lines)| (place, Change::between(lines, &found[place])));
        let different: Vec<_> = changes.filter(|(_, change)| !change.is_none()).collect();
        if different.is_empty() {
            return;
        }
        assert!(Instant::now() < deadline, "{what}: {different:#?}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

fn sequence(world: &World<'_>, reference: &Reference, model: &mut Model, seed: u64) {
    let mut random = StdRng::seed_from_u64(seed);
    let mut steps: Vec<Step> = (0..STEPS).map(|_| Step::random(&mut random)).collect();
    println!("seed {seed}: {steps:?}, from {model:?}");
    while let Some(step) = steps.pop() {
        let beside = steps.pop_if(|other| step.goes_with(*other) || other.goes_with(step));
        std::thread::scope(|scope| {
            scope.spawn(|| world.take(step));
            if let Some(beside) = beside {
                let pauses = [0, 5, 20, 60, 200];
                let pause = pauses.choose(&mut random).copied().unwrap_or_default();
                std::thread::sleep(Duration::from_millis(pause));
                world.take(beside);
            }
        });
        model.take(step);
        if let Some(beside) = beside {
            model.take(beside);
        }
    }
    world.wait_ready();
    let what = format!("AMBIDEX_SEED={seed}");
    settle(world, &reference.wanted(model), &what);
    diff_is_empty(world.lab, "--node");
    for pod in model.captured.keys() {
        let it = world.sandbox(*pod);
        diff_is_empty(world.lab, &format!("{}/{}", it.namespace, it.name));
    }
}

fn stage(mode: Mode, flow: NodeFlow) -> Scene {
    let mut spec = spec(mode);
    spec.node_flow = flow;
    spec.pods_per_node = 3;
    spec.leaves_pods = true;
    own(&spec)
}

#[rstest]
#[case::node_hybrid(Mode::Node, NodeFlow::Hybrid, 1)]
#[case::node_tunnel(Mode::Node, NodeFlow::Tunnel, 2)]
#[case::inpod(Mode::Inpod, NodeFlow::Hybrid, 3)]
#[case::mixed(Mode::Mixed, NodeFlow::Hybrid, 4)]
fn any_order_ends_in_the_same_state(
    #[case] mode: Mode,
    #[case] flow: NodeFlow,
    #[case] number: u64,
) {
    let scene = stage(mode, flow);
    let world = World {
        lab: &scene.lab,
        other: Sandbox::wired(&scene.lab, OTHER.1, OTHER.0.into()),
        successor: std::sync::Mutex::default(),
    };
    let reference = Reference::of(&world);
    let mut model = Model::default();
    let given = std::env::var("AMBIDEX_SEED").ok();
    let seeds: Vec<u64> = match given {
        Some(seed) => vec![seed.parse().expect("AMBIDEX_SEED is a number")],
        None => (0..sequences())
            .map(|_| rand::rng().random_range(0..1_000_000) * 10 + number)
            .collect(),
    };
    for seed in seeds {
        sequence(&world, &reference, &mut model, seed);
    }
    // In the end nothing is left.
    ambidex(world.lab, "undo --node").with_code(0);
    let mut removed = reference.removed.clone();
    if model.elsewhere {
        reference.swap_proxies(&mut removed);
    }
    settle(&world, &removed, "removed");
}
