//! Who may come in.

use std::net::Ipv4Addr;

use lab::topology::APPLICATION_PORT;
use lab::topology::workloads::LocalXds;
use lab::traffic::Check;
use rstest::rstest;
use serde_json::{Value, json};

use crate::harness::Variant::{self, Inpod, NodeHybrid};
use crate::harness::state::policy;
use crate::harness::{Scene, Stage};
use crate::{CLIENT, LIMIT, PLAIN, PODS, SERVER, shared};

/// Who gets through to a pod with the policies of a row: the client in a tunnel, with its identity, or the uncaptured pod
/// in plaintext, with none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pass {
    Both,
    Tunnel,
    Plaintext,
    Nobody,
}

use Pass::{Both, Nobody, Plaintext, Tunnel};

impl Pass {
    fn of(tunnel: bool, plaintext: bool) -> Self {
        match (tunnel, plaintext) {
            (true, true) => Both,
            (true, false) => Tunnel,
            (false, true) => Plaintext,
            (false, false) => Nobody,
        }
    }
}

/// One sentence: policies, without names, that a pod names.
struct Row {
    what: &'static str,
    policies: Vec<Value>,
    passes: Pass,
}

fn row<const N: usize>(what: &'static str, policies: [Value; N], passes: Pass) -> Row {
    Row {
        what,
        policies: policies.into(),
        passes,
    }
}

fn allow(rules: Value) -> Value {
    policy("", "Allow", rules)
}

fn deny(rules: Value) -> Value {
    policy("", "Deny", rules)
}

fn dry(mut policy: Value) -> Value {
    policy["dryRun"] = json!(true);
    policy
}

fn scoped(scope: &str, namespace: &str) -> Value {
    let mut everything = deny(json!([[]]));
    everything["scope"] = json!(scope);
    everything["namespace"] = json!(namespace);
    everything
}

/// What follows from the policies that apply.
fn decisions() -> Vec<Row> {
    let (all, none) = (json!([[]]), json!([]));
    let (allow_all, allow_none) = (allow(all.clone()), allow(none.clone()));
    let (deny_all, deny_none) = (deny(all), deny(none));
    vec![
        row("a missing one does not deny", [], Both),
        row("dry run of DENY", [dry(deny_all.clone())], Both),
        row(
            "dry run of ALLOW lets nobody pass",
            [dry(allow_all.clone()), allow_none.clone()],
            Nobody,
        ),
        row("any DENY", [deny_none.clone(), deny_all.clone()], Nobody),
        row("DENY wins", [allow_all.clone(), deny_all], Nobody),
        row("no ALLOW at all", [deny_none], Both),
        row("any ALLOW", [allow_none.clone(), allow_all], Both),
        row("else denied", [allow_none], Nobody),
    ]
}

/// Rules by structure, by emptiness and by field, as those of a DENY of a pod with this address.
fn rules(stage: &Stage, own: Ipv4Addr) -> Vec<Row> {
    let client = stage.identity(CLIENT).replace("spiffe://", "");
    let net = |ip: Ipv4Addr| format!("{ip}/32");
    let (from, plain, own) = (net(stage.ip(CLIENT)), net(stage.ip(PLAIN)), net(own));
    let port = APPLICATION_PORT;
    let (yes, no) = (
        json!({"destinationPorts": [port]}),
        json!({"destinationPorts": [1]}),
    );
    let account = json!([{"namespace": "alpha", "serviceAccount": "client"}]);
    let either = json!({"destinationPorts": [1, port]});
    let both = json!({"destinationPorts": [port], "sourceIps": [from]});
    let rules = |what, rules, passes| row(what, [deny(rules)], passes);
    let one = |what, field: Value, passes| rules(what, json!([[[field]]]), passes);
    let principal = |how: &str, value: Value| json!({"principals": [{how: value}]});
    vec![
        rules("rules are or", json!([[[yes]], [[no]]]), Nobody),
        rules("clauses are and", json!([[[yes], [no]]]), Both),
        rules("matches are or", json!([[[yes, no]]]), Nobody),
        one("fields are and", both, Plaintext),
        one("values are or", either, Nobody),
        rules("no rules", json!([]), Both),
        rules("a rule without clauses", json!([[]]), Nobody),
        rules("a clause without matches", json!([[[]]]), Nobody),
        one("a match without fields", json!({}), Both),
        one(
            "principal, exact",
            principal("Exact", json!(client)),
            Plaintext,
        ),
        one(
            "principal, prefix",
            principal("Prefix", json!("cluster.local/ns/alpha/")),
            Plaintext,
        ),
        one(
            "principal, suffix",
            principal("Suffix", json!("/sa/client")),
            Plaintext,
        ),
        one(
            "principal, presence",
            principal("Presence", json!([])),
            Plaintext,
        ),
        one(
            "principals have no scheme",
            principal("Prefix", json!("spiffe://")),
            Both,
        ),
        one(
            "not this principal",
            json!({"notPrincipals": [{"Exact": client}]}),
            Tunnel,
        ),
        one(
            "namespace",
            json!({"namespaces": [{"Exact": "alpha"}]}),
            Plaintext,
        ),
        one(
            "not this namespace",
            json!({"notNamespaces": [{"Exact": "alpha"}]}),
            Tunnel,
        ),
        one(
            "service account",
            json!({"serviceAccounts": account}),
            Plaintext,
        ),
        one(
            "not this service account",
            json!({"notServiceAccounts": account}),
            Tunnel,
        ),
        one("source address", json!({"sourceIps": [plain]}), Tunnel),
        one(
            "not this source address",
            json!({"notSourceIps": [plain]}),
            Plaintext,
        ),
        one(
            "destination address",
            json!({"destinationIps": [own]}),
            Nobody,
        ),
        one(
            "not this destination address",
            json!({"notDestinationIps": [own]}),
            Both,
        ),
        one("destination port", yes, Nobody),
        one(
            "not this destination port",
            json!({"notDestinationPorts": [port]}),
            Both,
        ),
    ]
}

