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
    assert_eq!(labs(&stderr).len(), 2 * 2, "{stderr}");
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
    what_a_report_lacks_makes_it_fail(&results);
    the_schema_is_kept(&results);
    a_broken_off_round_is_measured_again(&arguments, &out, results);
}

/// `ambidex bench show` of a report: exit code, what it printed, what it wrote to standard error.
fn show(report: &Value) -> (Option<i32>, String, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("results.json");
    std::fs::write(&file, report.to_string()).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
    let output = command.args(["bench", "show"]).arg(&file).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (
        output.status.code(),
        text(output.stdout),
        text(output.stderr),
    )
}

/// Judged by Debian's python3-jsonschema.
fn the_schema_is_kept(whole: &Value) {
    let valid = |report: &Value| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("results.json");
        std::fs::write(&file, report.to_string()).unwrap();
        let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/results.schema.json");
        let mut judge = Command::new("/usr/bin/python3");
        judge.args(["-m", "jsonschema", "--instance"]);
        let output = judge.arg(&file).arg(&schema).output().unwrap();
        (
            output.status.success(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (kept, complaint) = valid(whole);
    assert!(kept, "{complaint}");
    let mut unknown = whole.clone();
    unknown["samples"][0]["colour"] = json!("red");
    let mut lacking = whole.clone();
    lacking["samples"][0]
        .as_object_mut()
        .unwrap()
        .remove("value");
    let mut wrong = whole.clone();
    wrong["rounds"] = json!("two");
    for broken in [unknown, lacking, wrong] {
        assert!(!valid(&broken).0, "{broken:#}");
    }
}

fn what_a_report_lacks_makes_it_fail(whole: &Value) {
    let (code, stdout, stderr) = show(whole);
    assert_eq!((code, stderr.as_str()), (Some(0), ""), "{stdout}");
    let mut lacking = whole.clone();
    lacking["samples"].as_array_mut().unwrap().remove(3);
    let (code, stdout, stderr) = show(&lacking);
    assert_eq!(code, Some(1), "{stdout}");
    assert!(
        stderr.contains("inpod cross-node/newconn: 1 samples of 2"),
        "{stderr}"
    );
    assert!(stdout.contains("1 samples of 2"), "{stdout}");

    let mut unproven = whole.clone();
    unproven["proofs"].as_array_mut().unwrap().pop();
    let (code, _, stderr) = show(&unproven);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("inpod cross-node: the path was not proven"),
        "{stderr}"
    );

    // The same numbers with a relay that came to a third of no mesh.
    let text = whole.to_string().replace("\"inpod\"", "\"relay\"");
    let mut void: Value = serde_json::from_str(&text).unwrap();
    for sample in void["samples"].as_array_mut().unwrap() {
        if sample["case"] == "cross-node/bulk1" {
            sample["value"] = json!(if sample["variant"] == "relay" {
                1.0
            } else {
                3.0
            });
        }
    }
    let (code, stdout, stderr) = show(&void);
    assert_eq!(code, Some(1));
    assert!(
        stderr.contains("VOID: in cross-node/bulk1 the relay came to 0.33"),
        "{stderr}"
    );
    assert!(
        stdout
            .lines()
            .any(|row| row.contains("relay") && row.contains("VOID")),
        "{stdout}"
    );
}

/// A file as a killed run leaves it: the second round of the second case is there only in part.
fn a_broken_off_round_is_measured_again(arguments: &[&str], out: &Path, whole: Value) {
    let mut broken = whole.clone();
    broken["samples"].as_array_mut().unwrap().pop();
    broken["ended"] = json!("running");
    std::fs::write(out.join("results.json"), broken.to_string()).unwrap();
    let other = bench(&["--resume", "--rounds", "3"], out).output().unwrap();
    let stderr = String::from_utf8(other.stderr).unwrap();
    assert_eq!(other.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot be continued"), "{stderr}");

    let output = bench(arguments, out).arg("--resume").output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{stderr}");
    assert!(
        stderr.contains("3 of 4 steps were measured before"),
        "{stderr}"
    );
    let results = results(out);
    assert_eq!(
        (&results["ended"], &results["sessions"]),
        (&json!("finished"), &json!(2))
    );
    let samples = |report: &Value| report["samples"].as_array().unwrap().clone();
    assert_eq!(samples(&results)[..6], samples(&whole)[..6], "kept");
    assert_eq!(samples(&results).len(), 8);
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
        assert!((2..=3).contains(&labs(&said).len()), "{said}");
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

/// One small cell: one request at a time.
const CELL: [&str; 6] = [
    "--cases",
    "cross-node/rr1",
    "--rounds",
    "8",
    "--seconds",
    "1",
];

#[test]
fn a_variant_does_not_differ_from_itself() {
    // Of 100 checks 5 may find a difference by chance; of 10,000 tests, one finds one three times in a row.
    let mut said = String::new();
    for _ in 0..3 {
        let out = tempfile::tempdir().unwrap();
        let output = bench(&["--self-check"], out.path())
            .args(CELL)
            .output()
            .unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        said.push_str(&stdout);
        assert_eq!(labs(&stderr).len(), 2 * 8, "{stderr}");
        assert_gone(&labs(&stderr));
        let check: Value =
            serde_json::from_slice(&std::fs::read(out.path().join("self-check.json")).unwrap())
                .unwrap();
        for lab in check["samples"].as_array().unwrap() {
            assert_eq!(lab.as_array().unwrap().len(), 8);
        }
        match output.status.code() {
            Some(0) => {
                assert!(stdout.contains("self-check: no difference"), "{stdout}");
                return;
            }
            Some(3) => assert!(stdout.contains("DIFFERS from itself"), "{stdout}"),
            other => panic!("{other:?}: {stderr}"),
        }
    }
    panic!("three checks found a difference:\n{said}");
}

#[test]
fn an_injected_delay_is_detected() {
    let out = tempfile::tempdir().unwrap();
    let output = bench(&["--inject-delay", "1ms"], out.path())
        .args(CELL)
        .output()
        .unwrap();
    let stdout = String::from_utf8(output.stdout).unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stdout}{stderr}");
    assert!(stdout.contains("injected delay: detected"), "{stdout}");
    assert_gone(&labs(&stderr));

    // With too few rounds nothing can be found, which must not pass for equality.
    let mut few = bench(&["--self-check", "--rounds", "6"], out.path());
    let output = few.args(["--cases", "cross-node/rr64"]).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("want at least 7"), "{stderr}");
}

#[test]
fn the_tables_of_documents_are_what_their_results_say() {
    let check = |document: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
        command.args(["bench", "report", "docs/results", "--check", "--write"]);
        command
            .arg(document)
            .current_dir(env!("CARGO_MANIFEST_DIR"));
        command.output().unwrap().status.code()
    };
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/performance.md");
    assert_eq!(check(&document), Some(0), "make it so without --check");
    let directory = tempfile::tempdir().unwrap();
    let changed = directory.path().join("performance.md");
    let text = std::fs::read_to_string(&document).unwrap();
    std::fs::write(&changed, text.replace("Gbit/s", "Mbit/s")).unwrap();
    assert_eq!(check(&changed), Some(3));
}
