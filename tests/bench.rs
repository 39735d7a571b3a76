//! `ambidex bench` as a user runs it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use lab::standing;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

fn bench(arguments: &[&str], out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
    command.arg("bench").args(arguments).arg("--out").arg(out);
    command.env("NO_COLOR", "1").stdin(Stdio::null());
    command
}

fn results(out: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(out.join("results.json")).unwrap()).unwrap()
}

/// Names of the labs that a run says it built.
fn labs(stderr: &str) -> Vec<String> {
    stderr
        .lines()
        .filter_map(|line| line.split_once(": lab ")?.1.split_once(" stands"))
        .map(|(name, _)| name.to_owned())
        .collect()
}

fn assert_gone(labs: &[String]) {
    let standing = standing::list().unwrap();
    for lab in labs {
        assert!(!standing.contains(lab), "lab {lab} still stands");
    }
}

#[test]
fn a_run_has_every_sample_its_conditions_and_its_proofs() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("new/results");
    let arguments = [
        "--rounds",
        "2",
        "--seconds",
        "1",
        "--variants",
        "none,inpod",
        "--cases",
        "cross-node/bulk1,cross-node/newconn",
    ];
    let Output {
        status,
        stdout,
        stderr,
    } = bench(&arguments, &out).output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8(stdout).unwrap(),
        String::from_utf8(stderr).unwrap(),
    );
    assert!(status.success(), "{stdout}{stderr}");
    assert_eq!(labs(&stderr).len(), 2, "{stderr}");
    assert_gone(&labs(&stderr));

    let results = results(&out);
    assert_eq!(results["ended"], "finished");
    assert_eq!(results["rounds"], 2);
    // The order in which they were measured: it rotates from round to round.
    let order: Vec<(u64, &str, &str)> = results["samples"]
        .as_array()
        .unwrap()
        .iter()
        .map(|sample| {
            (
                sample["round"].as_u64().unwrap(),
                sample["case"].as_str().unwrap(),
                sample["variant"].as_str().unwrap(),
            )
        })
        .collect();
    let expected = [
        (0, "cross-node/bulk1", "none"),
        (0, "cross-node/bulk1", "inpod"),
        (0, "cross-node/newconn", "none"),
        (0, "cross-node/newconn", "inpod"),
        (1, "cross-node/bulk1", "inpod"),
        (1, "cross-node/bulk1", "none"),
        (1, "cross-node/newconn", "inpod"),
        (1, "cross-node/newconn", "none"),
    ];
    assert_eq!(order, expected);
    for sample in results["samples"].as_array().unwrap() {
        let number = |key: &str| sample[key].as_f64().unwrap();
        assert!(number("value") > 0.0 && number("work") > 0.0, "{sample}");
        assert!(number("wall_seconds") >= 1.0, "{sample}");
        let cpu = |of: &str| {
            sample[of]["user"].as_f64().unwrap() + sample[of]["system"].as_f64().unwrap()
        };
        assert_eq!(
            cpu("proxies_cpu") > 0.0,
            sample["variant"] == "inpod",
            "{sample}"
        );
        assert!(cpu("machine_cpu") > cpu("proxies_cpu"), "{sample}");
        let bulk = sample["case"] == "cross-node/bulk1";
        assert_eq!(sample["latency_us"].is_null(), bulk, "{sample}");
    }

    let environment = &results["environment"];
    for key in ["kernel", "processor", "congestion_control", "mtu"] {
        assert_ne!(environment[key], "", "{key}");
    }
    let tools = environment["tools"].to_string();
    for tool in ["iperf 3", "wrk", "nginx", "tcpdump"] {
        assert!(tools.contains(tool), "{tools}");
    }
    let version = env!("CARGO_PKG_VERSION");
    assert!(results["build"].as_str().unwrap().starts_with(version));
    assert_eq!(results["overlay"], Value::Null, "no variant has one");
    assert_eq!(results["overlay_ordered"], "auto");

    let proofs = results["proofs"].as_array().unwrap();
    let proven: Vec<Value> = proofs
        .iter()
        .map(|proof| json!([proof["variant"], proof["path"]]))
        .collect();
    assert_eq!(
        proven,
        [
            json!(["none", "cross-node"]),
            json!(["inpod", "cross-node"])
        ]
    );
    for proof in proofs {
        let statements = proof["statements"].as_array().unwrap();
        assert!(statements.len() >= 8, "{proof}");
        assert!(statements.iter().all(|s| s["holds"] == true), "{proof}");
    }

    // The table says what the samples say.
    for line in results["summary"].as_array().unwrap() {
        let of: Vec<f64> = results["samples"]
            .as_array()
            .unwrap()
            .iter()
            .filter(|sample| sample["case"] == line["case"] && sample["variant"] == line["variant"])
            .map(|sample| sample["value"].as_f64().unwrap())
            .collect();
        let median = f64::midpoint(of[0], of[1]);
        assert!((line["value"]["median"].as_f64().unwrap() - median).abs() < 1e-6);
        let shown = if line["case"] == "cross-node/bulk1" {
            format!("{median:.2}")
        } else {
            format!("{median:.0}")
        };
        let row = stdout.lines().find(|row| {
            row.starts_with(line["case"].as_str().unwrap())
                && row.contains(line["variant"].as_str().unwrap())
        });
        assert!(row.unwrap().contains(&shown), "{shown} in {row:?}");
    }
    assert!(
        !stdout.contains('\u{1b}') && !stderr.contains('\u{1b}'),
        "colours"
    );
}

