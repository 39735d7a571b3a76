//! The admin and metrics pages, judged by what reads them elsewhere: protoc's Python, Prometheus' own parsers, openssl, and the
//! types that the field's command line decodes the configuration dump into.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use harness::Variant::{self, Inpod, NodeHybrid};
use harness::{Stage, eventually, own, shared, state};
use lab::traffic::Check;
use rstest::rstest;
use serde::Deserialize;
use serde_json::Value;

/// Far over what any page takes.
const SOON: Duration = Duration::from_secs(60);

/// A page fetched as it is: status and body, which may be no text.
fn fetch(scene: &Stage, port: u16, path: &str, accept: &str) -> (String, Vec<u8>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let url = format!("http://127.0.0.1:{port}{path}");
    let accept = format!("Accept: {accept}");
    let file_name = file.path().to_str().unwrap();
    let curl = [
        "curl",
        "-s",
        "--max-time",
        "50",
        "-o",
        file_name,
        "-w",
        "%{http_code}",
        "-H",
        &accept,
        &url,
    ];
    let done = scene.lab.run("proxy1", &curl, SOON).unwrap();
    (done.stdout, std::fs::read(file.path()).unwrap())
}

/// Runs a judge with Debian's Python and returns what it says as JSON.
fn judge(name: &str, arguments: &[&str], input: &[u8]) -> Result<Value, String> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/judges")
        .join(name);
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), input).unwrap();
    let output = Command::new("/usr/bin/python3")
        .arg(script)
        .args(arguments)
        .arg(file.path())
        .stdin(Stdio::from(std::fs::File::open(file.path()).unwrap()))
        .output()
        .unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

/// While the proxy works, a profile of its processor time names its functions; there is one profile at a time; bounds are kept.
#[rstest]
fn processor_time_is_profiled(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = shared(variant);
    let ends = AtomicBool::new(false);
    let bulk = Check::Exchange {
        up: 4 << 20,
        down: 4 << 20,
    };
    std::thread::scope(|scope| {
        let _ends = Raise(&ends);
        scope.spawn(|| {
            while !ends.load(Ordering::Relaxed) {
                scene.check("pod1-1", scene.at("pod2-1"), bulk.clone());
            }
        });
        let mut taken = None;
        eventually("of three at a time one is taken", SOON, || {
            let page = "/debug/pprof/profile?seconds=3&frequency=500";
            let ask = || scope.spawn(|| fetch(&scene, 15000, page, "*/*"));
            let answers = [ask(), ask(), ask()].map(|asked| asked.join().unwrap());
            let refused = answers.iter().any(|(status, _)| status == "429");
            taken = answers.into_iter().find(|(status, _)| status == "200");
            refused && taken.is_some()
        });
        let (_, profile) = taken.unwrap();
        let said = judge("profile.py", &[], &profile).unwrap();
        let types = [["samples", "count"], ["cpu", "nanoseconds"]];
        assert_eq!(said["types"], serde_json::json!(types));
        assert_eq!(said["period"], 2_000_000);
        assert_eq!(said["duration"], 3_000_000_000_u64);
        let [count, nanos] = [0, 1].map(|at| said["totals"][at].as_u64().unwrap());
        assert!(count > 0 && nanos == count * 2_000_000, "{said:#}");
        let functions = said["functions"].as_array().unwrap();
        let ours = functions
            .iter()
            .any(|name| name.as_str().unwrap().contains("shared_proxy::"));
        assert!(ours, "{said:#}");
        // The judge is one: a profile that is cut short, or refers to what is not there, is none.
        assert!(judge("profile.py", &[], &profile[..profile.len() / 2]).is_err());
    });
    for wrong in ["seconds=0", "seconds=61", "frequency=1001", "seconds=x"] {
        let page = format!("/debug/pprof/profile?{wrong}");
        assert_eq!(fetch(&scene, 15000, &page, "*/*").0, "400", "{wrong}");
    }
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
}

struct Raise<'a>(&'a AtomicBool);

impl Drop for Raise<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The heap is profiled where the allocator was told to keep account; where it was not, the page says how to.
#[test]
fn memory_is_profiled_when_the_allocator_keeps_account() {
    let told = "prof:true,prof_active:true,lg_prof_sample:12";
    let mut spec = Inpod.spec();
    let variable = "_RJEM_MALLOC_CONF".to_owned();
    spec.daemon_env.insert(variable.clone(), told.to_owned());
    let scene = own(&spec);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let (status, profile) = fetch(&scene, 15000, "/debug/pprof/heap", "*/*");
    assert_eq!(status, "200", "{}", String::from_utf8_lossy(&profile));
    let said = judge("profile.py", &[], &profile).unwrap();
    assert_eq!(said["types"], serde_json::json!([["inuse_space", "bytes"]]));
    // What a proxy of a few pods has at least.
    assert!(said["totals"][0].as_u64().unwrap() > 100_000, "{said:#}");

    let (status, advice) = fetch(&shared(Inpod), 15000, "/debug/pprof/heap", "*/*");
    let advice = String::from_utf8(advice).unwrap();
    assert_eq!(status, "501");
    assert!(advice.contains(&variable), "{advice}");
}

