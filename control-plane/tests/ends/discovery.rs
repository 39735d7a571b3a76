use std::time::Duration;

use control_plane::transport::Roots;
use tempfile::TempDir;

use crate::rig::{Served, endpoint, eventually, follow, serve};

fn mesh(workloads: std::ops::Range<u32>, extra: &str) -> String {
    let mut text = "workloads:\n".to_owned();
    for number in workloads {
        text.push_str(&format!(
            "- {{uid: w{number}, namespace: a, workloadIps: [10.0.{}.{}], services: {{}}}}\n",
            number / 250,
            number % 250 + 1
        ));
    }
    text + extra
}

const POLICY: &str = "policies: [{name: p, namespace: a, scope: Namespace, action: Deny, dryRun: false, rules: []}]\n";

async fn both() -> (TempDir, Served) {
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, "127.0.0.1:0", false).await;
    (dir, served)
}

#[tokio::test]
async fn a_mesh_arrives_changes_and_shrinks() {
    let (dir, served) = both().await;
    served.publish(&mesh(0..300, ""));
    let client = follow(endpoint(&dir, &served.address.to_string()), false);
    assert_eq!(client.readiness.pending(), ["state manager"]);
    eventually("all workloads", || client.workloads().len() == 300).await;
    eventually("ready", || client.readiness.pending().is_empty()).await;
    let first = client.metric(&["message_bytes_total"]);

    served.publish(&mesh(0..301, POLICY));
    eventually("one more workload and a policy", || {
        client.workloads().len() == 301 && client.store.load().policy_count() == 1
    })
    .await;
    let second = client.metric(&["message_bytes_total"]) - first;
    assert!(
        second * 20 < first,
        "{second} bytes for two objects, {first} for all"
    );

    served.publish(&mesh(299..301, ""));
    eventually("the others are gone", || {
        client.workloads() == ["w299", "w300"] && client.store.load().policy_count() == 0
    })
    .await;
    assert_eq!(client.metric(&["ambidex_xds_connected"]), 1);
}

#[tokio::test]
async fn an_empty_mesh_makes_ready_too() {
    let (dir, served) = both().await;
    let client = follow(endpoint(&dir, &served.address.to_string()), false);
    eventually("ready", || client.readiness.pending().is_empty()).await;
}

#[tokio::test]
async fn a_lost_control_plane_changes_nothing_and_comes_back_with_the_differences() {
    let (dir, served) = both().await;
    let address = served.address.to_string();
    served.publish(&mesh(0..300, ""));
    let client = follow(endpoint(&dir, &address), false);
    eventually("all workloads", || client.workloads().len() == 300).await;
    let before = client.metric(&["message_bytes_total"]);
    served.stop().await;
    eventually("the loss is noticed", || {
        client.metric(&["terminations"]) > 2
    })
    .await;
    assert_eq!(client.workloads().len(), 300);
    assert_eq!(client.metric(&["ambidex_xds_connected"]), 0);
    assert!(client.metric(&["terminations", "ConnectionError"]) > 0);

    let served = serve(&dir, &address, false).await;
    served.publish(&mesh(1..301, ""));
    eventually("the differences", || {
        let workloads = client.workloads();
        workloads.len() == 300
            && workloads.contains(&"w300".to_owned())
            && !workloads.contains(&"w0".to_owned())
    })
    .await;
    let bytes = client.metric(&["message_bytes_total"]) - before;
    assert!(
        bytes * 20 < before,
        "{bytes} bytes on return, {before} at first"
    );
    eventually("connected", || {
        client.metric(&["ambidex_xds_connected"]) == 1
    })
    .await;
}

#[tokio::test]
async fn single_resources_on_demand() {
    let (dir, served) = both().await;
    let service = "services:
- {name: web, namespace: a, hostname: web, vips: [/10.1.0.1], ports: {80: 80}}
- {name: wide, namespace: a, hostname: wide, vips: [], cidrVips: [/10.2.0.0/16], ports: {80: 80}}
";
    served.publish(&mesh(0..300, &format!("{service}{POLICY}")));
    let client = follow(endpoint(&dir, &served.address.to_string()), true);
    eventually("ready", || client.readiness.pending().is_empty()).await;
    assert_eq!(client.store.load().policy_count(), 1);
    assert!(client.workloads().is_empty());

    let demands = client.ads.demands();
    let ask = |name: &'static str| tokio::time::timeout(Duration::from_secs(5), demands.ask(name));
    assert!(ask("/10.0.0.8").await.unwrap());
    assert_eq!(client.workloads(), ["w7"]);
    assert!(ask("/10.1.0.1").await.unwrap());
    assert_eq!(client.store.load().service_count(), 1);
    // An address in a range of one, which comes under the service's own name.
    assert!(ask("/10.2.3.4").await.unwrap());
    assert_eq!(client.store.load().service_count(), 2);
    // What does not exist releases whoever waits.
    assert!(ask("/10.9.9.9").await.unwrap());
    assert!(ask("w8").await.unwrap());
    assert_eq!(client.workloads(), ["w7", "w8"]);

    // What was asked for is followed, on a later stream too.
    let address = served.address.to_string();
    served.stop().await;
    let served = serve(&dir, &address, false).await;
    served.publish(&mesh(8..300, ""));
    eventually("what is gone is removed", || {
        client.workloads() == ["w8"] && client.store.load().service_count() == 0
    })
    .await;
}

#[tokio::test]
async fn the_server_is_verified_and_the_roots_are_read_for_each_connection() {
    let (dir, served) = both().await;
    served.publish(&mesh(0..1, ""));
    let other = TempDir::new().unwrap();
    crate::rig::ca_in(other.path());
    // A name that is not in the certificate, until the right one is named.
    let localhost = format!("localhost:{}", served.address.port());
    let unnamed = follow(endpoint(&dir, &localhost), false);
    let mut named = endpoint(&dir, &localhost);
    named.server_name = Some("istiod".to_owned());
    let named = follow(named, false);
    // Another CA's root.
    let mut stranger = endpoint(&other, &served.address.to_string());
    let roots = other.path().join("roots.pem");
    std::fs::copy(other.path().join("root-cert.pem"), &roots).unwrap();
    stranger.roots = Roots::File(roots.clone());
    let stranger = follow(stranger, false);
    eventually("the override works", || named.workloads().len() == 1).await;
    eventually("both are refused", || {
        unnamed.metric(&["ConnectionError"]) > 1 && stranger.metric(&["ConnectionError"]) > 1
    })
    .await;
    assert!(unnamed.workloads().is_empty() && stranger.workloads().is_empty());
    std::fs::copy(dir.path().join("root-cert.pem"), &roots).unwrap();
    eventually("the right root counts", || stranger.workloads().len() == 1).await;
}
