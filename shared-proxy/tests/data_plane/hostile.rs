//! Requests that no client library makes: what they are answered with, and that they harm nobody else.
#![allow(clippy::disallowed_methods)]

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderName, HeaderValue, Method, Request, StatusCode};
use rustls_pki_types::ServerName;
use shared_proxy::capture::{HBONE_PORT, Role};
use shared_proxy::core::CoreConfig;
use shared_proxy::hbone::HboneConfig;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::mesh::{CLIENT, Mesh, PORT, SERVER, VIP, quick};
use crate::peer::{HEADERS, certificate, identity};
use crate::protocol::{server, tunnel};

const LIMIT: Duration = Duration::from_secs(30);
const RST_STREAM: u8 = 3;
/// PROTOCOL_ERROR (RFC 9113, 7).
const PROTOCOL_ERROR: u32 = 1;

/// A client that writes its header blocks by hand.
struct RawClient {
    tls: TlsStream<TcpStream>,
    next_stream: u32,
}

/// Names and values of headers.
type Fields<'a> = &'a [(&'a str, &'a [u8])];

/// What became of a stream.
#[derive(Debug, PartialEq, Eq)]
enum Answer {
    Status(u16),
    Reset(u32),
    /// The whole tunnel ended.
    Closed,
}

/// A field that no table knows or will know (RFC 7541, 6.2.2).
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut block = vec![0];
    for text in [name, value] {
        // An integer of seven bits, continued if it does not fit (RFC 7541, 5.1).
        let mut length = text.len();
        if length < 127 {
            block.push(length as u8);
        } else {
            block.push(127);
            length -= 127;
            while length >= 128 {
                block.push(length as u8 | 128);
                length >>= 7;
            }
            block.push(length as u8);
        }
        block.extend(text);
    }
    block
}

fn connect_to(authority: &[u8]) -> Vec<u8> {
    [
        field(b":method", b"CONNECT"),
        field(b":authority", authority),
    ]
    .concat()
}

impl RawClient {
    async fn new(mesh: &Mesh) -> Self {
        let to = SocketAddr::new(mesh.ip(SERVER), HBONE_PORT);
        let tcp = mesh.connect(CLIENT, to).await.unwrap();
        let config = certificate(mesh, "client").await;
        let mut tls = TlsConnector::from(config.client_config(&[identity("server")]))
            .connect(ServerName::IpAddress(to.ip().into()), tcp)
            .await
            .unwrap();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        tls.write_all(preface).await.unwrap();
        Self {
            tls,
            next_stream: 1,
        }
    }

    /// Asks with a header block, in frames of the size that every peer takes.
    async fn ask(&mut self, block: &[u8]) -> Answer {
        const FRAME: usize = 16 << 10;
        const END_HEADERS: u8 = 4;
        const CONTINUATION: u8 = 9;
        let stream = self.next_stream;
        self.next_stream += 2;
        let mut kind = HEADERS;
        let parts = block.chunks(FRAME).count();
        for (number, part) in block.chunks(FRAME).enumerate() {
            let flags = if number + 1 == parts { END_HEADERS } else { 0 };
            let mut frame = (part.len() as u32).to_be_bytes()[1..].to_vec();
            frame.extend([kind, flags]);
            frame.extend(stream.to_be_bytes());
            frame.extend(part);
            self.tls.write_all(&frame).await.unwrap();
            kind = CONTINUATION;
        }
        self.tls.flush().await.unwrap();
        timeout(LIMIT, self.answer(stream)).await.unwrap()
    }

