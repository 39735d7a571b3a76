//! The HBONE server, asked by a peer of our own making.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use rustls_pki_types::ServerName;
use shared_proxy::capture::HBONE_PORT;
use shared_proxy::identity::{Certificates, Identity, LocalCa, RefreshPolicy, WorkloadCertificate};
use tokio_rustls::TlsConnector;

use crate::mesh::{CLIENT, Mesh, Node, PORT, SERVER, assert_failed};
use shared_proxy::core::Attached;

fn identity(account: &str) -> Identity {
    Identity::new("cluster.local", "default", account).unwrap()
}

pub async fn server(mesh: &Mesh) -> (Node, Attached) {
    let node = mesh.node();
    let attached = node.core.attach(Arc::new(mesh.server())).await.unwrap();
    (node, attached)
}

/// TLS to the server's HBONE port, with a certificate of `ca`. An error if the server turns it away, which with TLS 1.3
/// shows only when it is used.
pub async fn tunnel(
    mesh: &Mesh,
    ca: Arc<LocalCa>,
) -> Result<h2::client::SendRequest<Bytes>, String> {
    let certificates = Certificates::new(ca, RefreshPolicy::default());
    let certificate = certificates.get(&identity("client")).await.unwrap();
    tunnel_with(mesh, &certificate).await
}

/// As [`tunnel`], with a certificate.
pub async fn tunnel_with(
    mesh: &Mesh,
    certificate: &WorkloadCertificate,
) -> Result<h2::client::SendRequest<Bytes>, String> {
    let to = SocketAddr::new(mesh.ip(SERVER), HBONE_PORT);
    let tcp = mesh.connect(CLIENT, to).await.unwrap();
    let tls = TlsConnector::from(certificate.client_config(&[identity("server")]))
        .connect(ServerName::IpAddress(to.ip().into()), tcp)
        .await
        .map_err(|e| e.to_string())?;
    let (requests, connection) = h2::client::handshake(tls)
        .await
        .map_err(|e| e.to_string())?;
    tokio::spawn(connection);
    requests.ready().await.map_err(|e| e.to_string())
}

pub async fn status(
    requests: &h2::client::SendRequest<Bytes>,
    method: Method,
    uri: &str,
) -> Result<StatusCode, h2::Error> {
    let request = Request::builder().method(method).uri(uri).body(()).unwrap();
    let mut requests = requests.clone().ready().await?;
    let (response, _send) = requests.send_request(request, false)?;
    Ok(response.await?.status())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_kind_of_wrong_request_has_its_status() {
    let mesh = Mesh::new();
    let (_node, _server) = server(&mesh).await;
    let _app = mesh.listen().await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let here = mesh.ip(SERVER);
    let connect = |uri: String| {
        let requests = requests.clone();
        async move { status(&requests, Method::CONNECT, &uri).await.unwrap() }
    };
    assert_eq!(connect(format!("{here}:{PORT}")).await, StatusCode::OK);
    assert_eq!(
        connect(format!("{here}:1")).await,
        StatusCode::SERVICE_UNAVAILABLE
    );
    for own in [15_001, 15_006, 15_008, 15_053, 15_080, 15_088] {
        let answer = connect(format!("{here}:{own}")).await;
        assert_eq!(answer, StatusCode::SERVICE_UNAVAILABLE, "port {own}");
    }
    for wrong in [
        "10.1.2.3:8080",
        "server",
        &format!("{}:{PORT}", mesh.ip(CLIENT)),
    ] {
        assert_eq!(
            connect(wrong.to_owned()).await,
            StatusCode::BAD_REQUEST,
            "{wrong}"
        );
    }
    let get = status(&requests, Method::GET, &format!("https://{here}:{PORT}/")).await;
    assert_eq!(get.unwrap(), StatusCode::BAD_REQUEST);
    // None of it harmed the tunnel.
    assert_eq!(connect(format!("{here}:{PORT}")).await, StatusCode::OK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_denied_stream_is_401() {
    let mesh = Mesh::new();
    mesh.publish(
        "HBONE",
        "
policies:
- {name: nobody, namespace: default, scope: Namespace, action: Allow, dryRun: false, rules: []}
",
    );
    let (_node, _server) = server(&mesh).await;
    let requests = tunnel(&mesh, mesh.ca()).await.unwrap();
    let uri = format!("{}:{PORT}", mesh.ip(SERVER));
    let answer = status(&requests, Method::CONNECT, &uri).await.unwrap();
    assert_eq!(answer, StatusCode::UNAUTHORIZED);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_of_another_root_opens_nothing() {
    let (mesh, elsewhere) = (Mesh::new(), Mesh::new());
    let (node, _server) = server(&mesh).await;
    let opened = tunnel(&mesh, elsewhere.ca()).await;
    assert!(opened.is_err());
    assert_failed(&node, "TLS_FAILURE").await;
    assert!(node.core.connections().is_empty());
}
