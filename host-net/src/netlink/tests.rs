#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::IpAddr;
use std::process::Command;

use super::*;
use crate::plan::{
    Address, Family, Link, MarkMatch, Route, RouteKind, RouteScope, Rule, RuleAction,
};
use crate::sysctl;

mod node_objects;
mod overlays;
mod routes;
mod rules;

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
        family: Family::V4,
        priority,
        fwmark,
        action,
    }
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
