//! Both captures on both nodes, by one proxy each: odd pods by the node, even ones in the pod.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::sync::{OnceLock, PoisonError};

use harness::Stage;
use lab::topology::{Capture, LabSpec, Mode, NodeFlow};
use lab::traffic::Check;
use rstest::rstest;

fn capture(pod: &str) -> Capture {
    Mode::Mixed.of_pod(pod).unwrap()
}

/// Device on which a tunnel between two pods is neither inside a proxy's namespace nor inside a pod's.
fn device(stage: &Stage, from: &str, to: &str) -> String {
    if stage.node_of(from) != stage.node_of(to) {
        return "eth0".to_owned();
    }
    // One of the two is captured in its pod; its tunnels run over its veth, encrypted from the pod on.
    let inpod = [from, to]
        .into_iter()
        .find(|pod| capture(pod) == Capture::Inpod);
    stage.pod(inpod.unwrap()).veth
}

fn spec(flow: NodeFlow) -> LabSpec {
    let mut spec = harness::spec(Mode::Mixed);
    spec.node_flow = flow;
    spec
}

fn mixed(flow: NodeFlow) -> harness::Scene {
    static STAGES: [OnceLock<harness::SharedStage>; 2] = [const { OnceLock::new() }; 2];
    harness::shared_in(&STAGES[usize::from(flow == NodeFlow::Tunnel)], || {
        spec(flow)
    })
}

/// A request between every two pods, proven encrypted on the wire, with both captures named by those who served it.
#[rstest]
fn every_pair(
    #[values(NodeFlow::Hybrid, NodeFlow::Tunnel)] flow: NodeFlow,
    #[values(
        ("pod1-1", "pod1-2"), ("pod1-1", "pod2-1"), ("pod1-1", "pod2-2"),
        ("pod1-2", "pod1-1"), ("pod1-2", "pod2-1"), ("pod1-2", "pod2-2"),
        ("pod2-1", "pod1-1"), ("pod2-1", "pod1-2"), ("pod2-1", "pod2-2"),
        ("pod2-2", "pod1-1"), ("pod2-2", "pod1-2"), ("pod2-2", "pod2-1")
    )]
    (from, to): (&str, &str),
) {
    let scene = mixed(flow);
    // The way back of another pair would be seen by the same tap, from its middle on.
    let _alone = scene.quiet.lock().unwrap_or_else(PoisonError::into_inner);
    let (near, far) = (scene.node_of(from), scene.node_of(to));
    let (near_log, far_log) = (scene.mark(near), scene.mark(far));
    let between = format!("host {} and host {}", scene.ip(from), scene.ip(to));
    let tap = scene.tap(&format!("node{near}"), &device(&scene, from, to), &between);
    let outcome = scene.check(from, scene.at(to), Check::Who);
    assert_eq!(
        outcome.seen.unwrap().ip(),
        scene.ip(from),
        "the client's address"
    );
    let marked = scene.check(from, scene.at(to), Check::Marker { marker: None });
    let wire = tap.finish();
    wire.assert_encrypted(&[&marked.marker.unwrap()]);
    assert_eq!(
        wire.tunnel_clients(scene.ip(to)),
        [scene.ip(from)],
        "a tunnel of this pair"
    );

    let source = outcome.local.unwrap().to_string();
    let outbound = scene.access_line(
        near_log,
        &[("direction", "outbound"), ("src.addr", &source)],
    );
    assert_eq!(
        outbound["capture_mode"],
        *capture(from).to_string(),
        "{outbound}"
    );
    assert_eq!(outbound["dst.identity"], *scene.identity(to), "{outbound}");
    let wanted = [
        ("direction", "inbound"),
        ("src.workload", from),
        ("dst.workload", to),
    ];
    let inbound = scene.access_line(far_log, &wanted);
    assert_eq!(
        inbound["capture_mode"],
        *capture(to).to_string(),
        "{inbound}"
    );
    assert_eq!(inbound["src.identity"], *scene.identity(from), "{inbound}");
}

/// Two node-captured pods of one node beside in-pod captured ones.
#[rstest]
fn bulk_and_ends_between_captures(
    #[values(NodeFlow::Hybrid, NodeFlow::Tunnel)] flow: NodeFlow,
    #[values(("pod1-1", "pod2-2"), ("pod1-2", "pod2-1"), ("pod1-1", "pod1-2"), ("pod2-2", "pod2-1"))]
    (from, to): (&str, &str),
) {
    let scene = mixed(flow);
    let _alone = scene.quiet.lock().unwrap_or_else(PoisonError::into_inner);
    let bytes = 4 << 20;
    scene.check(
        from,
        scene.at(to),
        Check::Exchange {
            up: bytes,
            down: bytes,
        },
    );
    scene.check(from, scene.at(to), Check::HalfClose { bytes: 100_000 });
    scene.check(from, scene.at(to), Check::PeerReset { after: 1000 });
    scene.check(from, scene.at(to), Check::OwnReset);
    scene.check(from, scene.at(to), Check::Storm { connections: 100 });
}
