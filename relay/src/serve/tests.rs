#![allow(clippy::unwrap_used, clippy::expect_used)]

use shared_proxy::capture::{LocalWorkload, ScopeId};
use shared_proxy::state::local_xds;
use tokio::net::TcpSocket;

use super::*;

const MESH: &str = r#"
workloads:
- {uid: c, name: client, namespace: alpha, serviceAccount: client, trustDomain: td, workloadIps: [10.244.1.10], protocol: HBONE, node: node1, services: {}}
- {uid: s, name: server, namespace: alpha, serviceAccount: server, trustDomain: td, workloadIps: [10.244.2.10], protocol: HBONE, node: node2, services: {alpha/web.example: {80: 8080}}}
- {uid: p, name: plain, namespace: alpha, serviceAccount: plain, trustDomain: td, workloadIps: [10.244.2.11], protocol: TCP, node: node2, services: {}}
services:
- {name: web, namespace: alpha, hostname: web.example, vips: [/10.96.0.10], ports: {80: 8080}}
"#;

fn chosen(client: &str, dst: &str) -> Result<(String, bool), Refused> {
    let snapshot = local_xds::parse(MESH).unwrap();
    choose(&snapshot, client.parse().unwrap(), dst.parse().unwrap())
        .map(|destination| (destination.target.to_string(), destination.in_mesh))
}

#[test]
fn captured_pods_are_reached_through_their_relay_and_others_are_not() {
    let client = "10.244.1.10";
    let reached = |dst: &str| chosen(client, dst).unwrap();
    assert_eq!(reached("10.244.2.10:9"), ("10.244.2.10:9".to_owned(), true));
    assert_eq!(
        reached("10.244.2.11:9"),
        ("10.244.2.11:9".to_owned(), false)
    );
    assert_eq!(
        reached("192.0.2.1:443"),
        ("192.0.2.1:443".to_owned(), false)
    );
}

#[test]
fn a_service_address_becomes_an_endpoint_with_its_own_port() {
    let client = "10.244.1.10";
    assert_eq!(
        chosen(client, "10.96.0.10:80").unwrap(),
        ("10.244.2.10:8080".to_owned(), true)
    );
    assert!(matches!(
        chosen(client, "10.96.0.10:81"),
        Err(Refused::NoEndpoint { port: 81, .. })
    ));
    assert!(matches!(
        chosen("10.244.1.99", "10.96.0.10:80"),
        Err(Refused::UnknownClient(_))
    ));
}

/// Sockets as they come.
#[derive(Debug)]
struct Plain(ScopeId);

impl Scope for Plain {
    fn id(&self) -> &ScopeId {
        &self.0
    }

    fn owner(&self, _: Role, client: ClientAddr, _: OrigDstAddr) -> Result<LocalWorkload, Refusal> {
        Err(Refusal::UnknownOwner(client.0.ip()))
    }

    fn listen(&self, _: Role) -> io::Result<Vec<Listener>> {
        Ok(Vec::new())
    }

    fn socket(&self, _: SocketAddr, _: OnBehalfOf) -> io::Result<TcpSocket> {
        TcpSocket::new_v4()
    }
}

/// A comparison with a relay that waits for acknowledgements of small segments would flatter the proxy.
#[tokio::test]
async fn connections_have_the_options_of_the_proxys() {
    let service = Service {
        scope: Arc::new(Plain(ScopeId {
            capture_mode: "test",
            instance: "".into(),
        })),
        store: Arc::default(),
        pipes: Arc::default(),
    };
    #[allow(clippy::disallowed_methods, reason = "an application of a test")]
    let application = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let to = application.local_addr().unwrap();
    let stream = service
        .dial(to, OnBehalfOf::LocalWorkload(to.ip()))
        .await
        .unwrap();
    assert!(stream.nodelay().unwrap());
    let socket = SockRef::from(&stream);
    let keepalive = Keepalive::default();
    assert!(socket.keepalive().unwrap());
    assert_eq!(socket.tcp_keepalive_time().unwrap(), keepalive.time);
    assert_eq!(socket.tcp_keepalive_interval().unwrap(), keepalive.interval);
    assert_eq!(socket.tcp_keepalive_retries().unwrap(), keepalive.retries);
}
