//! The question that a pod's network namespace asks its own capture.

use std::sync::Arc;
use std::time::Duration;

use shared_proxy::capture::Role;
use shared_proxy::probe::{self, Answer, Question, Reached};
use tokio::time::timeout;

use crate::mesh::{Mesh, SERVER};

const LIMIT: Duration = Duration::from_secs(30);

/// What a pod hears that asks through `door`.
async fn ask(mesh: &Mesh, door: std::net::SocketAddr) -> Answer {
    let question = Question {
        nonce: "n-1".to_owned(),
    };
    timeout(LIMIT, async {
        let mut stream = mesh.connect(SERVER, door).await.unwrap();
        probe::write(&mut stream, &question).await.unwrap();
        probe::read(&mut stream).await.unwrap()
    })
    .await
    .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_captured_pod_reaches_itself_through_a_tunnel_and_leaves_no_trace() {
    let mesh = Mesh::new();
    let node = mesh.node();
    let scope = mesh.server();
    let door = scope.forward(mesh.ip(SERVER), Role::Outbound, probe::ADDRESS);
    let _attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let reached = Reached {
        nonce: "n-1".to_owned(),
        uid: format!("uid-{SERVER}"),
        capture_mode: "loopback".to_owned(),
        tunnelled: true,
    };
    assert_eq!(ask(&mesh, door).await, Answer::Reached(reached));
    assert_eq!(node.core.pooled_tunnels(), 0);
    let metrics = node.telemetry.encode().unwrap();
    let counted = |line: &&str| line.contains("opened_total{") || line.contains("failed_total{");
    assert_eq!(metrics.lines().find(counted), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_capture_without_tunnels_says_so() {
    let mesh = Mesh::new();
    let node = mesh.node();
    let pod = mesh.pod(SERVER, "server");
    let scope = mesh.server().handing_over(pod);
    let door = scope.forward(mesh.ip(SERVER), Role::Outbound, probe::ADDRESS);
    let _attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let Answer::Reached(reached) = ask(&mesh, door).await else {
        panic!("not reached");
    };
    assert!(!reached.tunnelled);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_no_tunnel_reaches_hears_why() {
    let mesh = Mesh::new();
    let node = mesh.node();
    // Without the listener of tunnels.
    let scope = crate::mesh::LoopbackScope::new("server", vec![mesh.pod(SERVER, "server")]);
    let door = scope.forward(mesh.ip(SERVER), Role::Outbound, probe::ADDRESS);
    let _attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let Answer::Failed(why) = ask(&mesh, door).await else {
        panic!("reached without a listener");
    };
    assert!(
        why.contains("no tunnel to the pod itself") && why.contains("refused"),
        "{why}"
    );
}
