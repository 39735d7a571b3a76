#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;

use rand::SeedableRng;
use rand::rngs::StdRng;

use super::*;
use crate::state::{NetworkAddress, Snapshot, local_xds};

/// An endpoint `NAME` with more keys.
fn endpoint(n: usize, name: &str, keys: &str) -> String {
    let addresses = if keys.contains("workloadIps") {
        String::new()
    } else {
        format!("workloadIps: [10.0.0.{n}], ")
    };
    let services = if keys.contains("services") {
        ""
    } else {
        "services: {default/web: {80: 8080}}, "
    };
    format!("- {{uid: {name}, name: {name}, namespace: default, {addresses}{services}{keys}}}\n")
}

fn mesh(load_balancer: &str, endpoints: &[(&str, &str)]) -> Snapshot {
    let mut text = String::from("workloads:\n");
    for (n, (name, keys)) in endpoints.iter().enumerate() {
        text += &endpoint(n + 1, name, keys);
    }
    text += &format!(
        "services: [{{name: web, namespace: default, hostname: web, vips: [/10.1.0.1], ports: {{80: 8000, 81: 0, 82: 8200}}, {load_balancer}}}]"
    );
    local_xds::parse(&text).unwrap_or_else(|e| panic!("{e}\n{text}"))
}

fn source() -> Workload {
    Workload {
        network: "".into(),
        node: "n1".into(),
        cluster_id: "c1".into(),
        locality: crate::state::workload::Locality {
            region: "r1".into(),
            zone: "z1".into(),
            subzone: "s1".into(),
        },
        ..Workload::default()
    }
}

/// How often each endpoint (`uid:port`) was chosen in 2,000 tries.
fn choices(snapshot: &Snapshot, port: u16) -> BTreeMap<String, u32> {
    let service = snapshot
        .service_by_vip("10.1.0.1".parse().unwrap())
        .unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let mut count = BTreeMap::new();
    for _ in 0..2000 {
        if let Some((workload, port)) =
            snapshot.choose_endpoint(&service, &source(), Wanted::Port(port), &mut rng)
        {
            *count.entry(format!("{}:{port}", workload.uid)).or_insert(0) += 1;
        }
    }
    count
}

fn chosen(load_balancer: &str, endpoints: &[(&str, &str)]) -> Vec<String> {
    choices(&mesh(load_balancer, endpoints), 80)
        .into_keys()
        .collect()
}

#[test]
fn capacity_is_weight() {
    let mesh = mesh(
        "",
        &[
            ("a", "capacity: 1"),
            ("b", "capacity: 3"),
            ("c", "capacity: 0"),
        ],
    );
    let count = choices(&mesh, 80);
    assert_eq!(count.keys().collect::<Vec<_>>(), ["a:8080", "b:8080"]);
    assert!((400..600).contains(&count["a:8080"]), "{count:?}");
}

#[test]
fn unhealthy_endpoints_serve_only_who_wants_all() {
    let endpoints = [("a", ""), ("b", "status: Unhealthy")];
    assert_eq!(chosen("", &endpoints), ["a:8080"]);
    let all = "loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}";
    assert_eq!(chosen(all, &endpoints), ["a:8080", "b:8080"]);
    assert!(chosen("", &endpoints[1..]).is_empty());
}

#[test]
fn an_endpoints_own_port_goes_before_the_services() {
    let mesh = mesh(
        "",
        &[
            ("a", "services: {default/web: {80: 8080, 81: 8081}}"),
            ("b", "services: {default/web: {}}"),
        ],
    );
    assert_eq!(
        choices(&mesh, 80).into_keys().collect::<Vec<_>>(),
        ["a:8080", "b:8000"]
    );
    assert_eq!(
        choices(&mesh, 81).into_keys().collect::<Vec<_>>(),
        ["a:8081"],
        "b does not say where the named port 81 is"
    );
    assert_eq!(
        choices(&mesh, 82).into_keys().collect::<Vec<_>>(),
        ["a:8200", "b:8200"]
    );
    assert!(choices(&mesh, 9).is_empty());
}

const NEAR: (&str, &str) = ("near", "locality: {region: r1, zone: z1}, node: n1");
const SAME_ZONE: (&str, &str) = ("zone", "locality: {region: r1, zone: z1}, node: n2");
const SAME_REGION: (&str, &str) = ("region", "locality: {region: r1, zone: z2}, node: n2");
const SAME_NODE_ONLY: (&str, &str) = ("node", "locality: {region: r2, zone: z1}, node: n1");

fn preferences(mode: &str) -> String {
    format!(
        "loadBalancer: {{routingPreferences: [Region, Zone, Node], mode: {mode}, healthPolicy: OnlyHealthy}}"
    )
}

