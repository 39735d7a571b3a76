//! What `ambidex doctor` finds: in recorded machines, one for each finding, and in namespaces and labs.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

#[path = "doctor/live.rs"]
mod live;
#[path = "doctor/report.rs"]
mod report;

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use ambidex::doctor::{Facts, Findings, Severity, catalogue, evaluate, recommended};
use ambidex::options::Capture;
use serde::Deserialize;
use serde_json::Value;

/// A machine that differs from the clean one, and what is found there.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Fixture {
    /// The check it is about.
    id: String,
    /// What differs (a merge patch, RFC 7396).
    facts: Value,
    /// All that is found, in any order.
    expect: Vec<Expected>,
    /// What nearly is a finding of the check.
    near: Value,
}

/// A finding; of the fixture's check unless it names another.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Expected {
    id: Option<String>,
    severity: Severity,
    object: String,
}

fn directory() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/doctor")
}

fn read(name: &str) -> Value {
    let text = fs::read(directory().join(name)).unwrap();
    serde_json::from_slice(&text).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn fixtures() -> Vec<Fixture> {
    let mut names: Vec<String> = fs::read_dir(directory())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.ends_with(".json") && name != "clean.json")
        .collect();
    names.sort();
    let fixture = |name: &String| {
        let fixture: Fixture =
            serde_json::from_value(read(name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(*name, format!("{}.json", fixture.id.replacen('/', "-", 1)));
        fixture
    };
    names.iter().map(fixture).collect()
}

fn merge(into: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *into = patch.clone();
        return;
    };
    if !into.is_object() {
        *into = Value::Object(serde_json::Map::new());
    }
    let into = into.as_object_mut().unwrap();
    for (key, value) in patch {
        if value.is_null() {
            into.remove(key);
        } else {
            merge(into.entry(key.clone()).or_insert(Value::Null), value);
        }
    }
}

/// What is found on the clean machine with these differences: id, severity, object.
fn found_with(patch: &Value) -> (Findings, BTreeSet<(String, Severity, String)>) {
    let mut facts = read("clean.json");
    merge(&mut facts, patch);
    let facts: Facts =
        serde_json::from_value(facts).unwrap_or_else(|error| panic!("{error}: {patch}"));
    let findings = evaluate(&facts);
    let bad = findings
        .findings
        .iter()
        .filter(|finding| finding.severity > Severity::Ok);
    let found = bad
        .map(|one| (one.id.clone(), one.severity, one.object.clone()))
        .collect();
    (findings, found)
}

#[test]
fn on_a_clean_machine_everything_is_fine() {
    let (findings, found) = found_with(&serde_json::json!({}));
    assert_eq!(found, BTreeSet::new());
    let ids: Vec<&str> = findings
        .findings
        .iter()
        .map(|finding| finding.id.as_str())
        .collect();
    let all: Vec<&str> = catalogue::all().map(|check| check.id).collect();
    assert_eq!(ids, all);
    assert_eq!(recommended(&findings).mode, Some(Capture::Inpod));
}

#[test]
fn nothing_is_concluded_from_what_is_not_known() {
    let findings = evaluate(&Facts::default());
    assert!(
        findings
            .findings
            .iter()
            .all(|finding| finding.severity == Severity::Ok),
        "{findings:#?}"
    );
}

#[test]
fn each_check_finds_what_it_is_for_and_nothing_near_it() {
    let fixtures = fixtures();
    for fixture in &fixtures {
        let (findings, found) = found_with(&fixture.facts);
        let wanted = fixture.expect.iter().map(|one| {
            let id = one.id.as_ref().unwrap_or(&fixture.id);
            (id.clone(), one.severity, one.object.clone())
        });
        let wanted: BTreeSet<_> = wanted.collect();
        assert!(
            wanted.iter().any(|(id, ..)| *id == fixture.id),
            "{}",
            fixture.id
        );
        assert_eq!(found, wanted, "{}", fixture.id);
        for finding in findings
            .findings
            .iter()
            .filter(|one| one.severity > Severity::Ok)
        {
            assert!(
                !finding.why.is_empty() && !finding.fix.is_empty(),
                "{finding:#?}"
            );
            assert!(!finding.fix.contains("OBJECT"), "{finding:#?}");
            assert!(!finding.modes.is_empty(), "{finding:#?}");
        }
        let (_, near) = found_with(&fixture.near);
        assert!(
            near.iter().all(|(id, ..)| *id != fixture.id),
            "near {}: {near:#?}",
            fixture.id
        );
    }
    let covered: BTreeSet<&str> = fixtures.iter().map(|fixture| fixture.id.as_str()).collect();
    let all: BTreeSet<&str> = catalogue::all().map(|check| check.id).collect();
    assert_eq!(covered, all, "checks and fixtures");
}

#[test]
fn a_mode_that_is_broken_is_not_recommended() {
    let of = |id: &str| {
        let fixture = fixtures()
            .into_iter()
            .find(|fixture| fixture.id == id)
            .unwrap();
        recommended(&found_with(&fixture.facts).0)
    };
    assert_eq!(of("node/pod-routes").mode, Some(Capture::Inpod));
    assert!(of("node/pod-routes").reason.contains("node/pod-routes"));
    assert_eq!(of("inpod/redirect").mode, Some(Capture::Node));
    assert_eq!(of("host/capabilities").mode, None);
}

#[test]
fn the_document_has_every_check() {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/doctor.md");
    let document = fs::read_to_string(path).unwrap();
    let explained = catalogue::explained();
    let missing: Vec<&str> = explained
        .lines()
        .filter(|line| !document.contains(line))
        .collect();
    assert!(
        document.contains(&explained),
        "put the output of `ambidex doctor --explain` into docs/doctor.md; differs: {missing:#?}"
    );
    let said = Command::new(harness::ambidex())
        .args(["doctor", "--explain"])
        .output()
        .unwrap();
    assert_eq!(String::from_utf8(said.stdout).unwrap(), explained);
}

#[test]
fn a_recorded_machine_is_judged_as_a_live_one() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let judge = |facts: &Value, args: &[&str]| {
        fs::write(file.path(), facts.to_string()).unwrap();
        let mut command = Command::new(harness::ambidex());
        command
            .arg("doctor")
            .arg("--facts")
            .arg(file.path())
            .args(args);
        runtime::Done::of(&mut command, b"")
    };
    let mut facts = read("clean.json");
    let said = judge(&facts, &[]).with_code(0);
    assert!(said.contains("√ node/rp-filter: "), "{said}");
    assert!(said.contains("recommended: inpod"), "{said}");
    assert!(
        !said.contains('\x1b'),
        "colour goes to terminals only: {said}"
    );
    merge(
        &mut facts,
        &serde_json::json!({"features": {"tproxy": "no such target"}}),
    );
    let said = judge(&facts, &["--mode", "node"]).with_code(3);
    assert!(
        said.contains("× node/tproxy: ") && said.contains("kernel: no such target"),
        "{said}"
    );
    assert!(said.contains("fix: modprobe xt_TPROXY"), "{said}");
    assert!(!said.contains("inpod/redirect"), "{said}");
    judge(&facts, &["--mode", "inpod"]).with_code(0);
    let said = judge(&facts, &["-o", "json"]).with_code(3);
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["recommended"]["mode"], "inpod");
    let bad: Vec<&Value> = said["findings"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|one| one["severity"] == "fail")
        .collect();
    assert_eq!(bad.len(), 1, "{bad:#?}");
    assert_eq!(bad[0]["id"], "node/tproxy");
    let said = judge(&facts, &["-o", "yaml"]).with_code(3);
    assert!(said.contains("severity: fail"), "{said}");
    let said = judge(&serde_json::json!({"kernal": "6.1"}), &[]);
    assert!(said.code == 1 && said.stderr.contains("kernal"), "{said:?}");
}
