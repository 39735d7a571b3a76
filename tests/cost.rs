//! `ambidex bench cost` as a user runs it: a small order, and what must be true of any.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::path::Path;
use std::process::{Command, Output, Stdio};

use lab::standing;
use serde_json::Value;

fn cost(arguments: &[&str], out: &Path) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
    command.args(["bench", "cost"]).args(arguments);
    command.arg("--out").arg(out).stdin(Stdio::null());
    command.output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number at {path} in {value:#}"))
}

#[test]
fn a_small_order_gives_numbers_that_agree_with_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let arguments = [
        "-o",
        "json",
        "--variants",
        "inpod",
        "--cases",
        "cross-node/rr1",
        "--pods",
        "0,1,4",
        "--idle-connections",
        "30",
        "--idle-tunnels",
        "24",
        "--seconds",
        "1",
        "--settle",
        "0",
    ];
    let run = cost(&arguments, directory.path());
    assert!(run.status.success(), "{}", text(&run.stderr));
    let report: Value = serde_json::from_slice(&run.stdout).unwrap();
    let stored = std::fs::read(directory.path().join("cost.json")).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&stored).unwrap(), report);
    assert_eq!(report["format"], 1);
    assert_eq!(report["ended"], "finished");
    assert_eq!(report["environment"]["mtu"], "1500");
    assert!(report["environment"]["busy_before"].as_f64().is_some());
    let cost = &report["variants"][0];
    assert_eq!(cost["variant"], "inpod");

    let load = &cost["loads"][0];
    assert_eq!(load["operation"], "request");
    assert!(number(load, "/operations") > 10.0);
    // A request and its answer are packets on the wire, and bytes in them.
    assert!(number(load, "/wire_packets_per_operation") >= 2.0);
    assert!(number(load, "/wire_bytes_per_operation") > 200.0);
    let of_all = number(load, "/machine_cpu_us_per_operation");
    let of_proxies = number(load, "/proxies_cpu_us_per_operation");
    assert!(of_proxies > 0.0 && of_all > of_proxies, "{load:#}");
    let names: Vec<&str> = load["processes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|process| process["process"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["agent1", "agent2", "proxy1", "proxy2"]);
    assert!(number(load, "/proxies_switches_per_operation") > 0.1);
    match report["syscall_tool"].as_str() {
        // Each proxy reads and writes for every request and every answer.
        Some(_) => assert!(number(load, "/proxies_syscalls_per_operation") >= 2.0),
        None => assert!(report["syscall_note"].as_str().is_some(), "{report:#}"),
    }

    let pods = cost["pods"].as_array().unwrap();
    let at = |index: usize, path: &str| number(&pods[index], path);
    assert_eq!(
        [at(0, "/pods"), at(1, "/pods"), at(2, "/pods")],
        [0.0, 1.0, 4.0]
    );
    let sockets: Vec<f64> = (0..3)
        .map(|index| at(index, "/proxy/descriptors/sockets"))
        .collect();
    // In-pod capture listens in each pod.
    assert!(sockets[1] - sockets[0] >= 3.0, "{sockets:?}");
    assert!(
        sockets[2] - sockets[1] >= 3.0 * (sockets[1] - sockets[0]),
        "{sockets:?}"
    );
    for index in 0..3 {
        assert!(at(index, "/proxy/memory/rss_kib") >= at(index, "/proxy/memory/pss_kib"));
        assert!(at(index, "/proxy/memory/rss_kib") > 1024.0);
        assert!(at(index, "/agent/memory/rss_kib") > 1024.0);
    }
    assert!(at(2, "/pod_objects/iptables_rules") >= 5.0);
    assert!(at(2, "/pod_objects/listening_sockets") >= 3.0);
    assert_eq!(at(2, "/node_objects_per_pod/set_members"), 1.0);
    assert_eq!(at(2, "/node_objects_per_pod/devices"), 0.0);
    assert!(pods[0]["enrolment"].is_null());
    let enrolment = &pods[2]["enrolment"];
    assert_eq!(number(enrolment, "/announce_us/samples"), 3.0);
    let p99 = |step: &str| number(enrolment, &format!("/{step}/p99"));
    assert!(p99("plugin_us") > p99("total_us") && p99("total_us") > p99("announce_us"));
    assert!(p99("apply_us") > 0.0 && p99("record_us") > 0.0 && p99("plan_us") > 0.0);

    // A connection is a socket at each end of each proxy; 30 of one pair share a tunnel, those of 24 pairs share none.
    let [connections, tunnels] = [&cost["idle_connections"], &cost["idle_tunnels"]];
    assert_eq!(number(connections, "/connections"), 29.0);
    assert_eq!(number(connections, "/open_sockets/client"), 1.0);
    assert_eq!(number(connections, "/unused_sockets/client"), 0.0);
    assert_eq!(number(tunnels, "/connections"), 23.0);
    assert_eq!(number(tunnels, "/open_sockets/client"), 2.0);
    assert_eq!(number(tunnels, "/unused_sockets/client"), 1.0);
    assert!(number(tunnels, "/open_kib/client") > 0.0);

    the_schema_is_kept(&report);

    // Nothing of this is about 200 pods or 2,000 tunnels, and it says so.
    let gates = report["gates"].as_array().unwrap();
    assert_eq!(gates.len(), 3);
    for gate in gates {
        assert_eq!(gate["status"], "not-measured");
        assert!(gate["found"].is_null() && gate["limit"].as_f64().is_some());
    }
}

