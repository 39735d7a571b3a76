//! A pod's program asks for its connections by SOCKS5.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rstest::rstest;
use shared_proxy::capture::Role;
use shared_proxy::core::{Attached, CoreConfig};
use shared_proxy::dns::DnsConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;

use crate::mesh::{CLIENT, Mesh, Node, PORT, SERVER, VIP, assert_failed, quick};

const LIMIT: Duration = Duration::from_secs(30);
/// Long enough for a connection that nothing holds.
const A_WHILE: Duration = Duration::from_millis(300);
const HELLO: [u8; 3] = [5, 1, 0];
const SERVICE: &str = "server.default.svc.cluster.local";

struct Stage {
    mesh: Mesh,
    one: Node,
    _two: Node,
    door: SocketAddr,
    _attached: [Attached; 2],
}

async fn stage() -> Stage {
    let config = CoreConfig {
        socks5: Some(Arc::new(DnsConfig::default())),
        ..quick()
    };
    let mesh = Mesh::new();
    let (one, two) = (mesh.node_with(config.clone()), mesh.node_with(config));
    let scope = mesh.clients();
    let door = scope.open(mesh.ip(CLIENT), Role::Socks5);
    let clients = one.core.attach(Arc::new(scope)).await.unwrap();
    let server = two.core.attach(Arc::new(mesh.server())).await.unwrap();
    Stage {
        mesh,
        one,
        _two: two,
        door,
        _attached: [clients, server],
    }
}

impl Stage {
    /// A client that has sent something at once, with what the connection is for behind it.
    async fn send(&self, messages: &[&[u8]]) -> TcpStream {
        let mut client = self.mesh.connect(CLIENT, self.door).await.unwrap();
        client.write_all(&messages.concat()).await.unwrap();
        client
    }
}

fn by_address(to: SocketAddr) -> Vec<u8> {
    let IpAddr::V4(ip) = to.ip() else {
        panic!("{to}");
    };
    [&[5, 1, 0, 1], &ip.octets()[..], &to.port().to_be_bytes()].concat()
}

fn by_name(name: &str, port: u16) -> Vec<u8> {
    let length = u8::try_from(name.len()).unwrap();
    [&[5, 1, 0, 3, length], name.as_bytes(), &port.to_be_bytes()].concat()
}

/// The answer to the request, behind that to the greeting.
async fn answer(client: &mut TcpStream) -> u8 {
    let mut answers = [0; 12];
    let read = timeout(LIMIT, client.read_exact(&mut answers)).await;
    read.unwrap().unwrap();
    assert_eq!(answers[..3], [5, 0, 5]);
    assert_eq!(answers[4..], [0, 1, 0, 0, 0, 0, 0, 0]);
    answers[3]
}

#[rstest]
#[case::address_of_a_pod(None, PORT)]
#[case::address_of_a_service(Some("10.96.0.1"), 80)]
#[case::name_of_a_service(Some(SERVICE), 80)]
#[case::as_the_pods_namespace_means_it(Some("Server"), 80)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_is_a_connection_of_the_pod(#[case] host: Option<&str>, #[case] port: u16) {
    let stage = stage().await;
    let app = stage.mesh.listen().await;
    let request = match host.map(|host| (host, host.parse::<IpAddr>())) {
        None => by_address(SocketAddr::new(stage.mesh.ip(SERVER), port)),
        Some((_, Ok(ip))) => by_address(SocketAddr::new(ip, port)),
        Some((name, Err(_))) => by_name(name, port),
    };
    let mut client = stage.send(&[&HELLO, &request, b"?"]).await;
    let (mut end, _) = timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert_eq!(answer(&mut client).await, 0);
    assert_eq!(
        end.read_u8().await.unwrap(),
        b'?',
        "what follows is carried"
    );
    end.write_all(b"!").await.unwrap();
    assert_eq!(client.read_u8().await.unwrap(), b'!');
    let open = stage.one.core.connections();
    let [connection] = &open[..] else {
        panic!("{open:?}");
    };
    assert!(connection.mutual_tls);
    let from = SocketAddr::new(stage.mesh.ip(CLIENT), client.local_addr().unwrap().port());
    assert_eq!(connection.source.addr, from);
    drop(client);
    let ended = timeout(LIMIT, end.read(&mut [0])).await.unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)));
}

#[rstest]
#[case::nobody_listens(&[5, 1, 0, 1, 10, 96, 0, 1, 0, 80], 4, "CONNECT")]
#[case::no_such_name(&by_name("nowhere.invalid", 80), 4, "CONNECT")]
#[case::own_port(&[5, 1, 0, 1, 127, 0, 0, 1, 0x3a, 0xe8], 1, "-")]
#[case::bind(&[5, 2, 0, 1, 10, 96, 0, 1, 0, 80], 7, "-")]
#[case::datagrams(&[5, 3, 0, 1, 10, 96, 0, 1, 0, 80], 7, "-")]
#[case::unknown_address_type(&[5, 1, 0, 2], 8, "-")]
#[case::no_name(&by_name("a..b", 80), 1, "-")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn refusals(#[case] request: &[u8], #[case] code: u8, #[case] flag: &str) {
    let stage = stage().await;
    let mut client = stage.send(&[&HELLO, request]).await;
    assert_eq!(answer(&mut client).await, code);
    let rest = timeout(LIMIT, client.read(&mut [0; 16])).await.unwrap();
    assert!(matches!(rest, Ok(0) | Err(_)), "{rest:?}");
    assert_failed(&stage.one, flag).await;
}

#[rstest]
#[case::socks4(&[4, 1, 0, 80, 10, 96, 0, 1, 0], &[])]
#[case::http(b"CONNECT 10.96.0.1:80 HTTP/1.1\r\n\r\n", &[])]
#[case::only_with_a_password(&[5, 1, 2], &[5, 0xff])]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn other_protocols_are_closed(#[case] greeting: &[u8], #[case] expected: &[u8]) {
    let stage = stage().await;
    let mut client = stage.send(&[greeting]).await;
    let mut said = Vec::new();
    // Reset or closed: what matters is that nothing else comes, and that it ends.
    let _ = timeout(LIMIT, client.read_to_end(&mut said)).await.unwrap();
    assert!(expected.starts_with(&said), "{said:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_held_pod_waits_for_its_answer() {
    let stage = stage().await;
    let app: TcpListener = stage.mesh.listen().await;
    let pod = stage.mesh.pod(CLIENT, "client");
    let hold = stage.one.core.hold(&pod, LIMIT).await;
    let request = by_address(VIP.parse().unwrap());
    let mut client = stage.send(&[&HELLO, &request]).await;
    let mut greeting = [0; 2];
    client.read_exact(&mut greeting).await.unwrap();
    assert!(timeout(A_WHILE, client.read_u8()).await.is_err());
    drop(hold);
    timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    let mut reply = [0; 10];
    let read = timeout(LIMIT, client.read_exact(&mut reply)).await;
    read.unwrap().unwrap();
    assert_eq!(reply[..2], [5, 0]);
}
