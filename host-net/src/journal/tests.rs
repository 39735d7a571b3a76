#![allow(clippy::unwrap_used, clippy::expect_used)]

use super::*;
use crate::plan::Sysctl;

fn record(name: &str, ino: u64, value: &str) -> Record {
    Record {
        plan: Plan {
            name: name.to_owned(),
            steps: vec![Step::Sysctl(Sysctl {
                key: "net/ipv4/conf/eth0.5/rp_filter".to_owned(),
                value: value.to_owned(),
            })],
        },
        place_label: "host".to_owned(),
        netns: NetnsId { dev: 4, ino },
        netns_path: Some(PathBuf::from("/run/netns/x")),
        boot_id: boot_id(),
        previous_sysctls: BTreeMap::from([(
            "net/ipv4/conf/eth0.5/rp_filter".to_owned(),
            "1".to_owned(),
        )]),
        preexisting: Vec::new(),
        nft_caused: vec![NftHook {
            family: Family::V6,
            table: Table::Nat,
            chain: None,
        }],
        iptables: Iptables::both(crate::iptables::Variant::Legacy),
    }
}

#[test]
fn a_record_survives_reopening_and_is_gone_when_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path().join("a/b")).unwrap();
    let wanted = record("host-node", 7, "2");
    journal.store(&wanted).unwrap();
    let again = Journal::open(dir.path().join("a/b")).unwrap();
    assert_eq!(again.load("host-node").unwrap(), Some(wanted));
    assert_eq!(again.list().unwrap(), ["host-node"]);
    again.forget("host-node").unwrap();
    again.forget("host-node").unwrap();
    assert_eq!(journal.load("host-node").unwrap(), None);
}

#[test]
fn a_replaced_record_is_seen_even_if_another_program_replaced_it() {
    let dir = tempfile::tempdir().unwrap();
    let mine = Journal::open(dir.path()).unwrap();
    let other = Journal::open(dir.path()).unwrap();
    for round in 0..20 {
        // Same length each time, so that only inode or time can tell the difference.
        let wanted = record("p", 7, &(round % 10).to_string());
        other.store(&wanted).unwrap();
        assert_eq!(mine.load("p").unwrap(), Some(wanted));
    }
}

#[test]
fn a_damaged_record_is_an_error_of_its_own_and_does_not_hide_the_others() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    journal.store(&record("good", 7, "0")).unwrap();
    journal.store(&record("elsewhere", 8, "0")).unwrap();
    fs::write(dir.path().join("bad.json"), "{\"plan\":").unwrap();
    let error = journal.load("bad").unwrap_err().to_string();
    assert!(error.contains("bad.json is damaged"), "{error}");
    let others = journal.others_in(NetnsId { dev: 4, ino: 7 }, "mine");
    assert_eq!(others.len(), 1);
    assert_eq!(others[0].plan.name, "good");
}

/// They are found without a look at the directory, and are what a look would find.
#[test]
fn records_of_a_namespace_follow_what_is_written_and_forgotten() {
    let dir = tempfile::tempdir().unwrap();
    let before = Journal::open(dir.path()).unwrap();
    for name in ["b", "a"] {
        before.store(&record(name, 7, "0")).unwrap();
    }
    let journal = Journal::open(dir.path()).unwrap();
    let names = |journal: &Journal| -> Vec<String> {
        let others = journal.others_in(NetnsId { dev: 4, ino: 7 }, "mine");
        others.iter().map(|it| it.plan.name.clone()).collect()
    };
    assert_eq!(names(&journal), ["a", "b"]);
    journal.store(&record("mine", 7, "0")).unwrap();
    journal.store(&record("c", 7, "0")).unwrap();
    journal.store(&record("a", 8, "0")).unwrap();
    journal.forget("b").unwrap();
    assert_eq!(names(&journal), ["c"]);
    assert_eq!(names(&Journal::open(dir.path()).unwrap()), ["c"]);
}

/// Power was lost: the record that was being written then is of no use, and must not keep the agent from starting.
#[test]
fn what_an_earlier_boot_left_incomplete_is_forgotten_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    journal.store(&record("whole", 7, "0")).unwrap();
    for empty in ["empty", "cut"] {
        fs::write(dir.path().join(format!("{empty}.json")), "").unwrap();
    }
    fs::write(dir.path().join("cut.json"), "{\"plan\":").unwrap();
    let again = Journal::open(dir.path()).unwrap();
    assert_eq!(
        again.list().unwrap(),
        ["cut", "empty", "whole"],
        "the same boot"
    );
    fs::write(dir.path().join(".boot"), "another boot").unwrap();
    let after = Journal::open(dir.path()).unwrap();
    assert_eq!(after.list().unwrap(), ["whole"]);
    // From then on it is this boot's directory again.
    fs::write(dir.path().join("cut.json"), "{").unwrap();
    let same = Journal::open(dir.path()).unwrap();
    assert!(same.load("cut").is_err());
}

#[test]
fn a_half_written_file_is_never_taken_for_a_record() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    fs::write(dir.path().join(".p.1.tmp"), "{").unwrap();
    assert!(journal.list().unwrap().is_empty());
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    for name in ["", "..", "../x", "a/b", ".hidden", "a b"] {
        assert!(
            matches!(journal.load(name), Err(JournalError::Name(_))),
            "{name:?}"
        );
    }
}

#[test]
fn an_unwritable_record_leaves_the_previous_one() {
    let dir = tempfile::tempdir().unwrap();
    let journal = Journal::open(dir.path()).unwrap();
    let first = record("p", 7, "0");
    journal.store(&first).unwrap();
    // A directory where the file written aside should be: creation fails for root too.
    fs::create_dir(dir.path().join(format!(".p.{}.tmp", std::process::id()))).unwrap();
    assert!(journal.store(&record("p", 7, "1")).is_err());
    assert_eq!(journal.load("p").unwrap(), Some(first));
}

/// Records of a time without IPv6 say nothing of families, and what is about IPv4 is still written as it was.
#[test]
fn steps_without_a_family_are_about_ipv4() {
    let written = [
        r#"{"step":"rule","priority":101,"fwmark":{"value":256,"mask":256},"action":{"lookup":101}}"#,
        r#"{"step":"set","name":"ztunnel-pods-ips","comments":true}"#,
        r#"{"step":"member","set":"ztunnel-pods-ips","ip":"10.244.1.5","comment":"uid"}"#,
        r#"{"step":"address","dev":"istioin","addr":"192.168.126.1/30"}"#,
    ];
    for text in written {
        let step: Step = serde_json::from_str(text).unwrap();
        match &step {
            Step::Rule(rule) => assert_eq!(rule.family, Family::V4),
            Step::Set(set) => assert_eq!(set.family, Family::V4),
            _ => {}
        }
        assert_eq!(serde_json::to_string(&step).unwrap(), text);
    }
    let text = r#"{"step":"set","name":"ztunnel-pods-ips6","family":"v6","comments":true}"#;
    let step: Step = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&step).unwrap(), text);
}
