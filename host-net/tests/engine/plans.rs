//! Plans that hold every kind of step, in the shapes that both captures use.

use std::net::Ipv4Addr;

use host_net::plan::*;

pub fn link(name: &str, vni: u32) -> Step {
    Step::Link(Link {
        name: name.to_owned(),
        overlay: OverlayKind::Vxlan,
        vni,
        remote: Ipv4Addr::new(10, 9, 0, 2),
        port: 6081,
        mtu: 1450,
    })
}

pub fn address(dev: &str, addr: &str) -> Step {
    Step::Address(Address {
        dev: dev.to_owned(),
        addr: addr.parse().unwrap(),
    })
}

pub fn rule(priority: u32, mark: u32, action: RuleAction) -> Step {
    Step::Rule(Rule {
        family: Family::V4,
        priority,
        fwmark: Some(MarkMatch {
            value: mark,
            mask: mark,
        }),
        action,
    })
}

fn rule6(priority: u32, mark: u32, action: RuleAction) -> Step {
    match rule(priority, mark, action) {
        Step::Rule(rule) => Step::Rule(Rule {
            family: Family::V6,
            ..rule
        }),
        other => other,
    }
}

pub fn route(table: u32, dst: &str, dev: &str) -> Route {
    Route {
        table,
        dst: dst.parse().unwrap(),
        dev: dev.to_owned(),
        via: None,
        src: None,
        onlink: false,
        kind: RouteKind::Unicast,
        scope: RouteScope::Link,
    }
}

pub fn via(table: u32, dst: &str, dev: &str, via: &str) -> Route {
    Route {
        via: Some(via.parse().unwrap()),
        scope: RouteScope::Global,
        ..route(table, dst, dev)
    }
}

pub fn sysctl(key: &str, value: &str) -> Step {
    Step::Sysctl(Sysctl {
        key: key.to_owned(),
        value: value.to_owned(),
    })
}

pub fn set(name: &str, comments: bool) -> Step {
    Step::Set(Set {
        name: name.to_owned(),
        family: Family::V4,
        comments,
    })
}

pub fn member(set: &str, last: u8, comment: Option<&str>) -> Step {
    Step::Member(Member {
        set: set.to_owned(),
        ip: Ipv4Addr::new(10, 244, 1, last).into(),
        comment: comment.map(str::to_owned),
    })
}

pub fn chain(table: Table, name: &str, rules: &[&str], jump: Option<(&str, Position)>) -> Step {
    Step::Chain(Chain {
        family: Family::V4,
        table,
        name: name.to_owned(),
        rules: rules.iter().map(|&rule| rule.to_owned()).collect(),
        jump: jump.map(|(from, position)| Jump {
            from: from.to_owned(),
            position,
        }),
    })
}

pub fn chain_rule(
    family: Family,
    table: Table,
    chain: &str,
    rule: &str,
    position: Position,
) -> Step {
    Step::ChainRule(ChainRule {
        family,
        table,
        chain: chain.to_owned(),
        rule: rule.to_owned(),
        position,
    })
}

/// Where all pods' IPv6 is dropped: an empty chain that other plans fill.
pub fn v6_chain() -> Step {
    Step::Chain(Chain {
        family: Family::V6,
        table: Table::Filter,
        name: "ambidex-v6".to_owned(),
        rules: Vec::new(),
        jump: Some(Jump {
            from: "FORWARD".to_owned(),
            position: Position::First,
        }),
    })
}

