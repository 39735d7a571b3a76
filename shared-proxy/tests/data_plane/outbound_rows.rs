//! The table of outbound decisions, row by row, on sockets: what the other end is asked, or what it sees.
#![allow(clippy::disallowed_methods)]

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::BoxFuture;
use http::StatusCode;
use shared_proxy::capture::{HBONE_PORT, Role};
use shared_proxy::core::{Attached, CoreConfig, Resolve};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, Node, SERVER, assert_failed, assert_refused, quick};
use crate::peer::Peer;

const LIMIT: Duration = Duration::from_secs(30);
/// The pod that is a waypoint or a gateway.
const BETWEEN: u8 = 31;

/// The client, a server with KEYS, a waypoint that is a service too, and services with MORE keys.
const STATE: &str = r#"
workloads:
- {uid: client, name: client, namespace: default, serviceAccount: client, workloadIps: [NET.11], protocol: HBONE, workloadName: client,
   workloadType: deployment, canonicalName: app, canonicalRevision: v1, clusterId: c1, locality: {region: r1, zone: z1}, services: {default/self: {80: 8080}}}
- {uid: server, name: server, namespace: default, serviceAccount: server, KEYS}
- {uid: between, name: between, namespace: default, serviceAccount: between, workloadIps: [NET.31], protocol: HBONE, services: {default/between: {}}}
services:
- {name: web, namespace: default, hostname: web, vips: [/10.96.0.1], ports: {80: 8080}, MORE}
- {name: between, namespace: default, hostname: between, vips: [/10.96.0.9], ports: {}}
- {name: self, namespace: default, hostname: self, vips: [/10.96.0.2], ports: {80: 8080}}
"#;
const HBONE: &str = "workloadIps: [NET.21], protocol: HBONE, services: {default/web: {80: 8080}}";
const TCP: &str = "workloadIps: [NET.21], services: {default/web: {80: 8080}}";

fn state(keys: &str, more: &str) -> String {
    let more = if more.is_empty() {
        "canonical: false"
    } else {
        more
    };
    STATE.replace("KEYS", keys).replace("MORE", more)
}

async fn captured(
    mesh: &Mesh,
    dst: SocketAddr,
    config: CoreConfig,
) -> (Node, Attached, io::Result<TcpStream>) {
    let node = mesh.node_with(config);
    let scope = mesh.clients();
    let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, dst);
    let attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let client = mesh.connect(CLIENT, door).await;
    (node, attached, client)
}

async fn speaks(mut client: TcpStream) {
    client.write_all(b"ping").await.unwrap();
    let mut back = [0; 4];
    timeout(LIMIT, client.read_exact(&mut back))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(&back, b"ping");
    client.shutdown().await.unwrap();
    let rest = timeout(LIMIT, client.read(&mut back)).await.unwrap();
    assert_eq!(rest.unwrap(), 0);
}

/// Rows whose connections go into a tunnel: where it ends, and what is asked there.
#[rstest::rstest]
#[case::row_1_vip_of_a_service_that_has_a_waypoint_by_address(HBONE, "waypoint: {destination: /NET.31}", "10.96.0.1:80", (BETWEEN, HBONE_PORT), "10.96.0.1:80")]
#[case::row_1_vip_of_a_service_that_has_a_waypoint_by_hostname(HBONE, "waypoint: {destination: default/between}", "10.96.0.1:80", (BETWEEN, HBONE_PORT), "10.96.0.1:80")]
#[case::row_1_vip_of_a_service_that_has_a_waypoint_by_vip(HBONE, "waypoint: {destination: /10.96.0.9, hboneMtlsPort: 15018}", "10.96.0.1:80", (BETWEEN, 15_018), "10.96.0.1:80")]
#[case::row_1_source_is_that_waypoint(HBONE, "waypoint: {destination: /NET.11}", "10.96.0.1:80", (SERVER, HBONE_PORT), "NET.21:8080")]
#[case::row_3_vip_of_a_service_endpoint_chosen_port_mapped(HBONE, "", "10.96.0.1:80", (SERVER, HBONE_PORT), "NET.21:8080")]
#[case::row_3_service_sans_are_accepted(
    "trustDomain: elsewhere, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {80: 8080}}",
    "subjectAltNames: ['spiffe://cluster.local/ns/default/sa/server']", "10.96.0.1:80", (SERVER, HBONE_PORT), "NET.21:8080")]
