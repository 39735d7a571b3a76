#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::IpAddr;
use std::process::Command;

use netlink_packet_core::Emitable;

use super::*;
use crate::plan::{
    Address, Family, Link, MarkMatch, Route, RouteKind, RouteScope, Rule, RuleAction,
};
use crate::sysctl;

mod node_objects;

/// A namespace with `eth0`, whose other end is in another one, and loopback up.
struct Stage {
    ns: Netns,
    peer: Netns,
    netlink: Netlink,
}

impl Stage {
    async fn new() -> Self {
        let ns = Netns::create_unnamed().unwrap();
        let peer = Netns::create_unnamed().unwrap();
        let netlink = Netlink::connect(&ns).await.unwrap();
        let far = Netlink::connect(&peer).await.unwrap();
        netlink.add_veth("eth0", "far0", &peer).await.unwrap();
        for (side, dev, addr) in [
            (&netlink, "eth0", "10.0.0.1/24"),
            (&far, "far0", "10.0.0.2/24"),
        ] {
            side.add_ip(dev, addr.parse().unwrap()).await.unwrap();
            side.set_up(dev).await.unwrap();
            side.set_up("lo").await.unwrap();
        }
        Self { ns, peer, netlink }
    }

    fn ip(&self, args: &str) -> String {
        ip(&self.ns, args)
    }
}

