//! What an operator sees of the proxies, judged by the tools that operators have.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::{Stage, eventually, own, shared};
use lab::traffic::Check;
use rstest::rstest;
use serde_json::Value;

/// Labels that every series of a connection has of which an end is known.
const COMMON: [&str; 28] = [
    "reporter",
    "source_workload",
    "source_canonical_service",
    "source_canonical_revision",
    "source_workload_namespace",
    "source_principal",
    "source_app",
    "source_version",
    "source_cluster",
    "destination_service",
    "destination_service_namespace",
    "destination_service_name",
    "destination_workload",
    "destination_canonical_service",
    "destination_canonical_revision",
    "destination_workload_namespace",
    "destination_principal",
    "destination_app",
    "destination_version",
    "destination_cluster",
    "request_protocol",
    "response_flags",
    "connection_security_policy",
    "source_region",
    "source_zone",
    "destination_region",
    "destination_zone",
    "capture_mode",
];

/// Every metric has the field's name and type; the text is what Prometheus takes; the labels say who it was.
#[rstest]
fn metrics_are_the_fields(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = shared(variant);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    scene.check("plain1", scene.at("pod1-1"), Check::Who);
    scene.refused("pod1-1", (scene.ip("pod2-1"), 8099).into());
    let page = scene.page(1, 15020, "/stats/prometheus");
    let families = parse(&page);
    let kind = |name: &str| families.get(name).map_or("absent", |family| family.kind);
    for (name, expected) in [
        ("istio_tcp_connections_opened_total", "counter"),
        ("istio_tcp_connections_closed_total", "counter"),
        ("istio_tcp_connections_failed_total", "counter"),
        ("istio_tcp_sent_bytes_total", "counter"),
        ("istio_tcp_received_bytes_total", "counter"),
        ("istio_tcp_sockets_open", "gauge"),
        ("istio_build", "gauge"),
        ("workload_manager_active_proxy_count", "gauge"),
        ("workload_manager_pending_proxy_count", "gauge"),
        ("workload_manager_proxies_started_total", "counter"),
        ("workload_manager_proxies_stopped_total", "counter"),
        ("process_open_fds", "gauge"),
        ("process_max_fds", "gauge"),
        ("tokio_num_workers", "gauge"),
        ("ambidex_pooled_tunnels", "gauge"),
        ("ambidex_log_lines_lost_total", "counter"),
        ("ambidex_metric_series_expired_total", "counter"),
        ("ambidex_tls_handshake_duration_seconds", "histogram"),
        ("ambidex_upstream_connect_duration_seconds", "histogram"),
        ("ambidex_first_byte_duration_seconds", "histogram"),
        ("ambidex_added_latency_seconds", "histogram"),
    ] {
        assert_eq!(kind(name), expected, "{name} in {page}");
    }
    for (name, family) in &families {
        let connections = name.starts_with("istio_tcp_") && name != "istio_tcp_sockets_open";
        for labels in family.samples.iter().filter(|_| connections) {
            let names: BTreeSet<&str> = labels.keys().map(String::as_str).collect();
            assert_eq!(names, COMMON.into(), "{name}");
            assert_eq!(labels["capture_mode"], variant.capture());
            // The state file says nothing of deployments: a pod goes by its own name.
            let of_pod = labels["source_principal"] == scene.identity("pod1-1");
            assert!(
                !of_pod || labels["source_workload"] == "pod1-1",
                "{labels:?}"
            );
            let failed = labels["response_flags"] != "-";
            assert!(!failed || !name.contains("_opened_"), "{name} {labels:?}");
        }
    }
    for stage in ["decide", "tunnel", "request", "total"] {
        let labels = [("stage", stage), ("reporter", "source")];
        let count = scene.metric(1, "ambidex_added_latency_seconds_count", &labels);
        assert!(count >= 1.0, "{stage}");
    }
    assert_eq!(
        scene.metric(1, "workload_manager_pending_proxy_count", &[]),
        0.0
    );
    promtool(&page);
}