/// Both forms of the metrics are what Prometheus' own parsers read, strictly; both list the same families.
#[rstest]
fn metrics_are_read_by_prometheus_own_parsers(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = shared(variant);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    scene.refused("pod1-1", (scene.ip("pod2-1"), 8099).into());
    let mut kinds: Vec<BTreeMap<String, String>> = Vec::new();
    for (form, accept) in [
        ("prometheus", "text/plain"),
        ("openmetrics", "application/openmetrics-text; version=1.0.0"),
    ] {
        let (status, page) = fetch(&scene, 15020, "/metrics", accept);
        assert_eq!(status, "200");
        let said = judge("metrics.py", &[form], &page).unwrap();
        let families = said.as_object().unwrap().iter();
        let kind = |value: &Value| value[0].as_str().unwrap().to_owned();
        kinds.push(
            families
                .map(|(name, it)| (name.clone(), kind(it)))
                .collect(),
        );
        let broken = [b"no_number{a=\"b\"} x\n", &page[..]].concat();
        let broken = judge("metrics.py", &[form], &broken);
        assert!(broken.is_err(), "the judge reads {form} without a number");
    }
    let counter =
        |kinds: &BTreeMap<String, String>| kinds.get("istio_tcp_connections_opened").cloned();
    assert_eq!(counter(&kinds[0]).as_deref(), Some("counter"));
    assert_eq!(kinds[0], kinds[1]);
}

/// Prometheus' own tool finds nothing to say about the pages of proxy and agent but two names, which are the field's.
#[rstest]
fn promtool_checks_the_metrics(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let tool = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/judges/promtool");
    assert!(
        tool.exists(),
        "{} is missing: run `make judges`",
        tool.display()
    );
    let scene = shared(variant);
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let check = |page: &[u8]| -> Vec<String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), page).unwrap();
        let output = Command::new(&tool)
            .args(["check", "metrics"])
            .stdin(std::fs::File::open(file.path()).unwrap())
            .output()
            .unwrap();
        let said = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        said.lines().map(str::to_owned).collect()
    };
    let (status, page) = fetch(&scene, 15020, "/metrics", "text/plain");
    assert_eq!(status, "200");
    let of_the_field = ["active", "pending"].map(|kind| {
        format!(
            "workload_manager_{kind}_proxy_count non-histogram and non-summary metrics should not have \"_count\" suffix"
        )
    });
    assert_eq!(check(&page), of_the_field);
    let agent = [
        "curl",
        "-s",
        "--max-time",
        "50",
        "http://127.0.0.1:15014/metrics",
    ];
    let agent = scene.lab.run("node1", &agent, SOON).unwrap().stdout;
    assert!(agent.contains("ambidex_agent_pods"), "{agent}");
    assert_eq!(check(agent.as_bytes()), [""; 0]);
    let broken = [b"no_number{a=\"b\"} x\n", &page[..]].concat();
    assert_ne!(check(&broken), of_the_field);
}

