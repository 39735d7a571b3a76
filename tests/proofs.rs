//! The proof of the path: it holds for each variant, and fails for everything that is deliberately broken.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::time::Duration;

use harness::{Scene, own};
use lab::bench::Path::{self, CrossNode, SameNode};
use lab::bench::Variant::{self, Inpod, NodeDirect, NodeHybrid, NodeTunnel, Relay};
use lab::bench::proof::{Proof, prove, require};
use lab::topology::Mode;

// What statements are about, as parts of their claims.
const MARKER_HIDDEN: &str = "the marker is never in the clear";
const MARKER_VISIBLE: &str = "the marker is visible";
const TLS: &str = "in TLS records only";
const NOTHING_ELSE: &str = "no TCP payload outside port 15008";
const SILENT: &str = "no TCP payload at all";
const ISTIOOUT: &str = "through istioout";
const ISTIOIN: &str = "through istioin";
const CLIENT_ADDRESS: &str = "the server sees the client's address";
/// On a wire where everything should be encrypted and nothing is.
const CLEAR: [&str; 3] = [MARKER_HIDDEN, TLS, NOTHING_ELSE];

fn lab(variant: &Variant) -> Scene {
    let mode = match variant {
        Variant::None => Mode::None,
        NodeHybrid | NodeTunnel | NodeDirect => Mode::Node,
        Inpod | Relay | Variant::External(_) => Mode::Inpod,
    };
    let spec = harness::spec(mode);
    own(&variant.lab(spec.name, spec.overlay, spec.programs))
}

fn judged(scene: &Scene, variant: &Variant, path: Path) -> Proof {
    prove(&scene.lab, variant, path).unwrap_or_else(|error| panic!("{variant} {path}: {error:#}"))
}

fn holds(scene: &Scene, variant: &Variant) {
    for path in [CrossNode, SameNode] {
        let proof = judged(scene, variant, path);
        assert!(proof.holds(), "{proof}");
        require(&[proof]).unwrap();
    }
}

/// The proof fails in the statements about these things, each at least once, and in no other.
#[track_caller]
fn fails(proof: &Proof, about: &[&str]) {
    let failed: Vec<&str> = proof
        .failed()
        .map(|statement| statement.claim.as_str())
        .collect();
    for part in about {
        assert!(
            failed.iter().any(|claim| claim.contains(part)),
            "{part:?} should not hold:\n{proof}"
        );
    }
    for claim in failed {
        assert!(
            about.iter().any(|part| claim.contains(part)),
            "{claim:?} should hold:\n{proof}"
        );
    }
    let error = require(std::slice::from_ref(proof))
        .unwrap_err()
        .to_string();
    for part in about {
        assert!(error.contains(part), "{part:?} is not named: {error}");
    }
}

fn run(scene: &Scene, target: &str, script: &str) {
    let done = scene
        .lab
        .run(target, &["sh", "-ec", script], Duration::from_secs(10));
    done.unwrap().success(script).unwrap();
}

/// All proxies take all pods for uncaptured ones.
fn without_tls(scene: &Scene, variant: &Variant) -> Proof {
    let _plain = scene.with_state(|state| {
        for workload in &mut state.workloads {
            workload.protocol = "TCP".to_owned();
        }
    });
    judged(scene, variant, CrossNode)
}

#[test]
fn no_mesh() {
    let scene = lab(&Variant::None);
    holds(&scene, &Variant::None);
    fails(&judged(&scene, &Inpod, CrossNode), &CLEAR);
    fails(&judged(&scene, &Inpod, SameNode), &CLEAR);
    for node in [NodeHybrid, NodeTunnel] {
        let about = [&CLEAR[..], &[ISTIOOUT, ISTIOIN]].concat();
        fails(&judged(&scene, &node, CrossNode), &about);
    }
}

/// The bound is readable on the wire, and neither a mesh nor a direct connection.
#[test]
fn relay() {
    let scene = lab(&Relay);
    holds(&scene, &Relay);
    let proof = judged(&scene, &Inpod, CrossNode);
    assert!(!proof.holds(), "a relay is no mesh:\n{proof}");
    let proof = judged(&scene, &Relay, CrossNode);
    assert!(proof.holds(), "{proof}");
    let direct = lab(&Variant::None);
    let proof = judged(&direct, &Relay, CrossNode);
    assert!(!proof.holds(), "a direct connection is no relay:\n{proof}");
}