/// The log filter can be changed by module, and goes back to what the proxy was started with.
#[test]
fn the_log_filter_is_changed_and_reset() {
    let mut spec = Inpod.spec();
    spec.daemon_env
        .insert("RUST_LOG".to_owned(), "warn,access=info".to_owned());
    let scene = own(&spec);
    let post = |level: &str| {
        let url = format!("http://127.0.0.1:15000/logging?level={level}");
        let curl = ["curl", "-s", "-X", "POST", &url];
        let done = scene.lab.run("proxy1", &curl, Duration::from_secs(15));
        done.unwrap().stdout
    };
    let access_lines = || {
        let mark = scene.mark(1);
        scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
        std::thread::sleep(Duration::from_millis(300));
        scene.access_lines(mark).len()
    };
    assert_eq!(access_lines(), 1);
    assert!(post("info,access=off").contains("access=off"));
    assert_eq!(access_lines(), 0);
    // As the field's command line goes back, and as it writes a target's level.
    let url = "http://127.0.0.1:15000/logging?reset";
    let curl = ["curl", "-s", "-X", "POST", url];
    let done = scene.lab.run("proxy1", &curl, Duration::from_secs(15));
    assert!(done.unwrap().stdout.contains("access=info"));
    assert!(post("access:off").contains("access=off"));
    assert_eq!(access_lines(), 0);
    assert!(post("reset").contains("access=info"));
    assert!(scene.page(1, 15000, "/logging").contains("warn"));
    assert_eq!(access_lines(), 1);
    assert!(post("access=loud").contains("access=loud"));
    assert_eq!(access_lines(), 1, "a filter that is none changes nothing");
}

/// A proxy takes the file descriptors that it may have, however few it was started with, and says when they are too few.
#[rstest]
#[case::too_few(700, true)]
#[case::enough(17_000, false)]
fn the_limit_of_descriptors_is_raised(#[case] hard: u32, #[case] too_few: bool) {
    let directory = tempfile::tempdir().unwrap();
    let place = |name: &str| directory.path().join(name).display().to_string();
    let proxy = format!(
        "ulimit -Sn 600; ulimit -Hn {hard}; exec {} proxy",
        harness::ambidex()
    );
    let netns = host_net::netns::Netns::create_unnamed().unwrap();
    let mut command = Command::new("sh");
    command
        .args(["-c", &proxy])
        .env("LOCAL_XDS", "workloads: []")
        .env("AMBIDEX_RUN_DIR", place("run"))
        .env("AMBIDEX_STATE_DIR", place("state"))
        .env("AMBIDEX_CA_DIR", place("ca"))
        .env("LOG_FORMAT", "json")
        .stdout(Stdio::piped());
    let mut child = netns.run(|| command.spawn()).unwrap().unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let said = lines
        .map(Result::unwrap)
        .find(|line| line.contains("file descriptors"));
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", child.id()));
    child.kill().unwrap();
    child.wait().unwrap();
    let said: Value = serde_json::from_str(&said.unwrap()).unwrap();
    assert_eq!(
        (&said["before"], &said["limit"]),
        (&600.into(), &hard.into())
    );
    assert_eq!(said["level"] == "WARN", too_few, "{said}");
    let soft = limits.unwrap().lines().find_map(|line| {
        line.strip_prefix("Max open files")?
            .split_whitespace()
            .next()
            .map(str::to_owned)
    });
    assert_eq!(soft, Some(hard.to_string()));
}

/// Lists of what the proxy knows, as tables and as documents.
#[rstest]
fn the_command_line_lists_what_the_proxy_knows(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = shared(variant);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let get = |what: &str| runtime::ambidex(&scene.lab, &format!("get {what}")).with_code(0);
    let pod = scene.pod("pod2-1");
    let line = |table: String, has: &str| {
        let line = table.lines().find(|line| line.contains(has));
        line.unwrap_or_else(|| panic!("no {has} in {table}"))
            .to_owned()
    };
    let workload = line(get("workloads"), &format!(" {} ", pod.ip));
    for part in [pod.name.as_str(), &pod.namespace, "HBONE"] {
        assert!(workload.contains(part), "{workload}");
    }
    let wide = line(get("workloads -o wide"), &format!(" {} ", pod.ip));
    assert!(wide.contains(&pod.service_account), "{wide}");
    let certificate = line(get("certs"), &scene.identity("pod1-1"));
    assert!(certificate.contains("Available"), "{certificate}");
    // A day, less what has passed since it was made: perhaps not a second.
    let left = ["23h59m", "1d0h"];
    assert!(
        left.iter().any(|left| certificate.contains(left)),
        "{certificate}"
    );
    assert!(get("services").starts_with("NAMESPACE"));
    assert!(get("policies").starts_with("NAMESPACE"));
    let documents: Vec<Value> = serde_json::from_str(&get("certs -o json")).unwrap();
    assert!(
        documents
            .iter()
            .any(|it| it["identity"] == *scene.identity("pod1-1"))
    );
    assert!(get("certs -o yaml").contains("serialNumber:"));
}

