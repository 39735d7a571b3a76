//! Many plans of one namespace at once: what is there in the end is what they make one after the other, and one that fails
//! is taken back alone.

use futures_util::future::join_all;
use host_net::engine::{ApplyError, apply};
use host_net::iptables::{Variant, rules_state};
use host_net::plan::{Family, Plan, Position, Step, Table};

use crate::plans::{chain_rule, member, route, set, sysctl, v6_chain, via};
use crate::stage::Stage;

const MANY: u8 = 200;

/// What pods share.
fn shared() -> Plan {
    Plan {
        name: "host-node".to_owned(),
        steps: vec![
            set("pods", true),
            set("guarded", true),
            v6_chain(),
            Step::Route(route(100, "10.9.0.2/32", "eth0")),
        ],
    }
}

/// What a pod has of its own.
fn pod(number: u8) -> Plan {
    let drop = |direction: &str| {
        chain_rule(
            Family::V6,
            Table::Filter,
            "ambidex-v6",
            &format!("{direction} veth{number} -j DROP"),
            Position::Last,
        )
    };
    let uid = format!("uid-{number}");
    Plan {
        name: format!("host-pod-{uid}"),
        steps: vec![
            drop("-i"),
            drop("-o"),
            member("pods", number, Some(&uid)),
            Step::Route(via(
                100,
                &format!("10.244.1.{number}/32"),
                "eth0",
                "10.9.0.2",
            )),
            member("guarded", number, Some(&uid)),
        ],
    }
}

async fn stage(variant: Variant) -> Stage {
    let stage = Stage::new(variant);
    let plan = shared();
    let from = Plan::empty(&plan.name);
    apply(&stage.place, &from, &plan, &stage.journal)
        .await
        .unwrap();
    stage
}

async fn made(stage: &Stage, plan: &Plan) -> Result<Vec<Step>, ApplyError> {
    let applied = apply(&stage.place, &Plan::empty(&plan.name), plan, &stage.journal).await;
    applied.map(|applied| applied.made)
}