#[case::row_4_health_policy_allow_all("status: Unhealthy, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {80: 8080}}",
    "loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}", "10.96.0.1:80", (SERVER, HBONE_PORT), "NET.21:8080")]
#[case::row_5_workload_ip_with_its_own_waypoint("waypoint: {destination: default/between}, workloadIps: [NET.21], protocol: HBONE, services: {}", "", "NET.21:9000", (BETWEEN, HBONE_PORT), "NET.21:9000")]
#[case::row_5_source_is_a_waypoint("waypoint: {destination: /NET.11}, workloadIps: [NET.21], protocol: HBONE, services: {}", "", "NET.21:9000", (SERVER, HBONE_PORT), "NET.21:9000")]
#[case::row_6_workload_tunnel_protocol_hbone(HBONE, "", "NET.21:9000", (SERVER, HBONE_PORT), "NET.21:9000")]
#[case::row_6_hostname_workload("hostname: db.example, workloadIps: [], protocol: HBONE, services: {default/web: {80: 5432}}", "", "10.96.0.1:80", (SERVER, HBONE_PORT), "db.example:5432")]
#[case::row_8_application_tunnel_takes_any_port("applicationTunnel: {protocol: PROXY, port: 15088}, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {}}",
    "", "10.96.0.1:9", (SERVER, HBONE_PORT), "NET.21:9")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn asks_in_a_tunnel(
    #[case] keys: &str,
    #[case] more: &str,
    #[case] dst: &str,
    #[case] ends: (u8, u16),
    #[case] asks: &str,
) {
    let mesh = Mesh::empty();
    // A service that lists no port 9 is no obstacle for an application tunnel.
    mesh.publish_text(&state(keys, more));
    let (last, port) = ends;
    let account = if last == BETWEEN { "between" } else { "server" };
    let mut peer = Peer::new(&mesh, SocketAddr::new(mesh.ip(last), port), account).await;
    let config = CoreConfig {
        resolver: Arc::new(OneName("db.example", mesh.ip(SERVER))),
        ..quick()
    };
    let dst = mesh.fill(dst).parse().unwrap();
    let (_node, _attached, client) = captured(&mesh, dst, config).await;
    let client = client.unwrap();
    let asked = peer.asked().await;
    assert_eq!(asked.authority(), mesh.fill(asks));
    let from = client.local_addr().unwrap();
    let host = asks_for_a_service(dst).map(|name| format!(";host={name}"));
    assert_eq!(
        asked.header("forwarded").unwrap(),
        format!("for=\"{from}\"{}", host.unwrap_or_default())
    );
    assert_eq!(
        asked.header("baggage").unwrap(),
        "k8s.cluster.name=c1,k8s.namespace.name=default,k8s.deployment.name=client,service.name=app,service.version=v1,\
         cloud.region=r1,cloud.availability_zone=z1"
    );
    let trace = asked.header("traceparent").unwrap();
    let parts: Vec<_> = trace.split('-').collect();
    assert_eq!(
        parts.iter().map(|part| part.len()).collect::<Vec<_>>(),
        [2, 32, 16, 2]
    );
    assert!(
        trace.starts_with("00-") && trace.ends_with("-00"),
        "{trace}"
    );
    assert_eq!(asked.header("x-forwarded-network"), None);
    asked.echo();
    speaks(client).await;
    assert!(peer.is_idle());
}

fn asks_for_a_service(dst: SocketAddr) -> Option<&'static str> {
    (dst.ip() == "10.96.0.1".parse::<IpAddr>().unwrap()).then_some("web")
}