/// Judged by Debian's python3-jsonschema.
fn the_schema_is_kept(whole: &Value) {
    let valid = |report: &Value| {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("cost.json");
        std::fs::write(&file, report.to_string()).unwrap();
        let schema = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/cost.schema.json");
        let mut judge = Command::new("/usr/bin/python3");
        judge.args(["-m", "jsonschema", "--instance"]);
        let output = judge.arg(&file).arg(&schema).output().unwrap();
        (output.status.success(), text(&output.stderr))
    };
    let (kept, complaint) = valid(whole);
    assert!(kept, "{complaint}");
    let broken = |change: fn(&mut Value)| {
        let mut report = whole.clone();
        change(&mut report);
        assert!(!valid(&report).0, "{report:#}");
    };
    broken(|report| report["variants"][0]["pods"][2]["colour"] = Value::from("red"));
    broken(|report| report["variants"][0]["loads"][0]["operation"] = Value::from("GB"));
    broken(|report| report["gates"][0]["status"] = Value::from("met"));
    broken(|report| {
        let idle = report["variants"][0]["idle_tunnels"].as_object_mut();
        idle.unwrap().remove("unused_kib");
    });
}

#[test]
fn an_order_that_cannot_be_carried_out_fails_and_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let run = cost(&["--pods", "5,1"], directory.path());
    assert_eq!(run.status.code(), Some(1));
    assert!(
        text(&run.stderr).contains("ascending"),
        "{}",
        text(&run.stderr)
    );

    // A load that fails is no cost: there is no wrk to make it.
    let tools = directory.path().join("tools");
    std::fs::create_dir(&tools).unwrap();
    let broken = tools.join("wrk");
    std::fs::write(&broken, "#!/bin/sh\necho no connection >&2\nexit 1\n").unwrap();
    std::fs::set_permissions(&broken, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let path = format!("{}:{}", tools.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
    command.args([
        "bench",
        "cost",
        "--variants",
        "none",
        "--cases",
        "cross-node/rr1",
    ]);
    command.arg("--out").arg(directory.path()).env("PATH", path);
    command.stdin(Stdio::null()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    let prefix = base36(child.id());
    let run = child.wait_with_output().unwrap();
    let stderr = text(&run.stderr);
    assert_eq!(run.status.code(), Some(1), "{stderr}");
    assert!(
        stderr.contains("cost of none") && stderr.contains("no connection"),
        "{stderr}"
    );
    let stored = std::fs::read(directory.path().join("cost.json")).unwrap();
    let stored: Value = serde_json::from_slice(&stored).unwrap();
    assert!(stored["ended"]["failed"].is_string(), "{stored:#}");
    // A lab is named after the process that builds it.
    let names = standing::list().unwrap();
    let left: Vec<_> = names
        .iter()
        .filter(|lab| lab.starts_with(&prefix))
        .collect();
    assert!(left.is_empty(), "{left:?}");
}

fn base36(mut number: u32) -> String {
    let mut digits = Vec::new();
    while number > 0 {
        digits.push(char::from_digit(number % 36, 36).unwrap());
        number /= 36;
    }
    digits.iter().rev().collect()
}
