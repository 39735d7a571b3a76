#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::net::Ipv4Addr;
use std::process::Command;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn shell(netns: &Netns, line: &str) -> String {
    let output = netns.run(|| Command::new("sh").args(["-c", line]).output());
    let output = output.unwrap().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

fn set(name: &str, comments: bool) -> Set {
    Set {
        name: name.to_owned(),
        family: Family::V4,
        comments,
    }
}

fn member(set: &str, ip: &str, comment: Option<&str>) -> Member {
    Member {
        set: set.to_owned(),
        ip: ip.parse().unwrap(),
        comment: comment.map(str::to_owned),
    }
}

#[test]
fn a_set_looks_as_if_the_ipset_program_had_made_it() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    for comments in [true, false] {
        let word = if comments { "comment" } else { "" };
        shell(&netns, &format!("ipset create probe hash:ip {word}"));
        let expected = shell(&netns, "ipset list probe");
        shell(&netns, "ipset destroy probe");
        assert_eq!(sets.create(&set("probe", comments)).unwrap(), Made::Created);
        let found = shell(&netns, "ipset list probe");
        // The seed of the hash is random, the last word of its line.
        let without_seed = |text: &str| -> Vec<String> {
            let line = |line: &str| line.split(" initval").next().unwrap_or(line).to_owned();
            text.lines().map(line).collect()
        };
        assert_eq!(without_seed(&found), without_seed(&expected));
        assert!(sets.destroy("probe").unwrap());
    }
}

#[test]
fn an_existing_set_is_accepted_only_if_it_is_the_same() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    let wanted = set("pods", true);
    assert_eq!(sets.create(&wanted).unwrap(), Made::Created);
    assert_eq!(sets.create(&wanted).unwrap(), Made::Existed);
    for (definition, shown) in [
        ("hash:ip", "hash:ip family inet"),
        (
            "hash:ip family inet6 comment",
            "hash:ip family inet6 comment",
        ),
        (
            "hash:ip timeout 60 comment",
            "hash:ip family inet timeout 60 comment",
        ),
        (
            "hash:ip netmask 24 comment",
            "hash:ip family inet netmask 24 comment",
        ),
        (
            "hash:ip counters comment",
            "hash:ip family inet counters comment",
        ),
        ("hash:net comment", "hash:net family inet comment"),
    ] {
        shell(
            &netns,
            &format!("ipset destroy pods; ipset create pods {definition}"),
        );
        match sets.create(&wanted) {
            Err(IpsetError::Conflict { found, .. }) => assert_eq!(found, shown),
            other => panic!("{definition}: {other:?}"),
        }
    }
}

#[test]
fn entries_carry_their_owner_and_leave_only_with_it() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    sets.create(&set("pods", true)).unwrap();
    let first = member("pods", "10.244.1.4", Some("uid-1"));
    let second = member("pods", "10.244.1.3", None);
    sets.add(&[first.clone(), second.clone()]).unwrap();
    let listed = sets.list("pods").unwrap().unwrap();
    assert_eq!(listed, [second.clone(), first.clone()]);
    assert!(shell(&netns, "ipset save pods").contains("add pods 10.244.1.4 comment \"uid-1\""));
    assert!(sets.test("pods", first.ip).unwrap());
    assert!(
        !sets
            .test("pods", Ipv4Addr::new(10, 0, 0, 1).into())
            .unwrap()
    );

    // The address goes to another pod before the entry of the first one is removed.
    let heir = member("pods", "10.244.1.4", Some("uid-2"));
    sets.add(std::slice::from_ref(&heir)).unwrap();
    assert_eq!(
        sets.del_all(&[
            first.clone(),
            second.clone(),
            member("other", "10.0.0.1", None)
        ])
        .unwrap(),
        [
            Removal::OwnedByOther {
                comment: Some("uid-2".to_owned())
            },
            Removal::Removed,
            Removal::Absent,
        ]
    );
    let owned_by_heir = sets.list("pods").unwrap().unwrap();
    assert_eq!(owned_by_heir, std::slice::from_ref(&heir));
    assert_eq!(sets.del(&heir).unwrap(), Removal::Removed);
    assert_eq!(sets.del(&heir).unwrap(), Removal::Absent);
    assert_eq!(sets.list("pods").unwrap().unwrap(), []);
}

