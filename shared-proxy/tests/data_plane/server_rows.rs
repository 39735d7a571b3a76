//! What the HBONE server answers, row by row, and what the application sees.
#![allow(clippy::disallowed_methods)]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request, StatusCode};
use shared_proxy::capture::Role;
use shared_proxy::core::CoreConfig;
use shared_proxy::identity::{Certificates, Identity, RefreshPolicy};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, PORT, SERVER, assert_failed, assert_refused, quick};
use crate::protocol::{server, status, tunnel, tunnel_with};

const LIMIT: Duration = Duration::from_secs(30);

/// The server with KEYS, other workloads, and services.
const STATE: &str = r#"
workloads:
- {uid: client, name: client, namespace: default, serviceAccount: client, workloadIps: [NET.11], protocol: HBONE, services: {}}
- {uid: server, name: server, namespace: default, serviceAccount: server, workloadIps: [NET.21], protocol: HBONE, KEYS}
- {uid: behind, name: behind, namespace: default, workloadIps: [10.0.0.5], waypoint: {destination: /NET.21}, services: {}}
- {uid: other, name: other, namespace: default, workloadIps: [10.0.0.6], services: {}}
services:
- {name: web, namespace: default, hostname: web.default.svc.cluster.local, vips: [/10.96.0.1], ports: {80: 8080, 81: 0}}
- {name: behind, namespace: shop, hostname: behind.shop.svc.cluster.local, vips: [/10.96.0.2], cidrVips: [/10.97.0.0/16], ports: {80: 80}, waypoint: {destination: default/wp}}
- {name: other, namespace: default, hostname: other.default.svc.cluster.local, vips: [/10.96.0.3], ports: {80: 8080}}
- {name: wp, namespace: default, hostname: wp, vips: [], ports: {}}
"#;
const PLAIN: &str = "services: {default/web.default.svc.cluster.local: {81: 8080}}";
const WAYPOINT: &str = "services: {default/wp: {}}";
const DENIED: &str = "
policies:
- {name: nobody, namespace: default, scope: Namespace, action: Allow, dryRun: false, rules: []}
";

fn state(keys: &str) -> String {
    STATE.replace("KEYS", keys)
}

#[rstest::rstest]
#[case::method_is_not_connect(PLAIN, Method::GET, "https://NET.21:8080/", 400)]
#[case::method_post(PLAIN, Method::POST, "https://NET.21:8080/", 400)]
#[case::authority_without_a_port(PLAIN, Method::CONNECT, "NET.21", 400)]
#[case::authority_unparsable(PLAIN, Method::CONNECT, "a..b:8080", 400)]
#[case::authority_ip_is_not_the_connection_s_local_ip(PLAIN, Method::CONNECT, "10.1.2.3:8080", 400)]
#[case::authority_is_the_capture_probe_of_another_pod(
    PLAIN,
    Method::CONNECT,
    "169.254.7.126:15099",
    400
)]
#[case::authority_ip_of_another_workload(PLAIN, Method::CONNECT, "10.0.0.6:8080", 400)]
#[case::authority_is_a_vip_of_its_own_service(PLAIN, Method::CONNECT, "10.96.0.1:8080", 400)]
#[case::authority_is_a_vip_of_a_service_with_another_waypoint(
    PLAIN,
    Method::CONNECT,
    "10.96.0.2:8080",
    400
)]
#[case::waypoint_asked_for_a_service_that_is_not_behind_it(
    WAYPOINT,
    Method::CONNECT,
    "10.96.0.3:8080",
    400
)]
#[case::hostname_not_resolvable(PLAIN, Method::CONNECT, "nowhere.example:80", 503)]
#[case::hostname_of_a_service_that_it_does_not_serve(
    PLAIN,
    Method::CONNECT,
    "other.default.svc.cluster.local:80",
    503
)]
#[case::port_of_the_service_that_nobody_serves(
    PLAIN,
    Method::CONNECT,
    "web.default.svc.cluster.local:82",
    503
)]
#[case::target_port_illegal_15001(PLAIN, Method::CONNECT, "NET.21:15001", 503)]
#[case::target_port_illegal_15006(PLAIN, Method::CONNECT, "NET.21:15006", 503)]
#[case::target_port_illegal_15008(PLAIN, Method::CONNECT, "NET.21:15008", 503)]
#[case::app_connect_failed(PLAIN, Method::CONNECT, "NET.21:1", 503)]
#[case::success_address_is_the_local_ip(PLAIN, Method::CONNECT, "NET.21:8080", 200)]
#[case::success_hostname_by_the_service_s_port(
    PLAIN,
    Method::CONNECT,
    "web.default.svc.cluster.local:80",
    200
)]
#[case::success_hostname_by_the_workload_s_own_port(
    PLAIN,
    Method::CONNECT,
    "Web.default.svc.cluster.local:81",
    200
)]
#[case::success_hostname_of_the_workload(
    "hostname: db.example, services: {}",
    Method::CONNECT,
    "db.example:8080",
    200
)]
#[case::success_workload_has_an_application_tunnel(
    "applicationTunnel: {protocol: PROXY, port: 8080}, services: {}",
    Method::CONNECT,
    "10.1.2.3:9",
    200
)]
#[case::success_application_tunnel_by_any_hostname(
    "applicationTunnel: {protocol: PROXY, port: 8080}, services: {}",
    Method::CONNECT,
    "any.example:9",
    200
)]
#[case::success_it_is_the_waypoint_of_the_authority_s_service(
    WAYPOINT,
    Method::CONNECT,
    "10.96.0.2:8080",
    200
)]
#[case::authority_in_a_range_of_a_service_with_another_waypoint(
    PLAIN,
    Method::CONNECT,
    "10.97.1.2:8080",
    400
)]
#[case::success_it_is_the_waypoint_of_the_authority_s_range(
    WAYPOINT,
    Method::CONNECT,
    "10.97.1.2:8080",
    200
)]
#[case::success_it_is_the_waypoint_of_the_authority_s_workload(
    WAYPOINT,
    Method::CONNECT,
    "10.0.0.5:8080",
    200
)]
#[case::success_it_is_the_waypoint_of_the_hostname_s_service(
    WAYPOINT,
    Method::CONNECT,
    "behind.shop.svc.cluster.local:8080",
    200
)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers(
    #[case] keys: &str,
    #[case] method: Method,
    #[case] uri: &str,
    #[case] expected: u16,
) {
    let mesh = Mesh::empty();
    mesh.publish_text(&state(keys));
    let (_node, _server) = server(&mesh).await;
    let app = mesh.listen().await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let answer = status(&requests, method, &mesh.fill(uri)).await.unwrap();
    assert_eq!(answer.as_u16(), expected);
    // 200 is said only when the application's connection stands, and nothing else reaches it.
    let reached = timeout(Duration::from_millis(100), app.accept()).await;
    assert_eq!(reached.is_ok(), expected == 200);
    if let Ok(Ok((_, from))) = reached {
        assert_eq!(from.ip(), mesh.ip(CLIENT));
    }
}

