//! A step that fails, at every position: the place is as before, and says so.

use host_net::engine::{ApplyError, apply};
use host_net::iptables::Variant;
use host_net::plan::{Family, Plan, Position, Step, Table};

use crate::plans::{chain, chain_rule, node, node_draining, route, sysctl};
use crate::stage::Stage;

/// One impossible step per kind of operation, and a part of the message.
fn impossible() -> Vec<(Step, &'static str)> {
    vec![
        (Step::Route(route(105, "10.1.1.1/32", "nosuch0")), "nosuch0"),
        (
            chain(
                Table::Nat,
                "own-BAD",
                &["-m mark --mark nonsense -j ACCEPT"],
                None,
            ),
            "nonsense",
        ),
        (
            chain_rule(
                Family::V4,
                Table::Mangle,
                "nosuch-chain",
                "-j ACCEPT",
                Position::Last,
            ),
            "nosuch-chain",
        ),
        (sysctl("net/ipv4/conf/nosuch0/rp_filter", "2"), "nosuch0"),
        (sysctl("net/ipv4/ip_forward", "nonsense"), "ip_forward"),
    ]
}

fn with_step_at(plan: &Plan, at: usize, step: &Step) -> Plan {
    let mut plan = plan.clone();
    plan.steps.insert(at, step.clone());
    plan
}

async fn must_fail(stage: &Stage, from: &Plan, to: &Plan, part: &str) {
    let before = stage.state().await;
    let recorded = stage.journal.load(&to.name).unwrap();
    let error = apply(&stage.place, from, to, &stage.journal)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(text.contains(part), "{text}");
    assert!(
        matches!(&error, ApplyError::Failed { left, .. } if left.is_empty()),
        "{text}"
    );
    assert_eq!(stage.state().await, before, "{text}");
    assert_eq!(stage.journal.load(&to.name).unwrap(), recorded, "{text}");
}

async fn from_nothing(stage: Stage) {
    let plan = node();
    let empty = Plan::empty(&plan.name);
    // Every position with the cheapest failure, the ends with every kind.
    for at in 0..=plan.steps.len() {
        for (number, (step, part)) in impossible().iter().enumerate() {
            if number == at % 5 || at == plan.steps.len() {
                must_fail(&stage, &empty, &with_step_at(&plan, at, step), part).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_position_from_nothing_nft() {
    from_nothing(Stage::bare(Variant::Nft)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_position_from_nothing_legacy() {
    from_nothing(Stage::new(Variant::Legacy)).await;
}

async fn between_two_states(variant: Variant) {
    let stage = Stage::new(variant);
    let (from, to) = (node(), node_draining());
    apply(
        &stage.place,
        &Plan::empty(&from.name),
        &from,
        &stage.journal,
    )
    .await
    .unwrap();
    for at in 0..=to.steps.len() {
        let (step, part) = &impossible()[at % 5];
        must_fail(&stage, &from, &with_step_at(&to, at, step), part).await;
    }
    assert_eq!(stage.findings(&from).await, [""; 0]);
    apply(&stage.place, &from, &to, &stage.journal)
        .await
        .unwrap();
    assert_eq!(stage.findings(&to).await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_position_between_two_states_nft() {
    between_two_states(Variant::Nft).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_at_any_position_between_two_states_legacy() {
    between_two_states(Variant::Legacy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_journal_that_cannot_be_written_keeps_the_kernel_untouched() {
    let stage = Stage::bare(Variant::Nft);
    let before = stage.state().await;
    let plan = node();
    let aside = format!(".{}.{}.tmp", plan.name, std::process::id());
    std::fs::create_dir(stage.journal_dir().join(aside)).unwrap();
    let error = apply(
        &stage.place,
        &Plan::empty(&plan.name),
        &plan,
        &stage.journal,
    )
    .await
    .unwrap_err();
    assert!(matches!(error, ApplyError::Journal(_)), "{error}");
    assert_eq!(stage.state().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn removal_goes_on_after_errors_and_can_be_repeated() {
    let stage = Stage::new(Variant::Nft);
    let before = stage.state().await;
    let plan = node();
    apply(
        &stage.place,
        &Plan::empty(&plan.name),
        &plan,
        &stage.journal,
    )
    .await
    .unwrap();
    // Somebody else's rule refers to a chain and to a set of ours: neither can go.
    stage.sh("iptables -t filter -I FORWARD 1 -j own-FWD
         iptables -t filter -I FORWARD 1 -j own-FWD -s 192.0.2.5
         iptables -t raw -A PREROUTING -m set --match-set pods src -j ACCEPT");
    let errors = host_net::engine::remove(&stage.place, &plan, &stage.journal).await;
    let texts: Vec<String> = errors.iter().map(ToString::to_string).collect();
    assert_eq!(texts.len(), 2, "{texts:?}");
    assert!(texts[0].contains("own-FWD"), "{texts:?}");
    assert!(texts[1].contains("ipset pods"), "{texts:?}");
    let rest: Vec<String> = stage
        .findings(&plan)
        .await
        .into_iter()
        .filter(|finding| !finding.ends_with(": missing"))
        .collect();
    assert_eq!(
        rest.len(),
        2,
        "only own-FWD and the sysctl of eth0 are there and differ: {rest:?}"
    );
    stage.sh("iptables -t filter -D FORWARD -j own-FWD -s 192.0.2.5
         iptables -t raw -F PREROUTING && nft delete table ip raw");
    let errors = host_net::engine::undo(&plan.name, None, &stage.journal).await;
    assert!(errors.is_empty(), "{errors:?}");
    assert_eq!(stage.state().await, before);
}
