//! Policies on connections that stand, and on which end they are asked.
#![allow(clippy::disallowed_methods)]

use std::sync::Arc;
use std::time::Duration;

use shared_proxy::capture::Role;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, PORT, SERVER, VIP, assert_failed};

const LIMIT: Duration = Duration::from_secs(30);

const STATE: &str = r#"
workloads:
- {uid: client, name: client, namespace: default, serviceAccount: client, workloadIps: [NET.11], protocol: HBONE, services: {}, authorizationPolicies: [default/clients]}
- {uid: server, name: server, namespace: default, serviceAccount: server, workloadIps: [NET.21], protocol: HBONE,
   services: {default/web: {80: 8080}}, authorizationPolicies: [default/servers]}
services:
- {name: web, namespace: default, hostname: web, vips: [/10.96.0.1], ports: {80: 8080}}
policies:
"#;

fn policy(name: &str, scope: &str, dry_run: bool, deny: &str) -> String {
    format!(
        "- {{name: {name}, namespace: default, scope: {scope}, action: Deny, dryRun: {dry_run}, rules: {deny}}}\n"
    )
}

async fn passed(client: &mut TcpStream, server: &mut TcpStream) {
    client.write_all(b"x").await.unwrap();
    assert_eq!(
        timeout(LIMIT, server.read_u8()).await.unwrap().unwrap(),
        b'x'
    );
}

async fn accept(app: &TcpListener) -> TcpStream {
    timeout(LIMIT, app.accept()).await.unwrap().unwrap().0
}

const ALL: &str = "[[]]";
const PLAINTEXT: &str = "[[[{notPrincipals: [{Presence: []}]}]]]";
const CLIENT_ONLY: &str = "[[[{principals: [{Exact: cluster.local/ns/default/sa/client}]}]]]";

/// What a change of the policies does to a connection in a tunnel and to one in plaintext.
#[rstest::rstest]
#[case::update_that_denies_all_closes_both("servers", "WorkloadSelector", false, ALL, true, true)]
#[case::update_to_strict_closes_plaintext(
    "servers",
    "WorkloadSelector",
    false,
    PLAINTEXT,
    false,
    true
)]
#[case::update_that_denies_an_identity_closes_its_own(
    "p",
    "Namespace",
    false,
    CLIENT_ONLY,
    true,
    false
)]
#[case::update_of_a_global_policy_closes(
    "p",
    "Global",
    false,
    "[[[{destinationPorts: [8080]}]]]",
    true,
    true
)]
#[case::update_for_another_port_closes_nothing(
    "p",
    "Global",
    false,
    "[[[{destinationPorts: [1]}]]]",
    false,
    false
)]
#[case::dry_run_closes_nothing("servers", "WorkloadSelector", true, ALL, false, false)]
#[case::there_is_no_outbound_rbac("clients", "WorkloadSelector", false, ALL, false, false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn existing_inbound_connections(
    #[case] name: &str,
    #[case] scope: &str,
    #[case] dry_run: bool,
    #[case] deny: &str,
    #[case] closes_tunnelled: bool,
    #[case] closes_plaintext: bool,
) {
    let mesh = Mesh::empty();
    mesh.publish_text(STATE.trim_end().trim_end_matches("policies:"));
    let (one, two) = (mesh.node(), mesh.node());
    let clients = mesh.clients();
    let door = clients.forward(mesh.ip(CLIENT), Role::Outbound, VIP.parse().unwrap());
    let _clients = one.core.attach(Arc::new(clients)).await.unwrap();
    let server = mesh.server();
    let plain_door = server.forward(mesh.ip(SERVER), Role::InboundPlaintext, mesh.app());
    let _server = two.core.attach(Arc::new(server)).await.unwrap();
    let app = TcpListener::bind((mesh.ip(SERVER), PORT)).await.unwrap();

    let mut tunnelled = mesh.connect(CLIENT, door).await.unwrap();
    let mut tunnelled_app = accept(&app).await;
    let mut plain = mesh.connect(77, plain_door).await.unwrap();
    let mut plain_app = accept(&app).await;
    passed(&mut tunnelled, &mut tunnelled_app).await;
    passed(&mut plain, &mut plain_app).await;

    mesh.publish_text(&(STATE.to_owned() + &policy(name, scope, dry_run, deny)));
    tokio::time::sleep(Duration::from_millis(150)).await;
    for (closes, client, server) in [
        (closes_tunnelled, &mut tunnelled, &mut tunnelled_app),
        (closes_plaintext, &mut plain, &mut plain_app),
    ] {
        if closes {
            for end in [client, server] {
                let read = timeout(LIMIT, end.read(&mut [0; 1])).await.unwrap();
                read.unwrap_err();
            }
        } else {
            passed(client, server).await;
        }
    }
    if closes_tunnelled || closes_plaintext {
        assert_failed(&two, "DENY").await;
    }
    let open = two.core.connections().len();
    assert_eq!(
        open,
        2 - usize::from(closes_tunnelled) - usize::from(closes_plaintext)
    );
}
