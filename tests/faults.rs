//! Faults of a node while traffic flows: found and mended, or the pod is closed; and nothing of a captured pod is on the wire
//! in the clear at any time. The table in docs/operations.md names these tests.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use harness::Variant::{self, Inpod, NodeHybrid, NodeTunnel};
use harness::marked::Marked;
use harness::{Scene, Stage, eventually, own};
use lab::standing::{Daemon, Lab};
use nix::sys::signal::Signal;
use rstest::rstest;
use runtime::{Sandbox, ambidex, assert_same, dumps, pods, start_agent, state_of};

/// Three times what docs/operations.md says (10 s), for machines that are busy.
const FOUND_WITHIN: Duration = Duration::from_secs(30);
/// Three times what docs/operations.md says (30 s).
const MENDED_WITHIN: Duration = Duration::from_secs(90);

/// A lab whose agents mend.
fn mending(variant: Variant) -> Scene {
    let mut spec = variant.spec();
    spec.mends = true;
    own(&spec)
}

fn all_suite() -> bool {
    std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all")
}

/// What the agent of node1 has logged from here on.
struct Log<'a>(&'a Lab, usize);

impl<'a> Log<'a> {
    fn from_here(lab: &'a Lab) -> Self {
        Self(lab, Self::text(lab).len())
    }

    fn text(lab: &Lab) -> String {
        let bytes = fs::read(lab.log_path(1, Daemon::Agent)).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    fn says(&self, part: &str) -> bool {
        Self::text(self.0)[self.1..].contains(part)
    }
}

fn shell(lab: &Lab, target: &str, command: &str) {
    let netns = lab.netns(target).unwrap();
    let status = netns.run(|| Command::new("sh").args(["-c", command]).status());
    assert!(status.unwrap().unwrap().success(), "{target}: {command}");
}

/// Damages node1 and waits until it is as before; prints how long finding and mending took.
fn damage_and_wait(scene: &Stage, target: &str, command: &str) {
    let lab = &scene.lab;
    let before = dumps(lab, &[target]);
    let log = Log::from_here(lab);
    let begun = Instant::now();
    shell(lab, target, command);
    eventually("the agent has found it", FOUND_WITHIN, || {
        log.says("missing or changed")
    });
    let found = begun.elapsed();
    while dumps(lab, &[target]) != before {
        assert!(begun.elapsed() < MENDED_WITHIN, "{target}: {command} stays");
        std::thread::sleep(Duration::from_millis(50));
    }
    eprintln!(
        "{target}: {command}: found after {found:.1?}, mended after {:.1?}",
        begun.elapsed()
    );
}

/// Kernel objects of the capture go, one kind after the other.
#[rstest]
#[case::flush_rules_of_the_node(NodeHybrid, &[
    ("node1", "iptables-nft -t mangle -F"),
    ("node1", "iptables-nft -t nat -F ztunnel-PREROUTING; iptables-nft -t nat -F ztunnel-POSTROUTING"),
    ("node1", "iptables-nft -F ztunnel-FORWARD"),
    ("proxy1", "iptables-nft -t mangle -F"),
])]
#[case::flush_rules_of_the_pod(Inpod, &[
    ("pod1-1", "iptables-nft -t nat -F"),
    ("pod1-1", "iptables-nft -t mangle -F"),
    ("pod1-1", "iptables-nft -F"),
])]
#[case::flush_set_of_the_node(NodeHybrid, &[
    ("node1", "ipset flush ztunnel-pods-ips"),
    ("node1", "ipset flush ambidex-guarded"),
])]
#[case::flush_set_of_in_pod_capture(Inpod, &[("node1", "ipset flush istio-inpod-probes-v4")])]
#[case::delete_routes_of_the_node(NodeHybrid, &[
    ("node1", "ip route flush table 100"),
    ("node1", "ip route flush table 101"),
    ("node1", "ip route flush table 102"),
    ("node1", "ip rule del pref 101"),
    ("node1", "ip link del istioout"),
])]
#[case::delete_routes_of_the_pod(Inpod, &[
    ("pod1-1", "ip route flush table 100"),
    ("pod1-1", "ip rule del pref 32764"),
])]
#[case::flush_rules_with_everything_in_the_tunnel(NodeTunnel, &[
    ("node1", "iptables-nft -t mangle -F"),
    ("node1", "ip route flush table 101"),
])]
fn damage_is_mended_and_nothing_is_in_the_clear(
    #[case] variant: Variant,
    #[case] damages: &[(&str, &str)],
) {
    let scene = mending(variant);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    for (target, command) in damages {
        damage_and_wait(&scene, target, command);
        marked.flows(&format!("after {command}"));
    }
    ambidex(&scene.lab, "verify").with_code(0);
    marked.assert_never_in_the_clear();
}

