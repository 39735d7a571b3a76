//! Nothing goes in circles.

use std::sync::Arc;
use std::time::Duration;

use shared_proxy::capture::Role;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::mesh::{Mesh, SERVER, assert_failed, assert_refused};

const LIMIT: Duration = Duration::from_secs(30);

/// A pod that is captured for both directions, and calls DST. `web` is a service that only it serves.
const SELF: &str = "
workloads:
- {uid: server, name: server, namespace: default, serviceAccount: server, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {80: 8080, 81: 15008}}}
services:
- {name: web, namespace: default, hostname: web, vips: [/10.96.0.1], ports: {80: 8080, 81: 15008}}
";

/// A pod that calls its own service reaches itself, through a tunnel to its own 15008; its address is not spoofed.
#[rstest::rstest]
#[case::by_its_service("10.96.0.1:80")]
#[case::by_its_address("NET.21:8080")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_calls_itself_reaches_itself(#[case] dst: &str) {
    let mesh = Mesh::empty();
    mesh.publish_text(SELF);
    let node = mesh.node();
    let scope = mesh.server();
    let dst = mesh.fill(dst).parse().unwrap();
    let door = scope.forward(mesh.ip(SERVER), Role::Outbound, dst);
    let _attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let app = mesh.listen().await;
    let mut client = mesh.connect(SERVER, door).await.unwrap();
    client.write_all(b"me").await.unwrap();
    let (mut server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    let mut got = [0; 2];
    server.read_exact(&mut got).await.unwrap();
    assert_eq!((&got, from.ip()), (b"me", mesh.ip(SERVER)));
    assert_eq!(node.core.pooled_tunnels(), 1);
}

#[rstest::rstest]
#[case::outbound_loopback_15001(Role::Outbound, "127.0.0.1:15001")]
#[case::outbound_loopback_15006(Role::Outbound, "127.0.0.1:15006")]
#[case::outbound_loopback_15008(Role::Outbound, "127.0.0.1:15008")]
#[case::outbound_own_address_15008(Role::Outbound, "NET.21:15008")]
#[case::outbound_a_service_whose_target_is_the_proxy_itself(Role::Outbound, "10.96.0.1:81")]
#[case::inbound_passthrough_15001(Role::InboundPlaintext, "NET.21:15001")]
#[case::inbound_passthrough_15006(Role::InboundPlaintext, "NET.21:15006")]
#[case::inbound_passthrough_15008(Role::InboundPlaintext, "NET.21:15008")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn illegal_ports_are_dropped(#[case] role: Role, #[case] dst: &str) {
    let mesh = Mesh::empty();
    mesh.publish_text(SELF);
    let node = mesh.node();
    let scope = mesh.server();
    let door = scope.forward(mesh.ip(SERVER), role, mesh.fill(dst).parse().unwrap());
    let _attached = node.core.attach(Arc::new(scope)).await.unwrap();
    assert_refused(mesh.connect(SERVER, door).await).await;
    assert_failed(&node, "-").await;
    assert_eq!(node.core.pooled_tunnels(), 0);
}
