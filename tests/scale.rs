//! What a large mesh costs a real proxy and a real control plane: printed, and that a change costs what it is large.
//!
//! `AMBIDEX_TEST_SUITE=all cargo test --release --test scale -- --nocapture` measures 100,000 workloads; otherwise there are
//! 2,000. Both processes run in a network namespace of their own, on one machine.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write as _};
use std::net::{Ipv4Addr, TcpStream};
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant, SystemTime};

use host_net::netns::Netns;
use tempfile::TempDir;

const WORKLOADS_PER_FILE: u32 = 1000;
const ENDPOINTS_PER_SERVICE: u32 = 100;
/// Changes of one workload, each waited for; a few when nothing is measured.
const CHANGES: u32 = 20;
const FEW_CHANGES: u32 = 3;

/// A namespace with nothing but its loopback, which goes with this.
struct Place {
    name: String,
    netns: Netns,
}

impl Place {
    fn new() -> Self {
        let name = format!("amx-scale-{}", std::process::id());
        let netns = Netns::create_named(&name).unwrap();
        let place = Self { name, netns };
        let argv = ["-n", &place.name, "link", "set", "lo", "up"];
        assert!(Command::new("ip").args(argv).status().unwrap().success());
        place
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Netns::delete_named(&self.name);
    }
}

/// A process of ours in the place, its log in a file. It ends with this.
struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    fn start(place: &Place, log: PathBuf, arguments: &[&str]) -> Self {
        let output = File::create(&log).unwrap();
        let child = place.netns.run(|| {
            Command::new(env!("CARGO_BIN_EXE_ambidex"))
                .args(arguments)
                .env("RUST_LOG", "info,control_plane=debug")
                .stdout(output.try_clone().unwrap())
                .stderr(output)
                .spawn()
        });
        let child = child.unwrap().unwrap();
        Self { child, log }
    }

    /// Lines of the log with a text in them.
    fn lines(&self, text: &str) -> Vec<String> {
        let log = fs::read_to_string(&self.log).unwrap();
        let lines = log.lines().filter(|line| line.contains(text));
        lines.map(str::to_owned).collect()
    }

    /// Resident memory, in MiB, and the most that it was.
    fn memory(&self) -> (f64, f64) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let of = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            let kib = line.split_whitespace().nth(1).unwrap();
            kib.parse::<f64>().unwrap() / 1024.0
        };
        (of("VmRSS:"), of("VmHWM:"))
    }
}

fn wait(what: &str, longest: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    while !holds() {
        assert!(
            started.elapsed() < longest,
            "not within {longest:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
    started.elapsed()
}

/// The body of a page of the proxy.
fn page(place: &Place, port: u16, path: &str) -> Option<String> {
    let got = place.netns.run(|| {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).ok()?;
        stream
            .set_read_timeout(Some(Duration::from_secs(20)))
            .ok()?;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        )
        .ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        Some(text)
    });
    got.unwrap()
}

/// One file of the mesh. `capacity` is that of its first workload.
fn file(number: u32, count: u32, capacity: u32) -> String {
    let first = number * WORKLOADS_PER_FILE;
    let mut text = String::from("workloads:\n");
    let service = |workload: u32| {
        let service = workload / ENDPOINTS_PER_SERVICE;
        let namespace = format!("ns-{}", service % 50);
        (
            service,
            format!("svc-{service}.{namespace}.svc.cluster.local"),
            namespace,
        )
    };
    let last = (first + WORKLOADS_PER_FILE).min(count);
    for workload in first..last {
        let (index, hostname, namespace) = service(workload);
        let [_, a, b, c] = workload.to_be_bytes();
        let capacity = if workload == first { capacity } else { 1 };
        writeln!(
            text,
            "- {{uid: Kubernetes//Pod/{namespace}/svc-{workload}-7f9c4b6d5-x2k4q, name: svc-{workload}-7f9c4b6d5-x2k4q, namespace: {namespace}, serviceAccount: sa-{index}, workloadIps: [10.{a}.{b}.{c}], protocol: HBONE, node: node-{}, canonicalName: svc-{index}, canonicalRevision: v1, workloadName: svc-{index}, services: {{{namespace}/{hostname}: {{80: 8080, 443: 8443}}}}, capacity: {capacity}}}",
            workload % 1000
        )
        .unwrap();
    }
    text.push_str("services:\n");
    for workload in (first..last).step_by(ENDPOINTS_PER_SERVICE as usize) {
        let (index, hostname, namespace) = service(workload);
        let [_, a, b, c] = index.to_be_bytes();
        writeln!(
            text,
            "- {{name: svc-{index}, namespace: {namespace}, hostname: {hostname}, vips: [/11.{a}.{b}.{c}], ports: {{80: 8080, 443: 8443}}}}"
        )
        .unwrap();
    }
    text
}