/// Rows whose connections are plain TCP.
#[rstest::rstest]
#[case::row_3_mode_passthrough(
    TCP,
    "loadBalancer: {routingPreferences: [], mode: Passthrough, healthPolicy: OnlyHealthy}",
    "10.96.0.1:8080",
    false
)]
#[case::row_7_workload_tunnel_protocol_none(TCP, "", "NET.21:8080", true)]
#[case::row_7_by_its_service(TCP, "", "10.96.0.1:80", true)]
#[case::row_7_hostname_workload(
    "hostname: db.example, workloadIps: [], services: {default/web: {80: 8080}}",
    "",
    "10.96.0.1:80",
    true
)]
#[case::row_9_unknown("workloadIps: [NET.22], services: {}", "", "NET.21:8080", true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn is_plain_tcp(
    #[case] keys: &str,
    #[case] more: &str,
    #[case] dst: &str,
    #[case] reaches: bool,
) {
    let mesh = Mesh::empty();
    mesh.publish_text(&state(keys, more));
    let app = TcpListener::bind(mesh.app()).await.unwrap();
    let config = CoreConfig {
        resolver: Arc::new(OneName("db.example", mesh.ip(SERVER))),
        connect_timeout: Duration::from_secs(1),
        ..quick()
    };
    let dst: SocketAddr = mesh.fill(dst).parse().unwrap();
    let (node, _attached, client) = captured(&mesh, dst, config).await;
    if !reaches {
        // Nobody has that address here; what counts is that it was dialled, and no endpoint was.
        assert_failed(&node, "CONNECT").await;
        assert!(
            timeout(Duration::from_millis(50), app.accept())
                .await
                .is_err()
        );
        return;
    }
    let (mut server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(from.ip(), mesh.ip(CLIENT));
    tokio::spawn(async move {
        let (mut read, mut write) = server.split();
        tokio::io::copy(&mut read, &mut write).await.unwrap();
        write.shutdown().await.unwrap();
    });
    speaks(client.unwrap()).await;
    assert_eq!(node.core.pooled_tunnels(), 0);
}

/// Rows that fail: the client's connection is reset, and the metrics say why.
#[rstest::rstest]
#[case::row_1_waypoint_unknown(HBONE, "waypoint: {destination: default/nobody}", "10.96.0.1:80")]
#[case::row_1_waypoint_has_no_endpoint(
    HBONE,
    "waypoint: {destination: default/web}",
    "10.96.0.1:80"
)]
#[case::row_4_no_healthy_endpoint(
    "status: Unhealthy, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {80: 8080}}",
    "",
    "10.96.0.1:80"
)]
#[case::row_4_no_endpoint_at_all(
    "workloadIps: [NET.21], protocol: HBONE, services: {}",
    "",
    "10.96.0.1:80"
)]
#[case::row_4_no_endpoint_serves_the_port(HBONE, "", "10.96.0.1:81")]
#[case::row_4_strict_and_no_endpoint_near(
    HBONE,
    "loadBalancer: {routingPreferences: [Region], mode: Strict, healthPolicy: OnlyHealthy}",
    "10.96.0.1:80"
)]
#[case::row_6_hostname_without_an_address(
    "hostname: nowhere.example, workloadIps: [], protocol: HBONE, services: {default/web: {80: 80}}",
    "",
    "10.96.0.1:80"
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fails(#[case] keys: &str, #[case] more: &str, #[case] dst: &str) {
    let mesh = Mesh::empty();
    let more = if more.contains("default/web") {
        // A waypoint that is a service without endpoints.
        "waypoint: {destination: default/empty}"
    } else {
        more
    };
    let empty = "- {name: empty, namespace: default, hostname: empty, vips: [], ports: {}}\n";
    mesh.publish_text(&(state(keys, more) + empty));
    let config = CoreConfig {
        resolver: Arc::new(OneName("db.example", mesh.ip(SERVER))),
        ..quick()
    };
    let (node, _attached, client) = captured(&mesh, dst.parse().unwrap(), config).await;
    assert_refused(client).await;
    assert_failed(&node, "CONNECT").await;
}

