#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::state::service::{
    HealthPolicy, IpFamilies, LoadBalancer, LoadBalancerMode, Scope, Visibility, WeightedWaypoint,
};
use crate::state::workload::{
    ApplicationProtocol, ApplicationTunnel, GatewayAddress, GatewayDestination, Health, Locality,
    NetworkMode, PortMap, Protocol,
};

const EVERY_KEY: &str = r#"
workloads:
- uid: cluster1//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: web
  trustDomain: td.example
  workloadIps: ["127.0.0.1", "::ffff:127.0.0.3", "fd00::1"]
  protocol: HBONE
  networkMode: Standard
  node: node1
  network: east
  clusterId: cluster1
  hostname: local.example
  canonicalName: local-app
  canonicalRevision: v1
  workloadName: local-deployment
  workloadType: deployment
  nativeTunnel: true
  waypoint: {destination: east/10.0.0.9, hboneMtlsPort: 15018}
  networkGateway: {destination: default/gateway.example}
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [default/deny-9999]
  services:
    default/local.example: {80: 8080, 443: 8443}
  status: Unhealthy
  capacity: 7
  locality: {region: r, zone: z, subzone: s}
- {workloadIps: [], namespace: default, services: {}}
services:
- name: local
  namespace: default
  hostname: local.example
  vips: [/127.10.0.1, east/127.10.0.2]
  ports: {80: 8080, 443: 0}
  subjectAltNames: ["spiffe://td.example/ns/default/sa/other"]
  waypoint: {destination: default/waypoint.example, hboneMtlsPort: 15008}
  loadBalancer:
    routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster]
    mode: Failover
    healthPolicy: AllowAll
  ipFamilies: Dual
  canonical: true
policies:
- action: Deny
  name: deny-9999
  namespace: default
  dryRun: false
  scope: WorkloadSelector
  rules:
  - - - notDestinationPorts: [9999]
    - - principals: [{Exact: td.example/ns/default/sa/web}, {Presence: []}]
        sourceIps: [127.0.0.0/8, "::1"]
"#;

#[test]
fn reads_every_key() {
    let snapshot = parse(EVERY_KEY).unwrap().in_network("east");
    let workload = snapshot
        .workload_by_ip("127.0.0.3".parse().unwrap())
        .expect("an IPv4-mapped address is found as IPv4");
    let expected = Workload {
        uid: "cluster1//v1/Pod/default/local".into(),
        name: "local".into(),
        namespace: "default".into(),
        service_account: "web".into(),
        trust_domain: "td.example".into(),
        addresses: ["127.0.0.1", "127.0.0.3", "fd00::1"]
            .map(|ip| ip.parse().unwrap())
            .to_vec(),
        network: "east".into(),
        protocol: Protocol::Hbone,
        network_mode: NetworkMode::Standard,
        node: "node1".into(),
        cluster_id: "cluster1".into(),
        hostname: "local.example".into(),
        canonical_name: "local-app".into(),
        canonical_revision: "v1".into(),
        workload_name: "local-deployment".into(),
        workload_type: "deployment".into(),
        native_tunnel: true,
        waypoint: Some(GatewayAddress {
            destination: GatewayDestination::Address("east/10.0.0.9".parse().unwrap()),
            hbone_mtls_port: 15018,
        }),
        network_gateway: Some(GatewayAddress {
            destination: GatewayDestination::Hostname("default/gateway.example".parse().unwrap()),
            hbone_mtls_port: 15008,
        }),
        application_tunnel: Some(ApplicationTunnel {
            protocol: ApplicationProtocol::Proxy,
            port: Some(15088),
        }),
        services: [(
            "default/local.example".parse().unwrap(),
            PortMap::from([(80, 8080), (443, 8443)]),
        )]
        .into(),
        authorization_policies: vec!["default/deny-9999".into()],
        status: Health::Unhealthy,
        capacity: 7,
        locality: Locality {
            region: "r".into(),
            zone: "z".into(),
            subzone: "s".into(),
        },
    };
    assert_eq!(*workload, expected);

    let service = snapshot
        .service_by_vip("127.10.0.2".parse().unwrap())
        .unwrap();
    assert_eq!(
        service.load_balancer,
        Some(LoadBalancer {
            routing_preferences: vec![
                Scope::Network,
                Scope::Region,
                Scope::Zone,
                Scope::Subzone,
                Scope::Node,
                Scope::Cluster
            ],
            mode: LoadBalancerMode::Failover,
            health_policy: HealthPolicy::AllowAll,
        })
    );
    assert_eq!(service.ports, PortMap::from([(80, 8080), (443, 0)]));
    assert_eq!(service.ip_families, Some(IpFamilies::Dual));
    assert!(service.canonical);
    assert!(
        snapshot
            .service_by_vip("127.10.0.1".parse().unwrap())
            .is_none(),
        "that address belongs to another network"
    );
    assert_eq!(snapshot.endpoints(&service), [workload]);
    assert_eq!(snapshot.policies().len(), 1);
}

