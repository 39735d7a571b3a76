#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::{IpAddr, Ipv4Addr};

use proptest::prelude::*;

use super::*;
use crate::state::workload::NetworkMode;
use crate::state::{NetworkAddress, Store};

fn ip(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 0, last).into()
}

fn service_key(number: u8) -> NamespacedHostname {
    format!("n/s{number}").parse().unwrap()
}

fn workload(uid: u8, addresses: &[u8], services: &[u8], host: bool) -> Arc<Workload> {
    Arc::new(Workload {
        uid: format!("w{uid}").into(),
        addresses: addresses.iter().map(|last| ip(*last)).collect(),
        services: services
            .iter()
            .map(|number| (service_key(*number), [(80, 8080)].into()))
            .collect(),
        network_mode: if host {
            NetworkMode::HostNetwork
        } else {
            NetworkMode::Standard
        },
        ..Workload::default()
    })
}

fn service(number: u8, vips: &[u8]) -> Arc<Service> {
    let key = service_key(number);
    Arc::new(Service {
        name: key.hostname.clone(),
        namespace: key.namespace,
        hostname: key.hostname,
        vips: vips
            .iter()
            .map(|last| NetworkAddress::new("", ip(*last)))
            .collect(),
        ports: [(80, 8080)].into(),
        ..Service::default()
    })
}

fn policy(number: u8, scope: PolicyScope, namespace: &str) -> Arc<Policy> {
    Arc::new(Policy {
        name: format!("p{number}").into(),
        namespace: namespace.into(),
        scope,
        action: crate::state::policy::Action::Deny,
        rules: Vec::new(),
        dry_run: false,
    })
}

fn change() -> impl Strategy<Value = Change> {
    let few = || prop::collection::btree_set(0u8..4, 0..3);
    let scope = prop::sample::select(vec![
        PolicyScope::Global,
        PolicyScope::Namespace,
        PolicyScope::WorkloadSelector,
    ]);
    prop_oneof![
        4 => (0u8..6, few(), few(), any::<bool>()).prop_map(|(uid, addresses, services, host)| {
            let list = |set: std::collections::BTreeSet<u8>| set.into_iter().collect::<Vec<_>>();
            Change::Workload(workload(uid, &list(addresses), &list(services), host))
        }),
        2 => (0u8..6).prop_map(|uid| Change::RemoveWorkload(format!("w{uid}").into())),
        2 => (0u8..4, few()).prop_map(|(number, vips)| {
            Change::Service(service(number, &vips.into_iter().collect::<Vec<_>>()))
        }),
        1 => (0u8..4).prop_map(|number| Change::RemoveService(service_key(number))),
        2 => (0u8..4, scope).prop_map(|(number, scope)| Change::Policy(policy(number, scope, "default"))),
        1 => (0u8..4).prop_map(|number| Change::RemovePolicy(format!("default/p{number}").into())),
    ]
}

/// What the indexes must say, worked out from the objects alone.
fn check(snapshot: &Snapshot) {
    let workloads: Vec<_> = snapshot.workloads().cloned().collect();
    assert_eq!(workloads.len(), snapshot.workload_count());
    for last in 0..4 {
        let having: Vec<_> = workloads
            .iter()
            .filter(|w| w.addresses.contains(&ip(last)))
            .collect();
        let own: Vec<_> = having
            .iter()
            .filter(|w| w.network_mode == NetworkMode::Standard)
            .collect();
        match (snapshot.workload_by_ip(ip(last)), &having[..], &own[..]) {
            (None, [], _) => {}
            // Hosts' addresses that several have name nobody.
            (None, [_, _, ..], []) => {}
            (Some(found), [one], _) => assert_eq!(found.uid, one.uid),
            (Some(found), _, some) => assert!(some.iter().any(|w| w.uid == found.uid)),
            other => panic!("{other:?}"),
        }
        let having: Vec<_> = snapshot
            .services()
            .filter(|s| s.vips.iter().any(|vip| vip.ip == ip(last)))
            .collect();
        let found = snapshot.service_by_vip(ip(last));
        assert_eq!(found.is_none(), having.is_empty());
        assert!(found.is_none_or(|found| having.iter().any(|s| s.key() == found.key())));
    }
    for number in 0..4 {
        let mut found: Vec<_> = snapshot
            .endpoints(&service(number, &[]))
            .iter()
            .map(|w| w.uid.to_string())
            .collect();
        found.sort();
        let wanted: Vec<_> = workloads
            .iter()
            .filter(|w| w.services.contains_key(&service_key(number)))
            .map(|w| w.uid.to_string())
            .collect();
        assert_eq!(found, wanted);
    }
    let anybody = workload(99, &[], &[], false);
    let mut found: Vec<_> = snapshot.policies_for(&anybody).map(|p| p.key()).collect();
    found.sort();
    let wanted: Vec<_> = snapshot
        .policies()
        .filter(|p| p.scope != PolicyScope::WorkloadSelector)
        .map(|p| p.key())
        .collect();
    assert_eq!(found, wanted);
}

proptest! {
    #[test]
    fn indexes_agree_with_the_objects_after_any_changes(batches in prop::collection::vec(prop::collection::vec(change(), 0..8), 0..12)) {
        let mut snapshot = Snapshot::default();
        for batch in batches {
            let one_by_one = batch.iter().cloned().fold(snapshot.clone(), |s, change| s.updated([change]));
            snapshot = snapshot.updated(batch);
            check(&snapshot);
            check(&one_by_one);
            prop_assert!(snapshot.workloads().eq(one_by_one.workloads()));
            prop_assert!(snapshot.services().eq(one_by_one.services()));
            prop_assert!(snapshot.policies().eq(one_by_one.policies()));
        }
    }
}

#[test]
fn an_address_that_moves_belongs_to_its_new_holder_in_either_order() {
    let old = Change::Workload(workload(1, &[1], &[], false));
    let new = Change::Workload(workload(2, &[1], &[], false));
    let gone = Change::RemoveWorkload("w1".into());
    let first = Snapshot::default().updated([old]);
    for changes in [[new.clone(), gone.clone()], [gone, new]] {
        let moved = first.updated(changes);
        assert_eq!(&*moved.workload_by_ip(ip(1)).unwrap().uid, "w2");
    }
    // The new holder goes again: the old one, if it is still there, is found.
    let both = first.updated([Change::Workload(workload(2, &[1], &[], false))]);
    let back = both.updated([Change::RemoveWorkload("w2".into())]);
    assert_eq!(&*back.workload_by_ip(ip(1)).unwrap().uid, "w1");
}

#[test]
fn writers_of_one_store_do_not_lose_each_others_changes() {
    let store = Arc::new(Store::new());
    let threads: Vec<_> = (0..4u8)
        .map(|thread| {
            let store = Arc::clone(&store);
            std::thread::spawn(move || {
                for number in 0..50 {
                    store.update([Change::Workload(workload(
                        thread * 50 + number,
                        &[],
                        &[],
                        false,
                    ))]);
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|t| t.join().unwrap());
    assert_eq!(store.load().workload_count(), 200);
}