/// Row 2: the outer stream asks the other network's gateway for the service's name and port; what the gateway then moves
/// is a second TLS and HTTP/2 connection, in which the endpoint is asked for the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_2_chosen_endpoint_in_another_network_is_double_hbone() {
    let mesh = Mesh::empty();
    let gateway = "networkGateway: {destination: there/NET.31, hboneMtlsPort: 15009}";
    let far = format!(
        "network: there, {gateway}, workloadIps: [], protocol: HBONE, services: {{default/web: {{80: 8080}}}}"
    );
    // There, the endpoint has an address and is asked by the name of its service.
    let there = "
- {uid: there, name: there, namespace: default, serviceAccount: server, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {80: 8080}}, capacity: 0}
- {uid: gateway, name: gateway, namespace: default, serviceAccount: between, workloadIps: [NET.31], network: there, services: {}}
services:";
    let text = state(&far, "").replacen("\nservices:", there, 1);
    let text = text.replace(
        "workloadIps: [NET.31], protocol: HBONE",
        "workloadIps: [NET.32], protocol: HBONE",
    );
    mesh.publish_text(&text);
    let two = mesh.node();
    let _server = two.core.attach(Arc::new(mesh.server())).await.unwrap();
    let app = mesh.listen().await;
    let at = SocketAddr::new(mesh.ip(BETWEEN), 15_009);
    let mut gateway = Peer::new(&mesh, at, "between").await;

    let dst = "10.96.0.1:80".parse().unwrap();
    let (one, _attached, client) = captured(&mesh, dst, quick()).await;
    let mut client = client.unwrap();
    let asked = gateway.asked().await;
    assert_eq!(asked.authority(), "web:80");
    assert_eq!(asked.header("x-forwarded-network"), None);
    asked.forward(SocketAddr::new(mesh.ip(SERVER), HBONE_PORT));
    let (mut server, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    let data = vec![7; 3 << 20];
    let (mut read, mut write) = client.split();
    let sending = async {
        write.write_all(&data).await.unwrap();
        write.shutdown().await.unwrap();
    };
    let echoing = async {
        let (mut from, mut to) = server.split();
        tokio::io::copy(&mut from, &mut to).await.unwrap();
        to.shutdown().await.unwrap();
    };
    let mut back = Vec::new();
    let all = async { tokio::join!(sending, echoing, read.read_to_end(&mut back)) };
    timeout(LIMIT, all).await.unwrap().2.unwrap();
    assert!(back == data, "{} bytes came back", back.len());

    // The tunnel to the gateway stays for others, the one inside is not shared.
    assert_eq!(one.core.pooled_tunnels(), 1);
    assert_eq!(gateway.connections(), 1);
}

/// Row 2, refusals: a gateway that is somebody else, an endpoint behind it that is, and a status of either.
#[rstest::rstest]
#[case::the_gateway_is_somebody_else("impostor", None, "TLS_FAILURE")]
#[case::the_gateway_refuses("between", Some(StatusCode::SERVICE_UNAVAILABLE), "CONNECT")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_2_a_gateway_that_does_not_serve(
    #[case] account: &str,
    #[case] status: Option<StatusCode>,
    #[case] flag: &str,
) {
    let mesh = Mesh::empty();
    let far = "network: there, networkGateway: {destination: there/NET.33}, workloadIps: [], protocol: HBONE, services: {default/web: {80: 8080}}";
    let gateway = "
- {uid: gateway, name: gateway, namespace: default, serviceAccount: between, workloadIps: [NET.33], network: there, services: {}}
services:";
    mesh.publish_text(&state(far, "").replacen("\nservices:", gateway, 1));
    let at = SocketAddr::new(mesh.ip(33), HBONE_PORT);
    let mut peer = Peer::new(&mesh, at, account).await;
    let dst = "10.96.0.1:80".parse().unwrap();
    let (one, _attached, client) = captured(&mesh, dst, quick()).await;
    if let Some(status) = status {
        peer.asked().await.refuse(status);
    }
    assert_refused(client).await;
    assert_failed(&one, flag).await;
}

