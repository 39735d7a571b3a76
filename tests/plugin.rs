//! The plugin and the agent behind it: what a runtime may rely on, whatever it or the node does.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use harness::{eventually, own};
use lab::standing::{Daemon, Lab};
use lab::topology::Mode;
use nix::sys::signal::Signal;
use rstest::rstest;
use runtime::{
    Sandbox, ambidex, assert_same, dumps, pods, replace_agent, request, send, start_agent, state_of,
};
use serde_json::{Value, json};

/// What the plugin may take for an answer, and a loaded machine.
const PLUGIN_ANSWERS_WITHIN: Duration = Duration::from_millis(6500);
/// What an agent touches for a pod with this name.
const PLACES: [&str; 3] = ["node1", "proxy1", "pod1-2"];

fn stop_proxy(lab: &Lab) {
    lab.process(1, Daemon::Proxy)
        .unwrap()
        .signal(Signal::SIGSTOP)
        .unwrap();
}

fn continue_proxy(lab: &Lab) {
    lab.process(1, Daemon::Proxy)
        .unwrap()
        .signal(Signal::SIGCONT)
        .unwrap();
}

/// Nothing works out: the pod does not start, the runtime hears why in time, and nothing is left behind.
#[rstest]
fn a_pod_that_cannot_be_captured_does_not_start(
    #[values(Mode::Node, Mode::Inpod)] mode: Mode,
    #[values(
        "no agent",
        "agent hangs",
        "no proxy",
        "proxy hangs",
        "proxy refuses",
        "no veth"
    )]
    trouble: &str,
) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    sandbox.del(lab);
    let before = dumps(lab, &PLACES);
    let (code, cause) = match trouble {
        "no agent" => {
            lab.kill(1, Daemon::Agent).unwrap();
            (11, "pluginevent.sock")
        }
        "agent hangs" => {
            let agent = lab.process(1, Daemon::Agent).unwrap();
            agent.signal(Signal::SIGSTOP).unwrap();
            (11, "no answer within 5s")
        }
        "no proxy" => {
            lab.kill(1, Daemon::Proxy).unwrap();
            eventually("the agent sees it", Duration::from_secs(5), || {
                !lab.is_ready(1)
            });
            (11, "no proxy is connected")
        }
        "proxy hangs" => {
            stop_proxy(lab);
            (999, "did not answer within 4.5s")
        }
        "proxy refuses" => {
            std::fs::remove_dir_all(lab.dir().join("ca")).unwrap();
            (999, "the proxy did not take it")
        }
        _ if mode == Mode::Node => {
            let route = format!(
                "route delete {}/32 dev {}\n",
                sandbox.ip,
                lab.topology().pod("pod1-2").unwrap().1.veth
            );
            runtime::ip_batch(&lab.topology().node(1).unwrap().netns, &route);
            (999, "no host route")
        }
        _ => {
            runtime::ip_batch(
                sandbox.netns.file_name().unwrap().to_str().unwrap(),
                &format!("address delete {}/32 dev eth0\n", sandbox.ip),
            );
            (7, "is not an address of the network namespace")
        }
    };
    let damaged = dumps(lab, &PLACES);
    let failed = sandbox.call(lab, "ADD");
    let error = failed.cni_error();
    assert_eq!(error["code"], code, "{error}");
    let details = error["details"].as_str().unwrap();
    assert!(details.contains(cause), "{details}");
    assert!(failed.took < PLUGIN_ANSWERS_WITHIN, "{:?}", failed.took);
    assert_same(trouble, &damaged, &dumps(lab, &PLACES));
    match trouble {
        "no agent" => start_agent(lab),
        "agent hangs" => {
            let agent = lab.process(1, Daemon::Agent).unwrap();
            agent.signal(Signal::SIGCONT).unwrap();
            // It finds the request of a plugin that has gone.
            std::thread::sleep(Duration::from_millis(300));
        }
        "no proxy" => lab.start(1, Daemon::Proxy).unwrap(),
        "proxy hangs" => continue_proxy(lab),
        _ => {}
    }
    if damaged == before && trouble != "proxy refuses" {
        lab.wait_ready(1, &|_| {}).unwrap();
        eventually("the pod is forgotten", Duration::from_secs(5), || {
            state_of(lab, &sandbox.uid).is_none()
        });
        assert_same("after it is over", &before, &dumps(lab, &PLACES));
        let listening = lab
            .run(
                "pod1-2",
                &["ss", "-Hntl", "sport = 15008"],
                Duration::from_secs(5),
            )
            .unwrap();
        assert_eq!(
            listening.stdout, "",
            "nobody listens for a pod that does not start"
        );
        sandbox.add(lab);
        assert_eq!(state_of(lab, &sandbox.uid).unwrap(), "captured");
    } else {
        assert_eq!(state_of(lab, &sandbox.uid), None);
    }
}