#[rstest::rstest]
#[case::rbac_denied(true, 401)]
#[case::local_workload_unknown(false, 503)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_about_the_workload(#[case] known: bool, #[case] expected: u16) {
    let mesh = Mesh::empty();
    if known {
        mesh.publish_text(&(state(PLAIN) + DENIED));
    }
    let (_node, _server) = server(&mesh).await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let uri = format!("{}:{PORT}", mesh.ip(SERVER));
    let answer = status(&requests, Method::CONNECT, &uri).await.unwrap();
    assert_eq!(answer.as_u16(), expected);
}

/// TLS is refused: no certificate, or one of another trust domain. The connection is closed without an answer.
#[rstest::rstest]
#[case::client_certificate_of_another_root(true)]
#[case::trust_domain_differs_from_the_local_one(false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denial_before_tls_completes_is_a_closed_connection(#[case] other_root: bool) {
    let mesh = Mesh::empty();
    mesh.publish_text(&state(PLAIN));
    let (node, _server) = server(&mesh).await;
    let elsewhere = Mesh::empty();
    let (ca, domain) = if other_root {
        (elsewhere.ca(), "cluster.local")
    } else {
        (mesh.ca_of("elsewhere"), "elsewhere")
    };
    let who = Identity::new(domain, "default", "client").unwrap();
    let certificates = Certificates::new(ca, RefreshPolicy::default());
    let certificate = certificates.get(&who).await.unwrap();
    // With TLS 1.3 a client may believe that all is well until it asks for something.
    if let Ok(requests) = tunnel_with(&mesh, &certificate).await {
        let uri = format!("{}:{PORT}", mesh.ip(SERVER));
        let answer = status(&requests, Method::CONNECT, &uri).await;
        answer.unwrap_err();
    }
    assert_failed(&node, "TLS_FAILURE").await;
}

