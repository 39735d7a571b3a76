//! `ambidex experiment` as a user runs it, and whether each of its judges sees what it is there for.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use lab::standing;
use serde_json::{Value, json};

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn experiment(arguments: &[&str]) -> (i32, String, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = Command::new(env!("CARGO_BIN_EXE_ambidex"))
        .arg("experiment")
        .args(arguments)
        .current_dir(root())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (status.code().unwrap_or(-1), text(stdout), text(stderr))
}

/// Runs an experiment: exit code, what it printed, result.json.
fn run(file: &str, more: &[&str]) -> (i32, String, Value) {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let arguments = [&["run", file, "--out", out.to_str().unwrap()], more].concat();
    let (code, stdout, stderr) = experiment(&arguments);
    let result = std::fs::read(out.join("result.json"));
    let result = result.unwrap_or_else(|error| panic!("{error}: {stdout}{stderr}"));
    let report = std::fs::read_to_string(out.join("report.md")).unwrap();
    assert_eq!(report, stdout);
    let stands = stderr
        .lines()
        .find_map(|line| line.strip_prefix("lab ")?.strip_suffix(" stands"));
    let lab = stands.expect("it says which lab").to_owned();
    assert!(
        !standing::list().unwrap().contains(&lab),
        "lab {lab} still stands"
    );
    (
        code,
        stdout + &stderr,
        serde_json::from_slice(&result).unwrap(),
    )
}

fn measured<'a>(result: &'a Value, assertion: &str) -> &'a Value {
    let all = result["assertions"].as_array().unwrap();
    all.iter()
        .find(|one| one["assertion"] == assertion)
        .unwrap_or_else(|| panic!("no {assertion}"))
}

/// Judged by Debian's python3-jsonschema.
fn valid(schema: &str, value: &Value) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("value.json");
    std::fs::write(&file, value.to_string()).unwrap();
    let mut judge = Command::new("/usr/bin/python3");
    judge.args(["-m", "jsonschema", "--instance"]).arg(&file);
    let output = judge
        .arg(root().join("docs").join(schema))
        .output()
        .unwrap();
    match output.status.success() {
        true => Ok(()),
        false => Err(String::from_utf8(output.stderr).unwrap()),
    }
}