/// Output of an `ip` command inside a namespace, without spaces at line ends.
fn ip(ns: &Netns, args: &str) -> String {
    let output = ns
        .run(|| Command::new("ip").args(args.split_whitespace()).output())
        .unwrap()
        .unwrap();
    assert!(
        output.status.success(),
        "ip {args}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<_> = text.lines().map(str::trim_end).collect();
    lines.join("\n")
}

fn vxlan(name: &str) -> Link {
    Link {
        name: name.into(),
        overlay: OverlayKind::Vxlan,
        vni: 1000,
        remote: "10.0.0.2".parse().unwrap(),
        port: 6081,
        mtu: 1450,
    }
}

fn route(table: u32, dst: &str, dev: &str) -> Route {
    Route {
        table,
        dst: dst.parse().unwrap(),
        dev: dev.into(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Unicast,
        scope: RouteScope::Link,
    }
}

fn rule(priority: u32, mark: Option<(u32, u32)>, action: RuleAction) -> Rule {
    let fwmark = mark.map(|(value, mask)| MarkMatch { value, mask });
    Rule {
        priority,
        fwmark,
        action,
    }
}

#[tokio::test]
async fn an_overlay_device_is_made_compared_and_deleted() {
    let stage = Stage::new().await;
    let wanted = vxlan("istioin");
    assert_eq!(
        stage.netlink.check_link(&wanted).await.unwrap(),
        Presence::Absent
    );
    assert_eq!(
        stage.netlink.add_link(&wanted).await.unwrap(),
        Made::Created
    );
    let shown = stage.ip("-d link show istioin");
    for part in [
        "vxlan id 1000 remote 10.0.0.2",
        "dstport 6081",
        "mtu 1450",
        ",UP",
    ] {
        assert!(shown.contains(part), "{part} in {shown}");
    }
    assert_eq!(
        stage.netlink.add_link(&wanted).await.unwrap(),
        Made::Existed
    );

    let mut others = vec![wanted.clone(); 4];
    others[0].vni = 1001;
    others[1].remote = "10.0.0.3".parse().unwrap();
    others[2].port = 4789;
    others[3].mtu = 1400;
    for other in &others {
        let error = stage.netlink.add_link(other).await.unwrap_err().to_string();
        assert_eq!(
            error,
            "device istioin: something else is in its place: \
             istioin vxlan id 1000 remote 10.0.0.2 dstport 6081 mtu 1450 up"
        );
        assert!(!stage.netlink.has_link(other).await.unwrap());
    }
    stage.netlink.set_down("istioin").await.unwrap();
    assert!(!stage.netlink.has_link(&wanted).await.unwrap());

    let twin = stage.netlink.add_link(&vxlan("twin")).await.unwrap_err();
    assert!(
        matches!(&twin, NetlinkError::Conflict { found, .. } if found.starts_with("istioin ")),
        "{twin}"
    );

    assert!(stage.netlink.del_link("istioin").await.unwrap());
    assert!(!stage.netlink.del_link("istioin").await.unwrap());
    assert!(stage.netlink.link("istioin").await.unwrap().is_none());
}

#[tokio::test]
async fn a_device_of_another_kind_is_a_conflict() {
    let stage = Stage::new().await;
    let error = stage.netlink.add_link(&vxlan("eth0")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "device eth0: something else is in its place: eth0 veth mtu 1500 up"
    );
}

#[tokio::test]
async fn a_kernel_without_geneve_is_told_in_one_sentence() {
    assert!(overlay_supported(OverlayKind::Vxlan).await);
    let geneve = Link {
        overlay: OverlayKind::Geneve,
        ..vxlan("istioin")
    };
    let stage = Stage::new().await;
    let made = stage.netlink.add_link(&geneve).await;
    if overlay_supported(OverlayKind::Geneve).await {
        assert_eq!(made.unwrap(), Made::Created);
        assert_eq!(
            stage.netlink.add_link(&geneve).await.unwrap(),
            Made::Existed
        );
    } else {
        assert_eq!(
            made.unwrap_err().to_string(),
            "this kernel has no geneve: load the module (modprobe geneve) or use --overlay vxlan"
        );
    }
}

#[test]
fn the_geneve_request_carries_vni_remote_and_port() {
    let geneve = Link {
        overlay: OverlayKind::Geneve,
        ..vxlan("istioin")
    };
    let message = links::creation(&geneve);
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    let contains = |part: &[u8]| bytes.windows(part.len()).any(|window| window == part);
    assert!(contains(b"istioin\0"));
    assert!(contains(b"geneve"));
    // Length and type in host order; then the VNI in host order, address and port in network order.
    let attribute = |kind: u16, value: &[u8]| {
        let length = 4 + u16::try_from(value.len()).unwrap();
        [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), value].concat()
    };
    assert!(contains(&attribute(1, &1000_u32.to_ne_bytes())));
    assert!(contains(&attribute(2, &[10, 0, 0, 2])));
    assert!(contains(&attribute(5, &[0x17, 0xc1])));
}

#[tokio::test]
async fn addresses_are_compared_with_their_prefix() {
    let stage = Stage::new().await;
    let wanted = Address {
        dev: "eth0".into(),
        addr: "192.168.126.1/30".parse().unwrap(),
    };
    assert_eq!(
        stage.netlink.add_address(&wanted).await.unwrap(),
        Made::Created
    );
    assert_eq!(
        stage.netlink.add_address(&wanted).await.unwrap(),
        Made::Existed
    );
    assert!(
        stage
            .ip("-4 address show eth0")
            .contains("inet 192.168.126.1/30 scope global eth0")
    );

    let wider = Address {
        addr: "192.168.126.1/24".parse().unwrap(),
        ..wanted.clone()
    };
    let error = stage.netlink.add_address(&wider).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "address 192.168.126.1/24 on eth0: something else is in its place: 192.168.126.1/30 dev eth0"
    );
    assert!(!stage.netlink.del_address(&wider).await.unwrap());
    assert!(stage.netlink.has_address(&wanted).await.unwrap());
    assert!(stage.netlink.del_address(&wanted).await.unwrap());
    assert!(!stage.netlink.del_address(&wanted).await.unwrap());

    let nowhere = Address {
        dev: "nosuch".into(),
        ..wanted
    };
    assert!(!stage.netlink.del_address(&nowhere).await.unwrap());
    let error = stage.netlink.add_address(&nowhere).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "address 192.168.126.1/30 on nosuch: there is no device nosuch"
    );
}