/// Who gets through to a pod.
fn found(scene: &Scene, pod: &str) -> Pass {
    let [tunnel, plaintext] = [CLIENT, PLAIN].map(|from| {
        let outcome = scene.attempt(from, scene.at(pod), Check::Who, LIMIT);
        outcome.ok
    });
    Pass::of(tunnel, plaintext)
}

/// Which policies apply to a pod: those for all, those of its namespace, and of the others those that it names.
#[rstest]
#[case::global(scoped("Global", "mesh"), Nobody)]
#[case::of_the_namespace(scoped("Namespace", "alpha"), Nobody)]
#[case::of_another_namespace(scoped("Namespace", "beta"), Both)]
#[case::that_nobody_names(scoped("WorkloadSelector", "alpha"), Both)]
fn policies_that_apply(
    #[values(NodeHybrid, Inpod)] variant: Variant,
    #[case] policy: Value,
    #[case] passes: Pass,
) {
    let scene = shared(variant);
    let _alone = scene.in_state(|state| state.policies.push(policy));
    assert_eq!(found(&scene, SERVER), passes);
}

/// Each sentence about what policies say, by a pod of its own: so many at a time as there are pods, on both nodes.
#[rstest]
fn sentence_by_sentence(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let on = |node: u8| move |pod| format!("pod{node}-{pod}");
    let pods = (1..=PODS).map(on(1)).chain((1..=PODS).map(on(2)));
    let pods: Vec<String> = pods.filter(|pod| pod != CLIENT).collect();
    let rows = |pod: &str| {
        let rules = rules(&scene, scene.ip(pod));
        decisions().into_iter().chain(rules).collect::<Vec<_>>()
    };
    let all: Vec<usize> = (0..rows(SERVER).len()).collect();
    for some in all.chunks(pods.len()) {
        let some: Vec<(&str, Row)> = some
            .iter()
            .zip(&pods)
            .map(|(at, pod)| (pod.as_str(), rows(pod).swap_remove(*at)))
            .collect();
        let _alone = scene.in_state(|state| {
            for (pod, row) in &some {
                name(state, pod, &row.policies);
            }
        });
        let wrong: Vec<String> = some
            .iter()
            .map(|(pod, row)| (pod, row, found(&scene, pod)))
            .filter(|(_, row, found)| *found != row.passes)
            .map(|(pod, row, found)| {
                format!("{} ({pod}): {found:?}, not {:?}", row.what, row.passes)
            })
            .collect();
        assert!(wrong.is_empty(), "{wrong:#?}");
    }
}

/// Has a pod name these policies, beside one that is not there.
fn name(state: &mut LocalXds, pod: &str, policies: &[Value]) {
    let mut names = vec!["alpha/missing".to_owned()];
    for (at, policy) in policies.iter().enumerate() {
        let mut policy = policy.clone();
        let name = format!("{pod}-{at}");
        policy["name"] = json!(name);
        names.push(format!("alpha/{name}"));
        state.policies.push(policy);
    }
    state.workload_mut(pod).unwrap().authorization_policies = names;
}
