//! What is applied is there, equals the typed commands, and leaves nothing behind.

use std::os::unix::fs::MetadataExt;

use host_net::commands::{as_commands, as_removal_commands};
use host_net::engine::{apply, remove, undo};
use host_net::iptables::Variant;
use host_net::plan::{Plan, Step};

use crate::plans::{node, node_draining, sysctl};
use crate::stage::Stage;

async fn twenty_rounds(stage: Stage) {
    let before = stage.state().await;
    let plan = node();
    for round in 0..20 {
        let applied = apply(
            &stage.place,
            &Plan::empty(&plan.name),
            &plan,
            &stage.journal,
        )
        .await
        .unwrap();
        assert_eq!(applied.made, plan.steps, "round {round}");
        assert_eq!(stage.findings(&plan).await, [""; 0], "round {round}");
        let errors = if round % 2 == 0 {
            remove(&stage.place, &plan, &stage.journal).await
        } else {
            undo(&plan.name, None, &stage.journal).await
        };
        assert!(errors.is_empty(), "round {round}: {errors:?}");
        assert_eq!(stage.state().await, before, "round {round}");
        assert_eq!(stage.journal.list().unwrap(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_rounds_leave_nothing_nft() {
    twenty_rounds(Stage::new(Variant::Nft)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_rounds_leave_nothing_legacy() {
    twenty_rounds(Stage::new(Variant::Legacy)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_nft_tables_that_we_caused_go_with_the_plan() {
    twenty_rounds(Stage::bare(Variant::Nft)).await;
}

async fn commands_make_the_same(variant: Variant) {
    let plan = node();
    let engine = Stage::new(variant);
    let before = engine.state().await;
    apply(
        &engine.place,
        &Plan::empty(&plan.name),
        &plan,
        &engine.journal,
    )
    .await
    .unwrap();
    let shell = Stage::new(variant);
    shell.sh(&as_commands(&plan).join("\n"));
    assert_eq!(shell.state().await, engine.state().await);
    assert_eq!(shell.findings(&plan).await, [""; 0]);
    shell.sh(&as_removal_commands(&plan).join("\n"));
    shell.sh("echo 1 > /proc/sys/net/ipv4/conf/eth0/rp_filter");
    if variant == Variant::Nft {
        // Commands do not know which tables and base chains they caused.
        shell.sh("nft delete table ip mangle && nft delete table ip6 mangle && nft delete chain ip nat OUTPUT");
    }
    assert_eq!(shell.state().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_make_the_same_nft() {
    commands_make_the_same(Variant::Nft).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_make_the_same_legacy() {
    commands_make_the_same(Variant::Legacy).await;
}

async fn moves_between_states(variant: Variant) {
    let stage = Stage::new(variant);
    let before = stage.state().await;
    let (active, draining) = (node(), node_draining());
    let (place, journal) = (&stage.place, &stage.journal);
    let empty = Plan::empty(&active.name);
    apply(place, &empty, &active, journal).await.unwrap();
    let state_active = stage.state().await;

    apply(place, &active, &draining, journal).await.unwrap();
    assert_eq!(stage.findings(&draining).await, [""; 0]);
    let direct = Stage::new(variant);
    apply(&direct.place, &empty, &draining, &direct.journal)
        .await
        .unwrap();
    assert_eq!(stage.state().await, direct.state().await);

    // The caller need not know what was there: the journal does.
    apply(place, &empty, &active, journal).await.unwrap();
    assert_eq!(stage.state().await, state_active);
    let written = || std::fs::metadata(stage.journal_dir().join("host-node.json")).unwrap();
    let before_again = written().ino();
    let again = apply(place, &active, &active, journal).await.unwrap();
    assert_eq!((again.made, again.removed), (vec![], vec![]));
    assert_eq!(
        written().ino(),
        before_again,
        "nothing changed, nothing written"
    );

    let gone = apply(place, &active, &empty, journal).await.unwrap();
    assert_eq!(gone.removed.len(), active.steps.len());
    assert_eq!(stage.state().await, before);
    assert_eq!(stage.journal.list().unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_between_states_nft() {
    moves_between_states(Variant::Nft).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn moves_between_states_legacy() {
    moves_between_states(Variant::Legacy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_value_of_a_sysctl_comes_back_after_many_applies() {
    let stage = Stage::bare(Variant::Nft);
    let key = "net/ipv4/conf/eth0/rp_filter";
    let plan = |value: &str| Plan {
        name: "p".to_owned(),
        steps: vec![sysctl(key, value)],
    };
    let mut from = Plan::empty("p");
    for value in ["2", "0", "2", "2"] {
        let to = plan(value);
        apply(&stage.place, &from, &to, &stage.journal)
            .await
            .unwrap();
        from = to;
    }
    assert!(remove(&stage.place, &from, &stage.journal).await.is_empty());
    stage.sh(&format!("[ $(cat /proc/sys/{key}) = 1 ]"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sysctl_that_somebody_changed_since_is_left_alone() {
    let stage = Stage::bare(Variant::Nft);
    let key = "net/ipv4/conf/eth0/rp_filter";
    let plan = Plan {
        name: "p".to_owned(),
        steps: vec![sysctl(key, "2")],
    };
    apply(&stage.place, &Plan::empty("p"), &plan, &stage.journal)
        .await
        .unwrap();
    stage.sh(&format!("echo 0 > /proc/sys/{key}"));
    assert!(remove(&stage.place, &plan, &stage.journal).await.is_empty());
    stage.sh(&format!("[ $(cat /proc/sys/{key}) = 0 ]"));
    assert_eq!(stage.journal.list().unwrap(), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_namespace_that_is_gone_is_forgotten() {
    let stage = Stage::bare(Variant::Nft);
    let plan = Plan {
        name: "pod-1".to_owned(),
        steps: vec![Step::Sysctl(host_net::plan::Sysctl {
            key: "net/ipv4/conf/eth0/rp_filter".to_owned(),
            value: "2".to_owned(),
        })],
    };
    apply(&stage.place, &Plan::empty("pod-1"), &plan, &stage.journal)
        .await
        .unwrap();
    let record = stage.journal.load("pod-1").unwrap().unwrap();
    assert!(record.netns_path.is_some_and(|path| path.exists()));
    stage.delete_netns();
    let errors = undo("pod-1", None, &stage.journal).await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(stage.journal.list().unwrap(), [""; 0]);
}
