#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::io;

use rand::SeedableRng;
use rand::rngs::StdRng;
use tokio::net::TcpSocket;

use super::*;
use crate::capture::{ClientAddr, Listener, OnBehalfOf, OrigDstAddr, Refusal, Role, ScopeId};
use crate::state::local_xds;

/// A client, two services' waypoints, a gateway, and services for every row of the table.
const MESH: &str = r#"
workloads:
- {uid: client, name: client, namespace: a, serviceAccount: client, workloadIps: [10.0.0.1], protocol: HBONE, network: here, node: n1,
   locality: {region: r1, zone: z1}, services: {a/web: {80: 8080}}}
- {uid: web, name: web, namespace: a, serviceAccount: web, workloadIps: [10.0.0.2], protocol: HBONE, network: here, services: {a/web: {80: 8080}, a/behind: {80: 8080}, a/range: {80: 8080}}}
- {uid: old, name: old, namespace: a, serviceAccount: old, workloadIps: [10.0.0.3], network: here, services: {a/plain: {80: 8081}}}
- {uid: wp, name: wp, namespace: a, serviceAccount: wp, workloadIps: [10.0.0.4], protocol: HBONE, nativeTunnel: true, network: here, services: {a/wp: {}}}
- {uid: behind, name: behind, namespace: a, serviceAccount: behind, workloadIps: [10.0.0.5], protocol: HBONE, network: here,
   waypoint: {destination: here/10.0.0.4, hboneMtlsPort: 15018}, services: {}}
- {uid: far, name: far, namespace: a, serviceAccount: far, workloadIps: [], protocol: HBONE, network: there,
   networkGateway: {destination: there/192.0.2.1, hboneMtlsPort: 15009}, services: {a/far: {80: 8080}}}
- {uid: far2, name: far2, namespace: a, serviceAccount: far2, workloadIps: [10.0.0.2], protocol: HBONE, network: there, capacity: 1,
   networkGateway: {destination: there/192.0.2.1, hboneMtlsPort: 15009}, services: {a/far: {80: 8080}}}
- {uid: gw, name: gw, namespace: ops, serviceAccount: gw, workloadIps: [192.0.2.1], network: there, services: {}}
- {uid: named, name: named, namespace: a, serviceAccount: named, workloadIps: [], hostname: db.example, protocol: HBONE, network: here, services: {a/named: {80: 5432}}}
- {uid: named-plain, name: named-plain, namespace: a, workloadIps: [], hostname: old.example, network: here, services: {a/named-plain: {80: 5432}}}
- {uid: sick, name: sick, namespace: a, serviceAccount: sick, workloadIps: [10.0.0.6], protocol: HBONE, status: Unhealthy, network: here, services: {a/sick: {80: 8080}, a/all: {80: 8080}}}
- {uid: tunnel, name: tunnel, namespace: a, serviceAccount: tunnel, workloadIps: [10.0.0.7], protocol: HBONE, network: here, applicationTunnel: {protocol: PROXY, port: 15088}, services: {a/tunnel: {}}}
- {uid: dual, name: dual, namespace: a, serviceAccount: dual, workloadIps: [10.0.0.8, 'fd00::8'], protocol: HBONE, network: here, services: {a/six: {80: 80}, a/either: {80: 80}}}
- {uid: far-wp, name: far-wp, namespace: a, serviceAccount: far-wp, workloadIps: [10.0.9.9], protocol: HBONE, network: there,
   networkGateway: {destination: there/192.0.2.1}, services: {a/far-wp: {}}}
