//! The complete set of links, addresses, rules and routes of a node, as `ip` prints it, and its removal.

use super::*;

fn overlay(name: &str, vni: u32) -> Link {
    Link { vni, ..vxlan(name) }
}

fn links() -> Vec<Link> {
    vec![overlay("istioin", 1000), overlay("istioout", 1001)]
}

fn addresses() -> Vec<Address> {
    let on = |dev: &str, addr: &str| Address {
        dev: dev.into(),
        addr: addr.parse().unwrap(),
    };
    vec![
        on("istioin", "192.168.126.1/30"),
        on("istioout", "192.168.127.1/30"),
    ]
}

fn rules() -> Vec<Rule> {
    vec![
        rule(100, Some((0x200, 0x200)), RuleAction::Goto(32766)),
        rule(101, Some((0x100, 0x100)), RuleAction::Lookup(101)),
        rule(102, Some((0x40, 0x40)), RuleAction::Lookup(102)),
        rule(102, Some((0x80, 0x80)), RuleAction::Lookup(103)),
        rule(103, None, RuleAction::Lookup(100)),
    ]
}

fn routes() -> Vec<Route> {
    let mut routes: Vec<_> = (100..=103)
        .map(|table| route(table, "10.0.0.2/32", "eth0"))
        .collect();
    let default = |table, via: &str, dev: &str| Route {
        via: Some(via.parse().unwrap()),
        scope: RouteScope::Global,
        ..route(table, "0.0.0.0/0", dev)
    };
    routes.push(default(101, "192.168.127.2", "istioout"));
    routes.push(Route {
        onlink: true,
        ..default(102, "10.0.0.2", "eth0")
    });
    routes.push(default(103, "192.168.126.2", "istioin"));
    routes.push(Route {
        dst: "10.244.1.4/32".parse().unwrap(),
        src: Some("10.0.0.1".parse().unwrap()),
        ..default(100, "192.168.126.2", "istioin")
    });
    // The proxy's side of the same, in a table of its own here.
    routes.push(Route {
        kind: RouteKind::Local,
        scope: RouteScope::Host,
        ..route(104, "0.0.0.0/0", "lo")
    });
    routes
}

fn listing(stage: &Stage) -> String {
    let commands = ["rule", "-4 route show table all", "-4 -o address show"];
    commands.map(|command| stage.ip(command)).join("\n")
}

const EXPECTED_RULES: &str = "\
0:\tfrom all lookup local
100:\tfrom all fwmark 0x200/0x200 goto 32766 proto 133
101:\tfrom all fwmark 0x100/0x100 lookup 101 proto 133
102:\tfrom all fwmark 0x40/0x40 lookup 102 proto 133
102:\tfrom all fwmark 0x80/0x80 lookup 103 proto 133
103:\tfrom all lookup 100 proto 133
32766:\tfrom all lookup main
32767:\tfrom all lookup default";

const EXPECTED_TABLES: [(u32, &str); 5] = [
    (
        100,
        "10.0.0.2 dev eth0 proto 133 scope link\n10.244.1.4 via 192.168.126.2 dev istioin proto 133 src 10.0.0.1",
    ),
    (
        101,
        "default via 192.168.127.2 dev istioout proto 133\n10.0.0.2 dev eth0 proto 133 scope link",
    ),
    (
        102,
        "default via 10.0.0.2 dev eth0 proto 133 onlink\n10.0.0.2 dev eth0 proto 133 scope link",
    ),
    (
        103,
        "default via 192.168.126.2 dev istioin proto 133\n10.0.0.2 dev eth0 proto 133 scope link",
    ),
    (104, "local default dev lo proto 133 scope host"),
];

async fn make_all(netlink: &Netlink) -> Vec<Made> {
    let mut made = Vec::new();
    for link in &links() {
        made.push(netlink.add_link(link).await.unwrap());
    }
    for address in &addresses() {
        made.push(netlink.add_address(address).await.unwrap());
    }
    for rule in &rules() {
        made.push(netlink.add_rule(rule).await.unwrap());
    }
    for result in netlink.add_routes(&routes()).await {
        made.push(result.unwrap());
    }
    made
}

#[tokio::test]
async fn the_objects_of_a_node_look_as_ip_makes_them_and_leave_no_trace() {
    let stage = Stage::new().await;
    let netlink = &stage.netlink;
    let before = listing(&stage);
    let dumped = crate::dump::dump(&stage.ns).await.unwrap();

    let made = make_all(netlink).await;
    assert!(made.iter().all(|made| *made == Made::Created), "{made:?}");
    assert_eq!(stage.ip("rule"), EXPECTED_RULES);
    for (table, expected) in EXPECTED_TABLES {
        assert_eq!(stage.ip(&format!("route show table {table}")), expected);
    }
    let full = listing(&stage);
    let dumped_full = crate::dump::dump(&stage.ns).await.unwrap();
    assert!(!dumped.diff(&dumped_full).is_empty());

    let again = make_all(netlink).await;
    assert!(again.iter().all(|made| *made == Made::Existed), "{again:?}");
    assert_eq!(listing(&stage), full);
    sysctl::write(&stage.ns, "net/ipv4/conf/istioin/rp_filter", "2").unwrap();

    for route in routes().iter().rev() {
        assert!(netlink.del_route(route).await.unwrap(), "{route:?}");
    }
    for rule in rules().iter().rev() {
        assert!(netlink.del_rule(rule).await.unwrap(), "{rule:?}");
    }
    for address in addresses().iter().rev() {
        assert!(netlink.del_address(address).await.unwrap(), "{address:?}");
    }
    for link in links().iter().rev() {
        assert!(netlink.del_link(&link.name).await.unwrap(), "{link:?}");
    }
    assert_eq!(listing(&stage), before);
    let after = crate::dump::dump(&stage.ns).await.unwrap();
    assert_eq!(dumped.diff(&after), Vec::<String>::new());
}