#[test]
fn what_is_left_out_has_the_fields_defaults() {
    let snapshot =
        parse("workloads: [{workloadIps: [10.0.0.1], namespace: ns, name: web, services: {}}]")
            .unwrap();
    let workload = snapshot
        .workload_by_ip("10.0.0.1".parse().unwrap())
        .unwrap();
    assert_eq!(workload.protocol, Protocol::Tcp);
    assert_eq!(workload.capacity, 1);
    assert_eq!(workload.status, Health::Healthy);
    assert_eq!(&*workload.uid, "Kubernetes//Pod/ns/web");
    assert_eq!(
        workload.identity().unwrap().to_string(),
        "spiffe://cluster.local/ns/ns/sa/default"
    );
}

#[test]
fn empty_service_account_and_trust_domain_mean_the_defaults() {
    let text = "workloads: [{workloadIps: [10.0.0.1], namespace: ns, services: {}, serviceAccount: '', trustDomain: ''}]";
    let snapshot = parse(text).unwrap();
    let identity = snapshot.workloads().next().unwrap().identity().unwrap();
    assert_eq!(
        identity.to_string(),
        "spiffe://cluster.local/ns/ns/sa/default"
    );
}

#[rstest::rstest]
#[case::nothing("")]
#[case::comment("# nothing yet\n")]
#[case::empty_map("{}")]
#[case::keys_only("workloads:\nservices:\npolicies:\n")]
#[case::empty_lists("workloads: []\nservices: []\npolicies: []\n")]
fn an_empty_mesh(#[case] text: &str) {
    assert_eq!(parse(text).unwrap().workloads().len(), 0);
}

/// The line (or its part) that has to go, and a word of the error.
#[rstest::rstest]
#[case::workload_ips(
    "  workloadIps: [\"127.0.0.1\", \"::ffff:127.0.0.3\", \"fd00::1\"]\n",
    "workloadIps"
)]
#[case::workload_namespace("  namespace: default\n  serviceAccount: web\n", "namespace")]
#[case::workload_services(
    "  services:\n    default/local.example: {80: 8080, 443: 8443}\n",
    "services"
)]
#[case::service_name("- name: local\n  namespace: default\n  hostname", "namespace")]
#[case::service_vips("  vips: [/127.10.0.1, east/127.10.0.2]\n", "vips")]
#[case::service_ports("  ports: {80: 8080, 443: 0}\n", "ports")]
#[case::balancer_preferences(
    "    routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster]\n",
    "routingPreferences"
)]
#[case::balancer_mode("    mode: Failover\n", "mode")]
#[case::balancer_health("    healthPolicy: AllowAll\n", "healthPolicy")]
#[case::policy_dry_run("  dryRun: false\n", "dryRun")]
#[case::policy_scope("  scope: WorkloadSelector\n", "scope")]
fn required_keys(#[case] part: &str, #[case] word: &str) {
    assert_eq!(EVERY_KEY.matches(part).count(), 1, "{part}");
    let replacement = match part.find("hostname") {
        Some(_) => "- name: local\n  hostname",
        None => "",
    };
    let error = parse(&EVERY_KEY.replace(part, replacement))
        .unwrap_err()
        .to_string();
    assert!(error.contains(word), "{error}");
}

#[rstest::rstest]
#[case::top_level("workload: []", "workload")]
#[case::workload(
    "workloads: [{workloadIps: [], namespace: a, services: {}, ip: x}]",
    "ip"
)]
#[case::snake_case(
    "workloads: [{workload_ips: [], namespace: a, services: {}}]",
    "workload_ips"
)]
#[case::match_key(
    "policies: [{name: a, namespace: b, scope: Global, action: Deny, dryRun: false, rules: [[[{ports: [1]}]]]}]",
    "ports"
)]
#[case::not_an_address(
    "workloads: [{workloadIps: [10.0.0.300], namespace: a, services: {}}]",
    ""
)]
#[case::not_a_vip(
    "services: [{name: a, namespace: b, hostname: c, vips: [10.0.0.1], ports: {}}]",
    "network/ip"
)]
#[case::not_a_service(
    "workloads: [{workloadIps: [], namespace: a, services: {web: {}}}]",
    "namespace/hostname"
)]
#[case::port_out_of_range(
    "services: [{name: a, namespace: b, hostname: c, vips: [], ports: {80: 70000}}]",
    ""
)]
#[case::protocol(
    "workloads: [{workloadIps: [], namespace: a, services: {}, protocol: QUIC}]",
    "QUIC"
)]
#[case::repeated_key("workloads: []\nworkloads: []", "workloads")]
#[case::scalar("42", "")]
#[case::unbalanced("workloads: [", "")]
#[case::identity(
    "workloads: [{workloadIps: [], namespace: a/sa/b, services: {}}]",
    "namespace `a/sa/b`"
)]
#[case::two_with_one_address(
    "workloads: [{workloadIps: [10.0.0.1], namespace: a, services: {}, name: x}, {workloadIps: [10.0.0.1], namespace: a, services: {}, name: y}]",
    "both have address /10.0.0.1"
)]
#[case::two_with_one_uid(
    "workloads: [{workloadIps: [], namespace: a, services: {}, uid: x}, {workloadIps: [], namespace: a, services: {}, uid: x}]",
    "workload x is there twice"
)]
fn refuses(#[case] text: &str, #[case] word: &str) {
    let error = parse(text).unwrap_err().to_string();
    assert!(error.contains(word), "{error}");
}