#[tokio::test]
async fn rules_are_told_apart_by_everything_they_say() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let marked = rule(102, Some((0x40, 0x40)), RuleAction::Lookup(102));
    let sibling = rule(102, Some((0x80, 0x80)), RuleAction::Lookup(103));
    assert_eq!(netlink.add_rule(&marked).await.unwrap(), Made::Created);
    assert_eq!(netlink.add_rule(&marked).await.unwrap(), Made::Existed);
    assert_eq!(netlink.add_rule(&sibling).await.unwrap(), Made::Created);

    let other_mask = rule(102, Some((0x40, 0xff)), RuleAction::Lookup(102));
    assert_eq!(
        netlink.check_rule(&other_mask).await.unwrap(),
        Presence::Absent
    );
    assert!(!netlink.del_rule(&other_mask).await.unwrap());
    let other_table = rule(102, Some((0x40, 0x40)), RuleAction::Lookup(1000));
    assert_eq!(
        netlink.check_rule(&other_table).await.unwrap(),
        Presence::Absent
    );
    assert_eq!(netlink.add_rule(&other_table).await.unwrap(), Made::Created);
    assert!(netlink.has_rule(&other_table).await.unwrap());
    assert!(stage.ip("rule").contains("lookup 1000 proto 133"));

    assert!(netlink.del_rule(&marked).await.unwrap());
    assert!(!netlink.del_rule(&marked).await.unwrap());
    assert!(netlink.has_rule(&sibling).await.unwrap());
    assert!(netlink.has_rule(&other_table).await.unwrap());
}

#[tokio::test]
async fn a_goto_with_another_target_is_a_conflict() {
    let stage = Stage::new().await;
    let there = rule(100, Some((0x200, 0x200)), RuleAction::Goto(32766));
    let elsewhere = rule(100, Some((0x200, 0x200)), RuleAction::Goto(32767));
    assert_eq!(stage.netlink.add_rule(&there).await.unwrap(), Made::Created);
    let error = stage.netlink.add_rule(&elsewhere).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "rule 100: fwmark 0x200/0x200 goto 32767: something else is in its place: \
         100: fwmark 0x200/0x200 goto 32766 proto 133"
    );
    assert!(!stage.netlink.del_rule(&elsewhere).await.unwrap());
    assert!(stage.netlink.del_rule(&there).await.unwrap());
}

#[tokio::test]
async fn deleting_a_rule_never_takes_another_one() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    // What the kernel would take for the unmarked rule: a marked one before it.
    let marked = rule(103, Some((0x9, 0xf)), RuleAction::Lookup(100));
    let plain = rule(103, None, RuleAction::Lookup(100));
    netlink.add_rule(&marked).await.unwrap();
    assert!(!netlink.del_rule(&plain).await.unwrap());
    netlink.add_rule(&plain).await.unwrap();
    let error = netlink.del_rule(&plain).await.unwrap_err().to_string();
    assert!(error.contains("would delete"), "{error}");
    assert!(netlink.has_rule(&marked).await.unwrap());
    assert!(netlink.del_rule(&marked).await.unwrap());
    assert!(netlink.del_rule(&plain).await.unwrap());

    // A rule that somebody else made serves, and stays.
    stage.ip("rule add pref 103 lookup 100");
    assert_eq!(netlink.add_rule(&plain).await.unwrap(), Made::Existed);
    assert!(!netlink.del_rule(&plain).await.unwrap());
    stage.ip("rule add pref 104 from 10.1.0.0/16 lookup 100");
    let narrow = rule(104, None, RuleAction::Lookup(100));
    assert_eq!(netlink.check_rule(&narrow).await.unwrap(), Presence::Absent);
}

#[tokio::test]
async fn ipv6_rules_do_not_mix_with_ipv4_ones() {
    let stage = Stage::new().await;
    let wanted = rule(101, Some((0x100, 0x100)), RuleAction::Lookup(101));
    let made = stage.netlink.add_rule_in(Family::V6, &wanted).await;
    assert_eq!(made.unwrap(), Made::Created);
    assert!(!stage.netlink.has_rule(&wanted).await.unwrap());
    assert!(
        stage
            .ip("-6 rule")
            .contains("fwmark 0x100/0x100 lookup 101")
    );
    assert!(!stage.netlink.del_rule(&wanted).await.unwrap());
    assert!(
        stage
            .netlink
            .del_rule_in(Family::V6, &wanted)
            .await
            .unwrap()
    );
}