#[rstest::rstest]
#[case::best(&[SAME_REGION, NEAR, SAME_ZONE, SAME_NODE_ONLY], &["near:8080"])]
#[case::next(&[SAME_REGION, SAME_ZONE, SAME_NODE_ONLY], &["zone:8080"])]
#[case::next_but_one(&[SAME_REGION, SAME_NODE_ONLY], &["region:8080"])]
#[case::ranking_stops_at_the_first_difference(&[SAME_NODE_ONLY, ("other", "")], &["node:8080", "other:8080"])]
#[case::the_unhealthy_do_not_count(&[("sick", "locality: {region: r1, zone: z1}, node: n1, status: Unhealthy"), SAME_ZONE], &["zone:8080"])]
fn failover(#[case] endpoints: &[(&str, &str)], #[case] expected: &[&str]) {
    assert_eq!(chosen(&preferences("Failover"), endpoints), expected);
}

#[test]
fn strict_takes_all_or_none() {
    let strict = preferences("Strict");
    assert_eq!(chosen(&strict, &[SAME_ZONE, NEAR]), ["near:8080"]);
    assert!(chosen(&strict, &[SAME_ZONE, SAME_REGION]).is_empty());
}

#[test]
fn without_a_mode_preferences_do_nothing() {
    let standard = preferences("Standard");
    assert_eq!(chosen(&standard, &[SAME_ZONE, NEAR]).len(), 2);
}

#[test]
fn another_network_ranks_below_every_endpoint_of_the_same() {
    let failover = "loadBalancer: {routingPreferences: [Network, Region, Zone], mode: Failover, healthPolicy: OnlyHealthy}";
    let far_here = ("here", "locality: {region: r9}");
    let near_there = ("there", "network: other, locality: {region: r1, zone: z1}");
    let far_there = (
        "farther",
        "network: other, locality: {region: r1, zone: z9}",
    );
    assert_eq!(
        chosen(failover, &[far_there, near_there, far_here]),
        ["here:8080"]
    );
    assert_eq!(chosen(failover, &[far_there, near_there]), ["there:8080"]);
    let strict = failover.replace("Failover", "Strict");
    assert!(chosen(&strict, &[near_there, far_here]).is_empty());
    assert_eq!(
        chosen(
            &strict,
            &[("all", "locality: {region: r1, zone: z1}"), near_there]
        ),
        ["all:8080"]
    );
}

#[test]
fn an_endpoint_without_an_address_needs_a_gateway_and_another_network() {
    let gateway = "workloadIps: [], networkGateway: {destination: other/10.9.9.9}";
    assert!(chosen("", &[("a", "workloadIps: []")]).is_empty());
    assert!(chosen("", &[("a", gateway)]).is_empty());
    let elsewhere = format!("network: other, {gateway}");
    assert_eq!(chosen("", &[("a", &elsewhere)]), ["a:8080"]);
}

#[test]
fn a_service_that_is_passed_through_has_no_choice() {
    let mesh = mesh(&preferences("Passthrough"), &[NEAR]);
    let key = "default/web".parse().unwrap();
    assert!(mesh.service(&key).unwrap().is_passthrough());
    assert!(choices(&mesh, 80).is_empty());
    let vip: NetworkAddress = "/10.1.0.1".parse().unwrap();
    assert!(mesh.service_by_vip(vip.ip).is_some());
}

#[test]
fn a_gateway_s_own_port_need_not_be_the_service_s() {
    let mesh = mesh(
        "",
        &[("a", "services: {default/web: {15008: 15018}}"), ("b", "")],
    );
    let service = mesh.service(&"default/web".parse().unwrap()).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let chosen: std::collections::BTreeSet<_> = (0..50)
        .filter_map(|_| mesh.choose_endpoint(&service, &source(), Wanted::Tunnel(15_008), &mut rng))
        .map(|(workload, port)| format!("{}:{port}", workload.uid))
        .collect();
    assert_eq!(
        chosen.into_iter().collect::<Vec<_>>(),
        ["a:15018", "b:15008"]
    );
}

#[test]
fn a_hostname_is_an_address_too() {
    assert_eq!(
        chosen("", &[("a", "workloadIps: [], hostname: db.example")]),
        ["a:8080"]
    );
}

#[test]
fn endpoints_of_another_family_than_the_service_s_do_not_count() {
    let six = ("six", "workloadIps: ['fd00::1']");
    let both = ("both", "workloadIps: [10.0.0.9, 'fd00::9']");
    let four = ("four", "workloadIps: [10.0.0.8]");
    assert_eq!(
        chosen("ipFamilies: IPv6", &[six, both, four]),
        ["both:8080", "six:8080"]
    );
    assert_eq!(
        chosen("ipFamilies: IPv4", &[six, both, four]),
        ["both:8080", "four:8080"]
    );
    assert_eq!(chosen("ipFamilies: Dual", &[six, both, four]).len(), 3);
}

#[test]
fn an_application_tunnel_takes_every_port() {
    let tunnel = "applicationTunnel: {protocol: PROXY, port: 15088}";
    let mesh = mesh(
        "",
        &[("a", tunnel), ("b", "applicationTunnel: {protocol: PROXY}")],
    );
    assert_eq!(choices(&mesh, 9).into_keys().collect::<Vec<_>>(), ["a:9"]);
}