/// Like a node's capture, with two pods: every kind of step and both iptables families.
pub fn node() -> Plan {
    let first = |from| Some((from, Position::First));
    Plan {
        name: "host-node".to_owned(),
        steps: vec![
            set("pods", true),
            set("live", false),
            link("tunin", 1000),
            link("tunout", 1001),
            address("tunin", "192.168.126.1/30"),
            address("tunout", "192.168.127.1/30"),
            sysctl("net/ipv4/conf/tunin/rp_filter", "2"),
            sysctl("net/ipv4/conf/eth0/rp_filter", "2"),
            rule(100, 0x200, RuleAction::Goto(32766)),
            rule(101, 0x100, RuleAction::Lookup(101)),
            Step::Rule(Rule {
                family: Family::V4,
                priority: 103,
                fwmark: None,
                action: RuleAction::Lookup(100),
            }),
            Step::Route(route(100, "10.9.0.2/32", "eth0")),
            Step::Route(via(101, "0.0.0.0/0", "tunout", "192.168.127.2")),
            Step::Route(Route {
                onlink: true,
                ..via(102, "0.0.0.0/0", "eth0", "10.9.0.2")
            }),
            Step::Route(Route {
                kind: RouteKind::Local,
                scope: RouteScope::Host,
                ..route(104, "0.0.0.0/0", "lo")
            }),
            chain(
                Table::Mangle,
                "own-PRE",
                &[
                    "-i tunin -j MARK --set-xmark 0x200/0x200",
                    "-m mark --mark 0x200/0x200 -j RETURN",
                    "-p tcp -m set --match-set pods src -j MARK --set-xmark 0x100/0x100",
                    "-m mark --mark 0x100/0x100 -j own-MORE",
                    "-m mark --mark 0x200/0x200 -j RETURN",
                ],
                first("PREROUTING"),
            ),
            chain(
                Table::Mangle,
                "own-MORE",
                &["-m set --match-set live src -j RETURN"],
                None,
            ),
            chain(
                Table::Nat,
                "own-PRE",
                &["-m mark --mark 0x100/0x100 -j ACCEPT"],
                first("PREROUTING"),
            ),
            chain(
                Table::Filter,
                "own-FWD",
                &["-m mark --mark 0x100/0x100 -j ACCEPT"],
                Some(("FORWARD", Position::Last)),
            ),
            v6_chain(),
            Step::Set(Set {
                name: "pods6".to_owned(),
                family: Family::V6,
                comments: true,
            }),
            address("tunin", "fd00:126::1/126"),
            rule6(100, 0x200, RuleAction::Goto(32766)),
            rule6(101, 0x100, RuleAction::Lookup(101)),
            Step::Route(Route {
                src: Some("fd00:126::1".parse().unwrap()),
                ..via(100, "fd00:10:244::5/128", "tunin", "fd00:126::2")
            }),
            Step::Route(via(101, "::/0", "tunin", "fd00:126::2")),
            Step::Route(Route {
                onlink: true,
                ..via(102, "::/0", "eth0", "fd00:99::2")
            }),
            Step::Route(Route {
                kind: RouteKind::Local,
                scope: RouteScope::Host,
                ..route(104, "::/0", "lo")
            }),
            sysctl("net/ipv6/conf/tunin/accept_ra", "0"),
            Step::Chain(Chain {
                family: Family::V6,
                table: Table::Mangle,
                name: "own-PRE".to_owned(),
                rules: vec![
                    "-p ipv6-icmp -m icmp6 --icmpv6-type 135 -j RETURN".to_owned(),
                    "-p tcp -m set --match-set pods6 src -j MARK --set-xmark 0x100/0x100"
                        .to_owned(),
                ],
                jump: Some(Jump {
                    from: "PREROUTING".to_owned(),
                    position: Position::First,
                }),
            }),
            Step::Member(Member {
                set: "pods6".to_owned(),
                ip: "fd00:10:244::5".parse().unwrap(),
                comment: Some("uid-1".to_owned()),
            }),
            chain_rule(
                Family::V4,
                Table::Nat,
                "OUTPUT",
                "-d 198.51.100.7/32 -p tcp -j ACCEPT",
                Position::First,
            ),
            chain_rule(
                Family::V6,
                Table::Filter,
                "ambidex-v6",
                "-i other0 -j DROP",
                Position::Last,
            ),
            member("pods", 4, Some("uid-4")),
            member("pods", 5, Some("uid-5")),
            member("live", 5, None),
            Step::Route(Route {
                src: Some("10.9.0.1".parse().unwrap()),
                ..via(100, "10.244.1.4/32", "tunin", "192.168.126.2")
            }),
            Step::Route(via(100, "10.244.1.5/32", "tunin", "192.168.126.2")),
        ],
    }
}

/// Another state of the same plan: things gone, things changed in place, things new.
pub fn node_draining() -> Plan {
    let mut plan = node();
    plan.steps.retain(|step| {
        !matches!(step, Step::Member(m) if m.set == "live")
            && !matches!(step, Step::Set(s) if s.name == "live")
            && !matches!(step, Step::Route(r) if r.dst.to_string() == "10.244.1.5/32")
            && !matches!(step, Step::Chain(c) if c.name == "own-MORE" || c.name == "own-FWD")
    });
    for step in &mut plan.steps {
        match step {
            Step::Chain(c) if c.table == Table::Mangle && c.family == Family::V4 => {
                c.rules = vec![
                    "-m mark --mark 0x200/0x200 -j RETURN".to_owned(),
                    "-p tcp -m set --match-set fresh src -j MARK --set-xmark 0x100/0x100"
                        .to_owned(),
                ];
            }
            Step::Link(l) if l.name == "tunout" => l.vni = 1003,
            Step::Address(a) if a.dev == "tunout" => a.addr = "192.168.127.1/29".parse().unwrap(),
            Step::Rule(r) if r.priority == 100 => r.action = RuleAction::Goto(103),
            Step::Rule(r) if r.priority == 101 => r.action = RuleAction::Lookup(102),
            Step::Route(r) if r.table == 102 && r.dst.addr().is_ipv4() => {
                r.via = Some("10.9.0.3".parse().unwrap());
            }
            Step::Route(r) if r.table == 102 => r.via = Some("fd00:99::3".parse().unwrap()),
            Step::Sysctl(s) if s.key.contains("eth0") => s.value = "0".to_owned(),
            Step::Member(m) if m.comment.as_deref() == Some("uid-5") => {
                m.comment = Some("uid-6".to_owned());
            }
            _ => {}
        }
    }
    plan.steps.insert(0, set("fresh", false));
    plan
}
