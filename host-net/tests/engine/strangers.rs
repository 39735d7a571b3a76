//! Objects that stood there before us: identical ones stay, others are refused.

use host_net::commands::as_commands;
use host_net::engine::{ApplyError, adopt, apply, remove, undo};
use host_net::iptables::Variant;
use host_net::plan::{Plan, Step};

use crate::plans::node;
use crate::stage::Stage;

#[tokio::test(flavor = "multi_thread")]
async fn other_objects_in_the_way_are_refused_and_nothing_changes() {
    let plan = node();
    let cases = [
        (
            "iptables -t nat -N own-PRE && iptables -t nat -A own-PRE -p tcp -j ACCEPT",
            "iptables chain own-PRE in table nat is there already and is not ours",
        ),
        (
            "ip link add tunin type vxlan id 7 remote 10.9.0.2 dstport 6081",
            "vxlan device tunin is there already and is not ours",
        ),
        (
            "ipset create pods hash:net",
            "ipset pods is there already and is not ours",
        ),
        (
            "ipset create pods hash:ip family inet comment && ipset add pods 10.244.1.4 comment other",
            "entry 10.244.1.4 of ipset pods is there already and is not ours (different: with comment \"other\")",
        ),
        (
            "ip route add 10.9.0.2 via 10.9.0.3 dev eth0 table 100",
            "route 10.9.0.2/32 in table 100 is there already and is not ours",
        ),
    ];
    for (script, message) in cases {
        let stage = Stage::new(Variant::Nft);
        stage.sh(script);
        let before = stage.state().await;
        let error = apply(
            &stage.place,
            &Plan::empty(&plan.name),
            &plan,
            &stage.journal,
        )
        .await
        .unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, ApplyError::Conflict { .. }), "{text}");
        assert!(text.contains(message), "{text}");
        assert_eq!(stage.state().await, before, "{script}");
        assert_eq!(stage.journal.list().unwrap(), [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn identical_objects_are_used_and_kept() {
    let plan = node();
    for made_by_hand in 0..plan.steps.len() {
        // Everything before the step too, because objects need each other.
        let stage = Stage::new(Variant::Nft);
        let by_hand = Plan {
            name: "by-hand".to_owned(),
            steps: plan.steps[..=made_by_hand].to_vec(),
        };
        if by_hand.steps.last().is_some_and(refers_ahead) {
            continue;
        }
        stage.sh(&as_commands(&by_hand).join("\n"));
        let before = stage.state().await;
        let applied = apply(
            &stage.place,
            &Plan::empty(&plan.name),
            &plan,
            &stage.journal,
        )
        .await
        .unwrap();
        assert_eq!(applied.made, plan.steps[made_by_hand + 1..]);
        assert_eq!(stage.findings(&plan).await, [""; 0]);
        // The second apply knows from the journal that they were there.
        apply(&stage.place, &plan, &plan, &stage.journal)
            .await
            .unwrap();
        let errors = remove(&stage.place, &plan, &stage.journal).await;
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(stage.state().await, before, "step {made_by_hand}");
    }
}

/// A chain whose rules jump to the next one cannot be made without it.
fn refers_ahead(step: &Step) -> bool {
    matches!(step, Step::Chain(chain) if chain.rules.iter().any(|rule| rule.contains("own-MORE")))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chain_that_stood_there_without_its_jump_keeps_standing_so() {
    let stage = Stage::new(Variant::Nft);
    stage.sh("iptables -t nat -N own-PRE
         iptables -t nat -A own-PRE -m mark --mark 0x100/0x100 -j ACCEPT");
    let before = stage.state().await;
    let mut plan = node();
    plan.steps
        .retain(|s| matches!(s, Step::Chain(c) if c.table == host_net::plan::Table::Nat));
    apply(
        &stage.place,
        &Plan::empty(&plan.name),
        &plan,
        &stage.journal,
    )
    .await
    .unwrap();
    assert_eq!(stage.findings(&plan).await, [""; 0]);
    assert!(remove(&stage.place, &plan, &stage.journal).await.is_empty());
    assert_eq!(stage.state().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_that_got_another_owner_since_is_left_to_it() {
    let stage = Stage::new(Variant::Nft);
    let plan = node();
    apply(
        &stage.place,
        &Plan::empty(&plan.name),
        &plan,
        &stage.journal,
    )
    .await
    .unwrap();
    stage.sh("ipset -exist add pods 10.244.1.4 comment uid-next");
    let mut pod = Plan::empty(&plan.name);
    pod.steps = plan
        .steps
        .iter()
        .filter(|step| !matches!(step, Step::Member(m) if m.comment.as_deref() == Some("uid-4")))
        .cloned()
        .collect();
    apply(&stage.place, &plan, &pod, &stage.journal)
        .await
        .unwrap();
    stage.sh("ipset list pods | grep -q '10.244.1.4 comment \"uid-next\"'");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_complete_can_be_taken_over_and_then_goes_with_an_undo() {
    for variant in Variant::ALL {
        let stage = Stage::new(variant);
        let before = stage.state().await;
        let mut plan = node();
        plan.steps.retain(|step| !matches!(step, Step::Sysctl(_)));
        stage.sh(&as_commands(&plan).join("\n"));
        let made = stage.state().await;
        let adopted = adopt(&stage.place, &plan, &stage.journal).await.unwrap();
        assert!(adopted, "{variant}");
        assert_eq!(stage.state().await, made, "nothing is touched");
        let nothing = Plan::empty(&plan.name);
        let applied = apply(&stage.place, &nothing, &plan, &stage.journal).await;
        assert_eq!(applied.unwrap().made, []);
        let errors = undo(&plan.name, Some(&stage.place.netns), &stage.journal).await;
        assert!(errors.is_empty(), "{errors:?}");
        assert_eq!(stage.state().await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_complete_is_not_taken_over() {
    let stage = Stage::new(Variant::Nft);
    let plan = node();
    stage.sh(&as_commands(&plan).join("\n"));
    stage.sh("ip rule del pref 101");
    let adopted = adopt(&stage.place, &plan, &stage.journal).await.unwrap();
    assert!(!adopted);
    assert_eq!(stage.journal.list().unwrap(), [""; 0]);
}