services:
- {name: web, namespace: a, hostname: web, vips: [here/10.1.0.1], ports: {80: 8080}, subjectAltNames: ['spiffe://cluster.local/ns/a/sa/alias', not-an-identity]}
- {name: behind, namespace: a, hostname: behind, vips: [here/10.1.0.2], ports: {80: 8080}, waypoint: {destination: a/wp}}
- {name: wp, namespace: a, hostname: wp, vips: [], ports: {}, subjectAltNames: ['spiffe://cluster.local/ns/a/sa/wp-alias']}
- {name: plain, namespace: a, hostname: plain, vips: [here/10.1.0.3], ports: {80: 80}}
- {name: far, namespace: a, hostname: far.example, vips: [], ports: {80: 8080}}
- {name: far, namespace: a, hostname: far, vips: [here/10.1.0.4], ports: {80: 8080}}
- {name: named, namespace: a, hostname: named, vips: [here/10.1.0.5], ports: {80: 5432}}
- {name: named-plain, namespace: a, hostname: named-plain, vips: [here/10.1.0.6], ports: {80: 5432}}
- {name: sick, namespace: a, hostname: sick, vips: [here/10.1.0.7], ports: {80: 8080}}
- {name: all, namespace: a, hostname: all, vips: [here/10.1.0.8], ports: {80: 8080}, loadBalancer: {routingPreferences: [], mode: Standard, healthPolicy: AllowAll}}
- {name: tunnel, namespace: a, hostname: tunnel, vips: [here/10.1.0.9], ports: {}}
- {name: six, namespace: a, hostname: six, vips: [here/10.1.0.10], ports: {80: 80}, ipFamilies: IPv6}
- {name: either, namespace: a, hostname: either, vips: [here/10.1.0.11, 'here/fd01::11'], ports: {80: 80}}
- {name: thru, namespace: a, hostname: thru, vips: [here/10.0.0.3], ports: {80: 80}, loadBalancer: {routingPreferences: [], mode: Passthrough, healthPolicy: OnlyHealthy}}
- {name: range, namespace: a, hostname: range, vips: [], cidrVips: [here/10.0.0.0/8], ports: {80: 8080}}
- {name: guarded, namespace: a, hostname: guarded, vips: [], cidrVips: [here/10.4.0.0/16], ports: {}, waypoint: {destination: a/wp}}
- {name: outside, namespace: a, hostname: outside, vips: [], cidrVips: [here/203.0.113.0/24], ports: {443: 443}, loadBalancer: {routingPreferences: [], mode: Passthrough, healthPolicy: OnlyHealthy}}
- {name: gone, namespace: a, hostname: gone, vips: [here/10.1.0.12], ports: {80: 80}, waypoint: {destination: a/nobody}}
- {name: cross, namespace: a, hostname: cross, vips: [here/10.1.0.13], ports: {80: 80}, waypoint: {destination: a/far-wp}}
- {name: far-wp, namespace: a, hostname: far-wp, vips: [], ports: {}}
"#;

fn mesh() -> Snapshot {
    local_xds::parse(MESH).unwrap().in_network("here")
}

/// Captures nothing; hands over the pods that it is told to.
#[derive(Debug)]
struct Handing(ScopeId, Vec<IpAddr>);

impl Scope for Handing {
    fn id(&self) -> &ScopeId {
        &self.0
    }
    fn owner(&self, _: Role, client: ClientAddr, _: OrigDstAddr) -> Result<LocalWorkload, Refusal> {
        Err(Refusal::UnknownOwner(client.0.ip()))
    }
    fn listen(&self, _: Role) -> io::Result<Vec<Listener>> {
        Ok(Vec::new())
    }
    fn socket(&self, _: SocketAddr, _: OnBehalfOf) -> io::Result<TcpSocket> {
        TcpSocket::new_v4()
    }
    fn hand_over(&self, dst: IpAddr) -> Option<LocalWorkload> {
        self.1.contains(&dst).then(|| LocalWorkload {
            uid: "pod".into(),
            name: "pod".into(),
            namespace: "a".into(),
            service_account: "web".into(),
            addresses: [dst].into(),
        })
    }
}

fn scope(hands_over: &[&str]) -> Handing {
    let id = ScopeId {
        capture_mode: "test",
        instance: "".into(),
    };
    Handing(
        id,
        hands_over.iter().map(|ip| ip.parse().unwrap()).collect(),
    )
}

/// A decision in words: `WAY ENDPOINT asks AUTHORITY of WHO[, then WHO]`.
fn words(destination: &Destination) -> String {
    let names = |who: &[Identity]| {
        let names: Vec<_> = who
            .iter()
            .map(|id| id.service_account().to_string())
            .collect();
        names.join("+")
    };
    let Destination {
        endpoint,
        authority,
        ..
    } = destination;
    match &destination.way {
        Way::Plain => format!("plain {endpoint}"),
        Way::Tunnel { expected } => {
            format!("hbone {endpoint} asks {authority} of {}", names(expected))
        }
        Way::Nested { gateway, expected } => format!(
            "double hbone {endpoint} asks {authority} of {}, then {}",
            names(gateway),
            names(expected)
        ),
        Way::HandOver(_) => format!("hand-over {endpoint} asks {authority}"),
    }
}

fn decide_in(snapshot: &Snapshot, source: &str, dst: &str, scope: &Handing) -> String {
    let source = snapshot.workload_by_uid(source).unwrap();
    let mut rng = StdRng::seed_from_u64(7);
    let mut all = BTreeSet::new();
    for _ in 0..50 {
        let pick = match pick(snapshot, &source, dst.parse().unwrap(), &mut rng) {
            Ok(pick) => pick,
            Err(failure) => return failure.to_string(),
        };
        let lookup = pick.hostname().map(|name| format!("looks up {name}, "));
        let address = pick.address().unwrap_or("203.0.113.9".parse().unwrap());
        all.insert(lookup.unwrap_or_default() + &words(&pick.at(scope, address)));
    }
    all.into_iter().collect::<Vec<_>>().join(" | ")
}

