//! The agent, its proxies and the command line when things go wrong around them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::{Stage, eventually, own};
use host_net::netns::Netns;
use inpod_redirect::zds::client::{self, ClientOptions, WorkloadHandler};
use inpod_redirect::zds::{Add, NodeConfiguration};
use lab::standing::{self, Daemon, Lab};
use lab::topology::Mode;
use lab::topology::network::Attachment;
use lab::traffic::Check;
use nix::sys::signal::Signal;
use rstest::rstest;
use runtime::{
    Sandbox, ambidex, assert_same, dumps, ip_batch, pods, replace_agent, request, start_agent,
    state_of,
};
use serde_json::Value;

const PLACES: [&str; 3] = ["node1", "proxy1", "pod1-2"];
/// Far over what an agent takes to start here.
const SOON: Duration = Duration::from_secs(20);

/// Moments at which something is killed: within its first 100 ms, then sparser.
fn moments(count: u32) -> impl Iterator<Item = Duration> {
    (0..count).map(|i| Duration::from_millis(u64::from(if i < 8 { i * 12 } else { i * 20 - 60 })))
}

fn diff_is_empty(lab: &Lab, subject: &str) {
    assert_eq!(ambidex(lab, &format!("diff {subject}")).with_code(0), "");
}

/// The agent is killed while it enrols or unenrols a pod: another one ends in one of the two states that there are
/// without the kill, and it is the captured one if the runtime was told so.
#[rstest]
fn killed_in_the_middle_of_a_pod(
    #[values(Mode::Node, Mode::Inpod)] mode: Mode,
    #[values("ADD", "DEL")] verb: &str,
) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    let captured = dumps(lab, &PLACES);
    sandbox.del(lab);
    let uncaptured = dumps(lab, &PLACES);
    let mut ends = [0, 0];
    for moment in moments(10) {
        match (verb, state_of(lab, &sandbox.uid).is_some()) {
            ("ADD", true) => sandbox.del(lab),
            ("DEL", false) => sandbox.add(lab),
            _ => {}
        }
        let told = std::thread::scope(|scope| {
            let call = scope.spawn(|| sandbox.call(lab, verb));
            std::thread::sleep(moment);
            lab.kill(1, Daemon::Agent).unwrap();
            call.join().unwrap()
        });
        start_agent(lab);
        let what = format!("{verb} killed after {moment:?}");
        match state_of(lab, &sandbox.uid).as_deref() {
            Some("captured") => {
                ends[0] += 1;
                assert_same(&what, &captured, &dumps(lab, &PLACES));
                diff_is_empty(lab, "beta/pod1-2");
            }
            None => {
                ends[1] += 1;
                assert!(verb == "DEL" || told.code != 0, "{what}: {told:?}");
                assert_same(&what, &uncaptured, &dumps(lab, &PLACES));
            }
            other => panic!("{what}: the pod is {other:?}"),
        }
        diff_is_empty(lab, "--node");
    }
    eprintln!("{verb}: captured {}, not captured {}", ends[0], ends[1]);
}