    async fn answer(&mut self, stream: u32) -> Answer {
        loop {
            let mut head = [0; 9];
            if self.tls.read_exact(&mut head).await.is_err() {
                return Answer::Closed;
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let mut payload = vec![0; length as usize];
            self.tls.read_exact(&mut payload).await.unwrap();
            if u32::from_be_bytes([head[5], head[6], head[7], head[8]]) != stream {
                continue;
            }
            match head[3] {
                HEADERS => return Answer::Status(status(&payload)),
                RST_STREAM => {
                    let reason = payload.try_into().unwrap();
                    return Answer::Reset(u32::from_be_bytes(reason));
                }
                _ => {}
            }
        }
    }
}

/// The first field of an answer: `:status` with a value of the static table (RFC 7541, appendix A), or with one of its own
/// in Huffman's code (appendix B).
fn status(block: &[u8]) -> u16 {
    match block {
        [0x88, ..] => 200,
        [0x8c, ..] => 400,
        [0x48, 0x83, 0x69, 0x90, 0xff, ..] => 431,
        other => panic!("a status that no case wants: {other:x?}"),
    }
}

async fn scene() -> (Mesh, crate::mesh::Node, shared_proxy::core::Attached) {
    let mesh = Mesh::new();
    let (node, attached) = server(&mesh).await;
    (mesh, node, attached)
}

/// What is wrong with the authority, and that the proxy takes a right one after it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_authority_that_is_none_is_refused_and_the_proxy_goes_on() {
    let (mesh, node, _attached) = scene().await;
    let app = mesh.listen().await;
    let mut client = RawClient::new(&mesh).await;
    let good = mesh.app().to_string();
    let with = |extra: Vec<u8>| [connect_to(good.as_bytes()), extra].concat();
    let refused = [
        (
            "missing",
            field(b":method", b"CONNECT"),
            Answer::Status(400),
        ),
        ("empty", connect_to(b""), Answer::Reset(PROTOCOL_ERROR)),
        (
            // To the library this is an error of the connection, which is one pod's own.
            "not UTF-8",
            connect_to(b"\xff\xfe:80"),
            Answer::Closed,
        ),
        (
            "with a blank",
            connect_to(b"10.0.0.1 :80"),
            Answer::Reset(PROTOCOL_ERROR),
        ),
        (
            "with a user",
            connect_to(b"me@web.example:80"),
            Answer::Status(400),
        ),
        (
            "longer than a hostname",
            connect_to(format!("{}:80", "a.".repeat(200)).as_bytes()),
            Answer::Status(400),
        ),
        (
            "longer than a header list",
            connect_to("a".repeat(70_000).as_bytes()),
            Answer::Status(431),
        ),
        (
            "repeated",
            with(field(b":authority", good.as_bytes())),
            Answer::Reset(PROTOCOL_ERROR),
        ),
        (
            "behind other fields",
            [
                field(b":method", b"CONNECT"),
                field(b"baggage", b"a=b"),
                field(b":authority", good.as_bytes()),
            ]
            .concat(),
            Answer::Reset(PROTOCOL_ERROR),
        ),
        (
            "with a scheme and a path",
            with([field(b":scheme", b"https"), field(b":path", b"/")].concat()),
            Answer::Reset(PROTOCOL_ERROR),
        ),
    ];
    let mut differing = Vec::new();
    for (what, block, expected) in refused {
        let answer = client.ask(&block).await;
        if answer == Answer::Closed {
            client = RawClient::new(&mesh).await;
        }
        if answer != expected {
            differing.push((what, answer));
        }
    }
    assert!(differing.is_empty(), "{differing:?}");
    assert_eq!(
        client.ask(&connect_to(good.as_bytes())).await,
        Answer::Status(200)
    );
    timeout(LIMIT, app.accept()).await.unwrap().unwrap();
    assert!(node.core.connections().len() <= 1);
}

/// Headers are for telemetry: however wrong, they neither refuse a connection nor say who its source is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn headers_that_are_wrong_change_nothing() {
    let (mesh, node, _attached) = scene().await;
    let _app = mesh.listen().await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let long = format!("k8s.namespace.name={}", "x".repeat(9000));
    let member = "k8s.namespace.name=evil";
    let wrong: [(&str, Fields<'_>); 9] = [
        ("long baggage", &[("baggage", long.as_bytes())]),
        (
            "baggage that is not UTF-8",
            &[("baggage", b"k8s.namespace.name=\xff\xfe")],
        ),
        (
            "repeated baggage",
            &[
                ("baggage", member.as_bytes()),
                ("baggage", b"k8s.pod.name=other"),
            ],
        ),
        (
            "forwarded that is not UTF-8",
            &[("forwarded", b"for=\"10.9.9.9:1\";host=\xff")],
        ),
        ("long forwarded", &[("forwarded", long.as_bytes())]),
        (
            "repeated forwarded",
            &[("forwarded", b"host=a"), ("forwarded", b"host=b")],
        ),
        (
            "forwarded for somebody else",
            &[("forwarded", b"for=10.9.9.9;host=nobody.example")],
        ),
        (
            "network that is not UTF-8",
            &[("x-forwarded-network", b"\xff")],
        ),
        (
            "traceparents",
            &[("traceparent", b"00-0-0-00"), ("traceparent", b"\xff")],
        ),
    ];
    for (what, headers) in wrong {
        let (status, _stream) = ask(&requests, &mesh, headers).await;
        assert_eq!(status, StatusCode::OK, "{what}");
        let connections = node.core.connections();
        let [connection] = &connections[..] else {
            panic!("{what}: {connections:?}");
        };
        let workload = connection.source.workload.as_deref();
        let namespace = connection.source.namespace.as_deref();
        assert_eq!(
            (workload, namespace),
            (Some("client"), Some("default")),
            "{what}"
        );
        assert_eq!(connection.service, None, "{what}");
        drop(_stream);
        ended(&node).await;
    }
}

