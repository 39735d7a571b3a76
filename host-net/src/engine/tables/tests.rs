#![allow(clippy::unwrap_used)]

use super::*;

fn key(table: Table, chain: &str) -> ChainKey {
    (table, chain.to_owned())
}

fn fill(table: Table, chain: &str, rules: &[&str]) -> Edit {
    Edit::Fill(key(table, chain), texts(rules))
}

fn texts(rules: &[&str]) -> Vec<String> {
    rules.iter().map(|&rule| rule.to_owned()).collect()
}

fn insert(table: Table, chain: &str, rule: &str, at: usize) -> Edit {
    Edit::Insert(key(table, chain), rule.to_owned(), at)
}

fn delete(table: Table, chain: &str, rule: &str) -> Edit {
    Edit::Delete(key(table, chain), rule.to_owned())
}

fn there() -> Tables {
    let mut tables = Tables::default();
    tables.set(Table::Nat, "PREROUTING", texts(&["-j KUBE", "-j OWN"]));
    tables.set(Table::Nat, "OWN", texts(&["-p tcp -j ACCEPT"]));
    tables.set(Table::Nat, "KUBE", texts(&["-j RETURN"]));
    tables
}

#[test]
fn what_is_as_wanted_needs_no_script() {
    let mut tables = there();
    let (effective, inverse) = tables.edit(&[
        fill(Table::Nat, "OWN", &["-p tcp -j ACCEPT"]),
        insert(Table::Nat, "PREROUTING", "-j OWN", 0),
        delete(Table::Nat, "OUTPUT", "-j OWN"),
        Edit::Drop(key(Table::Mangle, "OWN")),
    ]);
    assert_eq!((effective, inverse), (vec![], vec![]));
    assert_eq!(script(&there(), &[], Gate::Last).unwrap(), None);
    assert_eq!(tables, there());
}

#[test]
fn a_plan_on_an_empty_namespace_is_one_script_with_the_gate_last() {
    let mut tables = Tables::default();
    let (effective, _) = tables.edit(&[
        fill(Table::Nat, "OWN", &["-p tcp -j REDIRECT --to-ports 15006"]),
        insert(Table::Nat, "PREROUTING", "-j OWN", AT_END),
        fill(Table::Mangle, "OWN", &["-j TWO", "-j RETURN"]),
        fill(Table::Mangle, "TWO", &[]),
        insert(Table::Mangle, "PREROUTING", "-j OWN", 0),
    ]);
    assert_eq!(
        script(&Tables::default(), &effective, Gate::Last)
            .unwrap()
            .as_deref(),
        Some(
            "*mangle\n:OWN - [0:0]\n:TWO - [0:0]\n-A OWN -j TWO\n-A OWN -j RETURN\n-A PREROUTING -j OWN\nCOMMIT\n\
             *nat\n:OWN - [0:0]\n-A OWN -p tcp -j REDIRECT --to-ports 15006\n-A PREROUTING -j OWN\nCOMMIT\n"
        )
    );
}

#[test]
fn a_removal_leaves_others_alone_and_deletes_chains_after_what_refers_to_them() {
    let mut tables = there();
    let (effective, _) = tables.edit(&[
        Edit::Drop(key(Table::Nat, "OWN")),
        delete(Table::Nat, "PREROUTING", "-j OWN"),
    ]);
    assert_eq!(
        script(&there(), &effective, Gate::First)
            .unwrap()
            .as_deref(),
        Some("*nat\n:OWN - [0:0]\n-D PREROUTING -j OWN\n-X OWN\nCOMMIT\n")
    );
    assert_eq!(
        tables.rules(&key(Table::Nat, "PREROUTING")),
        Some(&texts(&["-j KUBE"])[..])
    );
}

#[test]
fn indexes_count_from_one_and_go_where_the_rule_was() {
    let mut tables = there();
    tables.set(Table::Nat, "PREROUTING", texts(&["-j A", "-j OWN", "-j B"]));
    let before = tables.clone();
    let (_, inverse) = tables.edit(&[delete(Table::Nat, "PREROUTING", "-j OWN")]);
    let (effective, _) = tables.clone().edit(&inverse);
    assert_eq!(
        script(&tables, &effective, Gate::Last).unwrap().as_deref(),
        Some("*nat\n-I PREROUTING 2 -j OWN\nCOMMIT\n")
    );
    tables.edit(&inverse);
    assert_eq!(tables, before);
}

#[test]
fn every_edit_is_undone_by_its_inverse() {
    let edits = [
        fill(Table::Nat, "OWN", &["-j DROP"]),
        fill(Table::Mangle, "NEW", &["-j DROP"]),
        delete(Table::Nat, "PREROUTING", "-j OWN"),
        insert(Table::Nat, "PREROUTING", "-j OWN", 0),
        insert(Table::Nat, "OWN", "-j LOG", 1),
        Edit::Drop(key(Table::Nat, "KUBE")),
    ];
    for count in 0..=edits.len() {
        let mut tables = there();
        let (effective, inverse) = tables.edit(&edits[..count]);
        assert_eq!(effective.len(), count);
        let (back, _) = tables.edit(&inverse);
        assert_eq!(back.len(), count);
        assert_eq!(tables, there(), "after {count} edits");
    }
}

#[test]
fn a_doubled_rule_is_deleted_as_often_as_it_stands_there() {
    let mut before = Tables::default();
    before.set(Table::Nat, "OUTPUT", texts(&["-j OWN", "-j X", "-j OWN"]));
    let (effective, _) = before.clone().edit(&[
        delete(Table::Nat, "OUTPUT", "-j OWN"),
        insert(Table::Nat, "OUTPUT", "-j OWN", 0),
    ]);
    assert_eq!(
        script(&before, &effective, Gate::Last).unwrap().as_deref(),
        Some("*nat\n-D OUTPUT -j OWN\n-D OUTPUT -j OWN\n-I OUTPUT 1 -j OWN\nCOMMIT\n")
    );
}

#[test]
fn single_rules_of_a_chain_that_goes_as_a_whole_need_no_line_of_their_own() {
    let mut before = there();
    before.set(
        Table::Nat,
        "OWN",
        texts(&["-p tcp -j ACCEPT", "-i veth1 -j DROP"]),
    );
    let (effective, inverse) = before.clone().edit(&[
        delete(Table::Nat, "OWN", "-i veth1 -j DROP"),
        Edit::Drop(key(Table::Nat, "OWN")),
    ]);
    assert_eq!(
        script(&before, &effective, Gate::First).unwrap().as_deref(),
        Some("*nat\n:OWN - [0:0]\n-X OWN\nCOMMIT\n")
    );
    let mut gone = before.clone();
    gone.edit(&effective);
    gone.edit(&inverse);
    assert_eq!(gone, before);
}

#[test]
fn a_rule_of_two_lines_is_refused() {
    let edits = [fill(Table::Nat, "OWN", &["-j ACCEPT\n-P INPUT DROP"])];
    assert!(script(&Tables::default(), &edits, Gate::Last).is_err());
}