#[test]
fn an_error_names_file_line_and_column() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mesh.yaml");
    std::fs::write(&path, EVERY_KEY.replace("capacity: 7", "capacity: seven")).unwrap();
    let line = 1 + EVERY_KEY
        .lines()
        .position(|l| l.contains("capacity"))
        .unwrap();
    assert_eq!(
        load(&path).unwrap_err().to_string(),
        format!(
            "{}: invalid u32 at line {line}, column 13: `capacity: seven`",
            path.display()
        )
    );
}

#[test]
fn ten_thousand_workloads_load_fast() {
    use std::fmt::Write;
    let mut text = String::from("workloads:\n");
    for n in 0..10_000_u32 {
        let ip = std::net::Ipv4Addr::from(0x0a00_0000 + n);
        writeln!(
            text,
            "- {{uid: u{n}, name: w{n}, namespace: ns{}, serviceAccount: sa, workloadIps: [{ip}], protocol: HBONE, node: node{}, services: {{default/s{}: {{80: 8080}}}}}}",
            n % 50,
            n % 100,
            n % 500
        )
        .unwrap();
    }
    let begin = Instant::now();
    let snapshot = parse(&text).unwrap();
    let took = begin.elapsed();
    assert_eq!(snapshot.workloads().len(), 10_000);
    assert_eq!(
        snapshot
            .workload_by_ip("10.0.39.15".parse().unwrap())
            .unwrap()
            .uid,
        "u9999".into()
    );
    // An unoptimized build on a busy machine; anything quadratic takes minutes.
    assert!(took < Duration::from_secs(10), "{took:?}");
    eprintln!("10,000 workloads, {} KiB: {took:?}", text.len() / 1024);
}

proptest! {
    #[test]
    fn arbitrary_text_never_panics(text in any::<String>()) {
        let _ = parse(&text);
    }

    #[test]
    fn almost_valid_text_never_panics(at in 0..EVERY_KEY.len(), cut in 0_usize..40, put in "[ -~\n]{0,12}") {
        let end = (at + cut).min(EVERY_KEY.len());
        let _ = parse(&format!("{}{put}{}", &EVERY_KEY[..at], &EVERY_KEY[end..]));
    }

    #[test]
    fn yaml_shaped_text_never_panics(text in "(workloads|services|policies)?(: |\n|- |[\\[\\]{}&*!|>%@'\"]|[a-z0-9/.]{1,4}|  ){0,40}") {
        let _ = parse(&text);
    }
}

#[test]
fn reads_what_only_recent_control_planes_say_of_a_service() {
    let text = r#"
services:
- name: web
  namespace: default
  hostname: web.example
  vips: []
  ports: {}
  ingressUseWaypoint: true
  weightedWaypoints:
  - {destination: {destination: default/canary.example}, weight: 10}
  - {destination: {destination: east/10.0.0.9, hboneMtlsPort: 15018}, weight: 90}
  visibility: Namespace
"#;
    let service = parse(text).unwrap();
    let service = service.service(&"default/web.example".parse().unwrap());
    let service = service.unwrap();
    let waypoint = |destination, port, weight| WeightedWaypoint {
        destination: GatewayAddress {
            destination,
            hbone_mtls_port: port,
        },
        weight,
    };
    let expected = Service {
        name: "web".into(),
        namespace: "default".into(),
        hostname: "web.example".into(),
        ingress_use_waypoint: true,
        weighted_waypoints: vec![
            waypoint(
                GatewayDestination::Hostname("default/canary.example".parse().unwrap()),
                15008,
                10,
            ),
            waypoint(
                GatewayDestination::Address("east/10.0.0.9".parse().unwrap()),
                15018,
                90,
            ),
        ],
        visibility: Visibility::Namespace,
        ..Service::default()
    };
    assert_eq!(*service, expected);
    let written = serde_json::to_string(&[&*service]).unwrap();
    let again = parse(&format!("services: {written}")).unwrap();
    assert_eq!(again.service(&expected.key()).as_deref(), Some(&expected));
}
