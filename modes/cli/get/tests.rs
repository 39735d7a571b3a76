#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;

use comfy_table::Table;
use serde_json::{Value, json};

use super::conns::{self, Report, State};
use super::mesh;
use crate::cli::output::{Format, OutputArgs};

fn shown(value: &impl serde::Serialize, wide: bool, table: impl FnOnce(bool) -> Table) -> String {
    let output = match wide {
        true => Format::Wide,
        false => Format::Table,
    };
    OutputArgs { output }.render(value, table).unwrap()
}

fn list(json: Value) -> Vec<Value> {
    serde_json::from_value(json).unwrap()
}

fn mesh_workloads() -> Vec<Value> {
    list(json!([
        {
            "uid": "Kubernetes//Pod/shop/web-2", "name": "web-2", "namespace": "shop", "serviceAccount": "web",
            "workloadIps": ["10.244.2.8"], "network": "", "protocol": "HBONE", "node": "node2",
            "workloadName": "web", "status": "Unhealthy",
            "services": {"shop/web.shop.svc.cluster.local": {"80": 8080}},
        },
        {
            "uid": "Kubernetes//Pod/shop/web-1", "name": "web-1", "namespace": "shop", "serviceAccount": "web",
            "workloadIps": ["10.244.2.7", "fd00::7"], "network": "", "protocol": "HBONE", "node": "node2",
            "workloadName": "web", "status": "Healthy",
            "waypoint": {"destination": {"namespace": "shop", "hostname": "wp.shop"}, "hboneMtlsPort": 15008},
            "services": {"shop/web.shop.svc.cluster.local": {"80": 8080}},
        },
        {
            "uid": "x", "name": "external", "namespace": "outside", "serviceAccount": "default", "workloadIps": [],
            "hostname": "db.example.com", "network": "", "protocol": "TCP", "node": "", "workloadName": "",
            "status": "Healthy", "services": {},
        },
    ]))
}

#[test]
fn mesh_tables() {
    let workloads = mesh_workloads();
    let services = list(json!([{
        "name": "web", "namespace": "shop", "hostname": "web.shop.svc.cluster.local", "vips": ["/10.96.0.7"],
        "ports": {"80": 8080, "443": 8443},
        "loadBalancer": {"routingPreferences": ["Zone"], "mode": "Failover", "healthPolicy": "OnlyHealthy"},
    }]));
    let policies = list(json!([
        {"name": "deny-all", "namespace": "shop", "scope": "Namespace", "action": "Deny", "rules": [], "dryRun": false},
        {"name": "a", "namespace": "istio-system", "scope": "Global", "action": "Allow", "rules": [[], []], "dryRun": true},
    ]));
    const NOW: u64 = 1_795_347_180;
    let certificate = |name: &str, state: &str, from: Option<u64>, until: Option<u64>| {
        json!({
            "identity": format!("spiffe://cluster.local/ns/shop/sa/{name}"), "state": state, "error": null,
            "serialNumber": until.map(|_| "0a1b2c"), "validFrom": from, "expirationTime": until,
        })
    };
    let certificates = vec![
        certificate("web", "Available", Some(NOW - 3600), Some(NOW + 82_800)),
        certificate("old", "Available", Some(NOW - 90_000), Some(NOW - 1)),
        certificate("new", "Initializing", None, None),
    ];
    let mut text = String::new();
    for wide in [false, true] {
        text += &shown(&workloads, wide, |wide| mesh::workloads(&workloads, wide));
        text += "\n";
        text += &shown(&services, wide, |wide| {
            mesh::services(&services, &workloads, wide)
        });
        text += "\n";
        text += &shown(&policies, wide, |wide| mesh::policies(&policies, wide));
        text += "\n";
        text += &shown(&certificates, wide, |wide| {
            mesh::certificates(&certificates, NOW, wide)
        });
        text += "\n";
    }
    insta::assert_snapshot!("mesh_tables", text);
}

/// A half as a proxy reports it.
fn half(id: u64, direction: &str, source: &str, destination: &str, more: Value) -> Value {
    let end = |text: &str| {
        let (addr, pod) = text.split_once(' ').unwrap_or((text, ""));
        let (namespace, name) = pod.split_once('/').unzip();
        json!({
            "addr": addr, "namespace": namespace, "workload": name,
            "identity": namespace.map(|n| format!("spiffe://cluster.local/ns/{n}/sa/default")),
        })
    };
    let mut half = json!({
        "id": id, "direction": direction, "captureMode": "inpod", "source": end(source), "destination": end(destination),
        "service": null, "hboneAddr": null, "mutualTls": false, "sent": 10, "received": 2000, "ageMillis": 61_000,
        "tunnel": null, "application": null, "clientEndedMillis": null, "applicationEndedMillis": null,
    });
    half.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    half
}