/// A plugin that gives up while the agent waits for the proxy: the sandbox is being taken down, so nothing may come of it.
#[rstest]
fn nothing_comes_of_an_enrolment_that_nobody_waits_for(
    #[values(Mode::Node, Mode::Inpod)] mode: Mode,
) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    sandbox.del(lab);
    let before = dumps(lab, &PLACES);
    stop_proxy(lab);
    let body = sandbox.event().to_string();
    let plugin = send(lab, "pluginevent.sock", "POST /cmdadd", body.as_bytes());
    eventually("it is being enrolled", Duration::from_secs(5), || {
        state_of(lab, &sandbox.uid).as_deref() == Some("pending")
    });
    drop(plugin);
    continue_proxy(lab);
    eventually("the pod is forgotten", Duration::from_secs(5), || {
        state_of(lab, &sandbox.uid).is_none()
    });
    assert_same("nobody waited", &before, &dumps(lab, &PLACES));
}

/// What runtimes do that one would not expect.
#[rstest]
fn repetitions_and_replacements(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let empty = dumps(lab, &["node1", "proxy1"]);
    let address = Ipv4Addr::new(10, 244, 1, 100);
    let first = Sandbox::wired(lab, "web1", address);
    let place = |sandbox: &Sandbox| {
        let netns = sandbox.netns.file_name().unwrap().to_str().unwrap();
        netns.rsplit('-').next().unwrap().to_owned()
    };
    let wired = dumps(lab, &["node1", "proxy1"]);
    let inside =
        |sandbox: &Sandbox| harness::dump(&host_net::netns::Netns::open(&sandbox.netns).unwrap());
    let uncaptured = inside(&first);
    assert_eq!(place(&first), "web1");

    first.add(lab);
    let captured = (dumps(lab, &["node1", "proxy1"]), inside(&first));
    first.add(lab);
    assert_same("ADD twice", &captured.0, &dumps(lab, &["node1", "proxy1"]));
    assert_eq!(captured.1, inside(&first));
    assert_eq!(pods(lab).len(), 3);

    // A repetition that cannot be confirmed does not end the capture that stands.
    stop_proxy(lab);
    first.call(lab, "ADD").cni_error();
    continue_proxy(lab);
    assert_eq!(state_of(lab, &first.uid).unwrap(), "captured");
    assert_same(
        "unconfirmed",
        &captured.0,
        &dumps(lab, &["node1", "proxy1"]),
    );
    lab.wait_ready(1, &|_| {}).unwrap();

    // The sandbox of a pod is replaced; the one before is cleaned up afterwards.
    let mut second = first.clone();
    second.container_id = "sandbox-again".to_owned();
    first.destroy(lab);
    host_net::netns::Netns::create_named(second.netns.file_name().unwrap().to_str().unwrap())
        .unwrap();
    second.wire(lab);
    second.add(lab);
    first.del(lab);
    assert_eq!(
        state_of(lab, &first.uid).unwrap(),
        "captured",
        "the late DEL of the first sandbox"
    );
    assert_eq!(captured.1, inside(&second));

    // Another pod gets the address of one that is still there: refused. Of one that is gone: taken over.
    let mut usurper = second.clone();
    usurper.name = "web3".to_owned();
    usurper.uid = "uid-usurper".to_owned();
    usurper.container_id = "sandbox-usurper".to_owned();
    usurper.netns = Sandbox::of(lab, "plain1").netns;
    let error = usurper.call(lab, "ADD").cni_error();
    assert_eq!(error["code"], 7, "{error}");
    let usurper = {
        // Its own namespace, with the same address in it but not on the node.
        let other = Sandbox::wired(lab, "web3", Ipv4Addr::new(10, 244, 1, 101));
        runtime::ip_batch(
            other.netns.file_name().unwrap().to_str().unwrap(),
            &format!("address add {address}/32 dev eth0\n"),
        );
        Sandbox {
            ip: address,
            ..other
        }
    };
    let error = usurper.call(lab, "ADD").cni_error();
    let details = error["details"].as_str().unwrap().to_owned();
    assert!(
        details.contains("gamma/web1") && details.contains("ambidex undo uid-web1"),
        "{details}"
    );
    assert_eq!(state_of(lab, &second.uid).unwrap(), "captured");
    usurper.destroy(lab);
    second.destroy(lab);
    let heir = Sandbox::wired(lab, "web5", address);
    heir.add(lab);
    assert_eq!(
        state_of(lab, &second.uid),
        None,
        "the pod that had the address is gone"
    );
    assert_eq!(state_of(lab, &heir.uid).unwrap(), "captured");

    // The same pod name again, as of a stateful set, with another UID.
    let same_name = Sandbox {
        uid: "uid-later".to_owned(),
        container_id: "sandbox-later".to_owned(),
        ..heir.clone()
    };
    heir.destroy(lab);
    host_net::netns::Netns::create_named(heir.netns.file_name().unwrap().to_str().unwrap())
        .unwrap();
    same_name.wire(lab);
    same_name.add(lab);
    assert_eq!(state_of(lab, &heir.uid), None);
    heir.del(lab);
    assert_eq!(state_of(lab, &same_name.uid).unwrap(), "captured");
    assert_eq!(captured.1, inside(&same_name));

    // Deletion: without a namespace, of what is gone, of what never was.
    let mut without_netns = same_name.clone();
    without_netns.netns = Default::default();
    without_netns.del(lab);
    assert_eq!(state_of(lab, &same_name.uid), None);
    assert_eq!(uncaptured, inside(&same_name));
    same_name.add(lab);
    same_name.destroy(lab);
    same_name.del(lab);
    same_name.del(lab);
    assert_same("all gone", &empty, &dumps(lab, &["node1", "proxy1"]));
    assert_ne!(empty[0], wired[0]);
    assert_eq!(pods(lab).len(), 2);
}

