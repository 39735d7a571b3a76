//! The agent and the command line when things go wrong around them.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::process::{Command, Stdio};
use std::time::Duration;

use harness::{eventually, own};
use host_net::netns::Netns;
use lab::standing::{self, Daemon};
use lab::topology::{LabSpec, Mode};
use nix::sys::signal::Signal;
use rstest::rstest;
use runtime::{
    Sandbox, ambidex, assert_same, diff_is_empty, dumps, ip_batch, pods, replace_agent, request,
    start_agent, state_of,
};
use serde_json::{Value, json};

const PLACES: [&str; 3] = ["node1", "proxy1", "pod1-2"];

/// Moments at which something is killed: most within the first 100 ms, which is what it takes; more of them, and closer, in
/// the full suite.
fn moments() -> impl Iterator<Item = Duration> {
    let full = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    let (count, step) = if full { (40, 3) } else { (10, 12) };
    (0..count).map(move |i| Duration::from_millis(i * step))
}

/// A lab whose agent has no pid namespace of its own: what it started when it is killed outlives it for a moment.
fn spec_of_orphans(mode: Mode) -> LabSpec {
    let mut spec = harness::spec(mode);
    spec.isolate = false;
    spec
}

/// The agent is killed while it enrols or unenrols a pod: another one ends in one of the two states that there are
/// without the kill, and it is the captured one if the runtime was told so.
#[rstest]
fn killed_in_the_middle_of_a_pod(
    #[values(Mode::Node, Mode::Inpod)] mode: Mode,
    #[values("ADD", "DEL")] verb: &str,
) {
    let scene = own(&spec_of_orphans(mode));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    let captured = dumps(lab, &PLACES);
    sandbox.del(lab);
    let uncaptured = dumps(lab, &PLACES);
    let mut ends = [0, 0];
    for moment in moments() {
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
    let mut spec = spec_of_orphans(Mode::None);
    let name = spec.name.clone();
    let without = standing::up(&spec, &|_| {}).unwrap().scoped();
    let before = dumps(&without, &PLACES);
    without.down().unwrap();
    spec = spec_of_orphans(mode);
    spec.name = name;
    let scene = own(&spec);
    let lab = &scene.lab;
    for (round, moment) in moments().enumerate() {
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
    let asked = ambidex(lab, "get pods");
    agent.signal(Signal::SIGCONT).unwrap();
    assert_eq!(refused.code, 1, "{refused:?}");
    for part in [
        format!("pid {pid}"),
        "agent.sock: no answer".to_owned(),
        "end it, then undo again".to_owned(),
    ] {
        assert!(refused.stderr.contains(&part), "{part}: {}", refused.stderr);
    }
    assert!(
        asked.code == 4 && asked.stderr.contains("no answer within 10s"),
        "{asked:?}"
    );
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

/// Health, metrics, and the plugin's failures in the agent's log.
#[test]
fn the_agent_says_how_it_is() {
    let scene = own(&harness::spec(Mode::Inpod));
    let lab = &scene.lab;
    let page = |port: u16, path: &str| {
        let url = format!("http://127.0.0.1:{port}{path}");
        let curl = [
            "curl",
            "--silent",
            "--max-time",
            "10",
            "-w",
            "%{http_code}",
            &url,
        ];
        lab.run("node1", &curl, Duration::from_secs(15))
            .unwrap()
            .stdout
    };
    assert_eq!(page(8000, "/healthz"), "ok\n200");
    assert_eq!(page(8000, "/readyz"), "ready\n200");
    let metrics = page(15014, "/metrics");
    for line in [
        "istio_cni_plugin_requests_total{response_code=\"200\"} 2",
        "ztunnel_connected 1",
        "ambidex_agent_pods{capture_mode=\"inpod\",state=\"captured\"} 2",
    ] {
        assert!(metrics.lines().any(|l| l == line), "{line}: {metrics}");
    }
    let sandbox = Sandbox::of(lab, "pod1-2");
    let mut config = sandbox.config(lab);
    config["prevResult"]["ips"][0]["address"] = json!("10.244.1.99/32");
    sandbox.del(lab);
    sandbox
        .call_with("ADD", config.to_string().as_bytes())
        .cni_error();
    eventually("it is in the log", Duration::from_secs(10), || {
        let log = std::fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
        let mut lines = log
            .lines()
            .filter(|line| line.contains(r#""target":"cni""#));
        lines.any(|line| line.contains(&format!("ADD of {}", sandbox.container_id)))
    });
    lab.kill(1, Daemon::Proxy).unwrap();
    eventually("the metrics say so", Duration::from_secs(10), || {
        let metrics = page(15014, "/metrics");
        metrics.contains("ztunnel_connected 0") && metrics.contains("response_code=\"400\"} 1")
    });
    ambidex(lab, "undo --node").with_code(0);
    assert!(page(8000, "/readyz").ends_with("503"));
}

/// An event of a plugin that knows more than this agent, or less, and what the agent makes of it.
#[rstest]
fn plugins_of_other_versions_are_understood(#[values(Mode::Node, Mode::Inpod)] mode: Mode) {
    let scene = own(&harness::spec(mode));
    let lab = &scene.lab;
    let sandbox = Sandbox::of(lab, "pod1-2");
    let captured = dumps(lab, &PLACES);
    sandbox.del(lab);
    let empty = dumps(lab, &PLACES);
    let mut later = sandbox.event();
    later["Sandbox"] = json!({"Class": "kata"});
    later["IPs"][0]["Zone"] = json!("eth0");
    later["IPs"][0]["Address"]["Scope"] = json!(7);
    let mut earlier = sandbox.event();
    for key in ["ServiceAccount", "ContainerID", "Network", "IfName"] {
        earlier.as_object_mut().unwrap().remove(key);
    }
    for event in [later, earlier] {
        let body = event.to_string();
        let (status, text) = request(lab, "pluginevent.sock", "POST /cmdadd", body.as_bytes());
        assert_eq!((status, text.as_str()), (200, ""), "{event}");
        assert_same("of another version", &captured, &dumps(lab, &PLACES));
        let (status, text) = request(lab, "pluginevent.sock", "POST /cmddel", body.as_bytes());
        assert_eq!((status, text.as_str()), (200, ""), "{event}");
        assert_same("deleted", &empty, &dumps(lab, &PLACES));
    }
}
