//! Fields in another order and fields that mean nothing here; and every number that stands for a word.

use std::fmt::Debug;

use super::super::workload::{
    ApplicationProtocol, ApplicationTunnel, HealthPolicy, IpFamilies, LoadBalancing, Mode,
    NetworkMode, PortList, Scope as Preference, TunnelProtocol, Visibility, WorkloadStatus,
    WorkloadType,
};
use super::*;

/// Fields that no message here has: a number, a text, eight bytes, four bytes.
const UNKNOWN: [&str; 4] = [
    "80 7d 05",
    "ea 7d 02 6869",
    "e1 7d 0000000000000001",
    "e5 7d 00000001",
];

/// Fields in order make the message, byte for byte; backwards, with unknown ones between them, they make the same.
fn in_any_order<M: Message + Default + PartialEq + Debug>(fields: &[&str], unknown: &[&str]) -> M {
    let bytes = hex(&fields.concat());
    let message = M::decode(&bytes[..]).unwrap();
    assert_eq!(message.encode_to_vec(), bytes, "{message:?}");
    let mut mixed = Vec::new();
    let mut unknown = UNKNOWN.iter().chain(unknown).cycle();
    let mut fields = fields.to_vec();
    // Backwards, but for the elements of a list, whose order means something.
    fields.sort_by(|one, other| other[..2].cmp(&one[..2]));
    for field in fields {
        mixed.push(*unknown.next().unwrap());
        mixed.push(field);
    }
    mixed.extend(unknown.take(4));
    assert_eq!(M::decode(&hex(&mixed.concat())[..]).unwrap(), message);
    message
}

#[test]
fn of_a_service() {
    let service: Service = in_any_order(
        &[
            "0a 01 73",                        // 1 name "s"
            "12 01 6e",                        // 2 namespace "n"
            "1a 03 732e6e",                    // 3 hostname "s.n"
            "22 0a 0a 02 6e31 12 04 0a010001", // 4 addresses "n1" 10.1.0.1
            "22 08 12 04 0a010000 18 18",      // 4 addresses "" 10.1.0.0, length 24
            "2a 05 08 50 10 90 3f",            // 5 ports 80 -> 8080
            "32 03 732f31",                    // 6 subject_alt_names "s/1"
            "3a 08 0a 06 0a 01 61 12 01 62",   // 7 waypoint: hostname a/b
            "42 08 0a 02 06 01 10 02 18 01", // 8 load_balancing NETWORK, REGION, FAILOVER, ALLOW_ALL
            "48 03",                         // 9 ip_families DUAL
            "58 01",                         // 11 canonical
            "60 01",                         // 12 ingress_use_waypoint
            "6a 06 0a 02 18 01 10 07",       // 13 weighted_waypoints: port 1, weight 7
            "70 01",                         // 14 visibility NAMESPACE
        ],
        // 10 extensions: a message with a name.
        &["52 05 0a 03 657874"],
    );
    assert_eq!(service.addresses[1].length, Some(24));
    assert!(matches!(
        service.waypoint.unwrap().destination,
        Some(Destination::Hostname(name)) if name.namespace == "a" && name.hostname == "b"
    ));
}

#[test]
fn of_a_workload() {
    // 15 is reserved, 26 are extensions.
    let workload: Workload = in_any_order(&WORKLOAD, &["7a 02 7878", "d2 01 05 0a 03 657874"]);
    assert_eq!(workload.capacity, Some(5));
    // A kind of protocol (3) on a port means nothing here.
    let ports = PortList::decode(&hex("0a 07 08 50 10 90 3f 18 02")[..]).unwrap();
    assert_eq!(
        (ports.ports[0].service_port, ports.ports[0].target_port),
        (80, 8080)
    );
}

#[test]
fn of_a_policy() {
    let policy: Authorization = in_any_order(
        &["0a 01 70", "12 01 6e", "18 02", "20 01", "2a 00", "30 01"],
        // 7 extensions.
        &["3a 05 0a 03 657874"],
    );
    assert!(policy.dry_run && policy.rules.len() == 1);
    let matched: authorization::Match = in_any_order(
        &[
            "0a 03 0a 01 61",             // 1 namespaces exact "a"
            "12 03 12 01 62",             // 2 not_namespaces prefix "b"
            "1a 03 1a 01 63",             // 3 principals suffix "c"
            "22 02 22 00",                // 4 not_principals presence
            "2a 08 0a 04 0a000000 10 08", // 5 source_ips 10.0.0.0/8
            "32 08 0a 04 0a000002 10 20", // 6 not_source_ips 10.0.0.2/32
            "3a 08 0a 04 0a000003 10 20", // 7 destination_ips 10.0.0.3/32
            "42 08 0a 04 0a000001 10 20", // 8 not_destination_ips 10.0.0.1/32
            "4a 01 50",                   // 9 destination_ports 80
            "52 02 bb 03",                // 10 not_destination_ports 443
            "5a 06 0a 01 6e 12 01 73",    // 11 service_accounts n/s
            "62 06 0a 01 6d 12 01 74",    // 12 not_service_accounts m/t
            "6a 05 0a 03 657874",         // 13 extensions "ext"
        ],
        &[],
    );
    assert_eq!(matched.not_source_ips[0].length, 32);
    assert_eq!(matched.service_accounts[0].service_account, "s");
    // Its configuration (2) is for those who know the extension.
    let configured = authorization::Match::decode(&hex("6a 09 0a 03 657874 12 02 0a 00")[..]);
    assert_eq!(configured.unwrap().extensions, matched.extensions);
    // Ports of an encoder that does not pack them.
    let loose = authorization::Match::decode(&hex("48 50 48 bb 03")[..]).unwrap();
    assert_eq!(loose.destination_ports, [80, 443]);
}

