#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::Arc;

use super::*;
use crate::state::{Store, local_xds};

fn uid(snapshot: &Snapshot, ip: &str) -> Option<String> {
    snapshot
        .workload_by_ip(ip.parse().unwrap())
        .map(|w| w.uid.to_string())
}

const TWO_NETWORKS: &str = "
workloads:
- {uid: here, workloadIps: [10.0.0.1], namespace: a, services: {}}
- {uid: east, workloadIps: [10.0.0.1], namespace: a, services: {}, network: east}
";

#[test]
fn an_address_belongs_to_its_network() {
    let snapshot = local_xds::parse(TWO_NETWORKS).unwrap();
    assert_eq!(uid(&snapshot, "10.0.0.1").as_deref(), Some("here"));
    assert_eq!(uid(&snapshot, "::ffff:10.0.0.1").as_deref(), Some("here"));
    let east = snapshot.workload_by_address(&"east/10.0.0.1".parse().unwrap());
    assert_eq!(&*east.unwrap().uid, "east");
}

#[test]
fn a_store_gives_its_network_to_every_snapshot() {
    let store = Store::in_network("east");
    store.replace(local_xds::parse(TWO_NETWORKS).unwrap());
    assert_eq!(uid(&store.load(), "10.0.0.1").as_deref(), Some("east"));
}

#[test]
fn the_host_networks_address_names_nobody_unless_one_is_there() {
    let host = |uid: &str, ip: &str| {
        format!(
            "- {{uid: {uid}, workloadIps: [{ip}], namespace: a, services: {{}}, networkMode: HostNetwork}}\n"
        )
    };
    let text = format!(
        "workloads:\n{}{}{}{}- {{uid: pod, workloadIps: [10.0.0.3], namespace: a, services: {{}}}}\n",
        host("one", "10.0.0.1"),
        host("two", "10.0.0.1"),
        host("alone", "10.0.0.2"),
        host("beside-a-pod", "10.0.0.3"),
    );
    let snapshot = local_xds::parse(&text).unwrap();
    assert_eq!(uid(&snapshot, "10.0.0.1"), None);
    assert_eq!(uid(&snapshot, "10.0.0.2").as_deref(), Some("alone"));
    assert_eq!(uid(&snapshot, "10.0.0.3").as_deref(), Some("pod"));
}

#[test]
fn two_services_cannot_share_a_virtual_address() {
    let text = "services: [{name: a, namespace: n, hostname: a, vips: [/10.1.0.1], ports: {}}, {name: b, namespace: n, hostname: b, vips: [/10.1.0.1], ports: {}}]";
    assert_eq!(
        local_xds::parse(text).unwrap_err().to_string(),
        "services n/a and n/b both have virtual address /10.1.0.1"
    );
}

#[tokio::test]
async fn a_subscriber_that_is_told_of_a_version_sees_it() {
    let store = Arc::new(Store::new());
    let mut versions = store.subscribe();
    let reader = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            versions.changed().await.unwrap();
            uid(&store.load(), "10.0.0.1")
        }
    });
    store.replace(local_xds::parse(TWO_NETWORKS).unwrap());
    assert_eq!(reader.await.unwrap().as_deref(), Some("here"));
}
