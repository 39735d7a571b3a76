#![allow(clippy::unwrap_used, clippy::expect_used)]

use proptest::prelude::*;

use super::*;
use crate::state::{Change, Snapshot, local_xds};

fn service(name: &str, ranges: &[&str]) -> Arc<Service> {
    Arc::new(Service {
        name: name.into(),
        namespace: "a".into(),
        hostname: name.into(),
        cidr_vips: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        ..Service::default()
    })
}

fn found(snapshot: &Snapshot, address: &str) -> Option<String> {
    let service = snapshot.service_by_address(&address.parse().unwrap())?;
    Some(service.name.to_string())
}

const MESH: &str = "
workloads:
- {uid: w, namespace: a, workloadIps: [10.1.2.9], services: {}}
services:
- {name: all, namespace: a, hostname: all, vips: [], cidrVips: [/0.0.0.0/0], ports: {80: 80}}
- {name: wide, namespace: a, hostname: wide, vips: [], cidrVips: [/10.0.0.0/8, '/fd00::/8'], ports: {80: 80}}
- {name: narrow, namespace: a, hostname: narrow, vips: [], cidrVips: [/10.1.2.0/24], ports: {80: 80}}
- {name: exact, namespace: a, hostname: exact, vips: [/10.1.2.3], ports: {80: 80}}
- {name: there, namespace: a, hostname: there, vips: [], cidrVips: [east/10.1.2.0/25], ports: {80: 80}}
";

#[rstest::rstest]
#[case::exact("/10.1.2.3", Some("exact"))]
#[case::longest("/10.1.2.4", Some("narrow"))]
#[case::last_of_the_range("/10.1.2.255", Some("narrow"))]
#[case::beside_it("/10.1.3.0", Some("wide"))]
#[case::a_workload_s_own_address("/10.1.2.9", None)]
#[case::everything("/198.51.100.1", Some("all"))]
#[case::ipv6("/fd12::1", Some("wide"))]
#[case::ipv6_outside("/2001:db8::1", None)]
#[case::of_its_network("east/10.1.2.4", Some("there"))]
#[case::no_other_network("east/10.1.2.200", None)]
fn the_longest_range_has_the_address(#[case] address: &str, #[case] expected: Option<&str>) {
    let mesh = local_xds::parse(MESH).unwrap();
    assert_eq!(found(&mesh, address).as_deref(), expected);
}

#[test]
fn a_range_may_hold_another_service_s_address_and_two_services_one_range() {
    let mesh = local_xds::parse(MESH).unwrap();
    let second = service("second", &["/10.1.2.0/24"]);
    let both = mesh.updated([Change::Service(Arc::clone(&second))]);
    assert_eq!(found(&both, "/10.1.2.4").as_deref(), Some("second"));
    let gone = both.updated([Change::RemoveService(second.key())]);
    assert_eq!(found(&gone, "/10.1.2.4").as_deref(), Some("narrow"));
    let narrow = gone
        .services()
        .find(|s| &*s.name == "narrow")
        .unwrap()
        .key();
    let gone = gone.updated([Change::RemoveService(narrow)]);
    assert_eq!(found(&gone, "/10.1.2.4").as_deref(), Some("wide"));
}

/// Many services do not make the search longer: only different lengths do.
#[test]
fn a_length_that_no_range_has_is_not_looked_for() {
    let mut ranges = Ranges::default();
    let services: Vec<_> = (0..10_000u16)
        .map(|number| {
            let [high, low] = number.to_be_bytes();
            service(&number.to_string(), &[&format!("/10.{high}.{low}.0/24")])
        })
        .collect();
    for service in &services {
        ranges.add(&service.cidr_vips[0], service);
    }
    let wide = service("wide", &["/10.0.0.0/8", "/10.0.0.0/8"]);
    for range in &wide.cidr_vips {
        ranges.add(range, &wide);
    }
    assert_eq!(ranges.lengths.ipv4, BTreeMap::from([(8, 1), (24, 10_000)]));
    assert!(ranges.longest(&"/10.39.15.1".parse().unwrap()).is_some());
    for service in services.iter().chain([&wide]) {
        for range in &service.cidr_vips {
            ranges.remove(range, service);
        }
    }
    assert!(ranges.is_empty() && ranges.lengths.ipv4.is_empty());
}

proptest! {
    /// The same as looking through all ranges.
    #[test]
    fn finds_what_a_search_through_all_finds(
        ranges in proptest::collection::vec((any::<[u8; 2]>(), 0u8..=16), 0..12),
        removed in proptest::collection::vec(any::<bool>(), 12),
        asked: [u8; 2],
    ) {
        let mut index = Ranges::default();
        let mut left = Vec::new();
        for (number, ([a, b], length)) in ranges.into_iter().enumerate() {
            let one = service(&number.to_string(), &[&format!("/{a}.{b}.0.0/{length}")]);
            index.add(&one.cidr_vips[0], &one);
            left.push(one);
        }
        for (at, one) in left.clone().iter().enumerate().rev() {
            if removed[at] {
                index.remove(&one.cidr_vips[0], one);
                left.remove(at);
            }
        }
        let address: NetworkAddress = format!("/{}.{}.1.1", asked[0], asked[1]).parse().unwrap();
        let longest = left
            .iter()
            .map(|one| &one.cidr_vips[0])
            .filter(|range| range.contains(&address))
            .map(|range| range.range.prefix_len())
            .max();
        let found = index.longest(&address).and_then(Holders::latest);
        let found = found.map(|one| one.cidr_vips[0].range.prefix_len());
        prop_assert_eq!(found, longest);
    }
}