/// One connection is one line, with its halves of both nodes and every leg; ended by one side, it is half-open.
#[rstest]
fn the_command_line_joins_the_halves_of_a_connection(
    #[values(NodeHybrid, Inpod)] variant: Variant,
    #[values("pod2-1", "pod1-2", "plain2")] to: &str,
) {
    let port = 8093;
    let scene = shared(variant);
    let _application = scene.witness(to, port);
    let mut client = connect(&scene, "pod1-1", (scene.ip(to), port).into());
    client.write_all(b"hello").unwrap();
    let local = client.local_addr().unwrap();
    let find = |more: &str| {
        let directories = [1, 2].map(|node| scene.lab.run_dir(node).display().to_string());
        let [near, far] = directories;
        let command = format!("get conns --run-dir {near} --run-dir {far} -o json{more}");
        let all = runtime::ambidex(&scene.lab, &command).with_code(0);
        let all: Vec<Value> = serde_json::from_str(&all).unwrap();
        all.into_iter()
            .find(|it| it["outbound"]["source"]["addr"] == *local.to_string())
    };
    let mut found = Value::Null;
    // The far end counts what has arrived there, a moment later.
    eventually("the bytes are listed", Duration::from_secs(10), || {
        found = find("").unwrap_or_default();
        let far_end = if to == "plain2" {
            "outbound"
        } else {
            "inbound"
        };
        found["outbound"]["sent"] == 5 && found[far_end]["sent"] == 5
    });
    assert_eq!(found["state"], "open", "{found:#}");
    let (outbound, inbound) = (&found["outbound"], &found["inbound"]);
    assert_eq!(outbound["captureMode"], variant.capture());
    if to == "plain2" {
        assert_eq!(*inbound, Value::Null);
        assert_eq!(
            outbound["application"]["peer"],
            format!("{}:{port}", scene.ip(to))
        );
    } else {
        assert_eq!(outbound["tunnel"], inbound["tunnel"]);
        assert!(outbound["tunnel"]["stream"].as_u64().is_some(), "{found:#}");
        assert_eq!(
            inbound["application"]["peer"],
            format!("{}:{port}", scene.ip(to))
        );
        assert_eq!(inbound["source"]["identity"], *scene.identity("pod1-1"));
    }
    assert!(find(" --half-open").is_none());

    client.shutdown(Shutdown::Write).unwrap();
    eventually("it is half-open", Duration::from_secs(10), || {
        found = find(" --half-open").unwrap_or_default();
        found["state"] == "clientEnded"
    });
    assert!(found["halfOpenMillis"].as_u64().unwrap() < 10_000);
    let table = runtime::ambidex(&scene.lab, "get conns").with_code(0);
    let pod = scene.pod("pod1-1");
    let source = format!("{}/{}:{}", pod.namespace, pod.name, local.port());
    let line = table
        .lines()
        .find(|line| line.starts_with(&source))
        .expect(&table);
    assert!(line.contains("half-open: client ended"), "{line}");
    drop(client);
}

/// `--watch` goes on until its reader has seen enough.
#[test]
fn connections_are_watched() {
    let scene = shared(Inpod);
    let mut child = Command::new(harness::ambidex())
        .args(["get", "conns", "--watch", "--interval", "0.1"])
        .envs(scene.lab.environment(1))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let headers = lines
        .map(Result::unwrap)
        .filter(|line| line.starts_with("SOURCE"));
    assert_eq!(headers.take(3).count(), 3);
    // The reader is gone.
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert!(child.wait().unwrap().success(), "{said}");
    assert_eq!(said, "");
}

/// A client in a target that says nothing by itself.
fn connect(scene: &Stage, from: &str, to: SocketAddr) -> TcpStream {
    let netns = scene.lab.netns(from).unwrap();
    #[allow(
        clippy::disallowed_methods,
        reason = "an application of a test, no part of the proxy"
    )]
    let client = netns.run(|| TcpStream::connect(to));
    client.unwrap().unwrap()
}