/// CHECK, STATUS, GC and VERSION.
#[rstest]
fn the_other_verbs(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    assert_eq!(sandbox.call(lab, "CHECK").with_code(0), "");
    let (target, remove, named) = match mode {
        Mode::Node => (
            "node1",
            format!("ip route delete {} table 100", sandbox.ip),
            ["table 100", "missing"],
        ),
        _ => (
            "pod1-2",
            "iptables -t mangle -F ISTIO_PRERT".to_owned(),
            ["chain ISTIO_PRERT", "lacks"],
        ),
    };
    let argv: Vec<&str> = remove.split(' ').collect();
    lab.run(target, &argv, Duration::from_secs(5))
        .unwrap()
        .success(&remove)
        .unwrap();
    let error = sandbox.call(lab, "CHECK").cni_error();
    let details = error["details"].as_str().unwrap();
    assert!(
        details.contains("beta/pod1-2") && named.iter().all(|word| details.contains(word)),
        "{details}"
    );
    let differs = ambidex(lab, "diff beta/pod1-2").with_code(3);
    assert!(named.iter().all(|word| differs.contains(word)), "{differs}");
    sandbox.add(lab);
    sandbox.call(lab, "CHECK").with_code(0);
    let unknown = Sandbox {
        uid: "other".to_owned(),
        container_id: "other".to_owned(),
        ..sandbox.clone()
    };
    let details = unknown.call(lab, "CHECK").cni_error()["details"].to_string();
    assert!(details.contains("has not enrolled it"), "{details}");

    assert_eq!(sandbox.call(lab, "STATUS").with_code(0), "");
    let version: Value = serde_json::from_str(&sandbox.call(lab, "VERSION").with_code(0)).unwrap();
    assert_eq!(version["cniVersion"], "1.1.0");
    assert_eq!(
        version["supportedVersions"],
        json!(["0.3.1", "0.4.0", "1.0.0", "1.0.1", "1.1.0"])
    );

    // Garbage collection takes away who is neither listed nor there, and nobody else.
    let gone = Sandbox::wired(lab, "gone1", Ipv4Addr::new(10, 244, 1, 120));
    gone.add(lab);
    let mut config = sandbox.config(lab);
    config["cni.dev/valid-attachments"] = json!([{"containerID": "elsewhere", "ifname": "eth0"}]);
    let config = config.to_string();
    sandbox.call_with("GC", config.as_bytes()).with_code(0);
    assert_eq!(pods(lab).len(), 3, "they are all there");
    gone.destroy(lab);
    sandbox.call_with("GC", config.as_bytes()).with_code(0);
    assert_eq!(state_of(lab, &gone.uid), None);
    assert_eq!(pods(lab).len(), 2);

    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the agent sees it", Duration::from_secs(5), || {
        !lab.is_ready(1)
    });
    let error = sandbox.call(lab, "STATUS").cni_error();
    assert_eq!(error["code"], 50, "{error}");
    let details = sandbox.call(lab, "CHECK").cni_error()["details"].to_string();
    assert!(details.contains("no proxy is connected"), "{details}");
}