#[test]
fn six_switches_break_nothing_and_everything_that_was_seen_is_in_the_result() {
    let (code, said, result) = run("scenarios/small.yaml", &["--check"]);
    assert_eq!(code, 0, "{said}");
    assert_eq!(result["holds"], true);
    assert_eq!(
        (&result["load"]["busy"], &result["load"]["idle"]),
        (&json!(20), &json!(20))
    );
    let new = result["load"]["new"].as_u64().unwrap();
    assert!(new >= 100, "{new} new connections");
    // What was looked at is there: nothing holds because nothing was seen.
    let tunnel = |device: &str| {
        let devices = result["devices"].as_array().unwrap();
        let found = devices.iter().find(|one| one["device"] == device);
        found.unwrap_or_else(|| panic!("no {device}"))["tunnel"]
            .as_u64()
            .unwrap()
    };
    assert!(tunnel("node1 eth0") > 1000, "{}", tunnel("node1 eth0"));
    assert!(
        result["devices"].as_array().unwrap().len() >= 8,
        "both ends, the outside, four pods"
    );
    let entries = [&result["access"]["outbound"], &result["access"]["inbound"]];
    assert_eq!(entries, [&json!(40 + new); 2]);
    let switches: Vec<&Value> = result["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|step| &step["switches"][0])
        .collect();
    assert_eq!(switches.len(), 6);
    for switch in switches {
        assert!(switch["held_ms"].as_f64().unwrap() > 0.0, "{switch}");
        assert!(switch["ledger"]["pod"].is_string(), "{switch}");
    }
    let timeline = result["timeline"].as_array().unwrap();
    let sum = |key: &str| -> u64 {
        timeline
            .iter()
            .map(|second| second[key].as_u64().unwrap())
            .sum()
    };
    assert_eq!(sum("new"), new);
    assert!(sum("messages") >= 40 * 2 + 20 * 10, "{}", sum("messages"));
    result_has_its_schema(&result);
}

fn result_has_its_schema(result: &Value) {
    let schema = "experiment-result.schema.json";
    assert_eq!(valid(schema, result), Ok(()));
    assert_eq!(
        valid("experiment.schema.json", &result["experiment"]),
        Ok(())
    );
    let mut unknown = result.clone();
    unknown["load"]["colour"] = json!("red");
    let mut lacking = result.clone();
    lacking["assertions"][0]
        .as_object_mut()
        .unwrap()
        .remove("measured");
    for broken in [unknown, lacking] {
        assert!(valid(schema, &broken).is_err());
    }
}

const BROKEN: &str = "
apiVersion: ambidex.io/v1alpha1
kind: Experiment
metadata: {name: broken}
lab: {podsPerNode: 2}
load:
  forSeconds: 14
  patienceSeconds: 5
  longLived: {connections: 16, idleShare: 0.5, everySeconds: 0.2}
  new: {perSecond: 100}
  pairs:
  - {from: pod1-2, to: pod2-1}
  - {from: pod2-2, to: pod1-1}
steps:
- {atSeconds: 1, corrupt: pod2-1}
- {atSeconds: 2, switch: {pods: [pod1-1], to: inpod}}
- {atSeconds: 4, exec: {target: pod1-2, command: [nft, flush, ruleset]}}
- {atSeconds: 7, kill: {daemon: proxy, node: 2}}
- {exec: {target: pod2-1, command: ['false']}}
assertions:
  resets: 0
  wrongBytes: 0
  failedNew: 0
  uncaptured: 0
  clearPackets: 0
  delayed: {overMs: 0, share: 0.001}
  heldMedianMs: 0
";

/// An application that answers wrongly, a capture that is taken away, a proxy that is killed, a step that fails, limits that
/// nothing keeps: each is seen by the judge that is there for it, and only with `--check` is it a failure.
#[test]
fn each_judge_sees_what_it_is_there_for() {
    let directory = tempfile::tempdir().unwrap();
    let file: PathBuf = directory.path().join("broken.yaml");
    std::fs::write(&file, BROKEN).unwrap();
    let (code, said, result) = run(file.to_str().unwrap(), &["--check"]);
    assert_eq!(code, 1, "{said}");
    assert_eq!(result["holds"], false);
    for assertion in [
        "failedSteps",
        "resets",
        "wrongBytes",
        "failedNew",
        "uncaptured",
        "clearPackets",
        "delayed",
        "heldMedianMs",
    ] {
        let one = measured(&result, assertion);
        assert_eq!(one["holds"], false, "{one}");
        assert!(one["measured"].as_f64().unwrap() > 0.0, "{one}");
        assert!(one["evidence"][0].is_string(), "{one}");
        let last = said.lines().last().unwrap();
        assert!(
            last.starts_with("does not hold: ") && last.contains(assertion),
            "{last}"
        );
    }
    assert_eq!(measured(&result, "wrongBytes")["measured"], 1.0);
    // What left the pod in the clear passed the wire between the nodes.
    let clear = measured(&result, "clearPackets")["evidence"].to_string();
    assert!(clear.contains("node1 eth0: "), "{clear}");
    let wrong = measured(&result, "wrongBytes")["evidence"].to_string();
    assert!(
        wrong.contains("pod1-2:") && wrong.contains("heard a wrong byte at"),
        "{wrong}"
    );
    assert_eq!(valid("experiment-result.schema.json", &result), Ok(()));
}

/// Every scenario that comes with the program is listed, valid by the program and by the schema, and shown as it is.
#[test]
fn what_comes_with_the_program_is_valid() {
    let (code, listed, _) = experiment(&["list", "-o", "json"]);
    assert_eq!(code, 0);
    let listed: Value = serde_json::from_str(&listed).unwrap();
    let mut names: Vec<&str> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|one| one["metadata"]["name"].as_str().unwrap())
        .collect();
    names.sort_unstable();
    let mut files: Vec<String> = std::fs::read_dir(root().join("scenarios"))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    files.sort_unstable();
    assert_eq!(names, files);
    for name in names {
        let file = root().join(format!("scenarios/{name}.yaml"));
        let text = std::fs::read_to_string(&file).unwrap();
        assert_eq!(
            experiment(&["show", name]),
            (0, text.clone(), String::new())
        );
        let (code, said, error) = experiment(&["validate", file.to_str().unwrap()]);
        assert_eq!(code, 0, "{error}");
        assert!(
            said.starts_with(&format!("{name}: an experiment of ")),
            "{said}"
        );
        let script = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))";
        let mut python = Command::new("/usr/bin/python3");
        python
            .args(["-c", script])
            .stdin(std::fs::File::open(&file).unwrap());
        let value: Value = serde_json::from_slice(&python.output().unwrap().stdout).unwrap();
        assert_eq!(valid("experiment.schema.json", &value), Ok(()), "{name}");
        let mut wrong = value;
        wrong["steps"][0]["kill"] = json!({"daemon": "kernel", "node": 1});
        assert!(valid("experiment.schema.json", &wrong).is_err(), "{name}");
    }
    let (code, _, error) = experiment(&["run", "no-such"]);
    assert_eq!(code, 1);
    assert!(
        error.contains("no-such: no such file") && error.contains("switch-1000"),
        "{error}"
    );
}