async fn gone(stage: &Stage, plan: &Plan) -> Vec<Step> {
    let nothing = Plan::empty(&plan.name);
    let applied = apply(&stage.place, plan, &nothing, &stage.journal).await;
    applied.unwrap().removed
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_at_once_as_one_after_the_other() {
    let (together, alone) = (stage(Variant::Nft).await, stage(Variant::Nft).await);
    let before = together.state().await;
    let plans: Vec<Plan> = (1..=MANY).map(pod).collect();
    let generation = || rules_state(&together.place.netns).unwrap().generation;
    let first = generation();
    for (result, plan) in join_all(plans.iter().map(|plan| made(&together, plan)))
        .await
        .into_iter()
        .zip(&plans)
    {
        assert_eq!(result.unwrap(), plan.steps);
    }
    // One transaction for each would be one for each.
    let transactions = generation() - first;
    assert!(transactions < u32::from(MANY) / 4, "{transactions}");
    for plan in &plans {
        made(&alone, plan).await.unwrap();
    }
    assert_eq!(together.state().await, alone.state().await);
    for name in plans.iter().map(|plan| &plan.name) {
        let record = |stage: &Stage| stage.journal.load(name).unwrap().unwrap();
        let (one, other) = (record(&together), record(&alone));
        assert_eq!(one.plan, other.plan);
        assert_eq!(one.nft_caused, other.nft_caused);
        assert_eq!(one.iptables, other.iptables);
    }

    let generation_full = generation();
    for (removed, plan) in join_all(plans.iter().map(|plan| gone(&together, plan)))
        .await
        .into_iter()
        .zip(&plans)
    {
        assert_eq!(removed.len(), plan.steps.len());
    }
    let transactions = generation() - generation_full;
    assert!(transactions < u32::from(MANY) / 4, "{transactions}");
    assert_eq!(together.state().await, before);
    assert_eq!(together.journal.list().unwrap(), [shared().name]);
}

/// Pods of which some cannot be made, by the restore of all, before it and after it.
async fn one_that_fails_is_taken_back_alone(variant: Variant) {
    let (together, alone) = (stage(variant).await, stage(variant).await);
    let mut plans: Vec<Plan> = (1..=12).map(pod).collect();
    let bad_rule = chain_rule(
        Family::V6,
        Table::Filter,
        "ambidex-v6",
        "-m mark --mark nonsense -j DROP",
        Position::Last,
    );
    plans[3].steps.insert(1, bad_rule);
    plans[5]
        .steps
        .insert(0, sysctl("net/ipv4/conf/nosuch0/rp_filter", "2"));
    plans[8]
        .steps
        .push(Step::Route(route(105, "10.1.1.1/32", "nosuch0")));
    // Somebody else's, so that it is refused before anything is made.
    together.sh("ipset add pods 10.244.1.11 comment stranger");
    alone.sh("ipset add pods 10.244.1.11 comment stranger");
    let failing = [
        (3, "nonsense"),
        (5, "nosuch0"),
        (8, "nosuch0"),
        (10, "not ours"),
    ];

    let results = join_all(plans.iter().map(|plan| made(&together, plan))).await;
    for (number, (result, plan)) in results.iter().zip(&plans).enumerate() {
        let expected = failing.iter().find(|(at, _)| *at == number);
        match (result, expected) {
            (Ok(made), None) => {
                assert_eq!(*made, plan.steps);
                self::made(&alone, plan).await.unwrap();
            }
            (Err(error), Some((_, part))) => {
                let text = error.to_string();
                assert!(text.contains(part), "{text}");
                assert!(!text.contains("could not be taken back"), "{text}");
                assert_eq!(together.journal.load(&plan.name).unwrap(), None, "{text}");
            }
            (result, _) => panic!("{number}: {result:?}"),
        }
    }
    assert_eq!(together.state().await, alone.state().await);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_fails_is_taken_back_alone_nft() {
    one_that_fails_is_taken_back_alone(Variant::Nft).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_that_fails_is_taken_back_alone_legacy() {
    one_that_fails_is_taken_back_alone(Variant::Legacy).await;
}

/// Whoever makes the others' plans may be stopped at any moment; they are made all the same.
#[tokio::test(flavor = "multi_thread")]
async fn one_that_is_stopped_stops_nobody_else() {
    for after in [0, 1, 3, 10, 30] {
        let stage = stage(Variant::Nft).await;
        let plans: Vec<Plan> = (1..=6).map(pod).collect();
        let rest = plans[1..].iter().map(|plan| made(&stage, plan));
        let first = async {
            let time = std::time::Duration::from_millis(after);
            let _ = tokio::time::timeout(time, made(&stage, &plans[0])).await;
        };
        let second = async {
            let time = std::time::Duration::from_millis(after + 5);
            let _ = tokio::time::timeout(time, made(&stage, &pod(7))).await;
        };
        let (_, _, rest) = tokio::join!(first, second, join_all(rest));
        for result in rest {
            result.unwrap();
        }
        // What was stopped is completed by doing it again.
        made(&stage, &plans[0]).await.unwrap();
        made(&stage, &pod(7)).await.unwrap();
        for plan in plans.iter().chain([&pod(7)]) {
            assert_eq!(stage.findings(plan).await, [""; 0]);
        }
    }
}

/// Plans that want the same object do not share a turn: the second one hears that it is taken.
#[tokio::test(flavor = "multi_thread")]
async fn two_that_want_one_address_take_turns() {
    let stage = stage(Variant::Nft).await;
    let mut thief = pod(1);
    thief.name = "host-pod-thief".to_owned();
    thief.steps = vec![member("pods", 1, Some("uid-thief"))];
    let plans = [pod(3), pod(1), thief, pod(2)];
    let results = join_all(plans.iter().map(|plan| made(&stage, plan))).await;
    let failed: Vec<bool> = results.iter().map(Result::is_err).collect();
    assert_eq!(failed, [false, false, true, false]);
    let error = results[2].as_ref().unwrap_err().to_string();
    assert!(error.contains("uid-1"), "{error}");
}