/// A source in another network is known by its baggage alone, in however many fields that comes; what of it is no text or
/// too long is not believed.
#[rstest::rstest]
#[case::two_fields(&[&b"k8s.namespace.name=far"[..], b"k8s.pod.name=away"], Some("far"), Some("away"))]
#[case::one_is_no_text(&[&b"k8s.namespace.name=\xff"[..], b"k8s.pod.name=away"], None, Some("away"))]
#[case::too_long_together(&[&[b'x'; 5000][..], &[b'y'; 5000], b"k8s.pod.name=away"], None, None)]
#[case::none(&[], None, None)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_source_is_what_its_baggage_says(
    #[case] baggage: &[&[u8]],
    #[case] namespace: Option<&str>,
    #[case] workload: Option<&str>,
) {
    let (mesh, node, _attached) = scene().await;
    let _app = mesh.listen().await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let mut headers: Vec<(&str, &[u8])> = vec![("x-forwarded-network", b"there")];
    headers.extend(baggage.iter().map(|value| ("baggage", *value)));
    let (status, _stream) = ask(&requests, &mesh, &headers).await;
    assert_eq!(status, StatusCode::OK);
    let connections = node.core.connections();
    let source = &connections[0].source;
    // An empty text is what is not known of a source that is.
    let known = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    assert_eq!(known(&source.namespace).as_deref(), namespace);
    assert_eq!(known(&source.workload).as_deref(), workload);
}

/// More headers than the server takes are answered as RFC 6585 says, and the tunnel goes on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_header_list_that_is_too_long_is_431() {
    let (mesh, _node, _attached) = scene().await;
    let _app = mesh.listen().await;
    let good = connect_to(mesh.app().to_string().as_bytes());
    let long = field(b"baggage", &[b'x'; 66_000]);
    let many = (0..2_000).flat_map(|n| field(format!("x-{n}").as_bytes(), b"value"));
    for too_much in [long, many.collect()] {
        let mut client = RawClient::new(&mesh).await;
        let block = [good.clone(), too_much].concat();
        assert_eq!(client.ask(&block).await, Answer::Status(431));
        assert_eq!(client.ask(&good).await, Answer::Status(200));
    }
}

async fn ask(
    requests: &SendRequest<Bytes>,
    mesh: &Mesh,
    headers: Fields<'_>,
) -> (StatusCode, h2::SendStream<Bytes>) {
    let uri = format!("{}:{PORT}", mesh.ip(SERVER));
    let mut request = Request::builder()
        .method(Method::CONNECT)
        .uri(uri)
        .body(())
        .unwrap();
    for (name, value) in headers {
        let name = HeaderName::from_bytes(name.as_bytes()).unwrap();
        request
            .headers_mut()
            .append(name, HeaderValue::from_bytes(value).unwrap());
    }
    let mut requests = requests.clone().ready().await.unwrap();
    let (response, send) = requests.send_request(request, false).unwrap();
    (response.await.unwrap().status(), send)
}

/// Waits until the server has no connection left.
async fn ended(node: &crate::mesh::Node) {
    timeout(LIMIT, async {
        while !node.core.connections().is_empty() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

/// A record of 512 bytes with a ClientHello is announced, and does not come.
const HALF_A_HELLO: &[u8] = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc";

/// Whoever is connected and does not go on with the handshake is given up, whichever end he is.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_handshake_that_does_not_go_on_is_given_up() {
    let config = CoreConfig {
        hbone: HboneConfig {
            handshake_timeout: Duration::from_millis(300),
            ..HboneConfig::default()
        },
        ..quick()
    };
    let mesh = Mesh::new();
    let two = mesh.node_with(config.clone());
    let attached = two.core.attach(Arc::new(mesh.server())).await.unwrap();
    let end = SocketAddr::new(mesh.ip(SERVER), HBONE_PORT);
    for begun in [&b""[..], HALF_A_HELLO] {
        let mut client = TcpStream::connect(end).await.unwrap();
        client.write_all(begun).await.unwrap();
        let mut said = Vec::new();
        // In order or by reset, but soon.
        let _ = timeout(LIMIT, client.read_to_end(&mut said)).await.unwrap();
    }
    drop(attached);

    let mesh = Mesh::new();
    let one = mesh.node_with(config);
    let end = SocketAddr::new(mesh.ip(SERVER), HBONE_PORT);
    let listener = TcpListener::bind(end).await.unwrap();
    let scope = mesh.clients();
    let door = scope.forward(mesh.ip(CLIENT), Role::Outbound, VIP.parse().unwrap());
    let _clients = one.core.attach(Arc::new(scope)).await.unwrap();
    let mut client = mesh.connect(CLIENT, door).await.unwrap();
    let _silent = timeout(LIMIT, listener.accept()).await.unwrap().unwrap();
    let ended = timeout(LIMIT, client.read(&mut [0; 1])).await.unwrap();
    assert_eq!(ended.unwrap_err().kind(), ErrorKind::ConnectionReset);
}