/// Whatever the plugin or the agent is sent: a clear error, and nothing changes.
#[test]
fn hostile_input_changes_nothing() {
    let scene = own(&harness::spec(Mode::Mixed));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    sandbox.del(lab);
    let before = dumps(lab, &PLACES);
    let known = pods(lab);

    let config = sandbox.config(lab);
    let with = |key: &str, value: Value| {
        let mut config = config.clone();
        config[key] = value;
        config.to_string().into_bytes()
    };
    let ips = |value: Value| with("prevResult", json!({"cniVersion": "1.1.0", "ips": value}));
    let deep = "[".repeat(100_000).into_bytes();
    let inputs: Vec<(Vec<u8>, u64)> = vec![
        (b"".to_vec(), 6),
        (b"null".to_vec(), 6),
        (b"[]".to_vec(), 6),
        (b"{".to_vec(), 6),
        (b"{}".to_vec(), 7),
        (b"\xff\xfe\x00".to_vec(), 6),
        (deep, 6),
        (vec![b' '; 5 << 20], 6),
        (with("cniVersion", json!("0.1.0")), 1),
        (with("cniVersion", json!("99.0.0")), 1),
        (with("cniVersion", json!(1)), 6),
        (with("ambient_enabled", json!("yes")), 6),
        (with("cni_agent_run_dir", json!(7)), 6),
        (with("cni_agent_run_dir", json!("/nowhere")), 11),
        (with("cni_agent_run_dir", json!("a".repeat(5000))), 11),
        (with("exclude_namespaces", json!("x")), 6),
        (with("ambidex", json!({"other": 1})), 6),
        (with("prevResult", Value::Null), 7),
        (ips(json!({})), 7),
        (ips(json!([{}])), 7),
        (ips(json!([{"address": "10.244.1.11"}])), 7),
        (ips(json!([{"address": "10.244.1.11/33"}])), 7),
        (ips(json!([{"address": "fd00::1/128"}])), 7),
        (ips(json!([{"address": "127.0.0.1/8"}])), 7),
        (
            ips(json!([{"address": "10.244.1.11/32", "gateway": "x"}])),
            7,
        ),
        (ips(json!([{"address": "10.244.1.77/32"}])), 7),
        (
            ips(json!(vec![json!({"address": "10.244.1.11/32"}); 500])),
            7,
        ),
    ];
    for (input, code) in &inputs {
        let shown: String = String::from_utf8_lossy(input).chars().take(200).collect();
        let done = sandbox.call_with("ADD", input);
        let error = done.cni_error();
        assert_eq!(error["code"], *code, "{shown}: {error}");
    }
    assert!(inputs.len() >= 20);

    let event = sandbox.event();
    let but = |key: &str, value: Value| {
        let mut event = event.clone();
        event[key] = value;
        event.to_string().into_bytes()
    };
    let node = host_net::netns::Netns::path_of(&lab.topology().node(1).unwrap().netns);
    let proxy = host_net::netns::Netns::path_of(&lab.topology().node(1).unwrap().proxy_netns);
    let address = |ip: &str, mask: &str| json!([{"Interface": null, "Address": {"IP": ip, "Mask": mask}, "Gateway": null}]);
    let bodies: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b"null".to_vec(),
        b"[1]".to_vec(),
        b"{".to_vec(),
        b"{}".to_vec(),
        b"\xff".to_vec(),
        b"[".repeat(200_000),
        but("Netns", json!("")),
        but("Netns", json!("run/netns/x")),
        but("Netns", json!("/run/netns/absent")),
        but("Netns", json!("/etc/passwd")),
        but("Netns", json!("/proc/self/ns/mnt")),
        but("Netns", json!("/dev/zero")),
        but("Netns", json!(node)),
        but("Netns", json!(proxy)),
        but("PodName", json!("")),
        but("PodName", json!("x\u{1b}[31m2")),
        but("PodName", json!("x".repeat(300))),
        but("PodNamespace", json!("../../etc")),
        but("PodNamespace", json!("a\nb")),
        but("PodUID", json!("../../../tmp/x")),
        but("PodUID", json!(".hidden")),
        but("PodUID", json!("u".repeat(129))),
        but("PodUID", json!("a b;rm -rf")),
        but("ContainerID", json!("\u{0}")),
        but("ServiceAccount", json!("sa/../other")),
        but("IPs", Value::Null),
        but("IPs", json!("10.0.0.1")),
        but("IPs", address("10.244.1.11", "////")),
        but("IPs", address("0.0.0.0", "/////w==")),
        but("IPs", address("224.0.0.1", "/////w==")),
        but("IPs", address("127.0.0.1", "/////w==")),
        but("IPs", address("10.244.1.1", "/////w==")),
        but("IPs", address("10.244.1.10", "/////w==")),
    ];
    for body in &bodies {
        let shown: String = String::from_utf8_lossy(body).chars().take(200).collect();
        let (status, text) = request(lab, "pluginevent.sock", "POST /cmdadd", body);
        assert_eq!(status, 400, "{shown}: {text}");
        assert!(
            text.len() > 10 && !text.contains('\u{1b}'),
            "{shown}: {text}"
        );
    }
    assert!(bodies.len() >= 20);
    for (head, wanted) in [
        ("GET /cmdadd", 404),
        ("POST /elsewhere", 404),
        ("POST /cmdgc", 400),
        ("POST /cmddel", 400),
        ("POST /cmdcheck", 400),
    ] {
        assert_eq!(
            request(lab, "pluginevent.sock", head, b"{").0,
            wanted,
            "{head}"
        );
    }
    for (head, wanted) in [
        ("GET /v1/plan", 400),
        ("GET /v1/plan?pod=", 400),
        ("GET /v1/diff?pod=nobody", 404),
        ("POST /v1/plan?node", 405),
        ("GET /v1/undo?node", 405),
        ("POST /v1/undo?pod=../../x", 404),
    ] {
        assert_eq!(request(lab, "agent.sock", head, b"").0, wanted, "{head}");
    }
    assert_same("hostile input", &before, &dumps(lab, &PLACES));
    assert_eq!(known, pods(lab));
    let log = std::fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
    assert!(!log.contains("panicked"), "{log}");
    sandbox.add(lab);
}