/// The moment at the beginning of a line of a log, in seconds of its day.
fn moment(line: &str) -> f64 {
    let (_, time) = line.split_once('T').unwrap();
    let time = time.split('Z').next().unwrap();
    let parts = time.split(':').map(|part| part.parse::<f64>().unwrap());
    parts.fold(0.0, |sum, part| sum * 60.0 + part)
}

#[test]
fn a_large_mesh() {
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    let (count, changes) = if all {
        (100_000, CHANGES)
    } else {
        (2_000, FEW_CHANGES)
    };
    let (longest, place, dir) = (
        Duration::from_secs(300),
        Place::new(),
        TempDir::new().unwrap(),
    );
    let path = |name: &str| dir.path().join(name).display().to_string();
    fs::create_dir(path("mesh")).unwrap();
    for number in 0..count / WORKLOADS_PER_FILE {
        let name = path(&format!("mesh/{number:04}.yaml"));
        fs::write(name, file(number, count, 1)).unwrap();
    }
    let control = Daemon::start(
        &place,
        dir.path().join("control.log"),
        &["control", "--dir", &path("mesh"), "--ca-dir", &path("ca")],
    );
    let took = wait("the control plane listens", longest, || {
        !control.lines("control plane started").is_empty()
    });
    let (memory, most) = control.memory();
    println!("{count} workloads in {} files", count / WORKLOADS_PER_FILE);
    println!("control plane: serves after {took:.1?}; {memory:.0} MiB resident, {most:.0} at most");

    let (root, zds) = (path("ca/root-cert.pem"), path("zds.sock"));
    let proxy = Daemon::start(
        &place,
        dir.path().join("proxy.log"),
        &[
            "proxy",
            "--xds-address",
            "127.0.0.1:15012",
            "--xds-root-ca",
            &root,
            "--zds-socket",
            &zds,
            "--auth-token",
            "",
        ],
    );
    let loaded = || {
        let pending = page(&place, 15021, "/healthz/ready");
        pending.is_some_and(|text| !text.contains("state manager"))
    };
    let took = wait("the proxy has the mesh", longest, loaded);
    let (memory, most) = proxy.memory();
    println!(
        "proxy: has the mesh {took:.2?} after its start; {memory:.0} MiB resident, {most:.0} at most"
    );
    let metrics = page(&place, 15020, "/metrics").unwrap();
    let line = metrics
        .lines()
        .find(|line| line.starts_with("istio_xds_message_bytes_total") && line.contains("workload"))
        .unwrap();
    println!(
        "proxy: {:.1} MB came by xDS",
        line.rsplit(' ').next().unwrap().parse::<f64>().unwrap() / 1e6
    );

    let answered = || proxy.lines("XDS response").len();
    wait("both types are answered", longest, || answered() == 2);
    let (mut whole, mut pushed) = (Vec::new(), Vec::new());
    for change in 0..changes {
        let number = change % (count / WORKLOADS_PER_FILE);
        let name = path(&format!("mesh/{number:04}.yaml"));
        let before = answered();
        fs::write(&name, file(number, count, change + 2)).unwrap();
        // The file has the same length as before, and times have a grain.
        let later = SystemTime::now() + Duration::from_secs(u64::from(change));
        File::open(&name).unwrap().set_modified(later).unwrap();
        whole.push(wait("the change", longest, || answered() > before));
        let published = control.lines("mesh published");
        let published = published.last().unwrap();
        for said in ["read=1 ", "changes=2 "] {
            assert!(published.contains(said), "{said:?} is not in {published}");
        }
        let response = proxy.lines("XDS response").pop().unwrap();
        assert!(response.contains("changes=1"), "{response}");
        pushed.push(moment(&response) - moment(published));
    }
    whole.sort();
    pushed.sort_by(f64::total_cmp);
    let middle = pushed.len() / 2;
    println!(
        "one workload changed: in force {:.1} ms after its file was read (median; most {:.1}), {:.0?} after it was written (most {:.0?}: a file is read when two looks, half a second apart, find the same)",
        pushed[middle] * 1000.0,
        pushed[pushed.len() - 1] * 1000.0,
        whole[middle],
        whole[whole.len() - 1],
    );
    let (memory, most) = proxy.memory();
    println!("proxy: {memory:.0} MiB resident after {changes} changes, {most:.0} at most");
}