#[tokio::test]
async fn a_route_with_another_next_hop_is_a_conflict() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let mut wanted = route(100, "10.244.1.4/32", "eth0");
    wanted.via = Some("10.0.0.2".parse().unwrap());
    wanted.scope = RouteScope::Global;
    wanted.src = Some("10.0.0.1".parse().unwrap());
    assert_eq!(netlink.add_route(&wanted).await.unwrap(), Made::Created);
    assert_eq!(netlink.add_route(&wanted).await.unwrap(), Made::Existed);

    let mut others = vec![wanted.clone(); 3];
    others[0].via = Some("10.0.0.9".parse().unwrap());
    others[1].src = None;
    others[2].onlink = true;
    for other in &others {
        let error = netlink.add_route(other).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            "route 10.244.1.4/32 in table 100: something else is in its place: \
             10.244.1.4/32 via 10.0.0.2 dev eth0 table 100 proto 133 src 10.0.0.1"
        );
        assert!(!netlink.del_route(other).await.unwrap());
    }
    assert!(netlink.has_route(&wanted).await.unwrap());
    assert!(netlink.del_route(&wanted).await.unwrap());
    assert!(!netlink.del_route(&wanted).await.unwrap());

    let unreachable = Route {
        via: Some("172.16.0.1".parse().unwrap()),
        ..wanted.clone()
    };
    let error = netlink.add_route(&unreachable).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "route 10.244.1.4/32 in table 100: Network is unreachable (os error 101)"
    );
    let nowhere = Route {
        dev: "nosuch".into(),
        ..wanted.clone()
    };
    let error = netlink.add_route(&nowhere).await.unwrap_err();
    assert!(matches!(error, NetlinkError::NoDevice { .. }), "{error}");
    assert!(!netlink.del_route(&nowhere).await.unwrap());

    stage.ip("route add 10.244.1.4/32 via 10.0.0.2 dev eth0 src 10.0.0.1 table 100");
    assert_eq!(netlink.add_route(&wanted).await.unwrap(), Made::Existed);
    assert!(
        !netlink.del_route(&wanted).await.unwrap(),
        "not made by this program"
    );
}

#[tokio::test]
async fn many_routes_go_in_one_batch_and_each_answers_for_itself() {
    let stage = Stage::new().await;
    let mut routes: Vec<_> = (0..=255)
        .map(|n| route(1000, &format!("10.9.{n}.0/24"), "eth0"))
        .collect();
    routes[7].dst = "10.0.7.1/24".parse().unwrap();
    stage
        .netlink
        .add_route(&route(1000, "10.9.3.0/24", "eth0"))
        .await
        .unwrap();
    stage.ip("route add blackhole 10.9.5.0/24 table 1000");
    let results = stage.netlink.add_routes(&routes).await;
    for (n, result) in results.iter().enumerate() {
        match n {
            3 => assert_eq!(*result.as_ref().unwrap(), Made::Existed),
            5 => assert!(matches!(result, Err(NetlinkError::Conflict { .. }))),
            7 => assert!(matches!(result, Err(NetlinkError::Kernel { .. }))),
            _ => assert_eq!(*result.as_ref().unwrap(), Made::Created, "{n}"),
        }
    }
    assert_eq!(stage.ip("route show table 1000").lines().count(), 255);
    let removed = stage.netlink.del_routes(&routes).await;
    let gone = removed.iter().filter(|r| matches!(r, Ok(true))).count();
    assert_eq!(gone, 254);
    assert_eq!(
        stage.ip("route show table 1000"),
        "blackhole 10.9.5.0/24\n10.9.5.0/24 dev eth0"
            .lines()
            .next()
            .unwrap()
    );
}

#[tokio::test]
async fn ipv6_destinations_are_accepted() {
    let stage = Stage::new().await;
    let mut local = route(100, "::/0", "lo");
    local.kind = RouteKind::Local;
    local.scope = RouteScope::Host;
    assert_eq!(
        stage.netlink.add_route(&local).await.unwrap(),
        Made::Created
    );
    assert_eq!(
        stage.netlink.add_route(&local).await.unwrap(),
        Made::Existed
    );
    assert!(
        stage
            .ip("-6 route show table 100")
            .starts_with("local default dev lo proto 133")
    );
    assert!(stage.netlink.del_route(&local).await.unwrap());
    assert_eq!(stage.ip("-6 route show table 100"), "");
}

