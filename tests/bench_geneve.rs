//! `ambidex bench geneve` as a user runs it: a machine is booted, and nothing is left of it.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

fn bench(arguments: &[&str], out: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
    command.args(["bench", "geneve"]).args(arguments);
    command.arg("--out").arg(out).stdin(Stdio::null());
    command
}

/// A directory that the machine sees, too: not below /tmp, which it has one of its own of.
fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// Processes whose command line names a path: the kernel's own, and whatever it runs.
fn processes(naming: &Path) -> Vec<String> {
    let wanted = naming.display().to_string();
    let all = fs::read_dir("/proc").unwrap().flatten();
    all.filter_map(|entry| fs::read(entry.path().join("cmdline")).ok())
        .map(|line| String::from_utf8_lossy(&line).replace('\0', " "))
        .filter(|line| line.contains(&wanted))
        .collect()
}

fn assert_nothing_left(out: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes(out).is_empty() {
        assert!(Instant::now() < deadline, "{:?}", processes(out));
        std::thread::sleep(Duration::from_millis(20));
    }
    let left: Vec<_> = fs::read_dir(out)
        .unwrap()
        .flatten()
        .map(|entry| entry.file_name().into_string().unwrap())
        .filter(|name| name != "results.json")
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn a_machine_that_measures_nothing_fails_the_run_with_its_words() {
    let directory = directory();
    let run = bench(&["--rounds", "0"], directory.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("failed with exit code 1"), "{stderr}");
    assert!(stderr.contains("nothing to measure"), "{stderr}");
    assert_nothing_left(directory.path());
}

#[test]
fn an_interrupted_machine_ends_with_all_its_processes() {
    let directory = directory();
    let arguments = ["--variants", "none", "--rounds", "100"];
    let mut command = bench(&arguments, directory.path());
    let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    // Something of the benchmark in the machine runs.
    lines
        .by_ref()
        .map_while(Result::ok)
        .find(|line| line.contains("guest:"))
        .expect("a line from the machine");
    assert!(!processes(directory.path()).is_empty());
    let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
    kill(pid, Signal::SIGINT).unwrap();
    let rest: Vec<String> = lines.map_while(Result::ok).collect();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest:?}");
    assert_nothing_left(directory.path());
}

/// Takes most of a minute, so it is part of the full suite only.
#[test]
fn a_run_over_geneve_brings_its_result_here() {
    if std::env::var("AMBIDEX_TEST_SUITE").as_deref() != Ok("all") {
        return;
    }
    let directory = directory();
    let arguments = [
        "--variants",
        "node-tunnel",
        "--cases",
        "cross-node/bulk1",
        "--rounds",
        "1",
        "--seconds",
        "1",
    ];
    let run = bench(&arguments, directory.path()).output().unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    assert!(run.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("overlay: geneve\n"), "{stdout}");
    let share = stdout
        .lines()
        .find(|line| line.contains("% of the bytes through it"))
        .unwrap();
    assert!(share.contains("node-tunnel"), "{share}");
    let results = fs::read(directory.path().join("results.json")).unwrap();
    let results: Value = serde_json::from_slice(&results).unwrap();
    assert_eq!(results["ended"], "finished");
    assert_eq!(results["overlay"], "geneve");
    assert_eq!(results["environment"]["user_mode_linux"], true);
    assert_eq!(results["samples"].as_array().unwrap().len(), 1);
    assert_nothing_left(directory.path());
}