/// Row 1, refusals: whatever a waypoint answers but 200, the client's connection is reset, and nobody goes around the
/// waypoint.
#[rstest::rstest]
#[case::bad_request(400)]
#[case::unauthorized(401)]
#[case::forbidden(403)]
#[case::not_found(404)]
#[case::headers_too_large(431)]
#[case::internal_error(500)]
#[case::unavailable(503)]
#[case::created(201)]
#[case::no_content(204)]
#[case::moved(301)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_1_a_waypoint_that_answers(#[case] status: u16) {
    let mesh = Mesh::empty();
    mesh.publish_text(&state(HBONE, "waypoint: {destination: /NET.31}"));
    let server = TcpListener::bind((mesh.ip(SERVER), HBONE_PORT))
        .await
        .unwrap();
    let app = TcpListener::bind((mesh.ip(SERVER), 8080)).await.unwrap();
    let at = SocketAddr::new(mesh.ip(BETWEEN), HBONE_PORT);
    let mut waypoint = Peer::new(&mesh, at, "between").await;
    let dst = "10.96.0.1:80".parse().unwrap();
    let (one, _attached, client) = captured(&mesh, dst, quick()).await;
    let asked = waypoint.asked().await;
    assert_eq!(asked.authority(), "10.96.0.1:80");
    asked.refuse(StatusCode::from_u16(status).unwrap());
    assert_refused(client).await;
    assert_failed(&one, "CONNECT").await;
    assert!(waypoint.is_idle());
    for listener in [server, app] {
        let reached = timeout(Duration::from_millis(50), listener.accept()).await;
        assert!(reached.is_err());
    }
}

/// Row 8 without a tunnel between: a pod of the same process is told of its connection as well.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn row_8_application_tunnel_of_a_pod_that_is_handed_over() {
    let mesh = Mesh::empty();
    let keys = "applicationTunnel: {protocol: PROXY, port: 15088}, workloadIps: [NET.21], protocol: HBONE, services: {default/web: {}}";
    mesh.publish_text(&state(keys, ""));
    let node = mesh.node();
    let scope = mesh.clients().handing_over(mesh.pod(SERVER, "server"));
    let door = scope.forward(
        mesh.ip(CLIENT),
        Role::Outbound,
        "10.96.0.1:9".parse().unwrap(),
    );
    let _attached = node.core.attach(Arc::new(scope)).await.unwrap();
    let app = TcpListener::bind((mesh.ip(SERVER), 15_088)).await.unwrap();
    let mut client = mesh.connect(CLIENT, door).await.unwrap();
    client.write_all(b"hello").await.unwrap();
    client.shutdown().await.unwrap();
    let (mut server, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    let mut got = Vec::new();
    timeout(LIMIT, server.read_to_end(&mut got))
        .await
        .unwrap()
        .unwrap();
    assert!(got.starts_with(b"\r\n\r\n\0\r\nQUIT\n\x21\x11"), "{got:?}");
    let end = b"spiffe://cluster.local/ns/default/sa/clienthello";
    assert!(got.ends_with(end), "{got:?}");
    assert_eq!(node.core.pooled_tunnels(), 0);
}

/// Knows one name.
#[derive(Debug)]
struct OneName(&'static str, IpAddr);

impl Resolve for OneName {
    fn resolve<'a>(&'a self, hostname: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            if hostname == self.0 {
                Ok(vec!["fd00::1".parse().unwrap(), self.1])
            } else {
                Err(io::Error::new(io::ErrorKind::NotFound, "no such name"))
            }
        })
    }
}
