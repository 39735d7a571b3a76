#![allow(clippy::unwrap_used, clippy::expect_used)]
use super::*;

const SMALLEST: &str = "
apiVersion: ambidex.io/v1alpha1
kind: Experiment
metadata: {name: smallest}
lab: {podsPerNode: 2}
load:
  forSeconds: 1
  longLived: {connections: 2}
  pairs: [{from: pod1-1, to: pod2-1}]
";

fn wrong(more: &str) -> String {
    format!(
        "{:#}",
        Experiment::parse(&format!("{SMALLEST}{more}")).unwrap_err()
    )
}

#[test]
fn what_is_left_out_has_its_default() {
    let experiment = Experiment::parse(SMALLEST).unwrap();
    assert_eq!(experiment.load.new.per_second, 0.0);
    assert_eq!(experiment.load.long_lived.message_bytes, 512);
    assert_eq!(experiment.assertions, Assertions::default());
    assert_eq!(
        experiment.talkers().into_iter().collect::<Vec<_>>(),
        ["pod1-1", "pod2-1"]
    );
    let again = serde_saphyr::to_string(&experiment).unwrap();
    assert_eq!(Experiment::parse(&again).unwrap(), experiment, "{again}");
}

#[test]
fn mistakes_are_named() {
    let cases = [
        ("colour: red", "colour"),
        ("steps: [{atSeconds: 1}]", "step 1: want exactly one"),
        (
            "steps: [{corrupt: pod2-1, waitSeconds: 1}]",
            "step 1: want exactly one",
        ),
        (
            "steps: [{switch: {pods: [pod9-1], to: node}}]",
            "no pod \"pod9-1\"",
        ),
        (
            "steps: [{switch: {pods: [pod1-1], to: sideways}}]",
            "sideways",
        ),
        (
            "steps: [{atSeconds: 2, waitSeconds: 1}, {atSeconds: 1, waitSeconds: 1}]",
            "step 2: its atSeconds",
        ),
        ("steps: [{kill: {daemon: proxy, node: 3}}]", "no node 3"),
        ("steps: [{corrupt: pod1-2}]", "pod1-2 takes no part"),
        (
            "steps: [{exec: {target: pod1-1, command: []}}]",
            "want a command",
        ),
        ("assertions: {reset: 0}", "reset"),
    ];
    for (more, said) in cases {
        let error = wrong(more);
        assert!(error.contains(said), "{more}: {error}");
    }
    let other = SMALLEST.replace("v1alpha1", "v2");
    assert!(
        Experiment::parse(&other)
            .unwrap_err()
            .to_string()
            .contains("ambidex.io/v2")
    );
    let itself = SMALLEST.replace("to: pod2-1", "to: pod1-1");
    assert!(
        Experiment::parse(&itself)
            .unwrap_err()
            .to_string()
            .contains("with itself")
    );
    let idle = SMALLEST.replace("connections: 2", "connections: 2, idleShare: 2");
    assert!(
        Experiment::parse(&idle)
            .unwrap_err()
            .to_string()
            .contains("idleShare")
    );
}