/// Prometheus' own judgement, where it is installed. It dislikes one thing, a gauge whose name ends in `_count`; the name
/// is the field's.
fn promtool(page: &str) {
    let program = std::env::var("PROMTOOL").unwrap_or_else(|_| "promtool".to_owned());
    let started = Command::new(&program)
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = started else {
        eprintln!("{program} is not installed: our own parser judges alone");
        return;
    };
    child
        .stdin
        .take()
        .unwrap()
        .write_all(page.as_bytes())
        .unwrap();
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    let complaints: Vec<&str> = said
        .lines()
        .filter(|line| !line.trim().is_empty() && !line.contains("_proxy_count non-histogram"))
        .collect();
    assert_eq!(complaints, Vec::<&str>::new());
}

struct Family<'a> {
    kind: &'a str,
    samples: Vec<BTreeMap<String, String>>,
}

/// Reads the text format as strictly as a scraper: every family has help and type before its samples and occurs once, a
/// series occurs once, a histogram's buckets grow and end in its count.
fn parse(page: &str) -> BTreeMap<String, Family<'_>> {
    let mut families: BTreeMap<String, Family> = BTreeMap::new();
    let mut series = BTreeSet::new();
    let mut helped = "";
    let mut current = String::new();
    let mut bucket: Option<(String, f64)> = None;
    for line in page.lines() {
        if let Some(text) = line.strip_prefix("# HELP ") {
            helped = text.split_once(' ').expect("help").0;
            continue;
        }
        if let Some(text) = line.strip_prefix("# TYPE ") {
            let (name, kind) = text.split_once(' ').expect("a type");
            assert_eq!(name, helped, "help comes first");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            let family = Family {
                kind,
                samples: Vec::new(),
            };
            assert!(families.insert(name.to_owned(), family).is_none(), "{line}");
            current = name.to_owned();
            continue;
        }
        assert!(!line.starts_with('#'), "{line}");
        let (left, value) = line.rsplit_once(' ').expect("a value");
        let value: f64 = value.parse().expect("a number");
        assert!(series.insert(left.to_owned()), "twice: {line}");
        let (name, labels) = match left.split_once('{') {
            Some((name, labels)) => (name, labels.strip_suffix('}').expect("closed labels")),
            None => (left, ""),
        };
        let mut labels = read_labels(labels);
        let family = families.get_mut(&current).expect("a family");
        if family.kind == "histogram" {
            let suffix = name.strip_prefix(&current).expect("its own samples");
            let le = labels.remove("le");
            assert_eq!(le.is_some(), suffix == "_bucket", "{line}");
            let key = format!("{current}{labels:?}");
            match suffix {
                "_bucket" => {
                    let below = bucket.as_ref().filter(|(of, _)| *of == key);
                    assert!(below.is_none_or(|(_, count)| *count <= value), "{line}");
                    bucket = Some((key, value));
                }
                "_count" => {
                    let all = page.lines().find(|other| {
                        other.starts_with(&format!("{current}_bucket"))
                            && other.contains("le=\"+Inf\"")
                            && labels
                                .iter()
                                .all(|(k, v)| other.contains(&format!("{k}=\"{v}\"")))
                    });
                    assert!(all.expect("+Inf").ends_with(&format!(" {value}")), "{line}");
                }
                "_sum" => {}
                _ => panic!("{line}"),
            }
        } else {
            assert_eq!(name, current, "{line}");
            assert!(
                family.kind != "counter" || name.ends_with("_total"),
                "{line}"
            );
            assert!(family.kind != "counter" || value >= 0.0, "{line}");
        }
        family.samples.push(labels);
    }
    families
}

/// `a="b",c="d"`. The lab's names need no escapes.
fn read_labels(text: &str) -> BTreeMap<String, String> {
    let mut labels = BTreeMap::new();
    let mut rest = text;
    while let Some((name, tail)) = rest.split_once("=\"") {
        assert!(
            name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_'),
            "{text}"
        );
        let (value, tail) = tail.split_once('"').expect("a quoted value");
        assert!(labels.insert(name.to_owned(), value.to_owned()).is_none());
        rest = tail.strip_prefix(',').unwrap_or(tail);
    }
    assert_eq!(rest, "", "{text}");
    labels
}