fn decide(source: &str, dst: &str) -> String {
    decide_in(&mesh(), source, dst, &scope(&[]))
}

/// The rows of the table of outbound decisions, in their order.
#[rstest::rstest]
#[case::row_1_vip_of_a_service_that_has_a_waypoint(
    "client",
    "10.1.0.2:80",
    "hbone 10.0.0.4:15008 asks 10.1.0.2:80 of wp+wp-alias"
)]
#[case::row_1_whatever_the_port(
    "client",
    "10.1.0.2:9",
    "hbone 10.0.0.4:15008 asks 10.1.0.2:9 of wp+wp-alias"
)]
#[case::row_1_source_is_that_waypoint(
    "wp",
    "10.1.0.2:80",
    "hbone 10.0.0.2:15008 asks 10.0.0.2:8080 of web"
)]
#[case::row_1_the_waypoint_is_not_known(
    "client",
    "10.1.0.12:80",
    "waypoint a/nobody is not known, or none of its endpoints is healthy"
)]
#[case::row_1_the_waypoint_is_in_another_network(
    "client",
    "10.1.0.13:80",
    "double hbone 192.0.2.1:15008 asks cross:80 of gw, then far-wp"
)]
#[case::row_1_vip_in_a_range_of_a_service_that_has_a_waypoint(
    "client",
    "10.4.1.2:443",
    "hbone 10.0.0.4:15008 asks 10.4.1.2:443 of wp+wp-alias"
)]
#[case::row_2_vip_of_a_service_chosen_endpoint_in_another_network(
    "client",
    "10.1.0.4:80",
    "double hbone 192.0.2.1:15009 asks far:80 of gw, then far+far2"
)]
#[case::row_3_vip_of_a_service_endpoint_chosen_port_mapped_service_sans(
    "old",
    "10.1.0.1:80",
    "hbone 10.0.0.1:15008 asks 10.0.0.1:8080 of alias+client | hbone 10.0.0.2:15008 asks 10.0.0.2:8080 of alias+web"
)]
#[case::row_3_vip_in_a_range_endpoint_chosen_port_mapped(
    "client",
    "10.200.0.1:80",
    "hbone 10.0.0.2:15008 asks 10.0.0.2:8080 of web"
)]
#[case::row_3_vip_in_a_range_that_is_passed_through(
    "client",
    "203.0.113.5:443",
    "plain 203.0.113.5:443"
)]
#[case::row_3_the_source_may_be_chosen_itself(
    "client",
    "10.1.0.1:80",
    "hbone 10.0.0.1:15008 asks 10.0.0.1:8080 of alias+client | hbone 10.0.0.2:15008 asks 10.0.0.2:8080 of alias+web"
)]
#[case::row_3_address_family_of_the_service(
    "client",
    "10.1.0.10:80",
    "hbone [fd00::8]:15008 asks [fd00::8]:80 of dual"
)]
#[case::row_3_address_family_of_the_client_ipv4(
    "client",
    "10.1.0.11:80",
    "hbone 10.0.0.8:15008 asks 10.0.0.8:80 of dual"
)]
#[case::row_3_address_family_of_the_client_ipv6(
    "client",
    "[fd01::11]:80",
    "hbone [fd00::8]:15008 asks [fd00::8]:80 of dual"
)]
#[case::row_3_passthrough_goes_to_the_original_destination(
    "client",
    "10.0.0.3:80",
    "plain 10.0.0.3:80"
)]
#[case::row_4_vip_known_but_no_healthy_endpoint(
    "client",
    "10.1.0.7:80",
    "no healthy endpoint of sick for port 80"
)]
#[case::row_4_vip_in_a_range_whose_service_has_no_such_port(
    "client",
    "10.200.0.1:81",
    "no healthy endpoint of range for port 81"
)]
#[case::row_4_health_policy_allow_all(
    "client",
    "10.1.0.8:80",
    "hbone 10.0.0.6:15008 asks 10.0.0.6:8080 of sick"
)]
#[case::row_4_no_endpoint_serves_the_port(
    "client",
    "10.1.0.1:81",
    "no healthy endpoint of web for port 81"
)]
#[case::row_5_workload_ip_with_its_own_waypoint(
    "client",
    "10.0.0.5:80",
    "hbone 10.0.0.4:15018 asks 10.0.0.5:80 of wp"
)]
#[case::row_5_source_is_its_waypoint(
    "wp",
    "10.0.0.5:80",
    "hbone 10.0.0.5:15008 asks 10.0.0.5:80 of behind"
)]
#[case::row_6_workload_with_tunnel_protocol_hbone(
    "client",
    "10.0.0.2:9000",
    "hbone 10.0.0.2:15008 asks 10.0.0.2:9000 of web"
)]
#[case::row_6_hostname_workload(
    "client",
    "10.1.0.5:80",
    "looks up db.example, hbone 203.0.113.9:15008 asks db.example:5432 of named"
)]
#[case::row_6_workload_in_a_service_s_range(
    "client",
    "10.0.0.2:7",
    "hbone 10.0.0.2:15008 asks 10.0.0.2:7 of web"
)]
#[case::row_7_workload_with_tunnel_protocol_none("client", "10.0.0.3:9000", "plain 10.0.0.3:9000")]
#[case::row_7_by_its_service("client", "10.1.0.3:80", "plain 10.0.0.3:8081")]
#[case::row_7_hostname_workload(
    "client",
    "10.1.0.6:80",
    "looks up old.example, plain 203.0.113.9:5432"
)]
#[case::row_8_workload_with_application_tunnel_takes_any_port(
    "client",
    "10.1.0.9:443",
    "hbone 10.0.0.7:15008 asks 10.0.0.7:443 of tunnel"
)]
#[case::row_9_unknown("client", "198.51.100.1:443", "plain 198.51.100.1:443")]
#[case::row_9_address_of_another_network_is_unknown_here(
    "client",
    "192.0.2.1:443",
    "plain 192.0.2.1:443"
)]
fn outbound_decision(#[case] source: &str, #[case] dst: &str, #[case] expected: &str) {
    assert_eq!(decide(source, dst), expected);
}

