//! Who may not pass, and what it looks like from both ends.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::state::apply_to;
use harness::{eventually, shared};
use lab::topology::APPLICATION_PORT;
use lab::traffic::{Check, Saw};
use rstest::rstest;
use serde_json::{Value, json};

/// A second application in the guarded pod.
const OTHER_PORT: u16 = 8081;
/// The pod that every policy here is about. `pod1-1` (alpha/client) is on the other node, `pod2-2` (beta/client) and
/// `pod2-3` (alpha/server) on its own.
const GUARDED: &str = "pod2-1";

/// A rule, and who may pass by it: each client with the port that it asks for.
struct Rule {
    action: &'static str,
    rules: fn(&harness::Stage) -> Value,
    passes: &'static [(&'static str, u16)],
    denied: &'static [(&'static str, u16)],
}

/// ALLOW of one principal leaves nobody else.
const PRINCIPAL: Rule = Rule {
    action: "Allow",
    rules: |_| json!([[[{"principals": [{"Exact": "cluster.local/ns/beta/sa/client"}]}]]]),
    passes: &[("pod2-2", APPLICATION_PORT)],
    denied: &[
        ("pod1-1", APPLICATION_PORT),
        ("pod2-3", APPLICATION_PORT),
        ("plain1", APPLICATION_PORT),
    ],
};

const NAMESPACE: Rule = Rule {
    action: "Deny",
    rules: |_| json!([[[{"namespaces": [{"Exact": "alpha"}]}]]]),
    passes: &[
        ("pod1-2", APPLICATION_PORT),
        ("pod2-2", APPLICATION_PORT),
        // Without an identity it is of no namespace.
        ("plain1", APPLICATION_PORT),
    ],
    denied: &[("pod1-1", APPLICATION_PORT), ("pod2-3", APPLICATION_PORT)],
};

const SOURCE_IP: Rule = Rule {
    action: "Deny",
    rules: |stage| {
        let addresses = ["pod1-1", "plain1"].map(|pod| format!("{}/32", stage.ip(pod)));
        json!([[[{"sourceIps": addresses}]]])
    },
    // The same identity as pod1-1, from another address.
    passes: &[("pod1-3", APPLICATION_PORT), ("plain2", APPLICATION_PORT)],
    denied: &[("pod1-1", APPLICATION_PORT), ("plain1", APPLICATION_PORT)],
};

const PORT: Rule = Rule {
    action: "Deny",
    rules: |_| json!([[[{"destinationPorts": [OTHER_PORT]}]]]),
    passes: &[("pod1-1", APPLICATION_PORT), ("plain1", APPLICATION_PORT)],
    denied: &[
        ("pod1-1", OTHER_PORT),
        ("pod2-2", OTHER_PORT),
        ("plain1", OTHER_PORT),
    ],
};

/// What a STRICT PeerAuthentication becomes: nobody without an identity.
const STRICT: Rule = Rule {
    action: "Deny",
    rules: |_| json!([[[{"notPrincipals": [{"Presence": []}]}]]]),
    passes: &[("pod1-1", APPLICATION_PORT), ("pod2-2", APPLICATION_PORT)],
    denied: &[("plain1", APPLICATION_PORT), ("plain2", APPLICATION_PORT)],
};

#[rstest]
#[case::principal(PRINCIPAL)]
#[case::namespace(NAMESPACE)]
#[case::source_ip(SOURCE_IP)]
#[case::port(PORT)]
#[case::strict(STRICT)]
fn denied_by_policy(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant, #[case] rule: Rule) {
    let scene = shared(variant);
    let rules = (rule.rules)(&scene);
    let _changed = scene.with_state(|state| apply_to(state, GUARDED, rule.action, rules));
    scene.serve(GUARDED, OTHER_PORT);
    let guarded = |port: u16| (scene.ip(GUARDED), port).into();
    for (client, port) in rule.passes {
        assert_eq!(
            scene.seen(client, guarded(*port)),
            scene.ip(client),
            "{client} to port {port}"
        );
    }
    for (client, port) in rule.denied {
        let captured = scene.pod(client).capture.is_some();
        let (near, far) = (scene.mark(scene.node_of(client)), scene.mark(2));
        let before = denials(&scene);
        scene.refused(client, guarded(*port));

        let reason = match rule.action {
            "Deny" => "~denied by policy alpha/tested",
            _ => "~no ALLOW policy matches",
        };
        let wanted = [
            ("direction", "inbound"),
            ("src.workload", client),
            ("dst.workload", GUARDED),
            ("error", reason),
        ];
        scene.access_line(far, &wanted);
        if captured {
            let wanted = [
                ("direction", "outbound"),
                ("src.workload", client),
                ("error", "~401"),
            ];
            scene.access_line(near, &wanted);
        }
        eventually("the denial is counted", Duration::from_secs(5), || {
            denials(&scene) > before
        });
    }
}

/// A policy is for connections that are open already, too: those that it denies end, the others do not notice.
#[rstest]
fn denied_while_open(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let to = scene.at(GUARDED);
    let open = |from: &'static str| {
        let check = Check::OneByteWrites {
            count: 2000,
            pause_ms: 8000,
        };
        let scene = &scene;
        move || scene.attempt(from, to, check, Duration::from_secs(40))
    };
    std::thread::scope(|scope| {
        let [tunnelled, plain] = ["pod1-1", "plain1"].map(|from| scope.spawn(open(from)));
        let allowed = scope.spawn(open("pod2-2"));
        let connections = |count: f64| {
            eventually("three connections are open", Duration::from_secs(5), || {
                let labels = [("reporter", "destination")];
                scene.metric(2, "istio_tcp_sockets_open", &labels) >= count
            });
        };
        connections(3.0);
        let rules = (PRINCIPAL.rules)(&scene);
        let (mark, before) = (scene.mark(2), denials(&scene));
        let changed = scene.with_state(|state| apply_to(state, GUARDED, PRINCIPAL.action, rules));
        for denied in [tunnelled, plain] {
            let outcome = denied.join().unwrap();
            assert_eq!(outcome.saw, Some(Saw::Reset), "{outcome:#?}");
            assert!(outcome.millis < 8000, "it ended by itself: {outcome:#?}");
        }
        for src in ["pod1-1", "plain1"] {
            let line = [
                ("direction", "inbound"),
                ("src.workload", src),
                ("dst.workload", GUARDED),
                ("message", "connection complete"),
                ("error", "~no ALLOW policy matches"),
            ];
            scene.access_line(mark, &line);
        }
        eventually("both are counted as denied", Duration::from_secs(5), || {
            denials(&scene) >= before + 2.0
        });
        let outcome = allowed.join().unwrap();
        assert!(outcome.ok, "{outcome:#?}");
        drop(changed);
    });
}

/// The kubelet has no identity and is not asked for one.
#[rstest]
fn host_probe_passes_where_plaintext_is_denied(
    #[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let rules = (STRICT.rules)(&scene);
    let _changed = scene.with_state(|state| apply_to(state, GUARDED, STRICT.action, rules));
    scene.refused("plain1", scene.at(GUARDED));
    scene.seen("node2", scene.at(GUARDED));
}

fn denials(stage: &harness::Stage) -> f64 {
    let labels = [("reporter", "destination"), ("response_flags", "DENY")];
    stage.metric(2, "istio_tcp_connections_failed_total", &labels)
}
