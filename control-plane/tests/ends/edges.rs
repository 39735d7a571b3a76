//! The client at the edges of the protocol and of the network.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use control_plane::backoff::Backoff;
use control_plane::ca::CaClient;
use control_plane::messages::certificate::CreateCertificateResponse;
use control_plane::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use control_plane::transport::{Keepalive, Roots, Token};
use rstest::rstest;
use shared_proxy::identity::{CertificateAuthority, Certificates, Identity, RefreshPolicy};
use tempfile::TempDir;
use tokio::net::{TcpListener, TcpStream};
use tonic::{Code, Status};

use crate::rig::{DAY, endpoint, eventually, follow, follow_with, serve};
use crate::script::{hostile, met, resource, workload};

const ONE: &str = "workloads: [{uid: one, namespace: a, workloadIps: [10.0.0.1], services: {}}]";
const TWO: &str = "workloads: [{uid: two, namespace: a, workloadIps: [10.0.0.2], services: {}}]";

#[tokio::test]
async fn on_demand_follows_all_policies_and_of_the_addresses_only_what_was_asked_for() {
    let mut server = hostile().await;
    let dir = TempDir::new().unwrap();
    let client = follow(endpoint(&dir, &server.address), true);
    let mut opened = server.opened.recv().await.unwrap();
    let addresses = opened.hears().await;
    assert_eq!(addresses.type_url, ADDRESS_TYPE);
    assert_eq!(addresses.resource_names_subscribe, ["*"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    let policies = opened.hears().await;
    assert_eq!(policies.type_url, AUTHORIZATION_TYPE);
    assert!(policies.resource_names_subscribe.is_empty());
    assert!(policies.resource_names_unsubscribe.is_empty());

    let demands = client.ads.demands();
    let asking = tokio::spawn(async move { demands.ask("/10.0.0.1").await });
    let asked = opened.hears().await;
    assert_eq!(asked.resource_names_subscribe, ["/10.0.0.1"]);
    assert!(asked.node.is_none() && asked.response_nonce.is_empty());
    opened.says(ADDRESS_TYPE, "n1", vec![workload("one", 1)], &[]);
    assert_eq!(opened.hears().await.response_nonce, "n1");
    assert!(asking.await.unwrap());

    // The next stream asks for the same, and says what is held.
    let end = Err(Status::unavailable("gone"));
    opened.responses.send(end).unwrap();
    let mut opened = server.opened.recv().await.unwrap();
    let mut addresses = opened.hears().await;
    addresses.resource_names_subscribe.sort();
    assert_eq!(addresses.resource_names_subscribe, ["*", "/10.0.0.1"]);
    assert_eq!(addresses.resource_names_unsubscribe, ["*"]);
    assert_eq!(addresses.initial_resource_versions["one"], "v1");
}

#[tokio::test]
async fn each_response_is_answered_by_its_own_nonce_and_in_order() {
    let (_server, client, opened) = met().await;
    let mut opened = opened;
    let bad = resource("bad", "v1", ADDRESS_TYPE, b"\xff\xff".to_vec());
    // None waits for the answer to the one before.
    opened.says(ADDRESS_TYPE, "a1", vec![workload("one", 1)], &[]);
    opened.says(AUTHORIZATION_TYPE, "p1", Vec::new(), &[]);
    opened.says(ADDRESS_TYPE, "a2", vec![bad, workload("two", 2)], &[]);
    opened.says(ADDRESS_TYPE, "a3", vec![workload("three", 3)], &["one"]);
    let mut answers = Vec::new();
    for _ in 0..4 {
        let answer = opened.hears().await;
        let refused = answer.error_detail.is_some();
        answers.push((answer.type_url, answer.response_nonce, refused));
    }
    let wanted = [
        (ADDRESS_TYPE, "a1", false),
        (AUTHORIZATION_TYPE, "p1", false),
        (ADDRESS_TYPE, "a2", true),
        (ADDRESS_TYPE, "a3", false),
    ];
    let wanted = wanted.map(|(t, nonce, refused)| (t.to_owned(), nonce.to_owned(), refused));
    assert_eq!(answers, wanted);
    assert_eq!(client.workloads(), ["three", "two"]);
}

#[tokio::test]
async fn the_removal_of_something_unknown_is_acknowledged_and_changes_nothing() {
    let (_server, client, mut opened) = met().await;
    opened.says(ADDRESS_TYPE, "n1", vec![workload("one", 1)], &[]);
    opened.hears().await;
    let before = client.store.load();
    opened.says(ADDRESS_TYPE, "n2", Vec::new(), &["two", "a/web", "", "*"]);
    let answer = opened.hears().await;
    assert_eq!((&*answer.response_nonce, answer.error_detail), ("n2", None));
    assert!(Arc::ptr_eq(&before, &client.store.load()));
}

#[tokio::test]
async fn ready_after_the_first_answer_of_each_type_and_for_good() {
    let (server, client, opened) = met().await;
    let mut opened = opened;
    let pending = || client.readiness.pending();
    opened.says(ADDRESS_TYPE, "n1", vec![workload("one", 1)], &[]);
    opened.hears().await;
    assert_eq!(pending(), ["state manager"], "no policy is known yet");
    // A refused resource is an answer all the same: one bad policy must not keep a node from serving.
    let bad = resource("a/p", "v1", AUTHORIZATION_TYPE, b"\xff".to_vec());
    opened.says(AUTHORIZATION_TYPE, "n2", vec![bad], &[]);
    assert!(opened.hears().await.error_detail.is_some());
    assert!(pending().is_empty());
    drop((opened, server));
    eventually("the loss is counted", || {
        client.metric(&["terminations"]) > 0
    })
    .await;
    assert!(pending().is_empty());
    assert_eq!(client.workloads(), ["one"]);
}

#[tokio::test]
async fn waits_grow_to_the_longest_and_begin_again_after_an_answer() {
    // Twenty failures would take three hours if nothing bounded the waits.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dir = TempDir::new().unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let _client = follow(endpoint(&dir, &address), false);
    let started = Instant::now();
    for _ in 0..20 {
        drop(listener.accept().await.unwrap());
    }
    assert!(started.elapsed() < Duration::from_secs(60));
    // And fifteen streams that end after an answer almost three minutes, if the waits went on growing.
    let mut server = hostile().await;
    let backoff = Backoff {
        longest: Duration::from_secs(3600),
        ..Backoff::default()
    };
    let _client = follow_with(endpoint(&dir, &server.address), false, backoff);
    let started = Instant::now();
    for _ in 0..15 {
        let mut opened = server.opened.recv().await.unwrap();
        opened.hears().await;
        opened.hears().await;
        opened.says(ADDRESS_TYPE, "n", Vec::new(), &[]);
        opened.hears().await;
        opened
            .responses
            .send(Err(Status::internal("over")))
            .unwrap();
    }
    assert!(started.elapsed() < Duration::from_secs(60));
}

#[tokio::test]
async fn nothing_is_sent_again_to_a_client_that_comes_back() {
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, "127.0.0.1:0", false).await;
    let address = served.address.to_string();
    served.publish(ONE);
    let client = follow(endpoint(&dir, &address), false);
    eventually("the mesh", || client.workloads() == ["one"]).await;
    eventually("ready", || client.readiness.pending().is_empty()).await;
    let before = client.store.load();
    let messages = || client.metric(&["istio_xds_message_total"]);
    let first = messages();
    served.stop().await;
    let served = serve(&dir, &address, false).await;
    served.publish(ONE);
    // The first answers of the stream, which are empty.
    eventually("both types are answered", || messages() == first + 2).await;
    assert!(Arc::ptr_eq(&before, &client.store.load()));
}

#[tokio::test]
async fn the_token_of_the_stream_is_read_again_when_it_is_refused() {
    let dir = TempDir::new().unwrap();
    let presented = dir.path().join("presented");
    std::fs::write(dir.path().join("token"), "right").unwrap();
    std::fs::write(&presented, "wrong").unwrap();
    let served = serve(&dir, "127.0.0.1:0", true).await;
    served.publish(ONE);
    let mut endpoint = endpoint(&dir, &served.address.to_string());
    endpoint.token = Some(Token::File(presented.clone()));
    let client = follow(endpoint.clone(), false);
    eventually("it is refused", || {
        client.metric(&["terminations", "\"Error\""]) > 1
    })
    .await;
    assert!(client.workloads().is_empty());
    // Kubernetes replaces a token by another file.
    let next = dir.path().join("next");
    std::fs::write(&next, "right\n").unwrap();
    std::fs::rename(&next, &presented).unwrap();
    eventually("the mesh", || client.workloads() == ["one"]).await;
    endpoint.token = Some(Token::Text("right".to_owned()));
    let client = follow(endpoint, false);
    eventually("the mesh, by a text", || client.workloads() == ["one"]).await;
}

#[tokio::test]
async fn a_control_plane_with_another_root_is_followed_once_the_root_file_says_so() {
    let (old, new) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let served = serve(&old, "127.0.0.1:0", false).await;
    let address = served.address.to_string();
    served.publish(ONE);
    let roots = old.path().join("mounted.pem");
    std::fs::copy(old.path().join("root-cert.pem"), &roots).unwrap();
    let mut endpoint = endpoint(&old, &address);
    endpoint.roots = Roots::File(roots.clone());
    let client = follow(endpoint.clone(), false);
    eventually("the mesh", || client.workloads() == ["one"]).await;
    served.stop().await;
    let served = serve(&new, &address, false).await;
    served.publish(TWO);
    let refused = client.metric(&["ConnectionError"]);
    eventually("it is not trusted", || {
        client.metric(&["ConnectionError"]) > refused + 1
    })
    .await;
    assert_eq!(client.workloads(), ["one"]);
    std::fs::copy(new.path().join("root-cert.pem"), &roots).unwrap();
    eventually("it is followed", || client.workloads() == ["two"]).await;
    let pem = std::fs::read_to_string(new.path().join("root-cert.pem")).unwrap();
    endpoint.roots = Roots::Text(pem);
    let client = follow(endpoint, false);
    eventually("the mesh, by a text", || client.workloads() == ["two"]).await;
}

#[rstest]
#[case("127.0.0.1", "{host}:{port}", None)]
#[case("127.0.0.1", "https://{host}:{port}", None)]
#[case("127.0.0.1", "https://{host}:{port}/", None)]
#[case("127.0.0.1", "https://localhost:{port}", Some("istiod"))]
#[case("[::1]", "{host}:{port}", Some("istiod"))]
#[case("[::1]", "https://{host}:{port}", Some("istiod"))]
#[tokio::test]
async fn forms_of_the_address(#[case] host: &str, #[case] form: &str, #[case] name: Option<&str>) {
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, &format!("{host}:0"), false).await;
    served.publish(ONE);
    let port = served.address.port().to_string();
    let address = form.replace("{host}", host).replace("{port}", &port);
    let mut endpoint = endpoint(&dir, &address);
    endpoint.server_name = name.map(str::to_owned);
    let client = follow(endpoint.clone(), false);
    eventually("the mesh", || client.workloads() == ["one"]).await;
    let web = Identity::new("cluster.local", "default", "web").unwrap();
    CaClient::new(endpoint, DAY).issue(&web).await.unwrap();
}

