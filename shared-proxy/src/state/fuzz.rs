//! A mesh in YAML that anybody may have written.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use fuzz_driver::{Target, Verdict};
use serde_json::{Value, json};

use super::{Snapshot, local_xds};

const WORKLOAD: &str = r#"workloads:
- uid: c//v1/Pod/default/local
  name: local
  namespace: default
  serviceAccount: web
  trustDomain: td.example
  workloadIps: ["127.0.0.1", "::ffff:127.0.0.3", "fd00::1"]
  protocol: HBONE
  network: east
  waypoint: {destination: east/10.0.0.9, hboneMtlsPort: 15018}
  networkGateway: {destination: default/gateway.example}
  applicationTunnel: {protocol: PROXY, port: 15088}
  authorizationPolicies: [default/deny-9999]
  services: {default/local.example: {80: 8080, 443: 8443}}
  status: Unhealthy
  capacity: 7
  locality: {region: r, zone: z, subzone: s}
- {workloadIps: [], namespace: default, services: {}}
"#;
const SERVICE: &str = r#"services:
- name: local
  namespace: default
  hostname: local.example
  vips: [/127.10.0.1, east/127.10.0.2]
  ports: {80: 8080, 443: 0}
  subjectAltNames: ["spiffe://td.example/ns/default/sa/other"]
  waypoint: {destination: default/waypoint.example, hboneMtlsPort: 15008}
  loadBalancer: {routingPreferences: [Network, Zone], mode: Failover, healthPolicy: AllowAll}
  ipFamilies: Dual
  canonical: true
"#;
const POLICY: &str = r#"policies:
- action: Deny
  name: deny-9999
  namespace: default
  dryRun: false
  scope: WorkloadSelector
  rules:
  - - - notDestinationPorts: [9999]
    - - principals: [{Exact: td/ns/default/sa/web}, {Presence: []}]
        sourceIps: [127.0.0.0/8, "::1"]
"#;

fn document(snapshot: &Snapshot) -> Value {
    json!({
        "workloads": snapshot.workloads().collect::<Vec<_>>(),
        "services": snapshot.services().collect::<Vec<_>>(),
        "policies": snapshot.policies().collect::<Vec<_>>(),
    })
}

#[test]
fn local_xds_yaml() {
    let small = "workloads: [{workloadIps: [10.0.0.1], namespace: a, services: {}}]\nservices:\n";
    let aliases = "services: &a []\nworkloads: *a\npolicies: *a\n";
    let seeds = [WORKLOAD, SERVICE, POLICY, small, aliases];
    let words: &[&[u8]] = &[
        b"\n- ",
        b"\n  ",
        b": ",
        b"{",
        b"}",
        b"[",
        b"]",
        b", ",
        b"&a ",
        b"*a",
        b"!!str ",
        b"|\n",
        b"'",
        b"\"",
        b"#",
        b"---\n",
        b"<<: ",
        b"~",
        b"0x1f",
        b"workloads:",
        b"Suffix",
        b"notPrincipals: ",
    ];
    Target::new("local-xds", seeds).words(words).run(|input| {
        let Ok(text) = std::str::from_utf8(input) else {
            return Verdict::refused("not UTF-8");
        };
        let snapshot = match local_xds::parse(text) {
            Ok(snapshot) => snapshot,
            Err(error) => {
                let reason = error.to_string();
                assert!(!reason.contains('\n'), "a log has room for one line");
                return Verdict::Refused(reason);
            }
        };
        let written = document(&snapshot);
        let again = local_xds::parse(&written.to_string()).unwrap();
        assert_eq!(document(&again), written);
        Verdict::Taken(match (snapshot.workload_count(), snapshot.policy_count()) {
            (0, 0) => "neither workloads nor policies",
            (_, 0) => "workloads",
            _ => "policies",
        })
    });
}