/// The application is told of its connection in a PROXY header: who opened it, what was asked, who it proved to be.
#[rstest::rstest]
#[case::asked_by_address("10.96.0.2:80", "0a600002", 80, "")]
#[case::asked_by_hostname("behind.shop.svc.cluster.local:80", "", 80, "02001d")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_tunnel_begins_with_a_proxy_header(
    #[case] authority: &str,
    #[case] address: &str,
    #[case] port: u16,
    #[case] name: &str,
) {
    let mesh = Mesh::empty();
    mesh.publish_text(&state(
        "applicationTunnel: {protocol: PROXY, port: 15088}, services: {}",
    ));
    let (_node, _server) = server(&mesh).await;
    let app = TcpListener::bind((mesh.ip(SERVER), 15_088)).await.unwrap();
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let (status, mut send) = connect(&requests, authority, &[]).await;
    assert_eq!(status, StatusCode::OK);
    let (mut application, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    send.send_data(Bytes::from_static(b"hello"), true).unwrap();
    let mut bytes = Vec::new();
    timeout(LIMIT, application.read_to_end(&mut bytes))
        .await
        .unwrap()
        .unwrap();
    let hex = |bytes: &[u8]| bytes.iter().map(|b| format!("{b:02x}")).collect::<String>();
    let octets = |last: u8| match mesh.ip(last) {
        std::net::IpAddr::V4(ip) => hex(&ip.octets()),
        std::net::IpAddr::V6(_) => unreachable!(),
    };
    let id = "spiffe://cluster.local/ns/default/sa/client";
    let address = if address.is_empty() {
        octets(SERVER)
    } else {
        address.to_owned()
    };
    let name = if name.is_empty() {
        String::new()
    } else {
        name.to_owned() + &hex(b"behind.shop.svc.cluster.local")
    };
    let text = hex(&bytes);
    let body = text.strip_prefix("0d0a0d0a000d0a515549540a2111").unwrap();
    let (length, body) = body.split_at(4);
    let source_port = &body[16..20];
    let expected = octets(CLIENT)
        + &address
        + source_port
        + &format!("{port:04x}")
        + &name
        + &format!("d0{:04x}", id.len())
        + &hex(id.as_bytes());
    assert_eq!(
        usize::from_str_radix(length, 16).unwrap(),
        expected.len() / 2
    );
    assert_eq!(body, expected + &hex(b"hello"));
    assert_eq!(from.ip(), mesh.ip(CLIENT));
}

/// The tunnel ends at the pod's loopback address, dialled from there, if the capture reaches it and it is wanted.
#[rstest::rstest]
#[case::reached(true, true)]
#[case::not_reached(false, true)]
#[case::not_wanted(true, false)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_application_tunnel_ends_on_loopback(#[case] reaches: bool, #[case] wanted: bool) {
    let mesh = Mesh::empty();
    let loopback = TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let port = loopback.local_addr().unwrap().port();
    let own = TcpListener::bind((mesh.ip(SERVER), port)).await.unwrap();
    mesh.publish_text(&state(&format!(
        "applicationTunnel: {{protocol: PROXY, port: {port}}}, services: {{}}"
    )));
    let node = mesh.node_with(CoreConfig {
        localhost_app_tunnel: wanted,
        ..quick()
    });
    let scope = mesh.server();
    let scope = if reaches {
        scope.reaching_loopback()
    } else {
        scope
    };
    let _server = node.core.attach(Arc::new(scope)).await.unwrap();
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    assert_eq!(connect(&requests, "10.96.0.2:80", &[]).await.0, 200);
    let (expected, other, from) = if reaches && wanted {
        (loopback, own, "127.0.0.1".parse().unwrap())
    } else {
        (own, loopback, mesh.ip(CLIENT))
    };
    let (mut application, seen) = timeout(LIMIT, expected.accept()).await.unwrap().unwrap();
    assert_eq!(seen.ip(), from);
    // Whose connection it is, the header says.
    let mut header = [0; 20];
    timeout(LIMIT, application.read_exact(&mut header))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(
        IpAddr::from(<[u8; 4]>::try_from(&header[16..]).unwrap()),
        mesh.ip(CLIENT)
    );
    let reached = timeout(Duration::from_millis(100), other.accept()).await;
    assert!(reached.is_err());
}

/// Policies are about the port that was asked for, not about the tunnel's own.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn policies_see_the_port_in_front_of_an_application_tunnel() {
    let mesh = Mesh::empty();
    let only_80 = "
policies:
- {name: p, namespace: default, scope: Namespace, action: Allow, dryRun: false, rules: [[[{destinationPorts: [80]}]]]}
";
    let keys = "applicationTunnel: {protocol: PROXY, port: 8080}, services: {}";
    mesh.publish_text(&(state(keys) + only_80));
    let (_node, _server) = server(&mesh).await;
    let _app = mesh.listen().await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    assert_eq!(connect(&requests, "10.96.0.1:80", &[]).await.0, 200);
    assert_eq!(connect(&requests, "10.96.0.1:8080", &[]).await.0, 401);
}

