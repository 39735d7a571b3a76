#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::drain::{Drainer, Phase, Signal};
use crate::state::{Change, local_xds};

const PODS: u8 = 100;
const CONNECTIONS_PER_POD: u8 = 100;
const CONNECTIONS: usize = 10_000;

/// A node's worth of pods, of which those of namespace `guarded` are every tenth, and pods of other nodes.
fn mesh(more: &str) -> Snapshot {
    let mut text = "workloads:\n".to_owned();
    for pod in 0..PODS {
        let namespace = if pod % 10 == 0 { "guarded" } else { "open" };
        let policies = if pod == 1 { "[open/one]" } else { "[]" };
        text += &format!(
            "- {{uid: pod-{pod}, name: pod-{pod}, namespace: {namespace}, workloadIps: [10.0.0.{pod}], services: {{}}, \
             authorizationPolicies: {policies}}}\n"
        );
    }
    local_xds::parse(&(text + more)).unwrap()
}

fn policy(key: &str, scope: &str, rules: &str) -> Change {
    let (namespace, name) = key.split_once('/').unwrap();
    let text = format!(
        "policies: [{{name: {name}, namespace: {namespace}, scope: {scope}, action: Deny, dryRun: false, rules: {rules}}}]"
    );
    let mesh = local_xds::parse(&text).unwrap();
    Change::Policy(Arc::clone(mesh.policies().next().unwrap()))
}

fn workload(text: &str) -> Change {
    let mesh = local_xds::parse(&format!("workloads: [{text}]")).unwrap();
    Change::Workload(Arc::clone(mesh.workloads().next().unwrap()))
}

/// A node with many connections to its pods.
struct Node {
    store: Store,
    admissions: Admissions,
    standing: Vec<(Signal, Arc<Admission>)>,
}

impl Node {
    fn new() -> Self {
        let node = Node {
            store: Store::new(),
            admissions: Admissions::default(),
            standing: Vec::new(),
        };
        node.store.replace(mesh(""));
        node
    }

    fn with_connections() -> Self {
        let mut node = Self::new();
        for pod in 0..PODS {
            for client in 0..CONNECTIONS_PER_POD {
                node.connect(pod, client);
            }
        }
        assert_eq!(node.standing.len(), CONNECTIONS);
        node
    }

    fn connect(&mut self, pod: u8, client: u8) -> u64 {
        let signal = Drainer::new().signal();
        let admission = Arc::new(Admission {
            client: ClientAddr(([10, 0, 1, client], 50000).into()),
            peer: Some("spiffe://cluster.local/ns/a/sa/b".parse().unwrap()),
            target: ([10, 0, 0, pod], 8080).into(),
            cutter: signal.cutter(),
            denied: OnceLock::new(),
            logged_as_info: false,
        });
        let uid = format!("pod-{pod}");
        let workload = self.store.load().workload_by_uid(&uid).unwrap();
        let (number, snapshot, workload) =
            self.admissions.enter(&self.store, &workload, &admission);
        assert!(admission.ask(&snapshot, &workload).is_allowed());
        self.standing.push((signal, admission));
        number
    }

    /// How many connections are asked about after these changes.
    fn asks_after(&self, changes: impl IntoIterator<Item = Change>) -> usize {
        self.store.update(changes);
        self.admissions.ask_again(&self.store)
    }

    fn denied(&self) -> usize {
        let denied = |(_, admission): &&(Signal, Arc<Admission>)| admission.denied.get().is_some();
        self.standing.iter().filter(denied).count()
    }
}

#[test]
fn only_connections_whose_policies_changed_are_asked_about() {
    let node = Node::with_connections();
    // What is no policy of theirs: endpoints that come and go, the clients' own records, services, others' policies.
    for number in 0..50u8 {
        let text = format!(
            "{{uid: far-{number}, namespace: a, workloadIps: [10.0.1.{number}], services: {{}}}}"
        );
        assert_eq!(node.asks_after([workload(&text)]), 0);
    }
    let gone = Change::RemoveWorkload("far-1".into());
    assert_eq!(node.asks_after([gone]), 0);
    let other = policy("elsewhere/p", "Namespace", "[[]]");
    assert_eq!(node.asks_after([other]), 0);
    let unnamed = policy("open/two", "WorkloadSelector", "[[]]");
    assert_eq!(node.asks_after([unnamed]), 0);
    // The pod's own record, as long as it names the same policies.
    let renamed =
        "{uid: pod-0, name: other, namespace: guarded, workloadIps: [10.0.0.0], services: {}}";
    assert_eq!(node.asks_after([workload(renamed)]), 0);
    // The same state from a file that was written again.
    node.store.replace(mesh(
        "policies: [{name: p, namespace: elsewhere, scope: Namespace, action: Deny, dryRun: false, rules: []}]",
    ));
    assert_eq!(node.admissions.ask_again(&node.store), 0);
    assert_eq!(node.denied(), 0);

    // Those of a namespace: ten pods. Those that a pod names: one. Those for all: everybody, who may pass still.
    let of_namespace = policy("guarded/p", "Namespace", "[[[{destinationPorts: [9]}]]]");
    assert_eq!(node.asks_after([of_namespace.clone()]), 1000);
    assert_eq!(node.asks_after([of_namespace]), 0, "nothing has changed");
    let named = policy(
        "open/one",
        "WorkloadSelector",
        "[[[{destinationPorts: [9]}]]]",
    );
    assert_eq!(node.asks_after([named]), 100);
    let global = policy("ops/p", "Global", "[[[{destinationPorts: [9]}]]]");
    assert_eq!(node.asks_after([global]), CONNECTIONS);
    assert_eq!(node.denied(), 0);
    // A policy that changes or goes is a change of what applies.
    let changed = policy("guarded/p", "Namespace", "[[[{sourceIps: [10.0.1.7]}]]]");
    assert_eq!(node.asks_after([changed]), 1000);
    assert_eq!(node.denied(), 10);
    let removed = Change::RemovePolicy("guarded/p".into());
    assert_eq!(node.asks_after([removed]), 1000);
    // A pod that names another policy, and one that is another pod's from here on.
    let names = "{uid: pod-2, namespace: open, workloadIps: [10.0.0.2], services: {}, authorizationPolicies: [open/one]}";
    assert_eq!(node.asks_after([workload(names)]), 100);
    let moved = [
        Change::RemoveWorkload("pod-3".into()),
        workload(
            "{uid: next, namespace: open, workloadIps: [10.0.0.3], services: {}, authorizationPolicies: [open/one]}",
        ),
    ];
    assert_eq!(node.asks_after(moved), 100);
}