/// As the other ones, and the kernel keeps the families apart.
#[test]
fn a_set_of_ipv6_addresses() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    let wanted = Set {
        family: Family::V6,
        ..set("pods6", true)
    };
    assert_eq!(sets.create(&wanted).unwrap(), Made::Created);
    assert_eq!(sets.create(&wanted).unwrap(), Made::Existed);
    let error = sets.create(&set("pods6", true)).unwrap_err().to_string();
    assert!(
        error.contains(
            "exists as `hash:ip family inet6 comment`, wanted `hash:ip family inet comment`"
        ),
        "{error}"
    );
    let members: Vec<Member> = (1..2000)
        .map(|n: u32| member("pods6", &format!("fd00:10:244::{n:x}"), Some("uid")))
        .collect();
    sets.add(&members).unwrap();
    let listed = sets.list("pods6").unwrap().unwrap();
    assert_eq!(listed.len(), members.len());
    assert!(members.iter().all(|member| listed.contains(member)));
    assert!(
        shell(&netns, "ipset save pods6").contains("add pods6 fd00:10:244::7cf comment \"uid\"")
    );
    assert!(sets.test("pods6", members[0].ip).unwrap());
    assert!(
        !sets
            .test("pods6", "fd00:10:244::ffff".parse().unwrap())
            .unwrap()
    );
    let stranger = Member {
        comment: Some("other".to_owned()),
        ..members[0].clone()
    };
    assert_ne!(sets.del(&stranger).unwrap(), Removal::Removed);
    assert_eq!(sets.del(&members[0]).unwrap(), Removal::Removed);
    assert!(!sets.test("pods6", members[0].ip).unwrap());
    sets.add(&[member("pods6", "10.0.0.1", None)]).unwrap_err();
}

#[test]
fn thousands_of_entries_go_in_and_come_back() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    sets.create(&set("many", true)).unwrap();
    let address = |n: u16| Ipv4Addr::from(0x0a00_0001 + u32::from(n) * 3);
    let members: Vec<Member> = (0..3000)
        .map(|n| Member {
            set: "many".to_owned(),
            ip: address(n).into(),
            comment: Some(format!("0f6c3a52-91d7-4d0e-8a36-{n:012}")),
        })
        .collect();
    sets.add(&members).unwrap();
    assert_eq!(sets.list("many").unwrap().unwrap(), members);
    let removals = sets.del_all(&members[..2990]).unwrap();
    assert!(removals.iter().all(|removal| *removal == Removal::Removed));
    assert_eq!(sets.list("many").unwrap().unwrap(), members[2990..]);
}

#[test]
fn a_refused_entry_is_named_and_those_before_it_stay() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    sets.create(&set("plain", false)).unwrap();
    let good = member("plain", "10.0.0.1", None);
    let late = member("plain", "10.0.0.3", None);
    let commented = member("plain", "10.0.0.2", Some("uid"));
    let error = sets.add(&[good.clone(), commented, late]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "ipset plain: add 10.0.0.2: the set was made without comments"
    );
    assert_eq!(sets.list("plain").unwrap().unwrap(), [good]);
    let error = sets
        .add(&[member("gone", "10.0.0.1", None)])
        .unwrap_err()
        .to_string();
    assert!(
        error.starts_with("ipset gone: add") && error.ends_with("no such set"),
        "{error}"
    );
}

#[test]
fn a_set_that_a_rule_uses_is_not_destroyed() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    sets.create(&set("used", false)).unwrap();
    shell(
        &netns,
        "iptables-legacy -t mangle -A OUTPUT -m set --match-set used dst -j ACCEPT",
    );
    assert_eq!(sets.header("used").unwrap().unwrap().references, 1);
    let error = sets.destroy("used").unwrap_err().to_string();
    assert!(
        error.contains("ipset used: destroy: the set is in use"),
        "{error}"
    );
    shell(&netns, "iptables-legacy -t mangle -F OUTPUT");
    assert!(sets.destroy("used").unwrap());
    assert!(!sets.destroy("used").unwrap());
}

#[test]
fn sets_are_swapped_listed_flushed_and_belong_to_one_namespace() {
    let (netns, elsewhere) = (
        Netns::create_unnamed().unwrap(),
        Netns::create_unnamed().unwrap(),
    );
    let sets = Ipset::open(&netns).unwrap();
    sets.create(&set("b", false)).unwrap();
    sets.create(&set("a", false)).unwrap();
    sets.add(&[member("a", "10.0.0.1", None)]).unwrap();
    sets.swap("a", "b").unwrap();
    assert_eq!(sets.list("a").unwrap().unwrap(), []);
    assert_eq!(
        sets.list("b").unwrap().unwrap(),
        [member("b", "10.0.0.1", None)]
    );
    assert_eq!(sets.sets().unwrap(), ["a", "b"]);
    assert!(sets.flush("b").unwrap());
    assert_eq!(sets.list("b").unwrap().unwrap(), []);
    assert_eq!(sets.list("c").unwrap(), None);
    assert!(!sets.flush("c").unwrap());

    // A socket stays where it was opened, whichever namespace its user is in.
    let others = Ipset::open(&elsewhere).unwrap();
    assert_eq!(netns.run(|| others.sets().unwrap()).unwrap(), [""; 0]);
    assert_eq!(elsewhere.run(|| sets.sets().unwrap()).unwrap(), ["a", "b"]);
}