/// The destination says who it is, if it is told to.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_answer_carries_baggage_if_that_is_on() {
    for on in [true, false] {
        let mesh = Mesh::empty();
        mesh.publish_text(&state("workloadName: srv, services: {}"));
        let config = CoreConfig {
            response_baggage: on,
            ..quick()
        };
        let node = mesh.node_with(config);
        let _server = node.core.attach(Arc::new(mesh.server())).await.unwrap();
        let _app = mesh.listen().await;
        let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
        let uri = format!("{}:{PORT}", mesh.ip(SERVER));
        let request = Request::builder().method(Method::CONNECT).uri(uri);
        let mut ready = requests.clone().ready().await.unwrap();
        let (response, _send) = ready
            .send_request(request.body(()).unwrap(), false)
            .unwrap();
        let response = response.await.unwrap();
        let baggage = response
            .headers()
            .get("baggage")
            .map(|v| v.to_str().unwrap());
        let expected =
            "k8s.cluster.name=Kubernetes,k8s.namespace.name=default,k8s.deployment.name=srv";
        assert_eq!(baggage, on.then_some(expected));
    }
}

/// `forwarded` names the service, `x-forwarded-network` and `baggage` the source; both for telemetry only.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_are_for_telemetry() {
    let mesh = Mesh::empty();
    mesh.publish_text(&state(PLAIN));
    let (node, _server) = server(&mesh).await;
    let _app = mesh.listen().await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let uri = format!("{}:{PORT}", mesh.ip(SERVER));
    let service = (
        "forwarded",
        "for=\"10.9.9.9:1\";host=web.default.svc.cluster.local",
    );
    let baggage = ("baggage", "k8s.namespace.name=far,k8s.deployment.name=away");
    let own = connect(&requests, &uri, &[service, baggage]).await;
    let foreign = connect(
        &requests,
        &uri,
        &[baggage, ("x-forwarded-network", "there")],
    )
    .await;
    assert_eq!((own.0, foreign.0), (StatusCode::OK, StatusCode::OK));
    let seen: Vec<_> = node
        .core
        .connections()
        .into_iter()
        .map(|c| (c.service, c.source.workload, c.source.namespace))
        .collect();
    let text = |text: &str| Some(text.to_owned());
    let expected = [
        (
            text("web.default.svc.cluster.local"),
            text("client"),
            text("default"),
        ),
        (None, text("away"), text("far")),
    ];
    assert_eq!(seen, expected);
}

async fn connect(
    requests: &SendRequest<Bytes>,
    authority: &str,
    headers: &[(&str, &str)],
) -> (StatusCode, h2::SendStream<Bytes>) {
    let mut request = Request::builder().method(Method::CONNECT).uri(authority);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let mut requests = requests.clone().ready().await.unwrap();
    let (response, send) = requests
        .send_request(request.body(()).unwrap(), false)
        .unwrap();
    (response.await.unwrap().status(), send)
}

/// Plaintext, row by row: no identity, the original destination from the original source, never by way of a waypoint.
#[rstest::rstest]
#[case::goes_to_the_original_destination_from_the_original_source(PLAIN, "", true)]
#[case::is_not_sent_to_a_waypoint("waypoint: {destination: /NET.11}, services: {}", "", true)]
#[case::is_not_for_an_application_tunnel(
    "applicationTunnel: {protocol: PROXY, port: 9}, services: {}",
    "",
    true
)]
#[case::rbac_without_an_identity_denied_by_strict(
    PLAIN,
    "rules: [[[{notPrincipals: [{Presence: []}]}]]]",
    false
)]
#[case::rbac_without_an_identity_by_address(PLAIN, "rules: [[[{sourceIps: [NET.77]}]]]", false)]
#[case::rbac_that_is_about_somebody_else(PLAIN, "rules: [[[{sourceIps: [NET.78]}]]]", true)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plaintext(#[case] keys: &str, #[case] deny: &str, #[case] passes: bool) {
    let mesh = Mesh::empty();
    let mut text = state(keys);
    if !deny.is_empty() {
        text += &format!(
            "policies:\n- {{name: p, namespace: default, scope: Namespace, action: Deny, dryRun: false, {deny}}}\n"
        );
    }
    mesh.publish_text(&text);
    let node = mesh.node();
    let scope = mesh.server();
    let door = scope.forward(mesh.ip(SERVER), Role::InboundPlaintext, mesh.app());
    let _server = node.core.attach(Arc::new(scope)).await.unwrap();
    let app = mesh.listen().await;
    let client = mesh.connect(77, door).await;
    if passes {
        let mut client = client.unwrap();
        client.write_all(b"!").await.unwrap();
        let (mut server, from) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
        assert_eq!(server.read_u8().await.unwrap(), b'!');
        assert_eq!(from.ip(), mesh.ip(77));
    } else {
        assert_refused(client).await;
        assert_failed(&node, "DENY").await;
    }
}