/// Connection tracking forgets what was redirected, and from where: the connections end, nothing leaves beside the tunnels.
#[rstest]
fn forgotten_connections_do_not_leave(#[values(NodeHybrid, NodeTunnel, Inpod)] variant: Variant) {
    let scene = mending(variant);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    let place = if variant.is_node() { "node1" } else { "pod1-1" };
    for _ in 0..3 {
        shell(&scene.lab, place, "conntrack -F 2>&1");
        marked.flows("after conntrack -F");
    }
    ambidex(&scene.lab, "verify").with_code(0);
    marked.assert_never_in_the_clear();
}

/// What leads past the capture although all of it is in place, and what takes that away again.
fn way_past(scene: &Stage, variant: Variant) -> (&'static str, String, String) {
    let address = scene.ip("pod1-1");
    if variant.is_node() {
        let rule = format!("pref 50 from {address} lookup main");
        let both = ["add", "del"].map(|verb| format!("ip rule {verb} {rule}"));
        let [add, delete] = both;
        ("node1", add, delete)
    } else {
        let both =
            ["-I", "-D"].map(|verb| format!("iptables-nft -t nat {verb} OUTPUT -p tcp -j ACCEPT"));
        let [add, delete] = both;
        ("pod1-1", add, delete)
    }
}

fn closed(lab: &Lab) -> Option<String> {
    let pods = pods(lab);
    let pod = pods.iter().find(|pod| pod["name"] == "pod1-1").unwrap();
    pod["closed"].as_str().map(str::to_owned)
}

fn effective(lab: &Lab, variant: Variant) -> String {
    let node = lab.netns("node1").unwrap();
    let page = Command::new("curl");
    let mut page = page;
    page.args([
        "--silent",
        "--max-time",
        "10",
        "http://127.0.0.1:15014/metrics",
    ]);
    let output = node.run(|| page.output()).unwrap().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let name = format!(
        "ambidex_capture_effective{{namespace=\"alpha\",pod=\"pod1-1\",capture_mode=\"{}\"}} ",
        variant.capture()
    );
    let line = text.lines().find_map(|line| line.strip_prefix(&name));
    line.unwrap_or_default().to_owned()
}

/// Nothing that the agent can put back is missing, and connections are led past the proxy: the pod is closed, stays closed
/// under another agent, and is opened when the way past is gone.
#[rstest]
fn what_cannot_be_mended_is_closed(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = mending(variant);
    let lab = &scene.lab;
    let places = ["node1", "pod1-1"];
    let before = dumps(lab, &places);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    let log = Log::from_here(lab);
    let (target, past, back) = way_past(&scene, variant);
    let begun = Instant::now();
    shell(lab, target, &past);
    eventually("the agent has found it", FOUND_WITHIN, || {
        log.says("pod is not captured as it should be")
    });
    let found = begun.elapsed();
    eventually("the pod is closed", MENDED_WITHIN, || {
        closed(lab).is_some_and(|closed| closed.contains("its TCP is stopped in"))
    });
    eprintln!(
        "{variant:?}: {past}: found after {found:.1?}, closed after {:.1?}",
        begun.elapsed()
    );
    eventually("the log says so", FOUND_WITHIN, || {
        log.says("pod is closed")
    });
    eventually("the metric says so", FOUND_WITHIN, || {
        effective(lab, variant) == "0"
    });
    let said = ambidex(lab, "verify alpha/pod1-1");
    assert!(
        said.code == 3 && said.stdout.contains("the pod is closed"),
        "{said:?}"
    );
    assert!(ambidex(lab, "get pods").with_code(0).contains("closed"));
    // The pod beside it is not.
    scene.check("pod1-2", scene.at("pod2-2"), lab::traffic::Check::Who);

    lab.kill(1, Daemon::Agent).unwrap();
    lab.start(1, Daemon::Agent).unwrap();
    lab.wait_ready(1, &|_| {}).unwrap();
    assert!(closed(lab).is_some(), "another agent knows it");

    let begun = Instant::now();
    shell(lab, target, &back);
    eventually("the pod is open", MENDED_WITHIN, || closed(lab).is_none());
    eprintln!("{variant:?}: open after {:.1?}", begun.elapsed());
    marked.flows("when the pod is open again");
    assert_same("open again", &before, &dumps(lab, &places));
    eventually("the metric says so", FOUND_WITHIN, || {
        effective(lab, variant) == "1"
    });
    marked.assert_never_in_the_clear();
}

