#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

use super::*;
use crate::plan::{NftBase, NftChain};

fn table(extra: &[&str]) -> NftTable {
    let rules = [
        "tcp dport 15006 counter accept",
        "ct state new tcp dport { 15001, 15008 } drop",
    ];
    let chain = |name: &str, base, rules: Vec<String>| NftChain {
        name: name.to_owned(),
        base,
        rules,
    };
    NftTable {
        name: "own".to_owned(),
        chains: vec![
            chain(
                "output",
                Some(NftBase {
                    kind: "nat".to_owned(),
                    hook: "output".to_owned(),
                    priority: -100,
                }),
                vec!["jump inner".to_owned()],
            ),
            chain(
                "inner",
                None,
                rules.iter().chain(extra).map(|r| (*r).to_owned()).collect(),
            ),
        ],
    }
}

fn nft(netns: &Netns, command: &str) {
    let status = netns.run(|| Command::new("nft").arg(command).status());
    assert!(status.unwrap().unwrap().success(), "{command}");
}

#[test]
fn a_table_is_made_compared_changed_and_deleted() {
    let netns = Netns::create_unnamed().unwrap();
    assert_eq!(look(&netns, &table(&[])).unwrap(), Some(Problem::Missing));
    assert!(!delete(&netns, "own").unwrap());
    for extra in [&["udp dport 53 accept"][..], &[]] {
        apply(&netns, &[table(extra)]).unwrap();
        assert_eq!(look(&netns, &table(extra)).unwrap(), None);
    }
    assert!(delete(&netns, "own").unwrap());
    assert_eq!(look(&netns, &table(&[])).unwrap(), Some(Problem::Missing));
}

#[test]
fn tables_of_both_families_are_listed_without_a_program() {
    let netns = Netns::create_unnamed().unwrap();
    assert_eq!(inet_tables(&netns).unwrap(), Vec::<String>::new());
    nft(&netns, "add table ip other");
    apply(&netns, &[table(&[])]).unwrap();
    assert_eq!(inet_tables(&netns).unwrap(), ["own"]);
}

#[test]
fn what_somebody_changed_is_named_and_goes_with_the_next_change() {
    let cases = [
        (
            "add rule inet own inner udp dport 7 accept",
            "1 foreign rule(s): `chain inner: udp dport 7 accept`",
        ),
        (
            "insert rule inet own output tcp dport 9 accept",
            "1 foreign rule(s): `chain output: tcp dport 9 accept`",
        ),
        (
            "flush chain inet own output",
            "different: lacks `chain output: jump inner`",
        ),
        (
            "add chain inet own other",
            "1 foreign rule(s): `chain other`",
        ),
    ];
    for (change, problem) in cases {
        let netns = Netns::create_unnamed().unwrap();
        apply(&netns, &[table(&[])]).unwrap();
        nft(&netns, change);
        let found = look(&netns, &table(&[])).unwrap();
        let found = found.map_or_else(String::new, |problem| problem.to_string());
        assert_eq!(found, problem, "{change}");
        apply(&netns, &[table(&[])]).unwrap();
        assert_eq!(look(&netns, &table(&[])).unwrap(), None, "{change}");
    }
}

#[test]
fn rules_in_another_order_are_noticed() {
    let netns = Netns::create_unnamed().unwrap();
    apply(&netns, &[table(&[])]).unwrap();
    let mut turned = table(&[]);
    turned.chains[1].rules.reverse();
    let found = look(&netns, &turned).unwrap();
    assert!(matches!(found, Some(Problem::Order { .. })), "{found:?}");
}

#[test]
fn of_two_tables_either_both_are_made_or_none() {
    let netns = Netns::create_unnamed().unwrap();
    apply(&netns, &[table(&["udp dport 53 accept"])]).unwrap();
    let broken = NftTable {
        name: "broken".to_owned(),
        ..table(&["no such words"])
    };
    let error = apply(&netns, &[table(&[]), broken])
        .unwrap_err()
        .to_string();
    assert!(error.contains("make own, broken"), "{error}");
    assert_eq!(
        look(&netns, &table(&["udp dport 53 accept"])).unwrap(),
        None
    );
}

#[test]
fn what_was_saved_is_put_back() {
    let netns = Netns::create_unnamed().unwrap();
    apply(&netns, &[table(&["udp dport 53 accept"])]).unwrap();
    let before = saved(&netns, "own").unwrap();
    apply(&netns, &[table(&[])]).unwrap();
    put_back(&netns, "own", before.as_deref()).unwrap();
    assert_eq!(
        look(&netns, &table(&["udp dport 53 accept"])).unwrap(),
        None
    );
    put_back(&netns, "own", None).unwrap();
    assert_eq!(saved(&netns, "own").unwrap(), None);
}

#[test]
fn a_missing_program_names_the_package_and_a_way_out() {
    let error = NftError::Start(io::ErrorKind::NotFound.into()).to_string();
    assert!(error.contains("apt-get install nftables"), "{error}");
    assert!(error.contains("--inpod-rules redirect"), "{error}");
}