#[test]
fn a_denied_connection_is_cut_and_the_others_are_not() {
    let mut node = Node::new();
    node.connect(0, 7);
    node.connect(0, 8);
    let denies = policy("guarded/p", "Namespace", "[[[{sourceIps: [10.0.1.7]}]]]");
    assert_eq!(node.asks_after([denies]), 2);
    let phases: Vec<Phase> = node
        .standing
        .iter()
        .map(|(signal, _)| signal.phase())
        .collect();
    assert_eq!(phases, [Phase::Cut, Phase::Open]);
    assert_eq!(node.denied(), 1);
}

#[test]
fn a_workload_that_goes_and_comes_back_is_asked_about_if_its_policies_changed_meanwhile() {
    let mut node = Node::new();
    node.connect(0, 7);
    assert_eq!(node.asks_after([Change::RemoveWorkload("pod-0".into())]), 0);
    assert_eq!(
        node.asks_after([policy("guarded/p", "Namespace", "[[]]")]),
        0
    );
    let back = "{uid: pod-0, namespace: guarded, workloadIps: [10.0.0.0], services: {}}";
    assert_eq!(node.asks_after([workload(back)]), 1);
    assert_eq!(node.denied(), 1);
}

#[test]
fn a_connection_that_has_ended_is_forgotten() {
    let mut node = Node::new();
    let number = node.connect(0, 7);
    node.admissions.leave(number, ([10, 0, 0, 0]).into());
    assert!(node.admissions.state().destinations.is_empty());
    assert_eq!(node.asks_after([policy("ops/p", "Global", "[[]]")]), 0);
}

/// What policies say is a line at DEBUG, or at INFO where that is asked for.
#[test]
fn verdicts_are_logged_at_the_level_that_was_asked_for() {
    let lines = |logged_as_info: bool, level: Level| {
        let file = Arc::new(tempfile::tempfile().unwrap());
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .with_writer(Arc::clone(&file))
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            let node = Node::new();
            node.store.update([policy(
                "guarded/no",
                "Namespace",
                "[[[{\"destinationPorts\": [8080]}]]]",
            )]);
            let snapshot = node.store.load();
            for pod in ["pod-0", "pod-1"] {
                let admission = Admission {
                    client: ClientAddr(([10, 0, 1, 9], 50000).into()),
                    peer: Some("spiffe://cluster.local/ns/a/sa/b".parse().unwrap()),
                    target: ([10, 0, 0, 7], 8080).into(),
                    cutter: Drainer::new().signal().cutter(),
                    denied: OnceLock::new(),
                    logged_as_info,
                };
                admission.ask(&snapshot, &snapshot.workload_by_uid(pod).unwrap());
            }
        });
        let mut text = String::new();
        let mut file = &*file;
        std::io::Seek::rewind(&mut file).unwrap();
        std::io::Read::read_to_string(&mut file, &mut text).unwrap();
        text
    };
    // A place that logs for the first time while other tests log, too, may miss that there is a subscriber. The next
    // subscriber finds it known.
    for logged_as_info in [true, false] {
        lines(logged_as_info, Level::DEBUG);
    }
    for (text, level) in [
        (lines(true, Level::INFO), "INFO"),
        (lines(false, Level::DEBUG), "DEBUG"),
    ] {
        let lines: Vec<&str> = text
            .lines()
            .filter(|line| line.contains("policies"))
            .collect();
        let [denied, allowed] = lines[..] else {
            panic!("{text}")
        };
        assert!(denied.contains(level) && allowed.contains(level), "{text}");
        assert!(denied.contains("denied by policy guarded/no"), "{denied}");
        assert!(denied.contains("allowed=false") && denied.contains("src.addr=10.0.1.9:50000"));
        assert!(allowed.contains("allowed=true"), "{allowed}");
    }
    assert!(!lines(false, Level::INFO).contains("policies"));
}
