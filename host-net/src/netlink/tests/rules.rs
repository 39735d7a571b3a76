//! Policy rules.

use super::*;

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
    let other = rule(101, Some((0x100, 0x100)), RuleAction::Lookup(101));
    let wanted = Rule {
        family: Family::V6,
        ..other.clone()
    };
    let made = stage.netlink.add_rule(&wanted).await;
    assert_eq!(made.unwrap(), Made::Created);
    assert!(!stage.netlink.has_rule(&other).await.unwrap());
    let listed = stage.netlink.rules(Family::V6).await.unwrap();
    assert!(listed.iter().any(|it| it.rule.as_ref() == Some(&wanted)));
    assert!(
        stage
            .ip("-6 rule")
            .contains("fwmark 0x100/0x100 lookup 101")
    );
    assert!(!stage.netlink.del_rule(&other).await.unwrap());
    let jump = Rule {
        family: Family::V6,
        ..rule(100, Some((0x200, 0x200)), RuleAction::Goto(32766))
    };
    assert_eq!(stage.netlink.add_rule(&jump).await.unwrap(), Made::Created);
    assert!(stage.ip("-6 rule").contains("goto 32766 proto 133"));
    let elsewhere = Rule {
        action: RuleAction::Goto(101),
        ..jump.clone()
    };
    let error = stage.netlink.add_rule(&elsewhere).await.unwrap_err();
    assert!(error.to_string().starts_with("IPv6 rule 100: "), "{error}");
    for rule in [&wanted, &jump] {
        assert!(stage.netlink.del_rule(rule).await.unwrap());
    }
}
