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
- {name: web, namespace: a, hostname: web, vips: [/10.1.0.1, 'east/fd00::2'], cidrVips: [/10.2.0.0/16, 'east/fd00::/8', /0.0.0.0/0], ports: {80: 8080, 81: 0}, subjectAltNames: ['spiffe://td/ns/a/sa/b'], waypoint: {destination: a/w}, loadBalancer: {routingPreferences: [Network, Region, Zone, Subzone, Node, Cluster], mode: Failover, healthPolicy: AllowAll}, ipFamilies: Dual, canonical: true}
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

/// Rules of one match with an extension, alone and beside a port.
#[rstest::rstest]
#[case::allow_alone("0a 01 70 2a 09 0a 07 12 05 6a 03 0a 01 78", "[[[{}]]]")]
#[case::allow_beside_a_port("0a 01 70 2a 0c 0a 0a 12 08 4a 01 50 6a 03 0a 01 78", "[[[{}]]]")]
#[case::deny_alone(
    "0a 01 70 20 01 2a 09 0a 07 12 05 6a 03 0a 01 78",
    "[[[{sourceIps: [0.0.0.0/0, '::/0']}]]]"
)]
#[case::deny_beside_a_port(
    "0a 01 70 20 01 2a 0c 0a 0a 12 08 4a 01 50 6a 03 0a 01 78",
    "[[[{destinationPorts: [80]}]]]"
)]
fn a_condition_that_is_not_known_lets_nobody_pass(#[case] bytes: &str, #[case] rules: &str) {
    let bytes = crate::messages::tests::hex(bytes);
    let Object::Policy(read) = policy(bytes.into(), &mut Texts::default()).unwrap() else {
        panic!("not a policy");
    };
    let yaml = format!(
        "policies: [{{name: p, namespace: '', scope: Global, action: Deny, dryRun: false, rules: {rules}}}]"
    );
    let wanted = local_xds::parse(&yaml).unwrap();
    assert_eq!(read.rules, wanted.policies().next().unwrap().rules);
}

/// Number 26 of a workload, 10 of a service, 7 of a policy: what somebody added to the whole object is not read.
#[test]
fn extensions_of_objects_are_accepted() {
    let mut fields = WORKLOAD.to_vec();
    fields.push("d2 01 05 0a 01 78 12 00");
    assert_eq!(read(&fields).unwrap(), read(&WORKLOAD).unwrap());
    let service = "12 0f 12 01 61 1a 03 776562 52 05 0a 01 78 12 00";
    let service = crate::messages::tests::hex(service);
    let Object::Service(service) = address(service.into(), &mut Texts::default()).unwrap() else {
        panic!("not a service");
    };
    assert_eq!(service.key().to_string(), "a/web");
    let bytes = crate::messages::tests::hex("0a 01 70 3a 05 0a 01 78 12 00");
    assert!(policy(bytes.into(), &mut Texts::default()).is_ok());
}

/// Addresses of a service: 10.0.0.1, 10.0.0.1/32, 10.0.0.0/8, the same as an IPv4-mapped one, fd00::/8 in network `e`.
#[test]
fn an_address_of_a_service_may_be_a_range() {
    let addresses = [
        "22 06 12 04 0a000001",
        "22 08 12 04 0a000002 18 20",
        "22 08 12 04 0a010203 18 08",
        "22 14 12 10 00000000000000000000ffff0b000000 18 68",
        "22 17 0a 01 65 12 10 fd000000000000000000000000000000 18 08",
    ];
    let mut inner =
        crate::messages::tests::hex(&("12 01 61 1a 03 776562".to_owned() + &addresses.concat()));
    let mut bytes = vec![0x12, u8::try_from(inner.len()).unwrap()];
    bytes.append(&mut inner);
    let Object::Service(service) = address(bytes.into(), &mut Texts::default()).unwrap() else {
        panic!("not a service");
    };
    let texts = |list: Vec<String>| list.join(" ");
    let vips = texts(service.vips.iter().map(ToString::to_string).collect());
    assert_eq!(vips, "/10.0.0.1 /10.0.0.2");
    let ranges = texts(service.cidr_vips.iter().map(ToString::to_string).collect());
    assert_eq!(ranges, "/10.0.0.0/8 /11.0.0.0/8 e/fd00::/8");
    let long = crate::messages::tests::hex("12 10 12 01 61 1a 01 62 22 08 12 04 0a000000 18 21");
    let error = address(long.into(), &mut Texts::default()).unwrap_err();
    assert_eq!(error.to_string(), "addresses is 10.0.0.0/33, too long");
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
