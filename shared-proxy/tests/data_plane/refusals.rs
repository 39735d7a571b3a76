//! Who is turned away, and how that shows.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use shared_proxy::capture::{HBONE_PORT, OUTBOUND_PORT, Role};
use shared_proxy::core::Attached;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::timeout;

use crate::mesh::{
    CLIENT, Mesh, Node, Pair, SERVER, TWIN, VIP, assert_failed, assert_refused, quick,
};

const LIMIT: Duration = Duration::from_secs(30);
const STRICT: &str = "
policies:
- {name: strict, namespace: default, scope: Namespace, action: Deny, dryRun: false,
   rules: [[[{notPrincipals: [{Presence: []}]}]]]}
";
const CLIENTS_ONLY: &str = "
policies:
- {name: clients-only, namespace: default, scope: Namespace, action: Allow, dryRun: false,
   rules: [[[{principals: [{Exact: cluster.local/ns/default/sa/somebody-else}]}]]]}
";

/// A node whose clients' connections to `dst` are captured.
async fn captured(mesh: &Mesh, dst: SocketAddr) -> (Node, Attached, SocketAddr) {
    let node = mesh.node();
    let scope = mesh.clients();
    let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, dst);
    let attached = node.core.attach(Arc::new(scope)).await.unwrap();
    (node, attached, door)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn denied_by_policy() {
    let mesh = Mesh::new();
    mesh.publish("HBONE", CLIENTS_ONLY);
    let pair = Pair::of(mesh, quick()).await;
    let app = pair.mesh.listen().await;
    assert_refused(pair.mesh.connect(CLIENT, pair.door).await).await;
    assert_failed(&pair.two, "DENY").await;
    assert_failed(&pair.one, "CONNECT").await;
    let nobody = timeout(Duration::from_millis(100), app.accept()).await;
    assert!(nobody.is_err(), "the application was reached");

    pair.mesh
        .publish("HBONE", &CLIENTS_ONLY.replace("somebody-else", "client"));
    let _client = pair.connect().await;
    timeout(LIMIT, app.accept()).await.unwrap().unwrap();
}