#[tokio::test]
async fn the_route_to_an_address_names_its_device() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let to = |ip: &str| ip.parse::<IpAddr>().unwrap();
    let direct = netlink.route_to(to("10.0.0.2")).await.unwrap();
    assert_eq!(
        (direct.dev.as_str(), direct.via, direct.table),
        ("eth0", None, 254)
    );
    assert_eq!(direct.src, Some(to("10.0.0.1")));
    let error = netlink.route_to(to("10.244.1.4")).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "route to 10.244.1.4: Network is unreachable (os error 101)"
    );

    let default = "0.0.0.0/0".parse().unwrap();
    netlink
        .add_plain_route(default, Some(to("10.0.0.2")), "eth0")
        .await
        .unwrap();
    let far = netlink.route_to(to("10.244.1.4")).await.unwrap();
    assert_eq!(far.via, Some(to("10.0.0.2")));
    netlink
        .add_rule(&rule(50, None, RuleAction::Lookup(1000)))
        .await
        .unwrap();
    netlink
        .add_route(&route(1000, "10.244.1.4/32", "eth0"))
        .await
        .unwrap();
    let own_table = netlink.route_to(to("10.244.1.4")).await.unwrap();
    assert_eq!((own_table.via, own_table.table), (None, 1000));
    let own = netlink.route_to(to("10.0.0.1")).await.unwrap();
    assert_eq!((own.dev.as_str(), own.table), ("lo", 255));
    let gone = netlink.del_plain_route(default, Some(to("10.0.0.2")), "eth0");
    assert!(gone.await.unwrap());

    netlink
        .add_ip("eth0", "fd00::1/64".parse().unwrap())
        .await
        .unwrap();
    let v6 = netlink.route_to(to("fd00::2")).await.unwrap();
    assert_eq!((v6.dev.as_str(), v6.via), ("eth0", None));
}

#[tokio::test]
async fn a_lab_is_built_from_pairs_and_bridges() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    netlink.add_bridge("br0").await.unwrap();
    netlink.add_veth("p0", "eth1", &stage.peer).await.unwrap();
    netlink.set_mtu("p0", 1400).await.unwrap();
    netlink.set_master("p0", "br0").await.unwrap();
    netlink.set_up("br0").await.unwrap();
    netlink.set_up("p0").await.unwrap();
    let bridge = netlink.link("br0").await.unwrap().unwrap();
    assert_eq!((bridge.kind.as_deref(), bridge.up), (Some("bridge"), true));
    let port = netlink.link("p0").await.unwrap().unwrap();
    assert_eq!((port.master, port.mtu), (Some(bridge.index), 1400));
    assert!(port.peer_netnsid.is_some());
    let far = Netlink::connect(&stage.peer).await.unwrap();
    let end = far.link("eth1").await.unwrap().unwrap();
    assert_eq!(port.peer, Some(end.index));

    far.move_to("eth1", &stage.ns).await.unwrap();
    assert!(far.link("eth1").await.unwrap().is_none());
    let moved = netlink.link("eth1").await.unwrap().unwrap();
    assert_eq!((moved.peer, moved.peer_netnsid), (Some(port.index), None));
    assert!(netlink.del_link("p0").await.unwrap());
    assert!(
        netlink.link("eth1").await.unwrap().is_none(),
        "the pair goes together"
    );
    let taken = netlink.add_veth("eth0", "x", &stage.peer).await;
    assert_eq!(
        taken.unwrap_err().to_string(),
        "veth pair eth0 - x: File exists (os error 17)"
    );
}

#[tokio::test]
async fn listings_at_the_same_time_do_not_disturb_each_other() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let wanted = route(100, "10.9.0.0/24", "eth0");
    let (links, v4, routes, rules, added) = tokio::join!(
        netlink.links(),
        netlink.addresses(),
        netlink.routes(Family::V4),
        netlink.rules(Family::V4),
        netlink.add_route(&wanted),
    );
    assert_eq!(links.unwrap().len(), 2);
    assert!(
        v4.unwrap()
            .contains(&("eth0".into(), "10.0.0.1/24".parse().unwrap()))
    );
    assert!(!routes.unwrap().is_empty());
    assert_eq!(rules.unwrap().len(), 3);
    assert_eq!(added.unwrap(), Made::Created);
}

#[tokio::test]
async fn the_connection_stays_in_its_namespace() {
    let stage = Stage::new().await;
    let here = Netlink::connect(&Netns::current().unwrap()).await.unwrap();
    stage.netlink.add_bridge("only-there").await.unwrap();
    assert!(here.link("only-there").await.unwrap().is_none());
    assert!(stage.netlink.link("only-there").await.unwrap().is_some());
}
