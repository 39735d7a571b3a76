#![allow(clippy::unwrap_used, clippy::expect_used)]

use shared_proxy::state::local_xds;

use super::*;
use crate::messages::tests::{WORKLOAD, address_of_workload};

fn read(fields: &[&str]) -> Result<Object, Unusable> {
    address(address_of_workload(fields).into(), &mut Texts::default())
}

#[test]
fn every_field_of_a_workload_arrives() {
    let Object::Workload(workload) = read(&WORKLOAD).unwrap() else {
        panic!("not a workload");
    };
    let yaml = "
workloads:
- uid: uid-1
  name: web
  namespace: default
  serviceAccount: sa
  trustDomain: td
  workloadIps: [10.0.0.1]
  network: n1
  protocol: HBONE
  networkMode: HostNetwork
  node: node-1
  clusterId: c1
  hostname: h
  canonicalName: cn
  canonicalRevision: v1
  workloadName: wn
  workloadType: pod
  nativeTunnel: true
  waypoint: {destination: /10.0.0.9, hboneMtlsPort: 15000}
  networkGateway: {destination: a/b}
  applicationTunnel: {protocol: PROXY, port: 10000}
  services: {default/web: {80: 8080}}
  authorizationPolicies: [default/p]
  status: Unhealthy
  capacity: 5
  locality: {region: r, zone: z, subzone: s}
";
    let wanted = local_xds::parse(yaml).unwrap();
    assert_eq!(*workload, **wanted.workloads().next().unwrap());
}

#[test]
fn what_is_left_out_is_the_default() {
    let Object::Workload(workload) = read(&["12 01 6e", "a2 01 01 75"]).unwrap() else {
        panic!("not a workload");
    };
    let wanted = Workload {
        uid: "u".into(),
        namespace: "n".into(),
        // Number 0 on the wire.
        workload_type: "deployment".into(),
        ..Workload::default()
    };
    assert_eq!(*workload, wanted);
}

#[rstest::rstest]
#[case::no_uid(&["12 01 6e"], "uid is missing")]
#[case::address_of_five_bytes(&["12 01 6e", "a2 01 01 75", "1a 05 0102030405"], "addresses is 5 bytes long, not 4 or 16")]
#[case::legacy_tunnel(&["12 01 6e", "a2 01 01 75", "28 02"], "tunnel_protocol is 2, neither NONE nor HBONE")]
#[case::unknown_tunnel(&["12 01 6e", "a2 01 01 75", "28 63"], "tunnel_protocol is 99, neither NONE nor HBONE")]
#[case::no_namespace(&["a2 01 01 75"], "namespace")]
#[case::identity_with_a_slash(&["12 01 6e", "a2 01 01 75", "3a 03 612f62"], "service account")]
#[case::port(&["12 01 6e", "a2 01 01 75", "b2 01 0f 0a 03 612f62 12 08 0a 06 08 80 80 08 10 01"], "service_port is 131072, not a port")]
#[case::service_name(&["12 01 6e", "a2 01 01 75", "b2 01 03 0a 01 61"], "services is `a` is not of the form namespace/hostname")]
#[case::gateway_without_destination(&["12 01 6e", "a2 01 01 75", "42 00"], "waypoint is missing")]
#[case::text_that_is_not_utf8(&["12 01 ff"], "cannot be decoded")]
fn a_workload_that_means_nothing_is_refused_by_name(#[case] fields: &[&str], #[case] why: &str) {
    let error = read(fields).unwrap_err().to_string();
    assert!(error.contains(why), "{error}");
}