/// What the field's command line decodes a configuration dump into: other keys are ignored, other types are errors.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Dump {
    workloads: Vec<Workload>,
    services: Vec<Service>,
    policies: Vec<Policy>,
    certificates: Vec<Certificates>,
    workload_state: BTreeMap<String, State>,
    staged_services: BTreeMap<String, BTreeMap<String, Endpoint>>,
    config: serde_json::Map<String, Value>,
    version: serde_json::Map<String, Value>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Workload {
    uid: String,
    workload_ips: Vec<String>,
    protocol: String,
    name: String,
    namespace: String,
    service_account: String,
    #[allow(dead_code, reason = "that it decodes is what counts")]
    capacity: u32,
    status: String,
    node: String,
    network: String,
    cluster_id: String,
    trust_domain: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Service {
    name: String,
    namespace: String,
    hostname: String,
    vips: Vec<String>,
    ports: BTreeMap<String, i64>,
    endpoints: BTreeMap<String, Endpoint>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Endpoint {
    workload_uid: String,
    service: String,
    port: BTreeMap<String, u16>,
}

#[derive(Debug, Deserialize)]
struct Policy {
    name: String,
    scope: String,
    action: String,
    rules: Vec<Vec<Vec<Value>>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificates {
    identity: String,
    state: String,
    cert_chain: Vec<Certificate>,
    root_certs: Vec<Certificate>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

#[derive(Debug, Deserialize)]
struct State {
    state: String,
    connections: Connections,
    info: Info,
}

#[derive(Debug, Deserialize)]
struct Connections {
    inbound: Vec<Connection>,
    outbound: Vec<Connection>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Connection {
    src: String,
    original_dst: String,
    actual_dst: String,
    protocol: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Info {
    name: String,
    namespace: String,
    trust_domain: String,
    service_account: String,
}

#[rstest]
fn the_fields_command_line_reads_the_configuration_dump(
    #[values(NodeHybrid, Inpod)] variant: Variant,
) {
    let scene = shared(variant);
    let elsewhere = "nowhere/x.nowhere.svc.cluster.local";
    let _changed = scene.with_state(|state| {
        let rules = serde_json::json!([[[{"destinationPorts": [9999]}]]]);
        state::apply_to(state, "pod1-1", "Deny", rules);
        let workload = state.workload_mut("pod2-2").unwrap();
        let ports = [(80, 8080)].into();
        workload.services.insert(elsewhere.to_owned(), ports);
    });
    let held = std::thread::scope(|scope| {
        let slow = Check::OneByteWrites {
            count: 200,
            pause_ms: 3000,
        };
        scope.spawn(|| scene.check("pod1-1", scene.at("pod2-1"), slow));
        let mut dump = None;
        let uid = scene.pod("pod1-1").uid;
        eventually("the connection is in the dump", SOON, || {
            let text = scene.page(1, 15000, "/config_dump");
            let read: Dump = serde_json::from_str(&text).unwrap();
            let there = !read.workload_state[&uid].connections.outbound.is_empty();
            dump = Some(read);
            there
        });
        dump.unwrap()
    });
    let pod = scene.pod("pod1-1");
    let state = &held.workload_state[&pod.uid];
    assert_eq!(state.state, "Up");
    let info = &state.info;
    assert_eq!(
        [
            &info.name,
            &info.namespace,
            &info.trust_domain,
            &info.service_account
        ],
        [
            &pod.name,
            &pod.namespace,
            "cluster.local",
            &pod.service_account
        ]
    );
    assert!(state.connections.inbound.is_empty());
    let connection = &state.connections.outbound[0];
    assert!(connection.src.starts_with(&format!("{}:", pod.ip)));
    assert_eq!(connection.original_dst, scene.at("pod2-1").to_string());
    assert_eq!(
        connection.actual_dst,
        format!("{}:15008", scene.ip("pod2-1"))
    );
    assert_eq!(connection.protocol, "HBONE");

    let workload = held
        .workloads
        .iter()
        .find(|it| it.name == "pod2-1")
        .unwrap();
    assert_eq!(workload.workload_ips, [scene.ip("pod2-1").to_string()]);
    let texts = [
        &workload.protocol,
        &workload.status,
        &workload.trust_domain,
        &workload.cluster_id,
    ];
    assert_eq!(texts, ["HBONE", "Healthy", "cluster.local", "Kubernetes"]);
    let there = scene.pod("pod2-1");
    let named = [&workload.namespace, &workload.service_account];
    assert_eq!(named, [&there.namespace, &there.service_account]);
    assert!(!workload.node.is_empty() && workload.network.is_empty());

    let service = &held.services[0];
    let endpoint = &service.endpoints[&workload.uid];
    assert_eq!(endpoint.workload_uid, workload.uid);
    let key = format!("{}/{}", service.namespace, service.hostname);
    assert_eq!(endpoint.service, key);
    assert_eq!(endpoint.port.len(), service.ports.len());
    assert!(!service.name.is_empty() && service.vips.len() == 1);
    let staged = &held.staged_services[elsewhere];
    assert_eq!(staged.values().next().unwrap().port["80"], 8080);

    let policy = held.policies.iter().find(|it| it.name == "tested").unwrap();
    assert_eq!(
        [&policy.scope, &policy.action],
        ["WorkloadSelector", "Deny"]
    );
    assert_eq!(policy.rules[0][0][0]["destinationPorts"][0], 9999);
    assert!(held.config.contains_key("trustDomain") && held.version.contains_key("version"));

    let identity = scene.identity("pod1-1");
    let ours = held.certificates.iter().find(|it| it.identity == identity);
    let ours = ours.unwrap();
    assert_eq!(ours.state, "Available");
    is_what_openssl_reads(&ours.cert_chain[0]);
    is_what_openssl_reads(&ours.root_certs[0]);
}

/// The text is a certificate, and openssl reads the same serial number and times in it.
fn is_what_openssl_reads(certificate: &Certificate) {
    let pem = STANDARD.decode(&certificate.pem).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), pem).unwrap();
    let openssl = "x509 -noout -serial -dates -dateopt iso_8601 -in";
    let output = Command::new("openssl")
        .args(openssl.split(' '))
        .arg(file.path())
        .output()
        .unwrap();
    let said = String::from_utf8(output.stdout).unwrap();
    let line = |key: &str| {
        said.lines()
            .find_map(|line| line.strip_prefix(key))
            .unwrap()
    };
    let date = |key: &str| line(key).replace(' ', "T");
    assert_eq!(certificate.valid_from, date("notBefore="));
    assert_eq!(certificate.expiration_time, date("notAfter="));
    let serial = certificate.serial_number.bytes();
    let mut hex = vec![0_u8];
    for digit in serial {
        let mut carry = u32::from(digit - b'0');
        for byte in hex.iter_mut().rev() {
            let value = u32::from(*byte) * 10 + carry;
            *byte = (value & 0xff) as u8;
            carry = value >> 8;
        }
        if carry > 0 {
            hex.insert(0, carry as u8);
        }
    }
    let hex: String = hex.iter().map(|byte| format!("{byte:02X}")).collect();
    assert_eq!(hex, line("serial="));
}
