//! Servers that misbehave, scripted.

use std::time::Duration;

use control_plane::ca::CaClient;
use control_plane::messages::certificate::CreateCertificateResponse;
use control_plane::messages::discovery::Resource;
use control_plane::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE};
use shared_proxy::identity::{CertificateAuthority, Identity};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tonic::Status;

use crate::rig::{DAY, ca_in, endpoint, eventually, follow};
use crate::script::{hostile, met, resource, workload};

#[tokio::test]
async fn one_bad_resource_is_refused_by_name_and_the_others_are_used() {
    let (_server, client, mut opened) = met().await;
    let good = || vec![workload("one", 1), workload("two", 2)];
    opened.says(ADDRESS_TYPE, "n1", good(), &[]);
    let answer = opened.hears().await;
    assert_eq!(
        (&*answer.response_nonce, &answer.error_detail),
        ("n1", &None)
    );

    let bad = vec![
        workload("three", 3),
        resource("two", "v9", ADDRESS_TYPE, b"\xff\xff".to_vec()),
        resource("four", "v9", AUTHORIZATION_TYPE, Vec::new()),
        Resource {
            name: "five".to_owned(),
            ..Resource::default()
        },
        workload("six", 6),
    ];
    opened.says(ADDRESS_TYPE, "n2", bad, &["one"]);
    let answer = opened.hears().await;
    assert_eq!(
        (&*answer.type_url, &*answer.response_nonce),
        (ADDRESS_TYPE, "n2")
    );
    let error = answer.error_detail.unwrap();
    assert_eq!(error.code, 3);
    for name in [
        "two: cannot be decoded",
        "four: is of type",
        "five: resource is missing",
    ] {
        assert!(error.message.contains(name), "{}", error.message);
    }
    assert!(!error.message.contains("three"), "{}", error.message);
    // The last good form of the bad one stays in force.
    assert_eq!(client.workloads(), ["six", "three", "two"]);
    assert_eq!(client.metric(&["refused_resources"]), 3);
}

#[tokio::test]
async fn a_type_that_nobody_asked_for_is_refused() {
    let (_server, client, mut opened) = met().await;
    opened.says(
        "type.googleapis.com/envoy.Cluster",
        "n1",
        vec![workload("one", 1)],
        &[],
    );
    let answer = opened.hears().await;
    assert!(answer.error_detail.is_some());
    assert!(client.workloads().is_empty());
    assert_eq!(client.readiness.pending(), ["state manager"]);
}

#[tokio::test]
async fn after_a_reset_the_stream_begins_with_what_is_held() {
    let (mut server, client, mut opened) = met().await;
    opened.says(
        ADDRESS_TYPE,
        "n1",
        vec![workload("one", 1), workload("two", 2)],
        &[],
    );
    opened.says(AUTHORIZATION_TYPE, "n2", Vec::new(), &[]);
    opened.hears().await;
    opened.hears().await;
    assert!(client.readiness.pending().is_empty());
    for attempt in 0..3 {
        opened
            .responses
            .send(Err(Status::internal("no more")))
            .unwrap();
        opened = server.opened.recv().await.unwrap();
        let request = opened.hears().await;
        let mut held: Vec<_> = request.initial_resource_versions.into_iter().collect();
        held.sort();
        let wanted = [("one", "v1"), ("two", "v2")].map(|(n, v)| (n.to_owned(), v.to_owned()));
        assert_eq!(held, wanted, "attempt {attempt}");
        assert!(request.node.is_some() && request.response_nonce.is_empty());
        opened.hears().await;
    }
    assert_eq!(client.workloads(), ["one", "two"]);
    assert_eq!(client.metric(&["terminations", "\"Error\""]), 3);
    assert!(client.readiness.pending().is_empty());
}

#[tokio::test]
async fn a_name_that_stands_for_another_object_leaves_nothing_of_the_first() {
    let (_server, client, mut opened) = met().await;
    opened.says(ADDRESS_TYPE, "n1", vec![workload("one", 1)], &[]);
    opened.hears().await;
    let mut renamed = workload("other", 1);
    renamed.name = "one".to_owned();
    opened.says(ADDRESS_TYPE, "n2", vec![renamed], &[]);
    opened.hears().await;
    assert_eq!(client.workloads(), ["other"]);
    opened.says(ADDRESS_TYPE, "n3", Vec::new(), &["one", "never seen"]);
    opened.hears().await;
    assert!(client.workloads().is_empty());
}

#[tokio::test]
async fn a_server_that_hangs_up_at_once_is_asked_again_with_growing_waits() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dir = TempDir::new().unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let client = follow(endpoint(&dir, &address), false);
    let mut times = Vec::new();
    for _ in 0..5 {
        drop(listener.accept().await.unwrap());
        times.push(std::time::Instant::now());
    }
    // 10, 20, 40 and 80 ms, less a fifth.
    let whole = times[4].duration_since(times[0]);
    assert!(whole >= Duration::from_millis(120), "{whole:?}");
    eventually("all are counted", || client.metric(&["terminations"]) >= 4).await;
}

#[tokio::test]
async fn an_answer_of_the_ca_that_is_not_what_was_asked_for_is_refused() {
    let server = hostile().await;
    let dir = TempDir::new().unwrap();
    let ca = CaClient::new(endpoint(&dir, &server.address), DAY);
    let wanted = Identity::new("cluster.local", "default", "web").unwrap();
    let other = Identity::new("cluster.local", "default", "admin").unwrap();
    let root = ca_in(dir.path());
    let pem = |account: &Identity| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.subject_alt_names =
            vec![rcgen::SanType::URI(account.to_string().try_into().unwrap())];
        let request = params.serialize_request(&key).unwrap().pem().unwrap();
        let (_, leaf) = root.sign_request(&request, DAY).unwrap();
        pem(&leaf)
    };
    let root_pem = std::fs::read_to_string(dir.path().join("root-cert.pem")).unwrap();
    for (chain, why) in [
        (vec![], "holds 0 certificates"),
        (vec![pem(&wanted)], "holds 1 certificates"),
        (
            vec!["-----BEGIN CERTIFICATE-----\nno".to_owned()],
            "the CA's answer",
        ),
        (
            vec![pem(&other), root_pem.clone()],
            "asked for a certificate of spiffe://cluster.local/ns/default/sa/web, got one of spiffe://cluster.local/ns/default/sa/admin",
        ),
        // The right name, another key.
        (vec![pem(&wanted), root_pem.clone()], "cannot be used"),
        (
            vec![root_pem.clone(), root_pem.clone()],
            "names no identity",
        ),
    ] {
        *server.certificates.lock().unwrap() = Ok(CreateCertificateResponse { cert_chain: chain });
        let error = ca.issue(&wanted).await.unwrap_err().to_string();
        assert!(error.contains(why), "{error} does not say {why:?}");
    }
}

pub fn pem(der: &[u8]) -> String {
    use base64::Engine;
    let text = base64::engine::general_purpose::STANDARD.encode(der);
    format!("-----BEGIN CERTIFICATE-----\n{text}\n-----END CERTIFICATE-----\n")
}
