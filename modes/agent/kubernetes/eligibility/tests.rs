#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fmt::Write;

use rstest::rstest;

use super::*;

/// Values of a label, `-` where it is not there.
const DATAPLANE: [&str; 4] = ["-", "ambient", "none", "sidecar"];
const CAPTURE: [&str; 6] = ["-", "node", "inpod", "none", "auto", "nodes"];

/// Labels from a text like `dataplane=ambient capture=node app=ztunnel`.
fn words(text: &str) -> Words {
    let pairs = text.split_whitespace().map(|pair| {
        let (key, value) = pair.split_once('=').unwrap();
        let key = match key {
            "dataplane" => DATAPLANE_MODE,
            "capture" => CAPTURE_MODE,
            "sidecar" => SIDECAR_STATUS,
            other => other,
        };
        (key.to_owned(), value.to_owned())
    });
    pairs.filter(|(_, value)| value != "-").collect()
}

fn rules(mode: Mode) -> Rules {
    Rules {
        mode,
        exclude_namespaces: vec!["kube-system".to_owned()],
        own_namespace: "ambidex-system".to_owned(),
    }
}

fn judged(namespace_labels: &str, labels: &str, annotations: &str, mode: Mode) -> Verdict {
    let (namespace_labels, labels, annotations) =
        (words(namespace_labels), words(labels), words(annotations));
    let candidate = Candidate {
        namespace: "shop",
        name: "till-2",
        namespace_labels: &namespace_labels,
        labels: &labels,
        annotations: &annotations,
        host_network: false,
        ended: false,
    };
    judge(&candidate, &rules(mode))
}

fn short(verdict: &Verdict) -> String {
    match verdict {
        Verdict::Captured(capture) => capture.to_string(),
        Verdict::NotCaptured(_) => "-".to_owned(),
        Verdict::Refused(_) => "refused".to_owned(),
    }
}

/// Every combination of the four labels, with the verdicts of the three kinds of agents.
#[test]
fn the_truth_table_is_as_recorded() {
    let mut table = format!(
        "{:<9} {:<7} {:<9} {:<7} | {:<8} {:<8} {:<8}\n{:<9} {:<7} {:<9} {:<7} | {:<8} {:<8} {:<8}\n",
        "namespace",
        "",
        "pod",
        "",
        "--mode",
        "",
        "",
        "dataplane",
        "capture",
        "dataplane",
        "capture",
        "node",
        "inpod",
        "mixed"
    );
    for of_namespace in DATAPLANE.iter().flat_map(|d| CAPTURE.map(|c| (d, c))) {
        for of_pod in DATAPLANE.iter().flat_map(|d| CAPTURE.map(|c| (d, c))) {
            let labels = |(dataplane, capture): (&&str, &str)| {
                format!("dataplane={dataplane} capture={capture}")
            };
            let verdicts = [Mode::Node, Mode::Inpod, Mode::Mixed]
                .map(|mode| short(&judged(&labels(of_namespace), &labels(of_pod), "", mode)));
            let row = format!(
                "{:<9} {:<7} {:<9} {:<7} | {:<8} {:<8} {:<8}",
                of_namespace.0,
                of_namespace.1,
                of_pod.0,
                of_pod.1,
                verdicts[0],
                verdicts[1],
                verdicts[2]
            );
            writeln!(table, "{}", row.trim_end()).unwrap();
        }
    }
    assert_eq!(table.lines().count(), 2 + 4 * 6 * 4 * 6);
    insta::assert_snapshot!("truth_table", table);
}

/// What keeps a pod out of the mesh does so whatever the labels say.
#[test]
fn exclusions_win_over_all_labels() {
    for (dataplane, capture) in DATAPLANE.iter().flat_map(|d| CAPTURE.map(|c| (d, c))) {
        let labels = words(&format!(
            "dataplane={dataplane} capture={capture} app=ztunnel"
        ));
        let ours = Words::from([(
            "app.kubernetes.io/name".to_owned(),
            "ambidex-agent".to_owned(),
        )]);
        let plain = Candidate {
            namespace: "shop",
            name: "till-2",
            namespace_labels: &labels,
            labels: &labels,
            annotations: &Words::new(),
            host_network: false,
            ended: false,
        };
        let sidecar = words("sidecar={}");
        let candidates = [
            (
                Candidate {
                    host_network: true,
                    ..plain
                },
                Reason::HostNetwork,
            ),
            (
                Candidate {
                    ended: true,
                    ..plain
                },
                Reason::Ended,
            ),
            (
                Candidate {
                    namespace: "kube-system",
                    ..plain
                },
                Reason::ExcludedNamespace,
            ),
            (
                Candidate {
                    namespace: "ambidex-system",
                    ..plain
                },
                Reason::OwnPod,
            ),
            (
                Candidate {
                    namespace: "ambidex-system",
                    labels: &ours,
                    ..plain
                },
                Reason::OwnPod,
            ),
            (
                Candidate {
                    annotations: &sidecar,
                    ..plain
                },
                Reason::Sidecar,
            ),
        ];
        for (candidate, reason) in candidates {
            assert_eq!(
                judge(&candidate, &rules(Mode::Mixed)),
                Verdict::NotCaptured(reason),
                "{candidate:?}"
            );
        }
    }
}

/// Rows that were written by hand from what the field does, and from what our label means.
#[rstest]
#[case::nothing_said("", "", "-")]
#[case::namespace("dataplane=ambient", "", "inpod")]
#[case::pod("", "dataplane=ambient", "inpod")]
#[case::pod_opts_out("dataplane=ambient", "dataplane=none", "-")]
#[case::pod_opts_in_where_the_namespace_does_not("dataplane=none", "dataplane=ambient", "inpod")]
#[case::another_word_is_no_opt_out("dataplane=ambient", "dataplane=sidecar", "inpod")]
#[case::how_is_not_whether("capture=node", "capture=node", "-")]
#[case::namespace_says_how("dataplane=ambient capture=node", "", "node")]
#[case::pod_says_how("dataplane=ambient capture=node", "capture=inpod", "inpod")]
#[case::pod_leaves_it_to_the_agent("dataplane=ambient capture=node", "capture=auto", "inpod")]
#[case::none_on_the_pod_wins(
    "dataplane=ambient capture=node",
    "dataplane=ambient capture=none",
    "-"
)]
#[case::none_on_the_namespace_wins(
    "dataplane=ambient capture=none",
    "dataplane=ambient capture=node",
    "-"
)]
#[case::a_word_of_nobody("dataplane=ambient", "capture=nodes", "refused")]
#[case::a_word_of_nobody_outside_the_mesh("", "capture=nodes", "-")]
#[case::an_empty_word_says_nothing("dataplane=ambient capture=", "", "inpod")]
fn the_fields_rows(#[case] namespace: &str, #[case] pod: &str, #[case] verdict: &str) {
    assert_eq!(short(&judged(namespace, pod, "", Mode::Mixed)), verdict);
}

#[test]
fn what_the_agent_cannot_make_is_refused_with_the_way_out() {
    let Verdict::Refused(refusal) = judged("dataplane=ambient", "capture=node", "", Mode::Inpod)
    else {
        panic!("not refused");
    };
    let text = refusal.to_string();
    assert!(
        text.contains("asks for node") && text.contains("--mode mixed"),
        "{text}"
    );
}