/// Passes connections on to a server. Those that were made before a freeze stay open, and nothing comes out of them any
/// more: what a client sees when packets are dropped on the way.
struct Relay {
    address: String,
    generation: Arc<tokio::sync::watch::Sender<u64>>,
}

impl Relay {
    async fn to(server: std::net::SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let generation = Arc::new(tokio::sync::watch::Sender::new(0));
        let current = Arc::clone(&generation);
        tokio::spawn(async move {
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut frozen = current.subscribe();
                frozen.mark_unchanged();
                tokio::spawn(async move {
                    let mut far = TcpStream::connect(server).await.unwrap();
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
                        _ = frozen.changed() => std::future::pending::<()>().await,
                    }
                });
            }
        });
        Self {
            address,
            generation,
        }
    }

    fn freeze(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }
}

#[tokio::test]
async fn a_server_that_went_silent_is_left_for_another_connection() {
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, "127.0.0.1:0", false).await;
    served.publish(ONE);
    let relay = Relay::to(served.address).await;
    let mut endpoint = endpoint(&dir, &relay.address);
    endpoint.keepalive = Keepalive {
        interval: Duration::from_millis(300),
        timeout: Duration::from_millis(700),
    };
    let client = follow(endpoint.clone(), false);
    let ca = CaClient::new(endpoint, DAY);
    let web = Identity::new("cluster.local", "default", "web").unwrap();
    ca.issue(&web).await.unwrap();
    eventually("the mesh", || client.workloads() == ["one"]).await;
    relay.freeze();
    served.publish(TWO);
    assert_eq!(client.workloads(), ["one"]);
    // The call fails with its connection, well before it would be given up by itself, and the next one has another.
    assert!(ca.issue(&web).await.is_err());
    ca.issue(&web).await.unwrap();
    eventually("the other mesh", || client.workloads() == ["two"]).await;
    assert_eq!(client.metric(&["ambidex_xds_connected"]), 1);
}

