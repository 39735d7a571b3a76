//! The cases of `ambidex bench` that are not streams and requests, and proxies of others, as a user runs them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use lab::standing::{self, Daemon, Lab};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

const AMBIDEX: &str = env!("CARGO_BIN_EXE_ambidex");

fn command(arguments: &[&str], out: &Path) -> Command {
    let mut command = Command::new(AMBIDEX);
    command.arg("bench").args(arguments).arg("--out").arg(out);
    command.args(["--rounds", "1", "--seconds", "1"]);
    command.stdin(Stdio::null());
    command
}

/// A benchmark that goes on while a test looks at it; it is ended if the test fails.
struct Run {
    child: Child,
    stderr: BufReader<ChildStderr>,
    /// What it wrote to standard error.
    said: String,
}

impl Run {
    fn start(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        Self {
            stderr: BufReader::new(child.stderr.take().unwrap()),
            child,
            said: String::new(),
        }
    }

    fn read_to(&mut self, word: &str) {
        while !self.said.contains(word) {
            let read = self.stderr.read_line(&mut self.said).unwrap();
            assert_ne!(read, 0, "no {word:?} in {}", self.said);
        }
    }

    /// The name of a variant's lab, when it stands.
    fn lab_of(&mut self, variant: &str) -> String {
        let begin = format!("{variant}: lab ");
        loop {
            let line = self.said.lines().find_map(|line| line.strip_prefix(&begin));
            if let Some((lab, _)) = line.and_then(|line| line.split_once(" stands")) {
                return lab.to_owned();
            }
            let read = self.stderr.read_line(&mut self.said).unwrap();
            assert_ne!(read, 0, "{}", self.said);
        }
    }

    /// Waits for its end: exit code and standard output.
    fn end(&mut self) -> (Option<i32>, String) {
        self.stderr.read_to_string(&mut self.said).unwrap();
        let mut stdout = String::new();
        let mut pipe = self.child.stdout.take().unwrap();
        pipe.read_to_string(&mut stdout).unwrap();
        (self.child.wait().unwrap().code(), stdout)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Asked, not killed: it removes its labs.
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        if self.child.try_wait().is_ok_and(|status| status.is_none()) {
            let _ = kill(pid, Signal::SIGTERM);
        }
        let _ = self.child.wait();
    }
}

/// A program in a directory.
fn script(directory: &Path, name: &str, text: &str) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

fn results(out: &Path) -> Value {
    serde_json::from_slice(&fs::read(out.join("results.json")).unwrap()).unwrap()
}

fn bench(arguments: &[&str], out: &Path) -> (Output, String) {
    let output = command(arguments, out).output().unwrap();
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
        "same-node/enrol4-at-once",
        "same-node/enrol4-20ps",
        "cross-node/crash",
    ];
    let proxy = format!("own={AMBIDEX},RUST_LOG=warn");
    let variants = ["--variants", "none", "--proxy", &proxy];
    let (output, stderr) = bench(
        &[&variants[..], &["--cases", &cases.join(",")]].concat(),
        out.path(),
    );
    assert!(output.status.success(), "{stderr}");
    let results = results(out.path());
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
    let measured = cases.iter().zip(of_none).filter(|(_, measured)| *measured);
    assert_eq!(measured.count(), 4, "{of_none:?}");

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
    for case in ["same-node/enrol4-at-once", "same-node/enrol4-20ps"] {
        let parts = ["agent", "iptables", "plugin", "proxy"];
        let parts = parts.map(|part| number(case, &format!("{part}_cpu_ms_per_pod")));
        let sum = 4.0 * parts.iter().sum::<f64>();
        assert!((number(case, "cpu_ms") - sum).abs() < 0.01, "{parts:?}");
        assert!(parts[0] > 0.0 && parts[3] > 0.0, "{parts:?}");
    }
    // On so many processors as there are nothing ends before its work is done.
    assert!(number("same-node/enrol4-at-once", "wall_by_cpu") > 0.5);
    // The last of four is due after 150 ms; and each has waited for as long as the plugin ran.
    assert!(number("same-node/enrol4-20ps", "wall_ms") >= 150.0);
    let paced = &sample("same-node/enrol4-20ps", "own").unwrap()["latency_us"];
    assert!(percentile(paced, "p50") <= percentile(paced, "p99"));
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains(" x CPU/"), "{table}");
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

    // One that runs and says nothing to the agent.
    let scripts = tempfile::tempdir().unwrap();
    let silent = script(scripts.path(), "silent", "echo no words; exec sleep 600");
    let proxy = format!("other={}", silent.display());
    let mut patient = command(&[&arguments[..], &["--proxy", &proxy]].concat(), out.path());
    let output = patient.env("AMBIDEX_LAB_READY_SECONDS", "10").output();
    let output = output.unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    for part in [
        "silent in the place of",
        "speak ZDS",
        "node1 is not ready after 10s",
        "no words",
    ] {
        assert!(stderr.contains(part), "no {part:?} in {stderr}");
    }
    // Labs of other tests come and go meanwhile; this one's are named after its processes.
    let ours = |lab: &String| !before.contains(lab) && stderr.contains(&format!("lab {lab} "));
    assert!(!standing::list().unwrap().iter().any(ours));
}