/// Kills what a failed test leaves.
struct Bench(Child);

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn an_interrupted_run_leaves_nothing_but_what_it_measured() {
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let out = tempfile::tempdir().unwrap();
        let arguments = ["--rounds", "50", "--seconds", "1", "--variants", "inpod"];
        let mut command = bench(&arguments, out.path());
        command.args(["--cases", "cross-node/rr64"]);
        command.stderr(Stdio::piped()).stdout(Stdio::piped());
        let mut bench = Bench(command.spawn().unwrap());
        let mut stderr = BufReader::new(bench.0.stderr.take().unwrap());
        let mut said = String::new();
        while !said.contains("round 2/50") {
            assert_ne!(stderr.read_line(&mut said).unwrap(), 0, "{said}");
        }
        kill(Pid::from_raw(i32::try_from(bench.0.id()).unwrap()), signal).unwrap();
        let sent = Instant::now();
        while stderr.read_line(&mut said).unwrap() > 0 {}
        let status = bench.0.wait().unwrap();
        assert_eq!(status.code(), Some(130), "{said}");
        assert!(sent.elapsed() < Duration::from_secs(10), "{said}");
        assert!(said.contains("interrupted"), "{said}");
        assert_eq!(labs(&said).len(), 1, "{said}");
        assert_gone(&labs(&said));
        let results = results(out.path());
        assert_eq!(results["ended"], "interrupted");
        let samples = results["samples"].as_array().unwrap().len();
        assert!((2..50).contains(&samples), "{samples}");
    }
}

#[test]
fn what_cannot_be_measured_is_said_and_nothing_is_left() {
    let out = tempfile::tempdir().unwrap();
    let arguments = ["--variants", "none", "--rounds", "1", "--seconds", "1"];
    let mut command = bench(&arguments, out.path());
    // No wrk on the PATH.
    let programs = tempfile::tempdir().unwrap();
    for directory in ["/usr/sbin", "/usr/bin", "/sbin", "/bin"] {
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            if entry.file_name() != "wrk" {
                let link = programs.path().join(entry.file_name());
                let _ = std::os::unix::fs::symlink(entry.path(), link);
            }
        }
    }
    command.env("PATH", programs.path());
    let output = command
        .args(["--cases", "same-node/newconn"])
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot start wrk"), "{stderr}");
    assert_eq!(labs(&stderr).len(), 1, "{stderr}");
    assert_gone(&labs(&stderr));
    let results = results(out.path());
    assert!(results["ended"]["failed"].as_str().unwrap().contains("wrk"));
    assert_eq!(results["proofs"].as_array().unwrap().len(), 1);

    let usage = bench(&["--cases", "sideways"], out.path())
        .output()
        .unwrap();
    assert_eq!(usage.status.code(), Some(2));
}