/// Whatever a CA answers, it is asked again: what it refuses at one moment it may grant at another, when the node's pods
/// have been told to it. A refusal leaves the connection as it is.
#[rstest]
#[case(Code::Unauthenticated, true)]
#[case(Code::PermissionDenied, true)]
#[case(Code::InvalidArgument, true)]
#[case(Code::FailedPrecondition, true)]
#[case(Code::ResourceExhausted, true)]
#[case(Code::Unavailable, false)]
#[case(Code::Internal, false)]
#[case(Code::DeadlineExceeded, false)]
#[tokio::test]
async fn failures_of_the_ca(#[case] code: Code, #[case] connection_stays: bool) {
    let server = hostile().await;
    let dir = TempDir::new().unwrap();
    *server.certificates.lock().unwrap() = Err(Status::new(code, "not like this"));
    let client = Arc::new(CaClient::new(endpoint(&dir, &server.address), DAY));
    let certificates = Certificates::new(
        client,
        RefreshPolicy {
            retry_first: Duration::from_millis(20),
            retry_longest: Duration::from_millis(50),
            ..RefreshPolicy::default()
        },
    );
    let web = Identity::new("cluster.local", "default", "web").unwrap();
    let error = certificates.get(&web).await.unwrap_err().to_string();
    assert!(
        error.contains(&format!("{code:?}")) && error.contains("not like this"),
        "{error}"
    );
    // An empty answer is no certificate, but it shows that the CA was asked again.
    *server.certificates.lock().unwrap() = Ok(CreateCertificateResponse::default());
    let deadline = Instant::now() + Duration::from_secs(10);
    while !certificates
        .get(&web)
        .await
        .unwrap_err()
        .to_string()
        .contains("holds 0 certificates")
    {
        assert!(Instant::now() < deadline, "not asked again");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let connections = server.connections.load(Ordering::Relaxed);
    assert_eq!(
        connections == 1,
        connection_stays,
        "{connections} connections"
    );
}