fn report(proxy: &str, pods: &[&str], halves: Vec<Value>) -> Report {
    Report {
        proxy: proxy.to_owned(),
        halves: halves
            .into_iter()
            .map(|half| serde_json::from_value(half).unwrap())
            .collect(),
        pods: pods
            .iter()
            .map(ToString::to_string)
            .collect::<BTreeSet<_>>(),
    }
}

fn tunnel(stream: u32) -> Value {
    json!({
        "hboneAddr": "10.244.2.7:8080", "mutualTls": true,
        "tunnel": {"client": "10.244.1.4:10500", "server": "10.244.2.7:15008", "stream": stream},
    })
}

fn with(mut one: Value, more: Value) -> Value {
    one.as_object_mut()
        .unwrap()
        .extend(more.as_object().unwrap().clone());
    one
}

/// Two nodes: a connection in a tunnel with both halves, one whose other half is gone, one that is too young to tell, a plain
/// one to the outside, a plain one between two pods, half-open ones.
fn reports() -> Vec<Report> {
    let (client, server) = ("default/curl", "shop/web");
    let outbound = |id, port: u16, more| {
        half(
            id,
            "outbound",
            &format!("10.244.1.4:{port} {client}"),
            &format!("10.244.2.7:15008 {server}"),
            more,
        )
    };
    let inbound = |id, more| {
        let more = with(
            more,
            json!({"application": {"local": "10.244.1.4:33001", "peer": "10.244.2.7:8080"}}),
        );
        half(
            id,
            "inbound",
            &format!("10.244.1.4:10500 {client}"),
            &format!("10.244.2.7:15008 {server}"),
            more,
        )
    };
    let leg = |local: &str, peer: &str| json!({"application": {"local": local, "peer": peer}});
    let near = vec![
        outbound(
            1,
            43_001,
            with(tunnel(1), json!({"service": "web.shop.svc.cluster.local"})),
        ),
        outbound(2, 43_002, tunnel(3)),
        outbound(3, 43_003, with(tunnel(5), json!({"ageMillis": 12}))),
        outbound(
            4,
            43_004,
            with(tunnel(7), json!({"clientEndedMillis": 2500})),
        ),
        half(
            5,
            "outbound",
            &format!("10.244.1.4:43005 {client}"),
            "198.51.100.1:80",
            with(
                leg("10.244.1.4:43105", "198.51.100.1:80"),
                json!({"applicationEndedMillis": 3_700_000, "ageMillis": 5_000_000}),
            ),
        ),
        half(
            6,
            "outbound",
            &format!("10.244.1.4:43006 {client}"),
            &format!("10.244.2.7:8080 {server}"),
            leg("10.244.1.4:43106", "10.244.2.7:8080"),
        ),
    ];
    let far = vec![
        inbound(1, tunnel(1)),
        inbound(2, with(tunnel(7), json!({"clientEndedMillis": 2400}))),
        half(
            3,
            "inbound",
            &format!("10.244.1.4:43106 {client}"),
            &format!("10.244.2.7:8080 {server}"),
            leg("10.244.1.4:33003", "10.244.2.7:8080"),
        ),
    ];
    vec![
        report("node1", &[client], near),
        report("node2", &[server], far),
    ]
}

#[test]
fn connections_are_joined_from_their_halves() {
    let connections = conns::join(reports());
    let found: Vec<_> = connections
        .iter()
        .map(|it| {
            let id = |half: &Option<conns::Half>| half.as_ref().map(conns::Half::id);
            (id(&it.outbound), id(&it.inbound), it.state)
        })
        .collect();
    let expected = [
        (Some(5), None, State::ApplicationEnded),
        (Some(1), Some(1), State::Open),
        (Some(2), None, State::OtherHalfGone),
        (Some(4), Some(2), State::ClientEnded),
        (Some(6), Some(3), State::Open),
        (Some(3), None, State::Open),
    ];
    assert_eq!(found, expected);
}

#[test]
fn a_node_asked_alone_calls_nothing_gone() {
    let connections = conns::join(reports().drain(..1).collect());
    assert_eq!(connections.len(), 6);
    assert!(
        connections
            .iter()
            .all(|it| it.inbound.is_none() && it.state != State::OtherHalfGone)
    );
}

#[test]
fn connection_tables() {
    let connections = conns::join(reports());
    let text = [false, true]
        .map(|wide| shown(&connections, wide, |wide| conns::table(&connections, wide)));
    insta::assert_snapshot!("connection_tables", text.join("\n"));
}
