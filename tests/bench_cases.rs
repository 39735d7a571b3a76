//! The cases of `ambidex bench` that are not streams and requests, and proxies of others, as a user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use lab::standing;
use serde_json::Value;

const AMBIDEX: &str = env!("CARGO_BIN_EXE_ambidex");

fn bench(arguments: &[&str], out: &Path) -> (Output, String) {
    let mut command = Command::new(AMBIDEX);
    command.arg("bench").args(arguments).arg("--out").arg(out);
    command.args(["--rounds", "1", "--seconds", "1"]);
    let output = command.stdin(Stdio::null()).output().unwrap();
    let stderr = String::from_utf8(output.stderr.clone()).unwrap();
    (output, stderr)
}

/// Our own proxy, given by its path as any other program.
#[test]
fn every_kind_of_case_is_measured_with_a_proxy_given_by_path() {
    let out = tempfile::tempdir().unwrap();
    let cases = [
        "cross-node/bulk8-down",
        "cross-node/rr1",
        "cross-node/first-byte",
        "same-node/cold",
        "cross-node/idle1000",
        "same-node/enrol1",
        "cross-node/crash",
    ];
    let proxy = format!("own={AMBIDEX},RUST_LOG=warn");
    let variants = ["--variants", "none", "--proxy", &proxy];
    let (output, stderr) = bench(
        &[&variants[..], &["--cases", &cases.join(",")]].concat(),
        out.path(),
    );
    assert!(output.status.success(), "{stderr}");
    let results = std::fs::read(out.path().join("results.json")).unwrap();
    let results: Value = serde_json::from_slice(&results).unwrap();
    let sample = |case: &str, variant: &str| {
        let samples = results["samples"].as_array().unwrap();
        let found = samples
            .iter()
            .find(|sample| sample["case"] == case && sample["variant"] == variant);
        found.cloned()
    };
    for case in cases {
        let sample = sample(case, "own").unwrap_or_else(|| panic!("no sample of {case}"));
        assert!(sample["value"].as_f64().unwrap() > 0.0, "{sample}");
    }
    // Without a mesh there is nothing to weigh, to be captured by, or to crash.
    let of_none = cases.map(|case| sample(case, "none").is_some());
    assert_eq!(of_none, [true, true, true, true, false, false, false]);

    let number = |case: &str, key: &str| {
        let sample = sample(case, "own").unwrap();
        let found = sample["extra"][key].as_f64();
        found.unwrap_or_else(|| panic!("no {key} in {sample}"))
    };
    let cold = sample("same-node/cold", "own").unwrap();
    let opened = number("same-node/cold", "tunnels_opened");
    assert_eq!(Some(opened), cold["work"].as_f64(), "one tunnel for each");
    let warm = &sample("cross-node/first-byte", "own").unwrap()["latency_us"];
    let percentile = |latency: &Value, key: &str| latency[key].as_f64().unwrap();
    assert!(percentile(warm, "p50") <= percentile(warm, "p99"));
    for side in ["client_side", "server_side"] {
        let rss = number("cross-node/idle1000", &format!("{side}_rss_kib"));
        assert!(
            (0.1..200.0).contains(&rss),
            "{side}: {rss} KiB a connection"
        );
    }
    assert!(number("same-node/enrol1", "wall_ms") > 1.0);
    let crash = "cross-node/crash";
    let harm = number(crash, "standing_connections_lost") + number(crash, "new_connections_failed");
    assert!(harm > 0.0, "a killed proxy does harm");
    assert!(number(crash, "ready_after_ms") > 0.0);
}

#[test]
fn a_program_that_is_no_proxy_is_named_and_nothing_is_left() {
    let out = tempfile::tempdir().unwrap();
    let before = standing::list().unwrap();
    let arguments = ["--variants", "none", "--cases", "cross-node/rr1"];
    let with = |proxy: &str| bench(&[&arguments[..], &["--proxy", proxy]].concat(), out.path());
    let (output, stderr) = with("other=/bin/true");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("/bin/true in the place of"), "{stderr}");
    assert!(stderr.contains("speak ZDS"), "{stderr}");
    assert!(stderr.contains("does not run"), "{stderr}");
    let (output, stderr) = with("other=/no/such/program");
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("/no/such/program"), "{stderr}");
    let (output, stderr) = with("inpod=/bin/true");
    assert_eq!(output.status.code(), Some(2), "{stderr}");
    assert!(
        stderr.contains("there is a variant of this name"),
        "{stderr}"
    );
    // Labs of other tests come and go meanwhile; this one's are named after its processes.
    let ours = |lab: &String| !before.contains(lab) && stderr.contains(&format!("lab {lab} "));
    assert!(!standing::list().unwrap().iter().any(ours));
}