/// The environment that a proxy of others gets, and connections of its lab that are not like those of the other labs.
#[test]
fn a_proxy_has_its_environment_and_what_is_not_equal_is_shown() {
    let directory = tempfile::tempdir().unwrap();
    let out = directory.path().join("out");
    let told = directory.path().join("told");
    // In-pod capture: the proxy's connections are in the pods' namespaces, and have their algorithm.
    let other = script(
        directory.path(),
        "other",
        &format!(
            "env >\"$TOLD.$NODE_NAME\"\n\
             ip netns exec \"adx-$AMBIDEX_LAB-pod2-1\" sysctl -qw net.ipv4.tcp_congestion_control=reno\n\
             exec {AMBIDEX} \"$@\""
        ),
    );
    let proxy = format!(
        "other={},TOLD={},RUST_LOG=warn,EMPTY=",
        other.display(),
        told.display()
    );
    let arguments = [
        "--variants",
        "none",
        "--cases",
        "cross-node/bulk1",
        "--proxy",
        &proxy,
    ];
    let (output, stderr) = bench(&arguments, &out);
    assert!(output.status.success(), "{stderr}");
    let environment = fs::read_to_string(told.with_extension("node2")).unwrap();
    for line in [
        "RUST_LOG=warn",
        "EMPTY=",
        "XDS_ADDRESS=",
        "CA_ADDRESS=",
        "PROXY_MODE=shared",
        "FAKE_CA=true",
        "NODE_NAME=node2",
    ] {
        assert!(
            environment.lines().any(|l| l == line),
            "no {line} in {environment}"
        );
    }
    for key in ["INPOD_UDS=/", "LOCAL_XDS_PATH=/", "ZTUNNEL_WORKER_THREADS="] {
        assert!(
            environment.lines().any(|l| l.starts_with(key)),
            "no {key} in {environment}"
        );
    }

    let results = results(&out);
    let properties = results["equality"].as_array().unwrap();
    let property = |what: &str| {
        let found = properties.iter().find(|property| property["what"] == what);
        found.unwrap_or_else(|| panic!("no {what}"))
    };
    let used = property("server: congestion control of its connections");
    assert_eq!(used["values"]["none"], "cubic", "{used}");
    assert_eq!(used["values"]["other"], "reno", "{used}");
    assert_eq!(used["equal"], false);
    let clients = property("client: congestion control of its connections");
    assert_eq!(clients["values"]["other"], "cubic", "{clients}");
    assert_eq!(
        clients["equal"], false,
        "a connection is as fast as its slowest part"
    );
    for place in ["client", "server", "node", "proxy"] {
        let buffers = property(&format!("{place}: socket buffers"));
        assert_eq!(buffers["equal"], true, "{buffers}");
        let values = buffers["values"]["none"].as_str().unwrap();
        for name in ["tcp_rmem ", "tcp_wmem ", "rmem_max ", "wmem_max "] {
            assert!(values.contains(name) && !values.contains('?'), "{values}");
        }
    }
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(
        stdout.contains(
            "warning: the variants differ in more than the capture: server: congestion control"
        ),
        "{stdout}"
    );
}

#[test]
fn a_proxy_that_ends_while_it_is_measured_is_named() {
    let out = tempfile::tempdir().unwrap();
    let proxy = format!("other={AMBIDEX}");
    let mut run = Command::new(AMBIDEX);
    run.args(["bench", "--variants", "none", "--proxy", &proxy]);
    run.args([
        "--cases",
        "cross-node/rr1,cross-node/rr64",
        "--rounds",
        "1",
        "--seconds",
        "5",
        "--out",
    ]);
    run.arg(out.path()).stdin(Stdio::null());
    let mut run = Run::start(run);
    let lab = run.lab_of("other");
    run.read_to("round 1/1 cross-node/rr1");
    let proxy = Lab::open(&lab).unwrap().process(2, Daemon::Proxy);
    let pid = Pid::from_raw(proxy.unwrap().pid);
    kill(pid, Signal::SIGKILL).unwrap();
    let (code, _) = run.end();
    let said = &run.said;
    assert_eq!(code, Some(1), "{said}");
    assert!(
        said.contains("of other cross-node/rr64: proxy2 has ended"),
        "{said}"
    );
    assert!(said.contains("--- end of "), "its log: {said}");
    let results = results(out.path());
    let why = results["ended"]["failed"].as_str().unwrap();
    assert!(why.contains("proxy2 has ended"), "{why}");
    assert!(!standing::list().unwrap().contains(&lab));
}

/// A relay whose wire between the nodes is narrow, while no mesh's is not: it bounds nothing, and the run says so.
#[test]
fn a_run_with_a_slow_relay_is_void() {
    let out = tempfile::tempdir().unwrap();
    let arguments = ["--variants", "none,relay", "--cases", "cross-node/bulk1"];
    let mut run = Run::start(command(&arguments, out.path()));
    let lab = run.lab_of("relay");
    let node = format!("adx-{lab}-node1");
    let limit = "qdisc add dev eth0 root tbf rate 200mbit burst 256k latency 100ms";
    let mut tc = Command::new("tc");
    tc.args(["-n", &node]).args(limit.split(' '));
    assert!(tc.status().unwrap().success());
    let (code, stdout) = run.end();
    let said = &run.said;
    assert_eq!(code, Some(1), "{stdout}{said}");
    assert!(
        said.contains("VOID: in cross-node/bulk1 the relay came to 0."),
        "{said}"
    );
    let results = results(out.path());
    let why = results["ended"]["void"].as_str().unwrap();
    assert!(why.contains("less than 0.45"), "{why}");
    let value = |variant: &str| {
        let samples = results["samples"].as_array().unwrap();
        let sample = samples.iter().find(|sample| sample["variant"] == variant);
        sample.unwrap()["value"].as_f64().unwrap()
    };
    assert!(value("relay") < 0.25, "{} Gbit/s", value("relay"));
    // The cause is in the matrix.
    let qdisc = "warning: the variants differ in more than the capture: node: qdisc";
    assert!(stdout.contains(qdisc), "{stdout}");
    assert!(!standing::list().unwrap().contains(&lab));
}