#[rstest::rstest]
#[case::captured_here("10.1.0.3:80", "plain 10.0.0.3:8081")]
#[case::by_address("10.0.0.2:80", "hand-over 10.0.0.2:80 asks 10.0.0.2:80")]
#[case::waypoint_that_ends_tunnels_itself(
    "10.1.0.2:80",
    "hbone 10.0.0.4:15008 asks 10.1.0.2:80 of wp+wp-alias"
)]
#[case::behind_an_application_tunnel("10.1.0.9:443", "hand-over 10.0.0.7:443 asks 10.0.0.7:443")]
fn pods_of_this_process_are_handed_over(#[case] dst: &str, #[case] expected: &str) {
    let scope = scope(&["10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.7"]);
    assert_eq!(decide_in(&mesh(), "client", dst, &scope), expected);
}

/// Without a gateway an endpoint of another network is tried as it is: networks may be routed to each other.
#[test]
fn an_endpoint_of_another_network_without_a_gateway_is_dialled() {
    let text = MESH.replace(
        "networkGateway: {destination: there/192.0.2.1, hboneMtlsPort: 15009}, ",
        "",
    );
    let mesh = local_xds::parse(&text).unwrap().in_network("here");
    let decided = decide_in(&mesh, "client", "10.1.0.4:80", &scope(&[]));
    assert_eq!(decided, "hbone 10.0.0.2:15008 asks 10.0.0.2:8080 of far2");
}

#[test]
fn waypoints_share_connections_by_weight() {
    let weighted = "weightedWaypoints: [{destination: {destination: a/wp}, weight: 1}, {destination: {destination: here/10.0.0.2}, weight: 1}, {destination: {destination: a/nobody}, weight: 0}]";
    let text = MESH.replace("waypoint: {destination: a/wp}", weighted);
    let mesh = local_xds::parse(&text).unwrap().in_network("here");
    let decided = decide_in(&mesh, "client", "10.1.0.2:80", &scope(&[]));
    let both = "hbone 10.0.0.2:15008 asks 10.1.0.2:80 of web | hbone 10.0.0.4:15008 asks 10.1.0.2:80 of wp+wp-alias";
    assert_eq!(decided, both);
    // Each of them is one: it goes on to an endpoint.
    let onward = "hbone 10.0.0.2:15008 asks 10.0.0.2:8080 of web";
    for waypoint in ["wp", "web"] {
        assert_eq!(
            decide_in(&mesh, waypoint, "10.1.0.2:80", &scope(&[])),
            onward
        );
    }
}

/// The waypoint of a service that a workload serves is a waypoint of the workload too: it is not sent to another one.
#[test]
fn row_5_source_is_the_waypoint_of_its_service() {
    let text = MESH.replace(
        "waypoint: {destination: here/10.0.0.4, hboneMtlsPort: 15018}, services: {}",
        "waypoint: {destination: here/10.0.0.2}, services: {a/behind: {80: 80}}",
    );
    let mesh = local_xds::parse(&text).unwrap().in_network("here");
    let through = "hbone 10.0.0.2:15008 asks 10.0.0.5:80 of web";
    let direct = "hbone 10.0.0.5:15008 asks 10.0.0.5:80 of behind";
    assert_eq!(
        decide_in(&mesh, "client", "10.0.0.5:80", &scope(&[])),
        through
    );
    assert_eq!(decide_in(&mesh, "wp", "10.0.0.5:80", &scope(&[])), direct);
}
