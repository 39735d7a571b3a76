//! Bytes typed by hand from the field numbers: what both ends must read and write.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use prost::Message;

use super::authorization::{Action, Authorization, MatchType, Scope};
use super::certificate::{CreateCertificateRequest, CreateCertificateResponse};
use super::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Kind};
use super::workload::{Address, AddressType, Destination, Service, Workload};
use super::*;

mod order;

/// Hexadecimal text with blanks and line breaks.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: String = text.chars().filter(|c| !c.is_whitespace()).collect();
    (0..digits.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

/// A workload with every field, one per line, in ascending order of their numbers.
pub(crate) const WORKLOAD: [&str; 25] = [
    "0a 03 776562",                                                     // 1 name "web"
    "12 07 64656661756c74",                                             // 2 namespace "default"
    "1a 04 0a000001",                                                   // 3 addresses 10.0.0.1
    "22 02 6e31",                                                       // 4 network "n1"
    "28 01",                                                            // 5 tunnel_protocol HBONE
    "32 02 7464",                                                       // 6 trust_domain "td"
    "3a 02 7361",                                                       // 7 service_account "sa"
    "42 0b 12 06 12 04 0a000009 18 98 75", // 8 waypoint: address 10.0.0.9, port 15000
    "4a 06 6e6f64652d31",                  // 9 node "node-1"
    "52 02 636e",                          // 10 canonical_name "cn"
    "5a 02 7631",                          // 11 canonical_revision "v1"
    "60 02",                               // 12 workload_type POD
    "6a 02 776e",                          // 13 workload_name "wn"
    "70 01",                               // 14 native_tunnel
    "82 01 09 64656661756c742f70",         // 16 authorization_policies "default/p"
    "88 01 01",                            // 17 status UNHEALTHY
    "92 01 02 6331",                       // 18 cluster_id "c1"
    "9a 01 08 0a 06 0a 01 61 12 01 62",    // 19 network_gateway: hostname a/b
    "a2 01 05 7569642d31",                 // 20 uid "uid-1"
    "aa 01 01 68",                         // 21 hostname "h"
    "b2 01 16 0a 0b 64656661756c742f776562 12 07 0a 05 08 50 10 90 3f", // 22 services "default/web": 80 -> 8080
    "ba 01 05 08 01 10 90 4e", // 23 application_tunnel PROXY, 10000
    "c2 01 09 0a 01 72 12 01 7a 1a 01 73", // 24 locality r, z, s
    "c8 01 01",                // 25 network_mode HOST_NETWORK
    "da 01 02 08 05",          // 27 capacity 5
];

/// The value of an `Address` resource that holds these fields of a workload.
pub(crate) fn address_of_workload(fields: &[&str]) -> Vec<u8> {
    let mut inner = hex(&fields.concat());
    let mut bytes = vec![0x0a];
    prost::encoding::encode_varint(inner.len() as u64, &mut bytes);
    bytes.append(&mut inner);
    bytes
}

fn workload(bytes: &[u8]) -> Workload {
    match Address::decode(bytes).unwrap().kind {
        Some(AddressType::Workload(workload)) => *workload,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_workload_is_read_in_any_order_and_with_unknown_fields_between() {
    let bytes = address_of_workload(&WORKLOAD);
    let read = workload(&bytes);
    assert_eq!(read.name, "web");
    assert_eq!(read.addresses, [&[10, 0, 0, 1][..]]);
    assert_eq!(read.tunnel_protocol, 1);
    assert_eq!(read.authorization_policies, ["default/p"]);
    assert_eq!(read.services["default/web"].ports[0].target_port, 8080);
    assert_eq!(read.capacity, Some(5));
    let waypoint = read.waypoint.clone().unwrap();
    assert_eq!(waypoint.hbone_mtls_port, 15000);
    assert!(
        matches!(waypoint.destination, Some(Destination::Address(a)) if a.address[..] == [10, 0, 0, 9])
    );

    let mut reordered = WORKLOAD.to_vec();
    reordered.reverse();
    // Number 15 (a text), 26 (a message) and 2000 (a number) mean nothing here.
    for (at, unknown) in [(3, "7a 02 7878"), (9, "d2 01 02 08 01"), (17, "80 7d 05")] {
        reordered.insert(at, unknown);
    }
    assert_eq!(workload(&address_of_workload(&reordered)), read);
}

#[test]
fn a_workload_is_written_byte_for_byte() {
    let bytes = address_of_workload(&WORKLOAD);
    let wanted = hex(&WORKLOAD.concat());
    let written = workload(&bytes).encode_to_vec();
    assert_eq!(written, wanted);
}

#[test]
fn a_service_is_read_and_written() {
    let service = hex("0a 01 73  12 01 6e  1a 03 732e6e
         22 0a 0a 02 6e31 12 04 0a010001
         2a 05 08 50 10 90 3f
         32 03 732f31
         3a 06 0a 04 0a 00 12 00
         42 08 0a 02 06 01 10 02 18 01
         48 03
         58 01 60 01
         6a 06 0a 02 18 01 10 07
         70 01");
    let read = Service::decode(&service[..]).unwrap();
    assert_eq!(
        (&*read.name, &*read.namespace, &*read.hostname),
        ("s", "n", "s.n")
    );
    assert_eq!(read.addresses[0].network, "n1");
    let balancing = read.load_balancing.clone().unwrap();
    assert_eq!(balancing.routing_preference, [6, 1]);
    assert_eq!((balancing.mode, balancing.health_policy), (2, 1));
    assert_eq!((read.ip_families, read.visibility), (3, 1));
    assert!(read.canonical && read.ingress_use_waypoint);
    assert_eq!(read.weighted_waypoints[0].weight, 7);
    assert_eq!(Service::decode(&read.encode_to_vec()[..]).unwrap(), read);
}

#[test]
fn a_policy_is_read_and_written_byte_for_byte() {
    let bytes = hex("0a 01 70  12 01 6e  18 02  20 01
         2a 3a 0a 38 12 36
           0a 03 0a 01 61
           12 03 12 01 62
           1a 03 1a 01 63
           22 02 22 00
           2a 08 0a 04 0a000000 10 08
           42 08 0a 04 0a000001 10 20
           4a 01 50
           52 02 bb 03
           62 06 0a 01 6e 12 01 73
         30 01");
    let read = Authorization::decode(&bytes[..]).unwrap();
    assert_eq!(read.scope(), Scope::WorkloadSelector);
    assert_eq!(read.action(), Action::Deny);
    assert!(read.dry_run);
    let matched = &read.rules[0].clauses[0].matches[0];
    let kind = |list: &[authorization::StringMatch]| list[0].match_type.clone().unwrap();
    assert_eq!(kind(&matched.namespaces), MatchType::Exact("a".into()));
    assert_eq!(kind(&matched.not_namespaces), MatchType::Prefix("b".into()));
    assert_eq!(kind(&matched.principals), MatchType::Suffix("c".into()));
    assert_eq!(kind(&matched.not_principals), MatchType::Presence(()));
    assert_eq!(matched.source_ips[0].length, 8);
    assert_eq!(matched.not_destination_ips[0].length, 32);
    assert_eq!(matched.destination_ports, [80]);
    assert_eq!(matched.not_destination_ports, [443]);
    assert_eq!(matched.not_service_accounts[0].service_account, "s");
    assert_eq!(read.encode_to_vec(), bytes);
}

#[test]
fn discovery_messages_are_read_and_written_byte_for_byte() {
    let request = hex(
        "0a 15 0a 03 7a7e31 1a 0e 0a 0c 0a 04 4e414d45 12 04 1a 02 7a31
         12 01 74  1a 01 2a  22 01 2a  2a 06 0a 01 61 12 01 31  32 01 6e
         3a 06 08 03 12 02 6e6f",
    );
    let read = DeltaDiscoveryRequest::decode(&request[..]).unwrap();
    let node = read.node.clone().unwrap();
    assert_eq!(node.id, "z~1");
    assert_eq!(
        node.metadata.unwrap().fields["NAME"].kind,
        Some(Kind::Text("z1".into()))
    );
    assert_eq!(read.initial_resource_versions["a"], "1");
    assert_eq!(read.error_detail.clone().unwrap().message, "no");
    assert_eq!(read.encode_to_vec(), request);

    let response = hex("0a 01 73
         12 0e 0a 01 31 12 06 0a 01 74 12 01 76 1a 01 61
         22 01 74  2a 01 6e  32 01 62");
    let read = DeltaDiscoveryResponse::decode(&response[..]).unwrap();
    assert_eq!(
        (&*read.resources[0].name, &*read.resources[0].version),
        ("a", "1")
    );
    assert_eq!(
        &read.resources[0].resource.as_ref().unwrap().value[..],
        b"v"
    );
    assert_eq!(read.removed_resources, ["b"]);
    assert_eq!(read.encode_to_vec(), response);
}

#[test]
fn certificate_messages_are_read_and_written_byte_for_byte() {
    let request = hex("0a 03 637372  18 80 a3 05
         22 1e 0a 1c 0a 14 496d706572736f6e617465644964656e74697479 12 04 1a 02 6964");
    let read = CreateCertificateRequest::decode(&request[..]).unwrap();
    assert_eq!(read.validity_duration, 86400);
    let metadata = read.metadata.clone().unwrap();
    assert_eq!(
        metadata.text(certificate::IMPERSONATED_IDENTITY),
        Some("id")
    );
    assert_eq!(read.encode_to_vec(), request);
    let response = CreateCertificateResponse::decode(&hex("0a 01 61 0a 01 62")[..]).unwrap();
    assert_eq!(response.cert_chain, ["a", "b"]);
}
