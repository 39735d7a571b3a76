#![allow(clippy::unwrap_used)]

use super::*;
use crate::plan::{
    Address, Chain, Family, Link, Member, OverlayKind, Route, RouteKind, RouteScope, Set, Sysctl,
    Table,
};

fn link(vni: u32) -> Step {
    Step::Link(Link {
        name: "istioin".to_owned(),
        overlay: OverlayKind::Vxlan,
        vni,
        remote: [10, 0, 0, 1].into(),
        port: 6081,
        mtu: 1450,
    })
}

fn address() -> Step {
    Step::Address(Address {
        dev: "istioin".to_owned(),
        addr: "192.168.126.1/30".parse().unwrap(),
    })
}

fn route(dev: &str, dst: &str) -> Step {
    Step::Route(Route {
        table: 100,
        dst: dst.parse().unwrap(),
        dev: dev.to_owned(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Unicast,
        scope: RouteScope::Link,
    })
}

fn sysctl(value: &str) -> Step {
    Step::Sysctl(Sysctl {
        key: "net/ipv4/conf/istioin/rp_filter".to_owned(),
        value: value.to_owned(),
    })
}

fn set(name: &str) -> Step {
    Step::Set(Set {
        name: name.to_owned(),
        family: Family::V4,
        comments: true,
    })
}

fn member(comment: &str) -> Step {
    Step::Member(Member {
        set: "pods".to_owned(),
        ip: [10, 0, 0, 2].into(),
        comment: Some(comment.to_owned()),
    })
}

fn chain(rule: &str) -> Step {
    Step::Chain(Chain {
        family: Family::V4,
        table: Table::Nat,
        name: "OWN".to_owned(),
        rules: vec![rule.to_owned()],
        jump: None,
    })
}

#[test]
fn a_whole_plan_goes_in_reverse_with_its_sets_last() {
    let old = [
        set("pods"),
        link(1000),
        address(),
        member("a"),
        chain("-j X"),
    ];
    assert_eq!(
        removals(&old, &[], &[]),
        [
            chain("-j X"),
            member("a"),
            address(),
            link(1000),
            set("pods")
        ]
    );
}

#[test]
fn chains_and_sysctls_with_other_content_are_changed_in_place() {
    let old = [sysctl("0"), chain("-j A")];
    assert_eq!(removals(&old, &[sysctl("2"), chain("-j B")], &[]), []);
    assert_eq!(removals(&old, &[sysctl("2")], &[]), [chain("-j A")]);
}

#[test]
fn a_device_that_is_made_again_takes_along_what_hangs_on_it() {
    let rest = [
        address(),
        route("istioin", "10.1.0.0/16"),
        route("eth0", "10.2.0.0/16"),
        sysctl("2"),
    ];
    let old: Vec<Step> = [link(1000)].into_iter().chain(rest.clone()).collect();
    let new: Vec<Step> = [link(1001)].into_iter().chain(rest).collect();
    let wanted_removals = [route("istioin", "10.1.0.0/16"), address(), link(1000)];
    assert_eq!(removals(&old, &new, &[]), wanted_removals);
    assert_eq!(removals(&old, &old, &[link(1000)]), wanted_removals);
    assert!(vanishes_with(&sysctl("2"), &link(1000)));
}

#[test]
fn an_entry_with_another_owner_is_removed_before_it_is_added() {
    assert_eq!(
        removals(
            &[set("pods"), member("a")],
            &[set("pods"), member("b")],
            &[]
        ),
        [member("a")]
    );
}

#[test]
fn the_union_can_be_removed_in_reverse() {
    let old = [set("old"), set("pods"), chain("-j A")];
    let new = [set("pods"), set("new"), chain("-j B")];
    assert_eq!(
        union(&new, &old),
        [
            set("pods"),
            set("new"),
            chain("-j B"),
            set("old"),
            chain("-j A")
        ]
    );
}

#[test]
fn consecutive_entries_of_one_set_routes_and_chains_are_one_run_each() {
    let steps = [
        set("pods"),
        set("more"),
        member("a"),
        member("b"),
        route("eth0", "10.1.0.0/16"),
        route("eth0", "10.2.0.0/16"),
        chain("-j A"),
        chain("-j B"),
        sysctl("1"),
        sysctl("2"),
    ];
    let lengths: Vec<usize> = runs(&steps).map(<[Step]>::len).collect();
    assert_eq!(lengths, [1, 1, 2, 2, 2, 1, 1]);
}