#[test]
fn of_discovery_and_certificates() {
    let request: DeltaDiscoveryRequest = in_any_order(
        &[
            "12 01 74",
            "1a 01 2a",
            "22 01 2a",
            "2a 06 0a 01 61 12 01 31",
            "32 01 6e",
        ],
        &[],
    );
    assert_eq!(request.response_nonce, "n");
    let response: DeltaDiscoveryResponse = in_any_order(
        &[
            "0a 01 73",
            "12 03 0a 01 31",
            "22 01 74",
            "2a 01 6e",
            "32 01 62",
        ],
        // 7 removed_resource_names of a later version; 9 aliases.
        &["3a 03 0a 01 78", "4a 00"],
    );
    assert_eq!(response.removed_resources, ["b"]);
    let request: CreateCertificateRequest =
        in_any_order(&["0a 03 637372", "18 80 a3 05"], &["12 01 78"]);
    assert_eq!(request.validity_duration, 86400);
}

/// A message that consists of one number.
fn of<M: Message + Default>(tag: &str, number: u8) -> M {
    let mut bytes = hex(tag);
    bytes.push(number);
    M::decode(&bytes[..]).unwrap()
}

#[test]
fn every_number_of_an_enumeration() {
    let tunnels = [
        TunnelProtocol::None,
        TunnelProtocol::Hbone,
        TunnelProtocol::LegacyIstioMtls,
    ];
    for (number, word) in (0..).zip(tunnels) {
        assert_eq!(of::<Workload>("28", number).tunnel_protocol(), word);
    }
    let types = [
        WorkloadType::Deployment,
        WorkloadType::Cronjob,
        WorkloadType::Pod,
        WorkloadType::Job,
    ];
    for (number, word) in (0..).zip(types) {
        assert_eq!(of::<Workload>("60", number).workload_type(), word);
    }
    for (number, word) in (0..).zip([WorkloadStatus::Healthy, WorkloadStatus::Unhealthy]) {
        assert_eq!(of::<Workload>("88 01", number).status(), word);
    }
    for (number, word) in (0..).zip([NetworkMode::Standard, NetworkMode::HostNetwork]) {
        assert_eq!(of::<Workload>("c8 01", number).network_mode(), word);
    }
    for (number, word) in (0..).zip([ApplicationProtocol::None, ApplicationProtocol::Proxy]) {
        assert_eq!(of::<ApplicationTunnel>("08", number).protocol(), word);
    }
    let preferences = [
        Preference::Unspecified,
        Preference::Region,
        Preference::Zone,
        Preference::Subzone,
        Preference::Node,
        Preference::Cluster,
        Preference::Network,
    ];
    for (number, word) in (0..).zip(preferences) {
        let read: LoadBalancing = of("0a 01", number);
        assert_eq!(read.routing_preference().next(), Some(word));
    }
    let modes = [
        Mode::Unspecified,
        Mode::Strict,
        Mode::Failover,
        Mode::Passthrough,
    ];
    for (number, word) in (0..).zip(modes) {
        assert_eq!(of::<LoadBalancing>("10", number).mode(), word);
    }
    for (number, word) in (0..).zip([HealthPolicy::OnlyHealthy, HealthPolicy::AllowAll]) {
        assert_eq!(of::<LoadBalancing>("18", number).health_policy(), word);
    }
    let families = [
        IpFamilies::Automatic,
        IpFamilies::Ipv4Only,
        IpFamilies::Ipv6Only,
        IpFamilies::Dual,
    ];
    for (number, word) in (0..).zip(families) {
        assert_eq!(of::<Service>("48", number).ip_families(), word);
    }
    for (number, word) in (0..).zip([Visibility::Public, Visibility::Namespace]) {
        assert_eq!(of::<Service>("70", number).visibility(), word);
    }
    for (number, word) in (0..).zip([Scope::Global, Scope::Namespace, Scope::WorkloadSelector]) {
        assert_eq!(of::<Authorization>("18", number).scope(), word);
    }
    for (number, word) in (0..).zip([Action::Allow, Action::Deny]) {
        assert_eq!(of::<Authorization>("20", number).action(), word);
    }
}