/// An undo takes away what closes a pod with everything else.
#[rstest]
fn a_closed_pod_is_undone_whole(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = mending(variant);
    let lab = &scene.lab;
    let places = ["node1", "pod1-1"];
    lab.del_pod("pod1-1").unwrap();
    let before = dumps(lab, &places);
    lab.add_pod("pod1-1").unwrap();
    let (target, past, back) = way_past(&scene, variant);
    shell(lab, target, &past);
    eventually("the pod is closed", MENDED_WITHIN, || closed(lab).is_some());
    // First: where the capture stood, a rule of somebody else's keeps the table that it is in.
    shell(lab, target, &back);
    ambidex(lab, "undo alpha/pod1-1").with_code(0);
    assert_same("undone", &before, &dumps(lab, &places));
}

/// Whoever is dead: traffic goes on through what is left, or not at all.
#[rstest]
fn dead_daemons_let_nothing_out(
    #[values(NodeHybrid, Inpod)] variant: Variant,
    #[values("agent", "proxy", "both")] who: &str,
) {
    let scene = mending(variant);
    let lab = &scene.lab;
    let before = dumps(lab, &["node1", "pod1-1"]);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    if who != "proxy" {
        lab.kill(1, Daemon::Agent).unwrap();
    }
    if who != "agent" {
        lab.kill(1, Daemon::Proxy).unwrap();
        let failed = marked.failed();
        eventually("connections fail", FOUND_WITHIN, || {
            marked.failed() > failed + 1
        });
    } else {
        marked.flows("without an agent");
    }
    if who != "proxy" {
        // Damage that nobody mends.
        let (target, command) = match variant {
            Inpod => ("pod1-1", "iptables-nft -t nat -F"),
            _ => ("node1", "iptables-nft -t mangle -F"),
        };
        shell(lab, target, command);
        std::thread::sleep(Duration::from_secs(2));
    }
    let begun = Instant::now();
    if who != "proxy" {
        lab.start(1, Daemon::Agent).unwrap();
    }
    if who != "agent" {
        lab.start(1, Daemon::Proxy).unwrap();
    }
    lab.wait_ready(1, &|_| {}).unwrap();
    marked.flows("after the start");
    eprintln!(
        "{variant:?}, {who} killed: well after {:.1?}",
        begun.elapsed()
    );
    eventually("everything is as before", MENDED_WITHIN, || {
        dumps(lab, &["node1", "pod1-1"]) == before
    });
    assert_eq!(closed(lab), None);
    marked.assert_never_in_the_clear();
}

/// A proxy that hangs holds its pods' traffic up; nothing is closed, nothing is mended, and it all goes on.
#[rstest]
fn a_slow_proxy_is_waited_for(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = mending(variant);
    let lab = &scene.lab;
    let before = dumps(lab, &["node1", "pod1-1"]);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    let log = Log::from_here(lab);
    let proxy = lab.process(1, Daemon::Proxy).unwrap();
    proxy.signal(Signal::SIGSTOP).unwrap();
    eventually("the agent has found it", FOUND_WITHIN, || {
        log.says("pod is not captured as it should be")
    });
    std::thread::sleep(Duration::from_secs(6));
    let (refused, known) = (
        Sandbox::of(lab, "pod1-2").call(lab, "ADD"),
        closed(lab).is_some(),
    );
    proxy.signal(Signal::SIGCONT).unwrap();
    assert_eq!(refused.code, 1, "an ADD is not confirmed: {refused:?}");
    assert!(!known, "nothing is led past a proxy that hangs");
    marked.flows("when the proxy goes on");
    assert_same("waited", &before, &dumps(lab, &["node1", "pod1-1"]));
    assert!(!log.says("pod is closed"));
    marked.assert_never_in_the_clear();
}

