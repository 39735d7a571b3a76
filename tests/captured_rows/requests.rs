//! What is asked of a pod at its port 15008, and what it answers.

use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{Method, Request};
use lab::topology::SERVICE_VIP;
use rstest::rstest;
use serde_json::json;
use shared_proxy::identity::{CertificateAuthority, Identity, LocalCa};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::harness::Stage;
use crate::harness::Variant::{self, Inpod, NodeHybrid};
use crate::harness::state::apply_to;
use crate::{
    CLIENT, CLOSED, LIMIT, PLAIN, SERVER, TUNNEL, UNKNOWN, WAYPOINT, service, set, shared,
};

const HBONE_PORT: u16 = 15008;
/// Where the application tunnel ends.
const TUNNEL_PORT: u16 = 9091;

/// A request, and its answer: pod, method, `:authority`, status.
type Asked = (&'static str, &'static str, Method, String, u16);

fn requests(stage: &Stage) -> Vec<Asked> {
    let ip = |pod: &str| stage.ip(pod);
    let own = |pod: &str, port: u16| format!("{}:{port}", ip(pod));
    let connect = |row, pod, authority: &str, status| {
        (row, pod, Method::CONNECT, authority.to_owned(), status)
    };
    let url = format!("https://{}/", own(SERVER, 8080));
    vec![
        ("not CONNECT", SERVER, Method::GET, url.clone(), 400),
        ("not CONNECT", SERVER, Method::POST, url, 400),
        connect("no port", SERVER, &ip(SERVER).to_string(), 400),
        connect("no authority", SERVER, "a..b:8080", 400),
        connect("nobody's address", SERVER, "10.1.2.3:8080", 400),
        connect("another pod's address", SERVER, &own(WAYPOINT, 8080), 400),
        connect("another node's pod", SERVER, &own(CLIENT, 8080), 400),
        connect("loopback", SERVER, "127.0.0.1:8080", 400),
        connect(
            "its own service's address",
            SERVER,
            &format!("{SERVICE_VIP}:80"),
            400,
        ),
        connect("a waypoint's service", SERVER, "10.98.0.1:80", 400),
        connect("unknown name", SERVER, "nowhere.example:80", 503),
        connect(
            "a service that it does not serve",
            SERVER,
            "behind.beta.svc.cluster.local:80",
            503,
        ),
        connect(
            "a port nobody serves",
            SERVER,
            "echo.beta.svc.cluster.local:82",
            503,
        ),
        connect("proxy's port", SERVER, &own(SERVER, 15001), 503),
        connect("proxy's port", SERVER, &own(SERVER, 15006), 503),
        connect("proxy's port", SERVER, &own(SERVER, 15008), 503),
        connect("application is down", SERVER, &own(SERVER, 9), 503),
        connect("its address", SERVER, &own(SERVER, 8080), 200),
        connect(
            "a service's name and port",
            SERVER,
            "echo.beta.svc.cluster.local:80",
            200,
        ),
        connect("waypoint of a workload", WAYPOINT, &own(SERVER, 8080), 200),
        connect("waypoint of a service", WAYPOINT, "10.98.0.1:8080", 200),
        connect("waypoint of a range", WAYPOINT, "10.98.7.9:8080", 200),
        connect(
            "waypoint of a service's name",
            WAYPOINT,
            "behind.beta.svc.cluster.local:8080",
            200,
        ),
        connect(
            "not its waypoint",
            WAYPOINT,
            &format!("{SERVICE_VIP}:8080"),
            400,
        ),
        connect("not its waypoint", WAYPOINT, &own(TUNNEL, 8080), 400),
        connect("application tunnel, any address", TUNNEL, "10.1.2.3:7", 200),
        connect("application tunnel, any name", TUNNEL, "any.example:7", 200),
        connect("policy denies", CLOSED, &own(CLOSED, 8080), 401),
        connect("workload unknown", UNKNOWN, &own(UNKNOWN, 8080), 503),
    ]
}