const MESH: &str = "
workloads:
- {uid: one, name: one, workloadType: deployment, namespace: a, workloadIps: [10.0.0.1, 'fd00::1'], services: {a/web: {80: 8080, 81: 0}}, protocol: HBONE}
- {uid: two, workloadType: job, namespace: b, workloadIps: [], services: {}, hostname: example.org, capacity: 0}
services:
- {name: web, namespace: a, hostname: web, vips: [/10.1.0.1, 'east/fd00::2'], ports: {80: 8080, 81: 0}, subjectAltNames: ['spiffe://td/ns/a/sa/b'], waypoint: {destination: a/w}, loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, healthPolicy: AllowAll}, ipFamilies: Dual, canonical: true}
- {name: db, namespace: a, hostname: db, vips: [], ports: {}, loadBalancer: {routingPreferences: [], mode: Passthrough, healthPolicy: OnlyHealthy}}
policies:
- name: p
  namespace: a
  scope: WorkloadSelector
  action: Deny
  dryRun: true
  rules:
  - - - {namespaces: [{Exact: x}], notNamespaces: [{Prefix: y}], principals: [{Suffix: z}], notPrincipals: [{Presence: []}]}
      - {sourceIps: [10.0.0.0/8], notSourceIps: ['fd00::/8'], destinationIps: [10.0.0.1], notDestinationIps: [10.0.0.2]}
    - []
  - - - {destinationPorts: [1, 65535], notDestinationPorts: [2]}
      - {serviceAccounts: [{namespace: a, serviceAccount: b}], notServiceAccounts: [{namespace: c, serviceAccount: d}]}
- {name: q, namespace: '', scope: Global, action: Allow, dryRun: false, rules: []}
";

#[test]
fn every_object_survives_the_wire() {
    let mesh = local_xds::parse(MESH).unwrap();
    let mut objects: Vec<Object> = Vec::new();
    objects.extend(mesh.workloads().cloned().map(Object::Workload));
    objects.extend(mesh.services().cloned().map(Object::Service));
    let mut texts = Texts::default();
    for object in objects {
        assert_eq!(address(object.encode().into(), &mut texts).unwrap(), object);
    }
    for object in mesh.policies().cloned().map(Object::Policy) {
        assert_eq!(policy(object.encode().into(), &mut texts).unwrap(), object);
    }
}

#[rstest::rstest]
#[case::scope("0a 01 70 18 07", "scope is 7, unknown")]
#[case::action("0a 01 70 20 07", "action is 7, unknown")]
#[case::kind_of_match(
    "0a 01 70 2a 08 0a 06 12 04 0a 02 2a 00",
    "match_type (or it is of an unknown kind) is missing"
)]
#[case::prefix(
    "0a 01 70 2a 0e 0a 0c 12 0a 2a 08 0a 04 0a000000 10 21",
    "source_ips is 10.0.0.0/33, too long"
)]
#[case::port(
    "0a 01 70 2a 0a 0a 08 12 06 4a 04 80 80 80 01",
    "destination_ports is 2097152, not a port"
)]
fn a_policy_that_is_not_wholly_understood_is_refused(#[case] bytes: &str, #[case] why: &str) {
    let bytes = crate::messages::tests::hex(bytes);
    let error = policy(bytes.into(), &mut Texts::default()).unwrap_err();
    assert_eq!(error.to_string(), why);
}

#[test]
fn texts_that_nobody_uses_are_thrown_away() {
    let mut texts = Texts::default();
    let kept = texts.get("kept");
    for number in 0..3 * Texts::FIRST_SWEEP {
        texts.get(&number.to_string());
    }
    assert!(texts.known.len() <= Texts::FIRST_SWEEP);
    assert!(Arc::ptr_eq(&texts.get("kept"), &kept));
}

proptest::proptest! {
    #[test]
    fn any_bytes_are_an_object_or_an_error(bytes: Vec<u8>) {
        let mut texts = Texts::default();
        let _ = address(bytes.clone().into(), &mut texts);
        let _ = policy(bytes.into(), &mut texts);
    }

    #[test]
    fn any_change_of_a_good_message_is_an_object_or_an_error(at in 0usize..200, byte: u8) {
        let mut bytes = address_of_workload(&WORKLOAD);
        let at = at % bytes.len();
        bytes[at] = byte;
        if let Ok(object) = address(bytes.into(), &mut Texts::default()) {
            // What is accepted can be passed on.
            let again = address(object.encode().into(), &mut Texts::default()).unwrap();
            proptest::prop_assert_eq!(again, object);
        }
    }
}