/// The sockets are root's: by their mode, and if that is changed, by who connects.
#[test]
fn sockets_are_for_root_only() {
    let scene = own(&harness::spec(Mode::Inpod));
    let lab = &scene.lab;
    for socket in ["agent.sock", "pluginevent.sock", "ztunnel.sock"] {
        let path = lab.run_dir(1).join(socket);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{socket}: {mode:o}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    }
    for (socket, page) in [("agent.sock", "healthz"), ("pluginevent.sock", "status")] {
        let path = lab.run_dir(1).join(socket);
        let ask = |uid: u32| {
            let mut curl = Command::new("curl");
            let url = format!("http://unix/{page}");
            curl.args(["--silent", "--fail", "--max-time", "5", "--unix-socket"]);
            let asked = curl.arg(&path).arg(url).uid(uid).gid(uid).output().unwrap();
            asked.status.success()
        };
        assert!(ask(0), "{socket}");
        assert!(!ask(65534), "{socket} answers nobody");
    }
}

/// Sixty sandboxes at once: all captured, all gone again, and little slower than the work itself.
#[test]
fn sixty_pods_at_once() {
    const PODS: u8 = 60;
    let scene = own(&harness::spec(Mode::Mixed));
    let lab = &scene.lab;
    let sandboxes: Vec<Sandbox> = (0..PODS)
        .map(|i| Sandbox::wired(lab, &format!("many{i}"), Ipv4Addr::new(10, 244, 1, 100 + i)))
        .collect();
    let before = dumps(lab, &["node1", "proxy1"]);
    let inside =
        |sandbox: &Sandbox| harness::dump(&host_net::netns::Netns::open(&sandbox.netns).unwrap());
    let uncaptured = inside(&sandboxes[0]);
    // As a runtime does: what cannot be done in time is tried again.
    let all = |verb: &str| {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for sandbox in &sandboxes {
                scope.spawn(move || {
                    let deadline = Instant::now() + Duration::from_secs(60);
                    loop {
                        let done = sandbox.call(lab, verb);
                        if done.code == 0 {
                            return;
                        }
                        assert!(
                            Instant::now() < deadline,
                            "{verb} {}: {done:?}",
                            sandbox.name
                        );
                    }
                });
            }
        });
        started.elapsed()
    };
    let one = Instant::now();
    sandboxes[0].add(lab);
    sandboxes[0].del(lab);
    let one = one.elapsed();
    let added = all("ADD");
    let captured: Vec<Value> = pods(lab);
    let captured = captured
        .iter()
        .filter(|pod| pod["state"] == "captured")
        .count();
    assert_eq!(captured, usize::from(PODS) + 2);
    assert_eq!(ambidex(lab, "diff --node").with_code(0), "");
    for sandbox in sandboxes.iter().step_by(13) {
        let pod = format!("diff gamma/{}", sandbox.name);
        assert_eq!(ambidex(lab, &pod).with_code(0), "");
    }
    let restarted = Instant::now();
    replace_agent(lab);
    let restarted = restarted.elapsed();
    let deleted = all("DEL");
    assert_eq!(pods(lab).len(), 2);
    assert_same("sixty pods", &before, &dumps(lab, &["node1", "proxy1"]));
    assert_eq!(uncaptured, inside(&sandboxes[0]));
    eprintln!(
        "{PODS} pods at once: ADD {added:.2?}, DEL {deleted:.2?}; one alone, both: {one:.2?}; agent restarted with them: {restarted:.2?}"
    );
}