#[test]
fn inpod() {
    let scene = lab(&Inpod);
    holds(&scene, &Inpod);
    fails(
        &judged(&scene, &Variant::None, CrossNode),
        &[MARKER_VISIBLE],
    );
    fails(&without_tls(&scene, &Inpod), &CLEAR);
    holds(&scene, &Inpod);

    // The proxy's last hop, which is on the pod's loopback, loses the client's address.
    let masquerade = "POSTROUTING -o lo -p tcp --dport 8090 -j SNAT --to-source 10.244.2.10";
    run(
        &scene,
        "pod2-1",
        &format!("iptables -t nat -A {masquerade}"),
    );
    fails(&judged(&scene, &Inpod, CrossNode), &[CLIENT_ADDRESS]);
    run(
        &scene,
        "pod2-1",
        &format!("iptables -t nat -D {masquerade}"),
    );

    // Without the rule that redirects them, and those that would stop them then, new connections leave the pod as they are.
    run(&scene, "pod1-1", "iptables -F AMBIDEX_GUARD_OUT");
    run(
        &scene,
        "pod1-1",
        "rule=$(iptables -t nat -S ISTIO_OUTPUT | grep -e '--to-ports 15001'); \
         iptables -t nat -D ${rule#-A }",
    );
    fails(&judged(&scene, &Inpod, CrossNode), &CLEAR);
    fails(&judged(&scene, &Inpod, SameNode), &CLEAR);
}

#[test]
fn node_hybrid() {
    node(&NodeHybrid, &NodeTunnel);
}

#[test]
fn node_tunnel() {
    node(&NodeTunnel, &NodeHybrid);
}

/// Two pods of a node are connected inside the proxy: nothing to see on its loopback, where the other flows have a tunnel.
#[test]
fn node_direct() {
    let scene = lab(&NodeDirect);
    holds(&scene, &NodeDirect);
    fails(&judged(&scene, &NodeHybrid, SameNode), &[TLS]);
    fails(&judged(&scene, &Variant::None, SameNode), &[ISTIOOUT]);
    let tunnelled = lab(&NodeHybrid);
    fails(&judged(&tunnelled, &NodeDirect, SameNode), &[SILENT]);
}

fn node(variant: &Variant, other_flow: &Variant) {
    let scene = lab(variant);
    holds(&scene, variant);
    fails(&judged(&scene, other_flow, CrossNode), &[ISTIOOUT, ISTIOIN]);
    fails(&judged(&scene, other_flow, SameNode), &[ISTIOOUT]);
    // On the way from the pod to the node's proxy there is no TLS yet. With the flow hybrid, nothing of a tunnel that stands
    // passes through istioin any more.
    let overlays: &[&str] = match variant {
        NodeTunnel => &[ISTIOOUT, ISTIOIN],
        _ => &[ISTIOOUT],
    };
    let about = [&CLEAR[..], overlays].concat();
    fails(&judged(&scene, &Inpod, CrossNode), &about);

    // The client's leg is captured as before; between the proxies there is no tunnel.
    let about = [&CLEAR[..], &[ISTIOIN]].concat();
    fails(&without_tls(&scene, variant), &about);
    holds(&scene, variant);

    // What comes from the proxy loses the client's address on its way into the pod.
    let masquerade = "INPUT -p tcp --dport 8090 -j SNAT --to-source 10.244.2.1";
    run(
        &scene,
        "pod2-1",
        &format!("iptables -t nat -A {masquerade}"),
    );
    fails(&judged(&scene, variant, CrossNode), &[CLIENT_ADDRESS]);
    run(
        &scene,
        "pod2-1",
        &format!("iptables -t nat -D {masquerade}"),
    );

    // A node that knows none of its pods as captured, and has nothing that would stop them, forwards their packets past the
    // proxy.
    run(
        &scene,
        "node1",
        "iptables -F ztunnel-FORWARD; ipset flush ztunnel-pods-ips; ip route flush table 100",
    );
    let about = [&CLEAR[..], &[ISTIOOUT, ISTIOIN]].concat();
    fails(&judged(&scene, variant, CrossNode), &about);
}
