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
use runtime::hostile;
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

    // What no attachment to the network owns goes, also when it is still there; of other networks, only what is gone.
    let mut config = sandbox.config(lab);
    let mut collect = |network: &str, owners: &[&Sandbox]| {
        let attachment = |s: &&Sandbox| json!({"containerID": s.container_id, "ifname": "eth0"});
        config["name"] = json!(network);
        config["cni.dev/valid-attachments"] = owners.iter().map(attachment).collect();
        sandbox
            .call_with("GC", config.to_string().as_bytes())
            .with_code(0);
        pods(lab).len()
    };
    let network = Sandbox::network(lab);
    let other = Sandbox::of(lab, "pod1-1");
    let untouched = dumps(lab, &["node1", "proxy1"]);
    let forgotten = Sandbox::wired(lab, "gone1", Ipv4Addr::new(10, 244, 1, 120));
    let wired = harness::dump(&host_net::netns::Netns::open(&forgotten.netns).unwrap());
    forgotten.add(lab);
    assert_eq!(collect(&network, &[&sandbox, &other, &forgotten]), 3);
    assert_eq!(collect("elsewhere", &[]), 3);
    assert_eq!(collect(&network, &[&sandbox, &other]), 2);
    assert_eq!(state_of(lab, &forgotten.uid), None);
    let inside = harness::dump(&host_net::netns::Netns::open(&forgotten.netns).unwrap());
    assert_eq!(inside, wired);
    forgotten.add(lab);
    forgotten.destroy(lab);
    assert_eq!(collect("elsewhere", &[]), 2);
    assert_same("collected", &untouched, &dumps(lab, &["node1", "proxy1"]));

    // A second attachment of a captured sandbox is refused, and its end does not end the capture.
    let mut second = sandbox.config(lab);
    second["name"] = json!("elsewhere");
    let second = second.to_string().into_bytes();
    let refused = sandbox.call_with("ADD", &second).cni_error();
    assert_eq!(refused["code"], 7, "{refused}");
    let details = refused["details"].as_str().unwrap();
    assert!(details.contains("of network elsewhere"), "{details}");
    sandbox.call_with("DEL", &second).with_code(0);
    sandbox.call(lab, "CHECK").with_code(0);

    let mut elsewhere = sandbox.config(lab);
    elsewhere["prevResult"]["ips"][0]["address"] = json!("10.244.1.99/32");
    let error = sandbox
        .call_with("CHECK", elsewhere.to_string().as_bytes())
        .cni_error();
    let details = error["details"].as_str().unwrap();
    for found in ["not an address that is captured", "not on any of its"] {
        assert!(details.contains(found), "{details}");
    }

    // Nobody listens any more: the kernel says so, whatever the agent remembers.
    let listener = if mode == Mode::Node {
        "proxy1"
    } else {
        "pod1-2"
    };
    let close = ["ss", "-K", "-t", "state", "listening", "sport = 15008"];
    lab.run(listener, &close, Duration::from_secs(5))
        .unwrap()
        .success("ss -K")
        .unwrap();
    let details = sandbox.call(lab, "CHECK").cni_error()["details"].to_string();
    assert!(
        details.contains("nobody listens on port 15008"),
        "{details}"
    );

    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the agent sees it", Duration::from_secs(5), || {
        !lab.is_ready(1)
    });
    let error = sandbox.call(lab, "STATUS").cni_error();
    assert_eq!(error["code"], 51, "{error}");
    let details = sandbox.call(lab, "CHECK").cni_error()["details"].to_string();
    assert!(details.contains("no proxy is connected"), "{details}");
    sandbox.del(lab);
    other.del(lab);
    let error = sandbox.call(lab, "STATUS").cni_error();
    assert_eq!(error["code"], 50, "nobody is captured: {error}");
    lab.kill(1, Daemon::Agent).unwrap();
    let error = sandbox.call(lab, "STATUS").cni_error();
    assert_eq!(error["code"], 50, "{error}");
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

    hostile::inputs(lab, &sandbox);
    hostile::environments(lab, &sandbox);
    hostile::bodies(lab, &sandbox);
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
    for socket in ["agent.sock", "pluginevent.sock", "log.sock", "ztunnel.sock"] {
        let path = lab.run_dir(1).join(socket);
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{socket}: {mode:o}");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    }
    for (socket, page) in [
        ("agent.sock", "healthz"),
        ("pluginevent.sock", "status"),
        ("log.sock", "log"),
    ] {
        let path = lab.run_dir(1).join(socket);
        let ask = |uid: u32| {
            let mut curl = Command::new("curl");
            let url = format!("http://unix/{page}");
            curl.args(["--silent", "--max-time", "5", "--unix-socket"]);
            let asked = curl.arg(&path).arg(url).uid(uid).gid(uid).output().unwrap();
            asked.status.success()
        };
        assert!(ask(0), "{socket}");
        assert!(!ask(65534), "{socket} answers nobody");
    }
    // ZDS is no HTTP: who is let in is told of at once, everybody else is hung up on.
    let script = "import socket,sys\n\
        s=socket.socket(socket.AF_UNIX,socket.SOCK_SEQPACKET)\n\
        s.settimeout(3)\n\
        s.connect(sys.argv[1])\n\
        try: print('closed' if s.recv(10)==b'' else 'spoken to')\n\
        except TimeoutError: print('waited for')\n\
        except ConnectionError: print('closed')";
    let zds = lab.run_dir(1).join("ztunnel.sock");
    let connected = |uid: u32| {
        let mut python = Command::new("python3");
        python.args(["-c", script]).arg(&zds).uid(uid).gid(uid);
        let output = python.output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert_eq!(connected(65534).trim(), "closed");
    assert_eq!(connected(0).trim(), "waited for", "until it says hello");
    lab.wait_ready(1, &|_| {}).unwrap();
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