/// The agent is killed while it sets the node up: the next one completes it, and undo leaves nothing, be it that agent's
/// or from the journal alone.
#[rstest]
fn killed_while_setting_up(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    let mut spec = harness::spec(Mode::None);
    let name = spec.name.clone();
    let without = standing::up(&spec, &|_| {}).unwrap().scoped();
    let before = dumps(&without, &PLACES);
    without.down().unwrap();
    spec = harness::spec(mode);
    spec.name = name;
    let scene = own(&spec);
    let lab = &scene.lab;
    for (round, moment) in moments(10).enumerate() {
        lab.kill(1, Daemon::Agent).unwrap();
        ambidex(lab, "undo --node").with_code(0);
        assert_same("undo without an agent", &before, &dumps(lab, &PLACES));
        assert_eq!(
            ambidex(lab, "undo --node").with_code(0),
            "",
            "nothing is left to undo"
        );
        lab.start(1, Daemon::Agent).unwrap();
        std::thread::sleep(moment);
        lab.kill(1, Daemon::Agent).unwrap();
        if round % 2 == 0 {
            continue;
        }
        start_agent(lab);
        diff_is_empty(lab, "--node");
        assert_eq!(pods(lab).len(), 0);
        let sandbox = Sandbox::of(lab, "pod1-2");
        sandbox.add(lab);
        ambidex(lab, "undo --node").with_code(0);
        assert_same("undo beside an agent", &before, &dumps(lab, &PLACES));
        let (status, why) = request(lab, "agent.sock", "GET /healthz", b"");
        assert!(
            status == 503 && why.contains("undo --node"),
            "{status} {why}"
        );
        let refused = sandbox.call(lab, "ADD").cni_error();
        assert_eq!(
            refused["code"], 11,
            "nothing is made after an undo: {refused}"
        );
        assert_same("after the undo", &before, &dumps(lab, &PLACES));
    }
}

/// One agent for one state; nothing is undone behind the back of one that hangs.
#[test]
fn an_agent_that_is_there_is_respected() {
    let scene = own(&harness::spec(Mode::Mixed));
    let lab = &scene.lab;
    let before = dumps(lab, &PLACES);
    let pid = lab.process(1, Daemon::Agent).unwrap().pid;

    let second = ambidex(lab, "agent --mode mixed");
    assert_eq!(second.code, 1, "{second:?}");
    assert!(
        second.stderr.contains(&format!("pid {pid}")) && second.stderr.contains("agent.lock"),
        "{second:?}"
    );
    assert!(
        lab.is_ready(1),
        "the second one has not taken the first one's sockets"
    );

    let agent = lab.process(1, Daemon::Agent).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    let refused = ambidex(lab, "undo --node");
    agent.signal(Signal::SIGCONT).unwrap();
    assert_eq!(refused.code, 1, "{refused:?}");
    for part in [
        format!("pid {pid}"),
        "agent.sock".to_owned(),
        "end it, then undo again".to_owned(),
    ] {
        assert!(refused.stderr.contains(&part), "{part}: {}", refused.stderr);
    }
    assert!(refused.took < Duration::from_secs(5));
    assert_same("refused undo", &before, &dumps(lab, &PLACES));

    // The socket of a dead agent is in nobody's way, and one pod can be undone without an agent, too.
    lab.kill(1, Daemon::Agent).unwrap();
    assert!(lab.run_dir(1).join("agent.sock").exists());
    ambidex(lab, "undo beta/pod1-2").with_code(0);
    let unknown = ambidex(lab, "undo beta/pod1-2");
    assert!(
        unknown.code == 1 && unknown.stderr.contains("no pod \"beta/pod1-2\""),
        "{unknown:?}"
    );
    start_agent(lab);
    assert_eq!(pods(lab).len(), 1);
    diff_is_empty(lab, "--node");
    Sandbox::of(lab, "pod1-2").add(lab);
    assert_same("as it was", &before, &dumps(lab, &PLACES));

    // Captures of a mode that the next agent does not have are not silently dropped.
    lab.kill(1, Daemon::Agent).unwrap();
    let other = ambidex(lab, "agent --mode inpod");
    assert!(
        other.code == 1
            && other.stderr.contains("alpha/pod1-1")
            && other.stderr.contains("--mode mixed"),
        "{other:?}"
    );
    assert_same("refused start", &before, &dumps(lab, &PLACES));
}