/// Every condition of a request to a pod has its status, whichever capture brings it; none of it ends the tunnel.
#[rstest]
fn requests_to_a_pod(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let tunnel_end = scene.witness(TUNNEL, TUNNEL_PORT);
    let waypoint = json!({"destination": format!("/{}", scene.ip(WAYPOINT))});
    let _alone = scene.in_state(|state| {
        set(state, SERVER, "waypoint", waypoint.clone());
        let mut behind = service(state, "behind", &["/10.98.0.1".to_owned()], None);
        behind
            .more
            .insert("cidrVips".to_owned(), json!(["/10.98.7.0/24"]));
        behind.more.insert("waypoint".to_owned(), waypoint);
        state.services.push(behind);
        let tunnel = json!({"protocol": "PROXY", "port": TUNNEL_PORT});
        set(state, TUNNEL, "applicationTunnel", tunnel);
        apply_to(state, CLOSED, "Allow", json!([]));
        state.workloads.retain(|workload| workload.name != UNKNOWN);
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let netns = scene.lab.netns(PLAIN).unwrap();
    let asked = requests(&scene);
    for pod in [SERVER, WAYPOINT, TUNNEL, CLOSED, UNKNOWN] {
        let far = scene.mark(scene.node_of(pod));
        let rows = asked.iter().filter(|(_, of, ..)| *of == pod);
        let ask = async {
            let requests = tunnel(&scene, pod).await;
            let mut wrong = Vec::new();
            for (row, _, method, authority, expected) in rows.clone() {
                let found = status(&requests, method, authority).await;
                if found != Ok(*expected) {
                    wrong.push(format!(
                        "{row}: {method} {authority}: {found:?}, not {expected}"
                    ));
                }
            }
            wrong
        };
        let wrong = netns.run(|| runtime.block_on(ask)).unwrap();
        assert!(wrong.is_empty(), "{pod}: {wrong:#?}");
        // Each connection to an application is the client's, by its address and by what it proved.
        let (from, identity) = (format!("~{}:", scene.ip(PLAIN)), scene.identity(CLIENT));
        for (row, ..) in rows.filter(|(.., status)| *status == 200) {
            let line = [
                ("direction", "inbound"),
                ("src.addr", &*from),
                ("src.identity", &*identity),
                ("dst.workload", pod),
                ("message", "connection complete"),
            ];
            let line = scene.access_line(far, &line);
            assert_eq!(line["capture_mode"], variant.capture(), "{row}: {line:#}");
        }
    }
    assert!(
        tunnel_end.saw_somebody(),
        "nobody came to the application tunnel"
    );
}

/// A tunnel from the pod that is not captured to another, as the client's identity.
async fn tunnel(stage: &Stage, to: &str) -> SendRequest<Bytes> {
    let ca = LocalCa::open(stage.lab.dir().join("ca"), "cluster.local", LIMIT * 10).unwrap();
    let us: Identity = stage.identity(CLIENT).parse().unwrap();
    let expected: Identity = stage.identity(to).parse().unwrap();
    let certificate = ca.issue(&us).await.unwrap();
    let connector = TlsConnector::from(Arc::clone(&certificate.client_config(&[expected])));
    let to: SocketAddr = (stage.ip(to), HBONE_PORT).into();
    let tcp = tokio::net::TcpSocket::new_v4().unwrap();
    let tcp = tcp.connect(to).await.unwrap();
    let name = ServerName::IpAddress(to.ip().into());
    let tls = connector.connect(name, tcp).await.unwrap();
    let (requests, connection) = h2::client::handshake(tls).await.unwrap();
    tokio::spawn(connection);
    requests
}

/// The status of the answer; what the tunnel carries is ended at once.
async fn status(
    requests: &SendRequest<Bytes>,
    method: &Method,
    authority: &str,
) -> Result<u16, String> {
    let request = Request::builder().method(method).uri(authority);
    let request = request.body(()).map_err(|error| error.to_string())?;
    let answer = async {
        let mut requests = requests.clone().ready().await?;
        let (response, mut send) = requests.send_request(request, false)?;
        let status = response.await?.status().as_u16();
        // Already ended where the answer was no.
        let _ = send.send_data(Bytes::new(), true);
        Ok::<_, h2::Error>(status)
    };
    match tokio::time::timeout(LIMIT, answer).await {
        Ok(answer) => answer.map_err(|error| error.to_string()),
        Err(_) => Err("no answer".to_owned()),
    }
}
