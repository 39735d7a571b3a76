#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::plan::{Family, Jump, MarkMatch, Table};

fn plan() -> Plan {
    let chain = |name: &str, rules: &[&str], jump| {
        Step::Chain(Chain {
            family: Family::V4,
            table: Table::Mangle,
            name: name.to_owned(),
            rules: rules.iter().map(|&r| r.to_owned()).collect(),
            jump,
        })
    };
    Plan {
        name: "p".to_owned(),
        steps: vec![
            Step::Set(Set {
                name: "pods".to_owned(),
                family: Family::V4,
                comments: true,
            }),
            Step::Link(Link {
                name: "istioin".to_owned(),
                overlay: OverlayKind::Geneve,
                vni: 1000,
                remote: [10, 0, 0, 9].into(),
                port: 6081,
                mtu: 1450,
            }),
            Step::Address(Address {
                dev: "istioin".to_owned(),
                addr: "192.168.126.1/30".parse().unwrap(),
            }),
            Step::Rule(Rule {
                family: Family::V4,
                priority: 100,
                fwmark: Some(MarkMatch {
                    value: 0x200,
                    mask: 0x200,
                }),
                action: RuleAction::Goto(32766),
            }),
            Step::Route(Route {
                table: 100,
                dst: "10.244.1.4/32".parse().unwrap(),
                dev: "istioin".to_owned(),
                via: Some([192, 168, 126, 2].into()),
                src: Some([10, 244, 1, 1].into()),
                onlink: false,
                kind: RouteKind::Unicast,
                scope: RouteScope::Global,
            }),
            Step::Sysctl(Sysctl {
                key: "net/ipv4/conf/eth0.5/rp_filter".to_owned(),
                value: "2".to_owned(),
            }),
            Step::Member(Member {
                set: "pods".to_owned(),
                ip: [10, 244, 1, 4].into(),
                comment: Some("it's".to_owned()),
            }),
            chain(
                "ONE",
                &["-j TWO"],
                Some(Jump {
                    from: "PREROUTING".to_owned(),
                    position: Position::First,
                }),
            ),
            chain("TWO", &["-p tcp -j RETURN"], None),
            Step::ChainRule(ChainRule {
                family: Family::V6,
                table: Table::Filter,
                chain: "FORWARD".to_owned(),
                rule: "-i veth1 -j DROP".to_owned(),
                position: Position::Last,
            }),
        ],
    }
}

#[test]
fn a_plan_reads_like_what_an_operator_would_type() {
    assert_eq!(
        as_commands(&plan()),
        [
            "ipset create pods hash:ip family inet comment",
            "ip link add istioin mtu 1450 type geneve id 1000 remote 10.0.0.9 dstport 6081",
            "ip link set istioin up",
            "ip addr add 192.168.126.1/30 dev istioin",
            "ip rule add pref 100 fwmark 0x200/0x200 goto 32766 protocol 133",
            "ip route add 10.244.1.4/32 via 192.168.126.2 dev istioin src 10.244.1.1 table 100 scope global proto 133",
            "echo '2' > /proc/sys/net/ipv4/conf/eth0.5/rp_filter",
            "ipset add pods 10.244.1.4 comment 'it'\\''s'",
            "iptables -w -t mangle -N ONE",
            "iptables -w -t mangle -N TWO",
            "iptables -w -t mangle -A ONE -j TWO",
            "iptables -w -t mangle -A TWO -p tcp -j RETURN",
            "iptables -w -t mangle -I PREROUTING 1 -j ONE",
            "ip6tables -w -t filter -A FORWARD -i veth1 -j DROP",
        ]
    );
}

#[test]
fn removal_goes_backwards_and_deletes_chains_when_nothing_refers_to_them() {
    assert_eq!(
        as_removal_commands(&plan()),
        [
            "ip6tables -w -t filter -D FORWARD -i veth1 -j DROP",
            "iptables -w -t mangle -D PREROUTING -j ONE",
            "iptables -w -t mangle -F TWO",
            "iptables -w -t mangle -F ONE",
            "iptables -w -t mangle -X TWO",
            "iptables -w -t mangle -X ONE",
            "ipset del pods 10.244.1.4",
            "# put back the previous value of /proc/sys/net/ipv4/conf/eth0.5/rp_filter",
            "ip route del 10.244.1.4/32 via 192.168.126.2 dev istioin src 10.244.1.1 table 100 scope global proto 133",
            "ip rule del pref 100 fwmark 0x200/0x200 goto 32766 protocol 133",
            "ip addr del 192.168.126.1/30 dev istioin",
            "ip link del istioin",
            "ipset destroy pods",
        ]
    );
}