/// Pods stay captured while no agent runs; one that is deleted meanwhile is cleaned up by the next agent; a namespace that
/// came to the path of another is not touched.
#[test]
fn pods_are_known_after_a_restart() {
    let scene = own(&harness::spec(Mode::Mixed));
    let lab = &scene.lab;
    let empty = dumps(lab, &["node1", "proxy1"]);
    let gone: Vec<Sandbox> = [("gone1", 101), ("gone2", 102)]
        .map(|(name, last)| Sandbox::wired(lab, name, [10, 244, 1, last].into()))
        .to_vec();
    for sandbox in &gone {
        sandbox.add(lab);
    }
    let known = pods(lab);
    assert_eq!(known.len(), 4);
    lab.kill(1, Daemon::Agent).unwrap();
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-2")), scene.ip("pod1-1"));
    assert_eq!(scene.seen("pod2-1", scene.at("pod1-2")), scene.ip("pod2-1"));
    // The runtime can take a pod down without an agent.
    gone[0].del(lab);
    for sandbox in &gone {
        sandbox.destroy(lab);
    }
    // Something else is at that path.
    let stranger = gone[1].netns.file_name().unwrap().to_str().unwrap();
    Netns::create_named(stranger).unwrap();
    let untouched = harness::dump(&Netns::open(&gone[1].netns).unwrap());
    start_agent(lab);
    let rest = pods(lab);
    assert_eq!(rest.len(), 2);
    assert!(rest.iter().all(|pod| known.contains(pod)), "{rest:?}");
    assert_same("two pods gone", &empty, &dumps(lab, &["node1", "proxy1"]));
    assert_eq!(
        untouched,
        harness::dump(&Netns::open(&gone[1].netns).unwrap())
    );
    assert_eq!(scene.seen("pod1-2", scene.at("pod2-1")), scene.ip("pod1-2"));

    // A living agent does not follow a path to another namespace either.
    let moved = Sandbox::wired(lab, "moved2", [10, 244, 1, 103].into());
    moved.add(lab);
    moved.destroy(lab);
    Netns::create_named(moved.netns.file_name().unwrap().to_str().unwrap()).unwrap();
    let error = ambidex(lab, "diff gamma/moved2");
    assert!(
        error.code == 1 && error.stderr.contains("was enrolled with"),
        "{error:?}"
    );
    ambidex(lab, "undo gamma/moved2").with_code(0);
    assert_eq!(
        untouched,
        harness::dump(&Netns::open(&moved.netns).unwrap())
    );
    assert_same("moved", &empty, &dumps(lab, &["node1", "proxy1"]));
}

/// A proxy that comes back, in the same or in another namespace, is what the node's objects lead to.
#[rstest]
fn a_replaced_proxy_is_followed(#[values(Mode::Node, Mode::Mixed)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let before = dumps(lab, &PLACES);
    lab.kill(1, Daemon::Proxy).unwrap();
    lab.start(1, Daemon::Proxy).unwrap();
    eventually("the proxy is back", SOON, || lab.is_ready(1));
    assert_same("proxy replaced", &before, &dumps(lab, &PLACES));

    lab.kill(1, Daemon::Proxy).unwrap();
    let topology = lab.topology();
    let node = topology.node(1).unwrap();
    // The old namespace stays, under another name, as one does that a process still holds.
    let old = Netns::open(Netns::path_of(&node.proxy_netns)).unwrap();
    ip_batch(&node.netns, &format!("link delete {}\n", node.proxy_veth));
    Netns::delete_named(&node.proxy_netns).unwrap();
    let kept = old
        .run(|| Command::new("sleep").arg("60").spawn())
        .unwrap()
        .unwrap();
    let _kept = Ending(kept);
    Netns::create_named(&node.proxy_netns).unwrap();
    let attachment = Attachment {
        veth: &node.proxy_veth,
        netns: &node.proxy_netns,
        ip: node.proxy_ip,
        gateway: node.pod_gateway,
    };
    ip_batch(&node.netns, &attachment.node_side());
    ip_batch(&node.proxy_netns, &attachment.pod_side());
    assert_ne!(old.id(), lab.netns("proxy1").unwrap().id());
    lab.start(1, Daemon::Proxy).unwrap();
    eventually("the proxy is there", SOON, || lab.is_ready(1));
    diff_is_empty(lab, "--node");
    diff_is_empty(lab, "alpha/pod1-1");
    let place = dumps(lab, &["proxy1"]).remove(0).1;
    harness::assert_same_dump("the proxy's other namespace", &before[1].1, &place);
    let left = harness::dump(&old);
    for ours in ["TPROXY", "pistio", "20000:"] {
        assert!(
            !left.contains(ours),
            "{ours} is left in the old namespace:\n{left}"
        );
    }
    assert_eq!(scene.seen("pod1-1", scene.at("pod2-1")), scene.ip("pod1-1"));
    assert_eq!(scene.seen("pod2-2", scene.at("pod1-1")), scene.ip("pod2-2"));
}

