//! Many plans in one namespace, at the same time.

use std::sync::Arc;

use host_net::engine::{apply, inspect_among, remove, undo};
use host_net::iptables::Variant;
use host_net::plan::{Family, Plan, Position, Step, Table};

use crate::plans::{chain, chain_rule, member, node, set, v6_chain, via};
use crate::stage::Stage;

fn node_without_pods() -> Plan {
    let mut plan = node();
    plan.steps
        .retain(|step| !matches!(step, Step::Member(_) | Step::ChainRule(_)));
    plan
}

fn pod(number: u8) -> Plan {
    let uid = format!("uid-{number}");
    Plan {
        name: format!("host-pod-{uid}"),
        steps: vec![
            chain_rule(
                Family::V6,
                Table::Filter,
                "ambidex-v6",
                &format!("-i veth{number} -j DROP"),
                Position::Last,
            ),
            member("pods", 100 + number, Some(&uid)),
            Step::Route(via(
                100,
                &format!("10.244.1.{}/32", 100 + number),
                "tunin",
                "192.168.126.2",
            )),
        ],
    }
}

/// A second mode on the same node: its own chain, at the same place of the same built-in chain.
fn second_mode() -> Plan {
    Plan {
        name: "host-inpod".to_owned(),
        steps: vec![
            set("probes", true),
            chain(
                Table::Nat,
                "probe-PRE",
                &["-m set --match-set probes dst -j ACCEPT"],
                Some(("PREROUTING", Position::First)),
            ),
        ],
    }
}

async fn apply_new(stage: &Stage, plan: &Plan) {
    let empty = Plan::empty(&plan.name);
    apply(&stage.place, &empty, plan, &stage.journal)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_come_and_go_together_without_disturbing_the_node() {
    let stage = Arc::new(Stage::bare(Variant::Nft));
    let before = stage.state().await;
    let host = node_without_pods();
    apply_new(&stage, &host).await;
    let node_only = stage.state().await;
    let pods: Vec<Plan> = (1..=20).map(pod).collect();
    for _ in 0..2 {
        let all = pods.iter().cloned().map(|plan| {
            let stage = Arc::clone(&stage);
            tokio::spawn(async move { apply_new(&stage, &plan).await })
        });
        for done in all.collect::<Vec<_>>() {
            done.await.unwrap();
        }
        let others: Vec<&Plan> = pods.iter().collect();
        let findings = inspect_among(&stage.place, &host, &others).await.unwrap();
        assert_eq!(findings, []);
        for plan in &pods {
            assert_eq!(stage.findings(plan).await, [""; 0]);
        }
        // The node's plan is applied again, its chain repaired, while the pods are there.
        stage.sh("ip6tables -I ambidex-v6 1 -j ACCEPT");
        assert_eq!(stage.findings(&host).await, [""; 0]);
        let findings = inspect_among(&stage.place, &host, &others).await.unwrap();
        assert_eq!(findings.len(), 1, "{findings:?}");
        assert_eq!(findings[0].step, v6_chain());
        apply(&stage.place, &host, &host, &stage.journal)
            .await
            .unwrap();
        for plan in &pods {
            assert_eq!(stage.findings(plan).await, [""; 0]);
        }
        let all = pods.iter().cloned().map(|plan| {
            let stage = Arc::clone(&stage);
            tokio::spawn(async move { remove(&stage.place, &plan, &stage.journal).await })
        });
        for done in all.collect::<Vec<_>>() {
            let errors = done.await.unwrap();
            assert!(errors.is_empty(), "{errors:?}");
        }
        assert_eq!(stage.state().await, node_only);
    }
    assert!(remove(&stage.place, &host, &stage.journal).await.is_empty());
    assert_eq!(stage.state().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn two_modes_share_a_built_in_chain_and_go_in_either_order() {
    let (one, two) = (node_without_pods(), second_mode());
    for first_to_go in [&one, &two] {
        let stage = Stage::bare(Variant::Nft);
        let before = stage.state().await;
        apply_new(&stage, &one).await;
        apply_new(&stage, &two).await;
        // Both want to be first; one of ours before the other is as good.
        for (plan, other) in [(&one, &two), (&two, &one)] {
            let findings = inspect_among(&stage.place, plan, &[other]).await.unwrap();
            assert_eq!(findings, []);
            let again = apply(&stage.place, plan, plan, &stage.journal)
                .await
                .unwrap();
            assert_eq!(again.made, []);
        }
        let last_to_go = if first_to_go == &one { &two } else { &one };
        for plan in [first_to_go, last_to_go] {
            let errors = undo(&plan.name, None, &stage.journal).await;
            assert!(errors.is_empty(), "{errors:?}");
        }
        assert_eq!(stage.state().await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn namespaces_do_not_wait_for_each_other() {
    let stages: Vec<Arc<Stage>> = (0..4)
        .map(|_| Arc::new(Stage::bare(Variant::Nft)))
        .collect();
    let all: Vec<_> = stages
        .iter()
        .cloned()
        .map(|stage| {
            tokio::spawn(async move {
                apply_new(&stage, &node()).await;
                stage.findings(&node()).await
            })
        })
        .collect();
    for done in all {
        assert_eq!(done.await.unwrap(), [""; 0]);
    }
}
