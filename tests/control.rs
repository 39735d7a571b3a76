//! Proxies that get their mesh and their certificates from a control plane, with it and without it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::state::apply_to;
use harness::{Stage, eventually, own};
use rstest::rstest;
use serde_json::json;

const GUARDED: &str = "pod2-1";
const CLIENT: &str = "pod1-1";
const SOON: Duration = Duration::from_secs(20);

/// Bytes of addresses that a node's proxy was sent so far.
fn received(stage: &Stage, node: u8) -> f64 {
    let labels = [("url", "type.googleapis.com/istio.workload.Address")];
    stage.metric(node, "istio_xds_message_bytes_total", &labels)
}

/// The same with a proxy that asks for what its connections need, and follows nothing else.
#[rstest]
fn the_mesh_comes_on_demand(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    spec.control_plane = true;
    spec.daemon_env
        .insert("XDS_ON_DEMAND".to_owned(), "true".to_owned());
    let scene = own(&spec);
    let known = |name: &str| scene.page(1, 15000, "/config_dump").contains(name);
    assert!(!known("\"pod2-1\"") && !known("\"pod2-2\""));
    let mark = scene.mark(2);
    assert_eq!(scene.seen(CLIENT, scene.at(GUARDED)), scene.ip(CLIENT));
    let identity = scene.identity(CLIENT);
    scene.access_line(
        mark,
        &[("direction", "inbound"), ("src.identity", &identity)],
    );
    assert!(known("\"pod2-1\"") && !known("\"pod2-2\""));
    // An address of nobody in the mesh.
    scene.seen(CLIENT, scene.at("out"));
    // One that cannot be asked about is not taken for that.
    scene.lab.kill_control().unwrap();
    scene.refused(CLIENT, scene.at("pod2-2"));
    assert_eq!(scene.seen(CLIENT, scene.at(GUARDED)), scene.ip(CLIENT));
}

fn connected(stage: &Stage, node: u8) -> bool {
    stage.metric(node, "ambidex_xds_connected", &[]) == 1.0
}

/// Traffic flows, a policy denies, the control plane dies and nothing else does, it returns and sends what differs.
#[rstest]
fn the_mesh_comes_from_a_control_plane(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let mut spec = variant.spec();
    spec.control_plane = true;
    let scene = own(&spec);
    let to = scene.at(GUARDED);
    let mark = scene.mark(2);
    assert_eq!(scene.seen(CLIENT, to), scene.ip(CLIENT));
    // Mutual TLS, with certificates of the control plane's CA.
    let identity = scene.identity(CLIENT);
    scene.access_line(
        mark,
        &[("direction", "inbound"), ("src.identity", &identity)],
    );
    let first = received(&scene, 1);

    let rules = json!([[[{"principals": [{"Suffix": "/ns/alpha/sa/client"}]}]]]);
    let denied = scene.with_state(|state| apply_to(state, GUARDED, "Deny", rules.clone()));
    scene.refused(CLIENT, to);
    scene.seen("pod2-2", to);
    assert!(
        received(&scene, 1) - first < first / 2.0,
        "one workload changed"
    );

    scene.lab.kill_control().unwrap();
    eventually("both proxies notice", SOON, || {
        !connected(&scene, 1) && !connected(&scene, 2)
    });
    scene.refused(CLIENT, to);
    scene.seen("pod2-2", to);
    scene.seen(CLIENT, scene.at("pod2-2"));

    let before = received(&scene, 1);
    scene.lab.start_control().unwrap();
    eventually("both proxies are connected again", SOON, || {
        connected(&scene, 1) && connected(&scene, 2)
    });
    // What was known was not sent again.
    assert!(received(&scene, 1) - before < first / 4.0);
    drop(denied);
    scene.seen(CLIENT, to);
}