/// A change of policy ends the connections that it denies, and no others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_that_comes_later_ends_what_it_denies() {
    let pair = Pair::new().await;
    let app = pair.mesh.listen().await;
    let mut client = pair.connect().await;
    client.write_all(b"?").await.unwrap();
    let (mut server, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'?');

    let for_client = CLIENTS_ONLY.replace("somebody-else", "client");
    pair.mesh.publish("HBONE", &for_client);
    tokio::time::sleep(Duration::from_millis(100)).await;
    server.write_all(b"!").await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');

    pair.mesh.publish("HBONE", CLIENTS_ONLY);
    for end in [&mut client, &mut server] {
        let read = timeout(LIMIT, end.read(&mut [0; 1])).await.unwrap();
        assert_eq!(read.unwrap_err().kind(), ErrorKind::ConnectionReset);
    }
    assert_failed(&pair.two, "DENY").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_with_another_identity_gets_nothing() {
    let mesh = Mesh::new();
    let two = mesh.node();
    let scope = Arc::new(mesh.server_as("impostor"));
    let _server = two.core.attach(scope).await.unwrap();
    let app = mesh.listen().await;
    let (one, _clients, door) = captured(&mesh, VIP.parse().unwrap()).await;
    assert_refused(mesh.connect(CLIENT, door).await).await;
    assert_failed(&one, "TLS_FAILURE").await;
    let nobody = timeout(Duration::from_millis(100), app.accept()).await;
    assert!(nobody.is_err(), "the application was reached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_that_is_down() {
    let pair = Pair::new().await;
    assert_refused(pair.mesh.connect(CLIENT, pair.door).await).await;
    assert_failed(&pair.two, "CONNECT").await;
    assert_failed(&pair.one, "CONNECT").await;
    // The tunnel is not to blame: it carries the next one.
    let app = pair.mesh.listen().await;
    let _client = pair.connect().await;
    timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(pair.one.core.pooled_tunnels(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_proxy_at_the_other_end() {
    let mesh = Mesh::new();
    let (one, _clients, door) = captured(&mesh, VIP.parse().unwrap()).await;
    assert_refused(mesh.connect(CLIENT, door).await).await;
    assert_failed(&one, "CONNECT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_of_the_service_that_nobody_serves() {
    let mesh = Mesh::new();
    let (one, _clients, door) = captured(&mesh, "10.96.0.1:81".parse().unwrap()).await;
    assert_refused(mesh.connect(CLIENT, door).await).await;
    assert_failed(&one, "CONNECT").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_nobody_announced() {
    let mesh = Mesh::new();
    let (one, _clients, door) = captured(&mesh, VIP.parse().unwrap()).await;
    assert_refused(mesh.connect(99, door).await).await;
    assert_failed(&one, "-").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn our_own_ports_on_the_pod_s_own_address() {
    let mesh = Mesh::new();
    let own = [
        SocketAddr::new(mesh.ip(CLIENT), OUTBOUND_PORT),
        "127.0.0.1:15006".parse().unwrap(),
    ];
    for dst in own {
        let (_one, _clients, door) = captured(&mesh, dst).await;
        assert_refused(mesh.connect(CLIENT, door).await).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unknown_destination_is_passed_through() {
    let mesh = Mesh::new();
    let outside = SocketAddr::new(mesh.ip(77), 9000);
    let app = tokio::net::TcpSocket::new_v4().unwrap();
    app.bind(outside).unwrap();
    let app = app.listen(16).unwrap();
    let (_one, _clients, door) = captured(&mesh, outside).await;
    let mut client = mesh.connect(TWIN, door).await.unwrap();
    client.write_all(b"plain").await.unwrap();
    let (mut server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    let mut got = [0; 5];
    server.read_exact(&mut got).await.unwrap();
    assert_eq!((&got, from.ip()), (b"plain", mesh.ip(TWIN)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_workload_that_is_told_of_late() {
    let mesh = Mesh::empty();
    let (one, _clients, door) = captured(&mesh, VIP.parse().unwrap()).await;
    let two = mesh.node();
    let _server = two.core.attach(Arc::new(mesh.server())).await.unwrap();
    assert_refused(mesh.connect(CLIENT, door).await).await;
    assert_failed(&one, "CONNECT").await;

    let app = mesh.listen().await;
    let _client = mesh.connect(CLIENT, door).await.unwrap();
    tokio::time::sleep(Duration::from_millis(100)).await;
    mesh.publish("HBONE", "");
    timeout(LIMIT, app.accept()).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext_to_a_captured_pod() {
    let mesh = Mesh::new();
    let node = mesh.node();
    let scope = mesh.server();
    let door = scope.forward(mesh.ip(SERVER), Role::InboundPlaintext, mesh.app());
    let own = SocketAddr::new(mesh.ip(SERVER), HBONE_PORT);
    let own_door = scope.forward(mesh.ip(SERVER), Role::InboundPlaintext, own);
    let _server = node.core.attach(Arc::new(scope)).await.unwrap();
    let app = mesh.listen().await;

    let mut client = mesh.connect(77, door).await.unwrap();
    client.write_all(b"!").await.unwrap();
    let (mut server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(server.read_u8().await.unwrap(), b'!');
    assert_eq!(from.ip(), mesh.ip(77));

    assert_refused(mesh.connect(77, own_door).await).await;

    mesh.publish("HBONE", STRICT);
    assert_refused(mesh.connect(77, door).await).await;
    assert_failed(&node, "DENY").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hand_over_asks_the_policies_and_uses_no_tunnel() {
    let mesh = Mesh::new();
    let node = mesh.node();
    let scope = mesh.clients().handing_over(mesh.pod(SERVER, "server"));
    let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, VIP.parse().unwrap());
    let _clients = node.core.attach(Arc::new(scope)).await.unwrap();
    let app = mesh.listen().await;
    let _client = mesh.connect(CLIENT, door).await.unwrap();
    let (_server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(from.ip(), mesh.ip(CLIENT));
    assert_eq!(node.core.pooled_tunnels(), 0);

    mesh.publish("HBONE", CLIENTS_ONLY);
    assert_refused(mesh.connect(CLIENT, door).await).await;
    assert_failed(&node, "DENY").await;
}