/// A small file system at a path, gone with this.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(at: &Path) -> Self {
        let status = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "size=256k", "tmpfs"])
            .arg(at)
            .status();
        assert!(status.unwrap().success());
        Self(at.to_path_buf())
    }

    fn filler(&self) -> PathBuf {
        self.0.join("filler")
    }

    /// Leaves no byte.
    fn fill(&self) {
        let written = fs::write(self.filler(), vec![0; 1 << 20]);
        assert_eq!(written.unwrap_err().kind(), std::io::ErrorKind::StorageFull);
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A pod's namespace goes, another one comes in its place with its address, and no runtime says so: it is captured in the
/// place of the earlier one, by the same agent, and leaves nothing when it goes.
#[rstest]
fn a_replaced_namespace_is_noticed(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = mending(variant);
    let lab = &scene.lab;
    let empty = dumps(lab, &["node1", "proxy1"]);
    let sandbox = Sandbox::wired(lab, "web1", Ipv4Addr::new(10, 244, 1, 140));
    sandbox.add(lab);
    let begun = Instant::now();
    sandbox.destroy(lab);
    let netns = sandbox.netns.file_name().unwrap().to_str().unwrap();
    host_net::netns::Netns::create_named(netns).unwrap();
    sandbox.wire(lab);
    eventually("it is captured anew", MENDED_WITHIN, || {
        ambidex(lab, "verify gamma/web1").code == 0
    });
    eprintln!("{variant:?}: captured after {:.1?}", begun.elapsed());
    sandbox.del(lab);
    sandbox.destroy(lab);
    assert_same("gone", &empty, &dumps(lab, &["node1", "proxy1"]));
}

/// With a full disk no pod is enrolled, which is said; those that are captured stay so, are mended and can leave.
#[rstest]
fn a_full_disk_loses_no_capture(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = mending(variant);
    let lab = &scene.lab;
    lab.stop(1, Daemon::Agent).unwrap();
    let kept = tempfile::tempdir().unwrap();
    let copy = |from: &Path, to: &Path| {
        let status = Command::new("cp")
            .arg("-a")
            .arg(from.join("."))
            .arg(to)
            .status();
        assert!(status.unwrap().success());
    };
    let state = lab.state_dir(1);
    copy(&state, kept.path());
    let disk = SmallDisk::mount(&state);
    copy(kept.path(), &state);
    start_agent(lab);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    let newcomer = Sandbox::wired(lab, "late1", Ipv4Addr::new(10, 244, 1, 130));
    let places = ["node1", "proxy1", "late1"];
    let before = dumps(lab, &places[..2]);
    disk.fill();

    let error = newcomer.call(lab, "ADD").cni_error();
    assert!(
        error["details"].as_str().unwrap().contains("No space left"),
        "{error}"
    );
    assert_eq!(state_of(lab, &newcomer.uid), None);
    assert_same("no pod more", &before, &dumps(lab, &places[..2]));
    let (target, command) = match variant {
        Inpod => ("pod1-1", "iptables-nft -t nat -F"),
        _ => ("node1", "iptables-nft -t mangle -F"),
    };
    damage_and_wait(&scene, target, command);
    marked.flows("with a full disk");
    let leaver = Sandbox::of(lab, "pod1-2");
    leaver.del(lab);
    assert_eq!(state_of(lab, &leaver.uid), None);

    fs::remove_file(disk.filler()).unwrap();
    newcomer.add(lab);
    leaver.add(lab);
    ambidex(lab, "verify").with_code(0);
    newcomer.del(lab);
    newcomer.destroy(lab);
    marked.assert_never_in_the_clear();
    lab.kill(1, Daemon::Agent).unwrap();
}

/// Sockets that a killed agent left, and other things in their place, keep none from starting.
#[rstest]
fn stale_sockets_are_replaced(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let before = dumps(lab, &["node1", "pod1-1"]);
    lab.kill(1, Daemon::Agent).unwrap();
    let sockets = ["agent.sock", "pluginevent.sock", "log.sock", "ztunnel.sock"];
    for socket in sockets {
        let path = lab.run_dir(1).join(socket);
        assert!(path.exists(), "{socket} is left");
    }
    let path = lab.run_dir(1).join("pluginevent.sock");
    fs::remove_file(&path).unwrap();
    fs::write(&path, "no socket").unwrap();
    let error = Sandbox::of(lab, "pod1-2").call(lab, "ADD").cni_error();
    assert_eq!(error["code"], 11, "{error}");
    start_agent(lab);
    Sandbox::of(lab, "pod1-2").add(lab);
    scene.check("pod1-1", scene.at("pod2-1"), lab::traffic::Check::Who);
    assert_same("another agent", &before, &dumps(lab, &["node1", "pod1-1"]));
}

/// Pods come and go while others talk: those notice nothing, and nothing is left of those that went.
#[rstest]
fn pods_come_and_go_under_load(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let (count, rounds): (u8, u32) = if all_suite() { (100, 3) } else { (10, 1) };
    let scene = mending(variant);
    let lab = &scene.lab;
    let sandboxes: Vec<Sandbox> = (0..count)
        .map(|i| {
            Sandbox::wired(
                lab,
                &format!("churn{i}"),
                Ipv4Addr::new(10, 244, 1, 100 + i),
            )
        })
        .collect();
    let before = dumps(lab, &["node1", "proxy1"]);
    let marked = Marked::between(&scene, "pod1-1", "pod2-1");
    let (begun, failed) = (Instant::now(), marked.failed());
    for _ in 0..rounds {
        for verb in ["ADD", "DEL"] {
            std::thread::scope(|scope| {
                for some in sandboxes.chunks(usize::from(count).div_ceil(4)) {
                    scope.spawn(move || {
                        for sandbox in some {
                            eventually("a runtime that tries again", MENDED_WITHIN, || {
                                sandbox.call(lab, verb).code == 0
                            });
                        }
                    });
                }
            });
        }
    }
    marked.flows("after it");
    eprintln!(
        "{variant:?}: {rounds} x {count} pods in {:.1?}; of {} connections beside them {} failed",
        begun.elapsed(),
        marked.succeeded(),
        marked.failed() - failed
    );
    assert_eq!(marked.failed(), failed, "connections of other pods fail");
    assert_same("they are gone", &before, &dumps(lab, &["node1", "proxy1"]));
    marked.assert_never_in_the_clear();
}

/// Every row of the table of faults has a test for each capture, and it exists.
#[test]
fn every_row_of_the_table_of_faults_has_its_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let document = fs::read_to_string(root.join("docs/operations.md")).unwrap();
    let table = document.split("## Faults").nth(1).expect("the section");
    let table = table.split("\n## ").next().unwrap();
    let rows: Vec<Vec<&str>> = table
        .lines()
        .filter(|line| line.starts_with("| ") && !line.starts_with("| fault"))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    let faults: Vec<&str> = rows.iter().map(|row| row[0]).collect();
    for wanted in [
        "rules flushed",
        "set flushed",
        "route deleted",
        "namespace replaced",
        "agent killed",
        "proxy killed",
        "both killed",
        "disk full",
        "proxy slow",
        "two agents",
        "stale socket",
        "ADD twice",
        "DEL of the unknown",
        "DEL without a namespace",
        "churn under load",
        "not mendable",
    ] {
        assert!(faults.contains(&wanted), "no row {wanted}: {faults:?}");
    }
    for row in &rows {
        let tests: Vec<&str> = row[3].split('`').skip(1).step_by(2).collect();
        assert!(!tests.is_empty(), "{}: no test", row[0]);
        for test in tests {
            let (file, name) = test.split_once("::").expect("file::test");
            let source = fs::read_to_string(root.join(format!("tests/{file}.rs"))).unwrap();
            assert!(
                source.contains(&format!("fn {name}(")),
                "{}: {test}",
                row[0]
            );
        }
    }
}