/// Killed when it goes out of scope.
struct Ending(std::process::Child);

impl Drop for Ending {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A proxy that is not ours.
#[derive(Default)]
struct FieldProxy {
    refuses: AtomicBool,
    served: std::sync::Mutex<Vec<String>>,
}

impl WorkloadHandler for FieldProxy {
    async fn add(&self, add: Add) -> Result<(), String> {
        if self.refuses.load(Ordering::Relaxed) {
            return Err("no room".to_owned());
        }
        assert!(add.netns.is_some(), "the namespace comes with every pod");
        self.served.lock().unwrap().push(add.info.name);
        Ok(())
    }
    async fn del(&self, _uid: &str, _drain: Duration) {
        self.served.lock().unwrap().pop();
    }
    async fn snapshot_sent(&self) {}
    async fn configure_node(&self, _: NodeConfiguration) -> Result<(), String> {
        panic!("the extension was not offered")
    }
    fn connections(&self, _uid: &str) -> u64 {
        0
    }
    fn disconnected(&self) {}
}

/// Runs a field's proxy against the agent of node1 while `test` runs.
fn with_field_proxy(lab: &Lab, test: impl FnOnce(&FieldProxy)) {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let handler = Arc::new(FieldProxy::default());
    let options = ClientOptions {
        path: lab.run_dir(1).join("ztunnel.sock"),
        extension: false,
        own_netns: Netns::current().unwrap(),
        default_drain: Duration::ZERO,
    };
    let proxy = runtime.spawn(client::run(
        options,
        Arc::clone(&handler),
        std::future::pending(),
    ));
    test(&handler);
    proxy.abort();
}

/// The field's proxy, which does not know our extension, can serve in-pod captures and is told why it cannot serve others.
#[test]
fn the_fields_proxy_serves_pods_in_their_namespaces() {
    let scene = own(&harness::spec(Mode::Inpod));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    sandbox.del(lab);
    let before = dumps(lab, &PLACES);
    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the proxy is gone", SOON, || !lab.is_ready(1));
    with_field_proxy(lab, |proxy| {
        eventually("the agent takes it", SOON, || lab.is_ready(1));
        let served = || proxy.served.lock().unwrap().clone();
        assert_eq!(served(), ["pod1-1"], "the snapshot");
        sandbox.add(lab);
        assert_eq!(served(), ["pod1-1", "pod1-2"]);
        assert_ne!(before, dumps(lab, &PLACES));
        sandbox.del(lab);
        assert_eq!(served(), ["pod1-1"]);
        proxy.refuses.store(true, Ordering::Relaxed);
        let error = sandbox.call(lab, "ADD").cni_error();
        assert!(
            error["details"].as_str().unwrap().contains("no room"),
            "{error}"
        );
        assert_eq!(state_of(lab, &sandbox.uid), None);
        assert_same("refused", &before, &dumps(lab, &PLACES));
    });
}

#[test]
fn the_fields_proxy_is_told_why_it_cannot_serve_the_node_capture() {
    let scene = own(&harness::spec(Mode::Node));
    let lab = &scene.lab;
    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the proxy is gone", SOON, || !lab.is_ready(1));
    with_field_proxy(lab, |_| {
        let mut why = String::new();
        eventually("the agent says why", SOON, || {
            why = request(lab, "agent.sock", "GET /healthz", b"").1;
            why.contains("extension that node capture needs")
        });
        assert!(why.contains("--mode inpod"), "{why}");
        let log = std::fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
        assert!(log.contains("extension that node capture needs"), "{log}");
    });
    lab.start(1, Daemon::Proxy).unwrap();
    eventually("ours is taken", SOON, || lab.is_ready(1));
}

/// What the operator's commands print and how they end.
#[test]
fn the_command_line_keeps_its_promises() {
    let scene = own(&harness::spec(Mode::Mixed));
    let lab = &scene.lab;
    let table = ambidex(lab, "get pods").with_code(0);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(
        lines[0].split_whitespace().collect::<Vec<_>>(),
        ["NAMESPACE", "NAME", "MODE", "STATE", "IP"]
    );
    assert_eq!(
        lines[1].split_whitespace().collect::<Vec<_>>(),
        ["alpha", "pod1-1", "node", "captured", "10.244.1.10"]
    );
    assert_eq!(lines.len(), 3);
    let wide = ambidex(lab, "get pods -o wide").with_code(0);
    assert!(
        wide.contains("SERVICE ACCOUNT") && wide.contains("/run/netns/"),
        "{wide}"
    );
    let yaml = ambidex(lab, "get pods -o yaml").with_code(0);
    assert!(
        yaml.contains("name: pod1-1") && yaml.contains("mode: node"),
        "{yaml}"
    );
    assert_eq!(pods(lab)[1]["name"], "pod1-2");

    for (arguments, code, said) in [
        ("get pods -o xml", 2, "possible values"),
        ("plan", 2, "required"),
        ("diff --node alpha/pod1-1", 2, "cannot be used with"),
        ("plan nobody/nothing", 1, "no pod \"nobody/nothing\""),
        ("undo a%20b", 1, "is not the name of a pod"),
        ("dump --netns /etc/passwd", 1, "/etc/passwd"),
        ("agent --mode sideways", 2, "possible values"),
    ] {
        let done = ambidex(lab, arguments);
        assert_eq!(done.code, code, "{arguments}: {done:?}");
        assert!(done.stderr.contains(said), "{arguments}: {}", done.stderr);
        assert!(
            !done.stderr.contains('\u{1b}'),
            "{arguments}: colour without a terminal"
        );
    }
    let plan = ambidex(lab, "plan beta/pod1-2").with_code(0);
    let plan: Value = serde_json::from_str(&plan).unwrap();
    let places: Vec<&str> = plan
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|p| p["place"].as_str())
        .collect();
    assert_eq!(places, ["node", "pod beta/pod1-2"]);
    for subject in ["--node", "alpha/pod1-1", "beta/pod1-2", "pod1-2"] {
        diff_is_empty(lab, subject);
    }
    ip_batch(
        &lab.topology().node(1).unwrap().netns,
        "rule delete pref 101\n",
    );
    let differs = ambidex(lab, "diff --node").with_code(3);
    assert!(
        differs.starts_with("node: host-node: ")
            && differs.contains("101")
            && differs.ends_with("missing\n"),
        "{differs}"
    );

