#![allow(clippy::unwrap_used, clippy::expect_used)]

use serde_json::{Value, json};

use super::Ruleset;
use super::rules;
use crate::explain::rule::{Masked, Match, Target};

fn read(parts: Value) -> (Vec<(bool, Match)>, Target) {
    rules::read(parts.as_array().unwrap())
}

fn matched(left: Value, op: &str, right: Value) -> Vec<(bool, Match)> {
    read(json!([{"match": {"op": op, "left": left, "right": right}}])).0
}

fn done(parts: Value) -> Target {
    read(parts).1
}

#[test]
fn conditions_bring_along_what_they_need() {
    let address = json!({"payload": {"protocol": "ip", "field": "daddr"}});
    let found = matched(address, "!=", json!("127.0.0.1"));
    // A packet of IPv6 has no such address, and does not fit either.
    assert_eq!(found[0], (false, Match::Family(0)));
    assert!(matches!(found[1], (true, Match::Destination(_))));
    let port = json!({"payload": {"protocol": "tcp", "field": "dport"}});
    let found = matched(port, "!=", json!({"set": [15006, {"range": [80, 90]}]}));
    assert_eq!(found[0], (false, Match::Protocol("tcp".into())));
    assert_eq!(
        found[1],
        (true, Match::DestinationPorts(vec![15006..=15006, 80..=90]))
    );
    let mark = json!({"&": [{"meta": {"key": "mark"}}, 0xfff]});
    let masked = Masked {
        value: 0x539,
        mask: 0xfff,
    };
    assert_eq!(
        matched(mark, "==", json!(0x539)),
        [(false, Match::Mark(masked))]
    );
    let flags = json!({"&": [{"payload": {"protocol": "tcp", "field": "flags"}}, ["fin", "syn"]]});
    let found = matched(flags, "==", json!("syn"));
    let listed = |words: &[&str]| words.iter().map(|it| (*it).to_owned()).collect::<Vec<_>>();
    let wanted = Match::Flags(listed(&["FIN", "SYN"]), listed(&["SYN"]));
    assert_eq!(found.last().unwrap(), &(false, wanted));
    let device = matched(json!({"meta": {"key": "iifname"}}), "==", json!("eth*"));
    assert_eq!(device, [(false, Match::In("eth+".into()))]);
}

#[test]
fn what_is_not_known_is_not_guessed() {
    let ttl = json!({"payload": {"protocol": "ip", "field": "ttl"}});
    for (left, op, right) in [
        (ttl, "<", json!(255)),
        (
            json!({"payload": {"protocol": "ip", "field": "saddr"}}),
            "==",
            json!("@named"),
        ),
        (json!({"meta": {"key": "cpu"}}), "==", json!(1)),
    ] {
        let found = matched(left, op, right);
        assert!(
            matches!(found.last(), Some((_, Match::Unknown(_)))),
            "{found:?}"
        );
    }
    assert!(matches!(
        done(json!([{"queue": {"num": 1}}])),
        Target::Unknown(_)
    ));
}

#[test]
fn marks_become_what_the_kernel_makes_of_them() {
    let mark = |key: &str| json!({key: {"key": "mark"}});
    let set = |to: &str, value: Value| {
        done(
            json!([{"counter": {"packets": 1, "bytes": 2}}, {"mangle": {"key": mark(to), "value": value}}]),
        )
    };
    // `ct mark set ct mark & 0xfffff111 | 0x111`, as nft shortens it.
    let combined = json!({"|": [{"&": [mark("ct"), 0xffff_f111_u32]}, 0x111]});
    let Target::ConnectionMark(masked) = set("ct", combined) else {
        panic!("no mark of a connection");
    };
    for before in [0, 0x111, 0xfff, 0xabcd_e539] {
        assert_eq!(masked.applied(before), (before & 0xffff_f111) | 0x111);
    }
    assert_eq!(
        set("meta", mark("ct")),
        Target::RestoreMark(u32::MAX, u32::MAX)
    );
    let part = json!({"&": [mark("meta"), 0xff]});
    assert_eq!(set("ct", part), Target::SaveMark(0xff, u32::MAX));
    let both = json!([{"tproxy": {"port": 15006}}, {"mangle": {"key": mark("meta"), "value": 7}}, {"accept": null}]);
    let Target::Several(targets) = done(both) else {
        panic!("one of several");
    };
    assert_eq!(targets[0], Target::Give(15006));
    assert_eq!(targets[2], Target::Accept);
}

#[test]
fn tables_of_iptables_are_left_to_it_and_texts_go_over_lines() {
    let rule = |table: &str, handle: u64| {
        json!({"rule": {"family": if table == "own" { "inet" } else { "ip" }, "table": table, "chain": "c", "handle": handle,
            "expr": [{"counter": {"packets": 3, "bytes": 9}}, {"drop": null}]}})
    };
    let chain = |family: &str, table: &str| json!({"chain": {"family": family, "table": table, "name": "c", "type": "filter", "hook": "input", "prio": 10, "policy": "drop"}});
    let json = json!({"nftables": [
        chain("ip", "filter"), rule("filter", 4),
        chain("inet", "own"), rule("own", 4), rule("own", 5),
        chain("bridge", "other"),
    ]});
    let text = "table ip filter { # handle 1\n\tchain c { # handle 1\n\t\tcounter drop # handle 4\n\t}\n}\n\
        table inet own { # handle 2\n\tset s { # handle 9\n\t\ttype ipv4_addr\n\t\telements = { 10.0.0.1,\n\t\t\t     10.0.0.2 }\n\t}\n\n\
        \tchain c { # handle 1\n\t\ttype filter hook input priority 10; policy drop;\n\
        \t\tip saddr { 10.0.0.1,\n\t\t\t   10.0.0.2 } counter drop # handle 4\n\t\tcounter drop # handle 5\n\t}\n}\n";
    let ruleset = Ruleset::of(&json, text);
    assert_eq!(
        ruleset.names().into_iter().collect::<Vec<_>>(),
        ["inet own"]
    );
    for family in [0, 1] {
        let chain = &ruleset.tables[family]["inet own"]["c"];
        assert_eq!(chain.policy.as_deref(), Some("DROP"));
        assert_eq!(
            chain.rules[0].text,
            "ip saddr { 10.0.0.1, 10.0.0.2 } counter drop"
        );
        assert_eq!(chain.rules[1].text, "counter drop");
    }
    let base = &ruleset.bases[0];
    assert_eq!((base.hook.as_str(), base.priority), ("INPUT", 10));
    let counted = ("inet own".to_owned(), "c".to_owned(), 2);
    assert_eq!(ruleset.counted[&counted], 3);
}
