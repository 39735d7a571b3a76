//! What a large mesh costs: printed, and bounded where the bound does not depend on the machine.
//!
//! `AMBIDEX_TEST_SUITE=all cargo test --release -p control-plane --test ends scale -- --nocapture` measures 100,000
//! workloads; otherwise there are 5,000.

use std::sync::Arc;
use std::time::{Duration, Instant};

use shared_proxy::state::workload::{Health, Protocol};
use shared_proxy::state::{Change, NamespacedHostname, Service, Snapshot, Workload};
use tempfile::TempDir;

use crate::rig::{endpoint, follow, serve};

const ENDPOINTS_PER_SERVICE: u32 = 100;
const UPDATES: u32 = 500;

fn service_of(number: u32) -> NamespacedHostname {
    let service = number / ENDPOINTS_PER_SERVICE;
    let namespace = service % 50;
    let text = format!("ns-{namespace}/svc-{service}.ns-{namespace}.svc.cluster.local");
    text.parse().unwrap()
}

fn workload(number: u32) -> Workload {
    let service = service_of(number);
    let [_, a, b, c] = number.to_be_bytes();
    Workload {
        uid: format!(
            "Kubernetes//Pod/{}/svc-{number}-7f9c4b6d5-x2k4q",
            service.namespace
        )
        .into(),
        name: format!("svc-{number}-7f9c4b6d5-x2k4q").into(),
        namespace: Arc::clone(&service.namespace),
        service_account: format!("sa-{}", number / ENDPOINTS_PER_SERVICE).into(),
        addresses: vec![[10, a, b, c].into()],
        protocol: Protocol::Hbone,
        node: format!("node-{}", number % 1000).into(),
        canonical_name: format!("svc-{}", number / ENDPOINTS_PER_SERVICE).into(),
        canonical_revision: "v1".into(),
        workload_name: format!("svc-{}", number / ENDPOINTS_PER_SERVICE).into(),
        workload_type: "deployment".into(),
        services: [(service, [(80, 8080), (443, 8443)].into())].into(),
        ..Workload::default()
    }
}

fn mesh(workloads: u32) -> Snapshot {
    let services = (0..workloads.div_ceil(ENDPOINTS_PER_SERVICE)).map(|number| {
        let key = service_of(number * ENDPOINTS_PER_SERVICE);
        let [_, a, b, c] = number.to_be_bytes();
        Service {
            name: format!("svc-{number}").into(),
            namespace: key.namespace,
            hostname: key.hostname,
            vips: vec![format!("/11.{a}.{b}.{c}").parse().unwrap()],
            ports: [(80, 8080), (443, 8443)].into(),
            ..Service::default()
        }
    });
    let workloads = (0..workloads).map(workload).collect();
    Snapshot::new(workloads, services.collect(), Vec::new()).unwrap()
}

/// Memory that this process has in use, in MiB.
fn resident() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib / 1024.0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_mesh() {
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    let count = if all { 100_000 } else { 5_000 };
    let dir = TempDir::new().unwrap();
    let served = serve(&dir, "127.0.0.1:0", false).await;
    let started = Instant::now();
    let whole = mesh(count);
    println!(
        "{count} workloads: a snapshot made of objects in {:?}",
        started.elapsed()
    );
    let started = Instant::now();
    served.control.publish(whole.clone());
    println!("server: encoded in {:?}", started.elapsed());

    let before = resident();
    let started = Instant::now();
    let client = follow(endpoint(&dir, &served.address.to_string()), false);
    let deadline = started + Duration::from_secs(120);
    while !client.readiness.pending().is_empty() {
        assert!(Instant::now() < deadline, "not ready within two minutes");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let bytes = client.metric(&["message_bytes_total"]);
    println!(
        "client: connected, loaded and ready after {:?}; {:.1} MiB on the wire, {:.0} MiB more in memory (stream, store, names and versions)",
        started.elapsed(),
        bytes as f64 / 1_048_576.0,
        resident() - before,
    );
    assert_eq!(client.store.load().workload_count(), count as usize);

    // One change, from the server's new mesh to the client's store.
    let changed = Workload {
        status: Health::Unhealthy,
        ..workload(7)
    };
    let uid = Arc::clone(&changed.uid);
    let changes = [Change::Workload(Arc::new(changed))];
    let started = Instant::now();
    served
        .control
        .update(whole.updated(changes.clone()), &changes);
    let encoded = started.elapsed();
    let unhealthy = || {
        let found = client.store.load().workload_by_uid(&uid);
        found.is_some_and(|w| w.status == Health::Unhealthy)
    };
    while !unhealthy() {
        assert!(
            started.elapsed() < Duration::from_secs(60),
            "one change takes a minute"
        );
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    println!(
        "one change: {encoded:?} in the server, {:?} until the client has it",
        started.elapsed()
    );

    // What a change costs the proxy alone.
    let mut times: Vec<Duration> = (0..UPDATES)
        .map(|number| {
            let mut changed = workload(number * 7 % count);
            changed.capacity = number + 2;
            let changed = Change::Workload(Arc::new(changed));
            let started = Instant::now();
            client.store.update([changed]);
            started.elapsed()
        })
        .collect();
    times.sort();
    let (middle, tail) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!("store: one workload changed in {middle:?} (median), {tail:?} (99th percentile)");
    // Copying the mesh would take a hundred times as long.
    assert!(middle < Duration::from_millis(5), "{middle:?}");
}