    // A reader that has seen enough.
    let mut child = Command::new(harness::ambidex())
        .args(["plan", "--node"])
        .envs(lab.environment(1))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let ended = child.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");

    // The logs of the daemons go to files here: no colour, and --help has none either.
    let help = ambidex(lab, "--help").with_code(0);
    assert!(!help.contains('\u{1b}'));
    lab.kill(1, Daemon::Agent).unwrap();
    let dead = ambidex(lab, "get pods");
    assert!(
        dead.code == 1 && dead.stderr.contains("is the agent of this node running?"),
        "{dead:?}"
    );
    for daemon in [Daemon::Agent, Daemon::Proxy] {
        let log = std::fs::read_to_string(lab.log_path(1, daemon)).unwrap();
        assert!(
            !log.contains('\u{1b}') && !log.contains("panicked"),
            "{log}"
        );
    }
}

/// The proxy's pages, and its end: by SIGTERM and by page, with and without patience.
#[rstest]
fn the_proxy_says_how_it_is_and_ends_when_asked(#[values("SIGTERM", "/quitquitquit")] how: &str) {
    let mut spec = harness::spec(Mode::Mixed);
    spec.proxy_args = ["--drain-seconds", "3"].map(str::to_owned).to_vec();
    let scene = own(&spec);
    let lab = &scene.lab;
    scene.check("pod2-1", scene.at("pod1-1"), Check::Who);
    scene.check("pod2-1", scene.at("pod1-2"), Check::Who);

    let dump: Value = serde_json::from_str(&scene.page(1, 15000, "/config_dump")).unwrap();
    assert!(dump["workloads"].as_array().unwrap().len() >= 4);
    let certificates = dump["certificates"].as_array().unwrap();
    let identity = scene.identity("pod1-1");
    let certificate = certificates
        .iter()
        .find(|c| c["identity"] == identity)
        .expect("its certificate");
    assert_eq!(certificate["state"], "Available");
    assert!(certificate["expirationTime"].as_u64() > certificate["validFrom"].as_u64());
    let state = &dump["workloadState"];
    for (pod, mode) in [("pod1-1", "node"), ("pod1-2", "inpod")] {
        let pod = scene.pod(pod);
        let state = &state[&pod.uid];
        assert_eq!(state["state"], "Up", "{dump}");
        assert_eq!(state["captureMode"], mode);
        assert_eq!(state["info"]["name"], pod.name);
        assert_eq!(state["info"]["serviceAccount"], pod.service_account);
    }
    for page in ["/metrics", "/stats/prometheus"] {
        assert_exposition(&scene.page(1, 15020, page));
    }
    assert!(
        scene.metric(
            1,
            "istio_tcp_connections_opened_total",
            &[("capture_mode", "inpod")]
        ) >= 1.0
    );

    // Not ready without its agent's snapshot.
    assert_eq!(readiness(&scene), "200");
    lab.kill(1, Daemon::Agent).unwrap();
    eventually("not ready without an agent", SOON, || {
        readiness(&scene) == "500"
    });
    start_agent(lab);
    eventually("ready again", SOON, || readiness(&scene) == "200");

    // A connection that does not end by itself is given three seconds, and no more.
    let long = Check::OneByteWrites {
        count: 2000,
        pause_ms: 20_000,
    };
    std::thread::scope(|scope| {
        let through = scope
            .spawn(|| scene.attempt("pod2-1", scene.at("pod1-2"), long, Duration::from_secs(15)));
        eventually("the connection is there", SOON, || {
            let dump: Value = serde_json::from_str(&scene.page(1, 15000, "/config_dump")).unwrap();
            dump["workloadState"][&scene.pod("pod1-2").uid]["connections"].as_u64() > Some(0)
        });
        let proxy = lab.process(1, Daemon::Proxy).unwrap();
        let started = Instant::now();
        if how == "SIGTERM" {
            proxy.signal(Signal::SIGTERM).unwrap();
        } else {
            let url = "http://127.0.0.1:15000/quitquitquit";
            let get = lab
                .run(
                    "proxy1",
                    &["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url],
                    SOON,
                )
                .unwrap();
            assert_eq!(get.stdout, "405", "only POST ends a proxy");
            lab.run("proxy1", &["curl", "-sf", "-X", "POST", url], SOON)
                .unwrap()
                .success(url)
                .unwrap();
        }
        std::thread::sleep(Duration::from_millis(800));
        assert!(proxy.is_alive(), "it drains");
        let refused = scene.attempt(
            "pod2-2",
            scene.at("pod1-2"),
            Check::Who,
            Duration::from_secs(2),
        );
        assert!(!refused.ok, "nothing is taken on any more: {refused:?}");
        assert!(proxy.wait_gone(Duration::from_secs(8)));
        let took = started.elapsed();
        assert!((2500..7000).contains(&took.as_millis()), "{took:?}");
        assert!(!through.join().unwrap().ok, "it was cut");
    });
    let log = scene.proxy_log(1);
    assert!(log.contains("draining") && log.contains("drained"), "{log}");
}

/// Status of the readiness page of node1's proxy.
fn readiness(scene: &Stage) -> String {
    let url = "http://127.0.0.1:15021/healthz/ready";
    let curl = ["curl", "-s", "-o", "/dev/null", "-w", "%{http_code}", url];
    scene.lab.run("proxy1", &curl, SOON).unwrap().stdout
}

/// The text format of metrics: every sample has a family with help and type, a name, paired labels and a number; every
/// series occurs once; counters end in `_total`.
fn assert_exposition(page: &str) {
    let name = |text: &str| {
        text.chars()
            .all(|c| c.is_ascii_alphanumeric() || c == '_' || c == ':')
            && text.starts_with(|c: char| !c.is_ascii_digit())
    };
    let mut families = std::collections::BTreeMap::new();
    let mut series = std::collections::BTreeSet::new();
    let mut ended = false;
    for line in page.lines() {
        assert!(!ended, "something after the end: {line}");
        if line == "# EOF" {
            ended = true;
        } else if let Some(text) = line.strip_prefix("# TYPE ") {
            let (family, kind) = text.split_once(' ').expect("a type");
            assert!(name(family), "{line}");
            assert!(
                ["counter", "gauge", "histogram", "info", "unknown"].contains(&kind),
                "{line}"
            );
            assert!(
                families
                    .insert(family.to_owned(), kind.to_owned())
                    .is_none(),
                "twice: {line}"
            );
        } else if !line.starts_with('#') {
            let (left, value) = line.rsplit_once(' ').expect("a value");
            value.parse::<f64>().expect("a number");
            assert!(series.insert(left.to_owned()), "twice: {line}");
            let (metric, labels) = left.split_once('{').unwrap_or((left, "}"));
            assert!(name(metric), "{line}");
            let family = families.iter().find(|(family, _)| {
                metric.strip_prefix(family.as_str()).is_some_and(|suffix| {
                    [
                        "", "_total", "_bucket", "_sum", "_count", "_info", "_created",
                    ]
                    .contains(&suffix)
                })
            });
            let (_, kind) = family.unwrap_or_else(|| panic!("no family of {line}"));
            assert!(kind != "counter" || metric.ends_with("_total"), "{line}");
            let labels = labels.strip_suffix('}').expect("closed labels");
            for label in labels.split("\",").filter(|label| !label.is_empty()) {
                let (key, value) = label.split_once("=\"").expect("a quoted value");
                assert!(
                    name(key) && !value.trim_end_matches('"').contains('\n'),
                    "{line}"
                );
            }
        }
    }
    assert!(
        series.len() > 15 && families.contains_key("istio_tcp_connections_opened"),
        "{} series in {page}",
        series.len()
    );
}

/// An agent that is replaced while nothing happens changes nothing at all.
#[test]
fn replacing_an_idle_agent_changes_nothing() {
    let scene = own(&harness::spec(Mode::Mixed));
    let lab = &scene.lab;
    let before = dumps(lab, &["node1", "proxy1", "pod1-1", "pod1-2", "plain1"]);
    replace_agent(lab);
    let targets = ["node1", "proxy1", "pod1-1", "pod1-2", "plain1"];
    assert_same("an idle agent", &before, &dumps(lab, &targets));
    lab.restart(1, Daemon::Agent).unwrap();
    assert_same("an agent that was asked", &before, &dumps(lab, &targets));
}
