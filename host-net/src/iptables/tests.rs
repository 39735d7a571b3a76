#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs::File;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{Flock, FlockArg};

use super::*;

mod spelling;

fn shell(netns: &Netns, line: &str) -> String {
    let output = netns.run(|| Command::new("sh").args(["-c", line]).output());
    let output = output.unwrap().unwrap();
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{line}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// Whether the kernel has nf_tables for IPv4, by another road than the one under test. User-Mode Linux has none.
fn kernel_has_nf_tables() -> bool {
    let netns = Netns::create_unnamed().unwrap();
    let nft = netns.run(|| {
        Command::new("nft")
            .args(["add", "table", "ip", "probe"])
            .output()
    });
    nft.unwrap().unwrap().status.success()
}

/// The variants that must work here.
fn variants() -> Vec<Variant> {
    let mut variants = vec![Variant::Legacy];
    if kernel_has_nf_tables() {
        variants.push(Variant::Nft);
    }
    variants
}

fn with_rule(table: Table, chain: &str) -> String {
    let mut script = RestoreScript::new();
    script.declare(table, chain);
    script.append(table, chain, "-p tcp -j ACCEPT");
    script.render().unwrap()
}

#[test]
fn looking_choosing_and_trying_leave_no_trace() {
    let netns = Netns::create_unnamed().unwrap();
    for variant in variants() {
        let iptables = Iptables::both(variant);
        for family in [Family::V4, Family::V6] {
            usable(variant, family).unwrap();
            for table in [Table::Raw, Table::Filter, Table::Mangle, Table::Nat] {
                let ruleset = iptables.save(&netns, family, table).unwrap();
                assert!(ruleset.is_trivial());
                assert!(
                    !iptables
                        .chain_exists(&netns, family, table, "NONE")
                        .unwrap()
                );
                let exists =
                    iptables.rule_exists(&netns, family, table, "OUTPUT", "-p tcp -j ACCEPT");
                assert!(!exists.unwrap());
            }
        }
    }
    for family in [Family::V4, Family::V6] {
        let chosen = choice::choose_by_state(&netns, family).unwrap();
        assert_eq!(chosen == Variant::Nft, kernel_has_nf_tables());
        assert_eq!(tables_in_use(&netns, family).unwrap(), []);
    }
}

#[test]
fn the_variant_that_has_rules_is_chosen() {
    if !kernel_has_nf_tables() {
        return;
    }
    for variant in Variant::ALL {
        let netns = Netns::create_unnamed().unwrap();
        let iptables = Iptables::both(variant);
        iptables
            .restore(&netns, Family::V4, &with_rule(Table::Raw, "OWN"))
            .unwrap();
        assert_eq!(
            choice::choose_by_state(&netns, Family::V4).unwrap(),
            variant
        );
        // The families are apart.
        assert_eq!(
            choice::choose_by_state(&netns, Family::V6).unwrap(),
            Variant::Nft
        );
        let other = match variant {
            Variant::Nft => Variant::Legacy,
            Variant::Legacy => Variant::Nft,
        };
        Iptables::both(other)
            .restore(&netns, Family::V4, &with_rule(Table::Filter, "OWN"))
            .unwrap();
        match choice::choose_by_state(&netns, Family::V4) {
            Err(error @ IptablesError::Mixed { .. }) => {
                assert!(error.to_string().contains("AMBIDEX_IPTABLES"));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn the_operator_decides_with_the_two_words() {
    assert_eq!(choice::chosen_by_operator("nft").unwrap(), Variant::Nft);
    assert_eq!(
        choice::chosen_by_operator("legacy").unwrap(),
        Variant::Legacy
    );
    assert!(choice::chosen_by_operator("").is_err());
}

#[test]
fn a_failed_restore_names_its_line_and_leaves_its_table_alone() {
    for variant in variants() {
        let netns = Netns::create_unnamed().unwrap();
        let iptables = Iptables::both(variant);
        for (bad, number) in [
            ("-A OWN -p tcp -j NOSUCH", 4),
            ("-A OWN -m nosuch", 4),
            ("-D OWN -p udp -j ACCEPT", 4),
        ] {
            let script = format!("*mangle\n:OWN - [0:0]\n-A OWN -p tcp -j ACCEPT\n{bad}\nCOMMIT\n");
            let error = iptables.restore(&netns, Family::V4, &script).unwrap_err();
            match &error {
                IptablesError::Failed { line, stderr, .. } => {
                    assert!(!stderr.is_empty());
                    let (found, text) = line.as_ref().unwrap();
                    // Legacy finds at COMMIT what it did not look at before.
                    assert!(*found >= number, "{error}");
                    assert!(script.lines().any(|line| line == text), "{error}");
                }
                other => panic!("{other:?}"),
            }
            assert!(
                !iptables
                    .chain_exists(&netns, Family::V4, Table::Mangle, "OWN")
                    .unwrap()
            );
        }
    }
}

#[test]
fn a_rule_is_found_in_any_spelling() {
    for variant in variants() {
        let netns = Netns::create_unnamed().unwrap();
        let iptables = Iptables::both(variant);
        let v4 = Family::V4;
        iptables
            .restore(&netns, v4, &with_rule(Table::Mangle, "OWN"))
            .unwrap();
        let rule = |chain: &str, rule| iptables.rule_exists(&netns, v4, Table::Mangle, chain, rule);
        assert!(rule("OWN", "-p tcp -j ACCEPT").unwrap());
        assert!(rule("OWN", "-j ACCEPT -p 6").unwrap());
        assert!(!rule("OWN", "-p udp -j ACCEPT").unwrap());
        assert!(!rule("OTHER", "-p tcp -j ACCEPT").unwrap());
        assert!(rule("OWN", "-p tcp -j NOSUCH").is_err());
        assert!(rule("OWN", "--no-such-option").is_err());
        let chain = |chain: &str| iptables.chain_exists(&netns, v4, Table::Mangle, chain);
        assert!(chain("OWN").unwrap());
        assert!(!chain("OTHER").unwrap());
    }
}

#[test]
fn only_empty_nft_tables_are_deleted() {
    if !kernel_has_nf_tables() {
        return;
    }
    let netns = Netns::create_unnamed().unwrap();
    let iptables = Iptables::both(Variant::Nft);
    let v4 = Family::V4;
    let mut script = RestoreScript::new();
    script.declare(Table::Mangle, "OWN");
    script.append(Table::Mangle, "OUTPUT", "-j OWN");
    script.declare(Table::Nat, "OWN");
    iptables
        .restore(&netns, v4, &script.render().unwrap())
        .unwrap();
    shell(&netns, "nft add table ip6 mangle");
    // With a set of somebody's own, iptables still takes the table for one of its own.
    shell(
        &netns,
        "iptables-nft -t raw -A OUTPUT -j ACCEPT; iptables-nft -t raw -F; nft add set ip raw own '{ type ipv4_addr; }'",
    );
    shell(&netns, "iptables-nft -P FORWARD DROP");

    let all = [Table::Raw, Table::Filter, Table::Mangle, Table::Nat];
    assert_eq!(delete_nft_tables(&netns, v4, &all).unwrap(), []);

    let mut script = RestoreScript::new();
    script.remove(Table::Mangle, "OUTPUT", "-j OWN");
    script.drop_chain(Table::Mangle, "OWN");
    iptables
        .restore(&netns, v4, &script.render().unwrap())
        .unwrap();
    assert_eq!(
        delete_nft_tables(&netns, v4, &all).unwrap(),
        [Table::Mangle]
    );
    assert_eq!(delete_nft_tables(&netns, v4, &all).unwrap(), []);
    let left = shell(&netns, "nft list tables");
    assert_eq!(
        left.lines().collect::<std::collections::BTreeSet<_>>(),
        [
            "table ip6 mangle",
            "table ip filter",
            "table ip nat",
            "table ip raw"
        ]
        .into()
    );
}

#[test]
fn a_table_that_is_filled_meanwhile_is_not_deleted() {
    if !kernel_has_nf_tables() {
        return;
    }
    let netns = Netns::create_unnamed().unwrap();
    shell(
        &netns,
        "iptables-nft -t mangle -A OUTPUT -j ACCEPT; iptables-nft -t mangle -F",
    );
    let nf_tables = NfTables::open(&netns, Family::V4).unwrap();
    let generation = nf_tables.generation().unwrap();
    assert!(nf_tables.is_trivial("mangle").unwrap());
    shell(&netns, "iptables-nft -t mangle -A OUTPUT -j ACCEPT");
    assert!(!nf_tables.is_trivial("mangle").unwrap());
    assert!(matches!(
        nf_tables.delete("mangle", generation),
        Err(Failure::Stale)
    ));
    assert_eq!(nf_tables.tables().unwrap(), ["mangle"]);
    shell(&netns, "iptables-nft -t mangle -F");
    let generation = nf_tables.generation().unwrap();
    nf_tables.delete("mangle", generation).unwrap();
    assert_eq!(nf_tables.tables().unwrap(), [""; 0]);
}

#[test]
fn a_table_of_somebody_else_is_not_read_as_empty() {
    if !kernel_has_nf_tables() {
        return;
    }
    let netns = Netns::create_unnamed().unwrap();
    shell(
        &netns,
        "nft add table ip filter; nft 'add chain ip filter INPUT { type filter hook input priority 0; }'; \
         nft add rule ip filter INPUT meta mark set numgen random mod 4",
    );
    let found = tables_in_use(&netns, Family::V4).unwrap();
    assert_eq!(found.len(), 1);
    assert!(!found[0].trivial);
    let saved = Iptables::both(Variant::Nft).save(&netns, Family::V4, Table::Filter);
    assert!(
        matches!(saved, Err(IptablesError::Foreign { .. })),
        "{saved:?}"
    );
}

#[test]
fn writers_of_one_namespace_wait_for_each_other_and_for_nobody_else() {
    const HELD: Duration = Duration::from_millis(400);
    let (netns, elsewhere) = (
        Netns::create_unnamed().unwrap(),
        Netns::create_unnamed().unwrap(),
    );
    let iptables = Iptables::both(Variant::Legacy);
    let script = with_rule(Table::Mangle, "OWN");
    let own = netns.run(|| File::open("/proc/thread-self/ns/net"));
    let lock = Flock::lock(own.unwrap().unwrap(), FlockArg::LockExclusive).unwrap();
    let started = Instant::now();
    let release = std::thread::spawn(move || {
        std::thread::sleep(HELD);
        lock.unlock().unwrap();
    });
    iptables.restore(&elsewhere, Family::V4, &script).unwrap();
    assert!(!release.is_finished());
    iptables.restore(&netns, Family::V4, &script).unwrap();
    assert!(started.elapsed() >= HELD);
    release.join().unwrap();
}

#[test]
fn line_numbers_are_found_in_every_form_of_message() {
    for (message, number) in [
        ("iptables-restore: line 3 failed", Some(3)),
        ("x\nError occurred at line: 12\nTry `x -h'", Some(12)),
        ("line 7: RULE_APPEND failed (No such file)", Some(7)),
        ("the outline is fine, line 4 failed", Some(4)),
        ("online", None),
    ] {
        assert_eq!(named_line(message), number, "{message}");
    }
}