#[test]
fn a_set_of_another_type_can_be_looked_at() {
    let netns = Netns::create_unnamed().unwrap();
    let sets = Ipset::open(&netns).unwrap();
    shell(
        &netns,
        "ipset create ports hash:ip,port; ipset add ports 10.0.0.1,tcp:80",
    );
    let listing = sets.listing("ports").unwrap().unwrap();
    assert_eq!(listing.header.definition(), "hash:ip,port family inet");
    assert_eq!(listing.entries.len(), 1);
    assert_eq!(
        listing.entries[0].ip,
        Some(Ipv4Addr::new(10, 0, 0, 1).into())
    );
    assert!(matches!(
        sets.list("ports"),
        Err(IpsetError::Conflict { .. })
    ));
}

#[test]
fn names_and_comments_that_the_kernel_would_cut_are_refused() {
    let sets = Ipset::open(&Netns::create_unnamed().unwrap()).unwrap();
    for name in ["", &"n".repeat(32), "a\0b"] {
        let error = sets.create(&set(name, true)).unwrap_err();
        assert!(matches!(error, IpsetError::Name { .. }), "{error}");
    }
    sets.create(&set(&"n".repeat(31), true)).unwrap();
    for comment in ["a\0b", "a\"b", "a\nb", &"c".repeat(256)] {
        let error = sets
            .add(&[member(&"n".repeat(31), "10.0.0.1", Some(comment))])
            .unwrap_err();
        assert!(matches!(error, IpsetError::Comment { .. }), "{error}");
    }
    let longest = member(&"n".repeat(31), "10.0.0.1", Some(&"c".repeat(255)));
    sets.add(std::slice::from_ref(&longest)).unwrap();
    assert_eq!(sets.list(&longest.set).unwrap().unwrap(), [longest]);
}

proptest! {
    #[test]
    fn arbitrary_answers_do_not_panic(parts in vec(vec(any::<u8>(), 0..120), 0..4)) {
        let _ = protocol::listing_from(&parts);
        let _ = protocol::names_from(&parts);
        for part in &parts {
            let _ = protocol::revision_from(part);
            let _ = protocol::refused_index(part);
        }
    }

    /// Damage to a valid request, which has the form of an answer, reaches deeper than random bytes.
    #[test]
    fn damaged_answers_do_not_panic(at in 0usize..400, byte in any::<u8>(), keep in 0usize..400) {
        let elements: Vec<Element<'_>> = (1..6)
            .map(|n| Element { ip: Ipv4Addr::from(n).into(), comment: Some("owner") })
            .collect();
        let mut part = protocol::create("set", 6, Family::V4, true).unwrap();
        part.extend(protocol::batches("set", &elements).unwrap().remove(0).1);
        let whole = protocol::listing_from(std::slice::from_ref(&part)).unwrap().unwrap();
        prop_assert_eq!(whole.entries.len(), 5);
        if let Some(hit) = part.get_mut(at) {
            *hit = byte;
        }
        part.truncate(keep.max(1));
        let _ = protocol::listing_from(&[part]);
    }

    #[test]
    fn batches_hold_every_entry_once_and_fit_a_message(lengths in vec(0usize..=255, 0..900)) {
        let comments: Vec<String> = lengths.iter().map(|length| "c".repeat(*length)).collect();
        let elements: Vec<Element<'_>> = comments
            .iter()
            .zip(1u32..)
            .map(|(comment, n)| Element { ip: Ipv4Addr::from(n).into(), comment: Some(comment) })
            .collect();
        let header = protocol::create("set", 6, Family::V4, true).unwrap();
        let mut next = 0;
        for (first, request) in protocol::batches("set", &elements).unwrap() {
            prop_assert_eq!(first, next);
            prop_assert!(request.len() < 34 * 1024);
            let part = [header.clone(), request].concat();
            let entries = protocol::listing_from(&[part]).unwrap().unwrap().entries;
            prop_assert!(!entries.is_empty());
            for (entry, element) in entries.iter().zip(&elements[next..]) {
                prop_assert_eq!(entry.ip, Some(element.ip));
                prop_assert_eq!(entry.comment.as_deref(), element.comment);
            }
            next += entries.len();
        }
        prop_assert_eq!(next, elements.len());
    }
}
