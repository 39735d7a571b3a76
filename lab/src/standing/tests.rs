#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::*;
use crate::topology::{APPLICATION_PORT, Mode, OUTSIDE, Programs, SERVICE_PORT, SERVICE_VIP};
use crate::traffic::{self, Check, ClientOptions, Outcome, ServerOptions};

/// Removes a lab by name, also if the test never got hold of it.
struct Cleanup(String);

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Err(error) = down(&self.0) {
            eprintln!("{error:#}");
        }
    }
}

fn quiet(line: &str) {
    eprintln!("{line}");
}

fn spec(mode: Mode, programs: Programs) -> (LabSpec, Cleanup) {
    let name = LabSpec::unique_name();
    (LabSpec::new(name.clone(), mode, programs), Cleanup(name))
}

fn no_programs() -> Programs {
    Programs::beside(Path::new("/nonexistent/ambidex"))
}

/// What of a lab of this name is on the machine, and what no lab may touch.
fn traces(lab: &str) -> Vec<String> {
    let mut traces = existing_netns(lab).unwrap();
    traces.extend(lab_dir(lab).exists().then(|| "directory".to_owned()));
    traces.extend(
        Path::new(LABS_DIR)
            .join(format!(".{lab}.lock"))
            .exists()
            .then(|| "lock".to_owned()),
    );
    traces.extend(cgroup::exist(lab).then(|| "control group".to_owned()));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let here = runtime
        .block_on(host_net::dump::dump(&Netns::current().unwrap()))
        .unwrap();
    traces.push(here.to_string());
    traces
}

/// The traffic server in a target, on a thread of this process; it ends with the test process.
fn serve(lab: &Lab, target: &str, port: u16) {
    let netns = lab.netns(target).unwrap();
    let (ready, up) = mpsc::channel();
    thread::spawn(move || {
        let options = ServerOptions {
            listen: (Ipv4Addr::UNSPECIFIED, port).into(),
            timeout_ms: 20_000,
        };
        netns
            .run(|| traffic::serve(&options, |_| Ok(ready.send(())?)))
            .unwrap()
            .unwrap();
    });
    up.recv_timeout(Duration::from_secs(10)).unwrap();
}

fn check(lab: &Lab, from: &str, to: impl Into<SocketAddr>, check: Check) -> Outcome {
    let options = ClientOptions {
        to: to.into(),
        timeout_ms: 10_000,
        from_port: None,
        check,
    };
    lab.netns(from)
        .unwrap()
        .run(|| traffic::check(&options))
        .unwrap()
        .unwrap()
}

fn pod_ip(lab: &Lab, pod: &str) -> IpAddr {
    lab.topology().pod(pod).unwrap().1.ip.into()
}

/// Who the server at `to` says that `from` is.
fn seen(lab: &Lab, from: &str, to: impl Into<SocketAddr>) -> IpAddr {
    let outcome = check(lab, from, to, Check::Who);
    assert!(outcome.ok, "{from}: {outcome:?}");
    outcome.seen.unwrap().ip()
}

#[test]
fn lab_without_capture_carries_all_kinds_of_traffic_and_leaves_no_trace() {
    let (spec, _cleanup) = spec(Mode::None, no_programs());
    let before = traces(&spec.name);
    let lab = up(&spec, &quiet).unwrap();
    for target in ["pod1-1", "pod1-2", "pod2-1", "pod2-2", "plain1", "plain2"] {
        serve(&lab, target, APPLICATION_PORT);
    }
    serve(&lab, "out", APPLICATION_PORT);
    let at = |pod: &str| SocketAddr::from((pod_ip(&lab, pod), APPLICATION_PORT));

    let pods = ["pod1-1", "pod1-2", "pod2-1", "plain1"];
    for from in pods {
        for to in pods {
            assert_eq!(
                seen(&lab, from, at(to)),
                pod_ip(&lab, from),
                "{from} to {to}"
            );
        }
    }
    let topology = lab.topology();
    let [node1, node2] = &topology.nodes[..] else {
        panic!("two nodes")
    };
    assert_eq!(
        seen(&lab, "node1", at("pod1-1")),
        node1.pod_gateway,
        "probe from the pod's own node"
    );
    assert_eq!(
        seen(&lab, "node2", at("pod1-1")),
        node2.address,
        "from the other node"
    );
    assert_eq!(
        seen(&lab, "proxy1", at("pod2-1")),
        node1.proxy_ip,
        "from the proxy's namespace"
    );
    let outside = (OUTSIDE, APPLICATION_PORT);
    assert_eq!(
        seen(&lab, "pod1-1", outside),
        node1.outside_address,
        "masqueraded on the way out"
    );
    assert_eq!(
        seen(&lab, "pod2-1", outside),
        node2.outside_address,
        "masqueraded on the way out"
    );

    let service = (SERVICE_VIP, SERVICE_PORT);
    for from in ["pod1-1", "pod2-2", "plain2", "node1"] {
        let outcome = check(
            &lab,
            from,
            service,
            Check::Exchange {
                up: 100_000,
                down: 100_000,
            },
        );
        assert!(outcome.ok, "{from}: {outcome:?}");
    }
    // An endpoint that reaches itself through the service is masqueraded, else it would answer itself directly.
    let own: Vec<IpAddr> = (0..12).map(|_| seen(&lab, "pod1-2", service)).collect();
    assert!(
        own.contains(&node1.pod_gateway.into()) && own.contains(&pod_ip(&lab, "pod1-2")),
        "both endpoints: {own:?}"
    );

    let everything = check(
        &lab,
        "pod1-1",
        at("pod2-2"),
        Check::Storm { connections: 50 },
    );
    assert!(everything.ok, "{everything:?}");
    lab.down().unwrap();
    assert_eq!(traces(&spec.name), before);
}

#[test]
fn pods_that_come_later_are_pods_like_the_others_and_go_with_the_lab() {
    let (spec, _cleanup) = spec(Mode::None, no_programs());
    let before = traces(&spec.name);
    let lab = up(&spec, &quiet).unwrap();
    assert_eq!(lab.create_pods(1, 2).unwrap(), ["pod1-3", "pod1-4"]);
    let last = lab.create_pods(2, 20).unwrap().pop().unwrap();
    assert_eq!(last, "pod2-22");
    serve(&lab, &last, APPLICATION_PORT);
    let to = SocketAddr::new(pod_ip(&lab, &last), APPLICATION_PORT);
    assert_eq!(seen(&lab, "pod1-4", to), pod_ip(&lab, "pod1-4"));
    assert_eq!(lab.status().first_broken(), None);
    let state = fs::read_to_string(lab.workloads_path()).unwrap();
    assert!(state.contains("10.244.2.31"), "{state}");
    // Another process finds them, and there is an end to addresses.
    let again = Lab::open(&spec.name).unwrap();
    assert_eq!(again.topology().node(2).unwrap().pods.len(), 23);
    let error = again.create_pods(2, 219).unwrap_err().to_string();
    assert!(error.contains("at most 240"), "{error}");
    lab.destroy_pod(&last).unwrap();
    lab.create_pod(&last).unwrap();
    // They can go before it does, without a trace but for the others.
    lab.remove_created_pods(2).unwrap();
    lab.remove_created_pods(2).unwrap();
    assert_eq!(lab.topology().node(2).unwrap().pods.len(), 3);
    let state = fs::read_to_string(lab.workloads_path()).unwrap();
    assert!(!state.contains("10.244.2.31") && state.contains("10.244.1.13"));
    assert_eq!(lab.create_pods(2, 1).unwrap(), ["pod2-3"]);
    assert_eq!(lab.status().first_broken(), None);
    lab.down().unwrap();
    assert_eq!(traces(&spec.name), before);
}

#[test]
fn up_again_finds_the_same_lab_and_refuses_another_one() {
    let (mut spec, _cleanup) = spec(Mode::None, no_programs());
    let first = up(&spec, &quiet).unwrap();
    let pid = |lab: &Lab| lab.lock().record.processes["pause pod1-1"];
    let again = up(&spec, &quiet).unwrap();
    assert_eq!(pid(&first), pid(&again));
    assert!(list().unwrap().contains(&spec.name));
    spec.pods_per_node = 3;
    let error = up(&spec, &quiet).unwrap_err().to_string();
    assert!(error.contains("other settings"), "{error}");
    spec.pods_per_node = 2;
    pid(&first).signal(Signal::SIGKILL).unwrap();
    assert!(pid(&first).wait_gone(Duration::from_secs(5)));
    let error = up(&spec, &quiet).unwrap_err().to_string();
    assert!(error.contains("pod1-1 does not exist"), "{error}");
    first.down().unwrap();
    assert!(
        Lab::open(&spec.name)
            .unwrap_err()
            .to_string()
            .contains("there is no lab")
    );
    down(&spec.name).unwrap();
}

#[test]
fn remains_of_a_killed_builder_are_removed_without_its_record() {
    let (spec, _cleanup) = spec(Mode::None, no_programs());
    let before = traces(&spec.name);
    let lab = up(&spec, &quiet).unwrap();
    let pauses: Vec<Process> = lab.lock().record.processes.values().copied().collect();
    assert_eq!(pauses.len(), 6);
    fs::remove_file(lab.dir().join("lab.json")).unwrap();
    // What `ip netns add` leaves when it is killed between making the file and mounting the namespace on it.
    fs::write(
        Netns::path_of(&format!("{}pod9-9", netns_prefix(&spec.name))),
        "",
    )
    .unwrap();
    let error = Lab::open(&spec.name).unwrap_err().to_string();
    assert!(error.contains("not complete"), "{error}");
    down(&spec.name).unwrap();
    assert_eq!(traces(&spec.name), before);
    assert!(pauses.iter().all(|pause| !pause.is_alive()));
    // A builder finds the same and makes room for itself.
    up(&spec, &quiet).unwrap();
    fs::remove_file(lab.dir().join("lab.json")).unwrap();
    let rebuilt = up(&spec, &quiet).unwrap();
    assert_eq!(rebuilt.status().first_broken(), None);
}

#[test]
fn two_builders_of_one_name_do_not_meet() {
    let (spec, _cleanup) = spec(Mode::None, no_programs());
    let lock = Lock::take(&spec.name).unwrap();
    let error = up(&spec, &quiet).unwrap_err().to_string();
    assert!(error.contains("by another process"), "{error}");
    drop(lock);
    assert!(
        !Path::new(LABS_DIR)
            .join(format!(".{}.lock", spec.name))
            .exists()
    );
}

#[test]
fn pods_carry_their_uid_in_their_control_group_and_get_another_one_when_created_anew() {
    let (spec, _cleanup) = spec(Mode::None, no_programs());
    let lab = up(&spec, &quiet).unwrap();
    let group_of_pause = || {
        let pause = lab.lock().record.processes["pause pod2-1"];
        fs::read_to_string(format!("/proc/{}/cgroup", pause.pid)).unwrap()
    };
    let uid = |lab: &Lab| lab.topology().pod("pod2-1").unwrap().1.uid.clone();
    let first = uid(&lab);
    assert!(
        group_of_pause().contains(&format!("/pod{first}/")),
        "{}",
        group_of_pause()
    );
    lab.destroy_pod("pod2-1").unwrap();
    assert!(lab.netns("pod2-1").is_err());
    lab.create_pod("pod2-1").unwrap();
    assert_ne!(uid(&lab), first);
    assert_eq!(
        uid(&lab),
        uid(&Lab::open(&spec.name).unwrap()),
        "the same from the record"
    );
    assert!(group_of_pause().contains(&format!("/pod{}/", uid(&lab))));
    serve(&lab, "pod2-1", APPLICATION_PORT);
    let to = (pod_ip(&lab, "pod2-1"), APPLICATION_PORT);
    assert_eq!(seen(&lab, "pod1-1", to), pod_ip(&lab, "pod1-1"));
}

#[test]
fn exec_gives_the_exit_code_and_the_environment_of_the_target() {
    let (spec, _cleanup) = spec(Mode::None, no_programs());
    let lab = up(&spec, &quiet).unwrap();
    let script = |script: &str| ["sh", "-c", script].map(str::to_owned);
    assert_eq!(exec(&spec.name, "pod1-2", &script("exit 7")).unwrap(), 7);
    assert_eq!(exec(&spec.name, "out", &script("kill -9 $$")).unwrap(), 137);
    let wanted = format!(
        "test $AMBIDEX_RUN_DIR:$AMBIDEX_LAB = {}:{}",
        lab.run_dir(2).display(),
        spec.name
    );
    assert_eq!(exec(&spec.name, "proxy2", &script(&wanted)).unwrap(), 0);
    let found = lab
        .run(
            "node2",
            &["ip", "-brief", "address", "show", "eth0"],
            Duration::from_secs(5),
        )
        .unwrap();
    assert!(found.stdout.contains("172.30.0.2/24"), "{found:?}");
    let error = exec(&spec.name, "pod3-1", &script("true"))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("want one of node1, proxy1, pod1-1"),
        "{error}"
    );
}

/// Programs that do no more than a lab can see of the real ones, to drive what the lab does with them: an agent that
/// answers on its socket, a proxy that waits, a plugin that passes its result on and writes down how it was called.
fn playacting_programs(dir: &Path) -> Programs {
    let ambidex = "#!/bin/sh
[ $1 = answer ] || echo \"started $*\"
case $1 in
agent) exec socat UNIX-LISTEN:$AMBIDEX_RUN_DIR/agent.sock,fork,unlink-early EXEC:\"$0 answer\" ;;
answer) while read -r line; do [ ${#line} -gt 1 ] || break; done
       printf 'HTTP/1.1 200 OK\\r\\n\\r\\nok' ;;
proxy) [ -z \"$BREAK_PROXY\" ] || { echo cannot start; exit 1; }
       trap 'exit 0' TERM; while :; do sleep 0.05; done ;;
esac
";
    let plugin = "#!/bin/sh
env | grep ^CNI_ | sort >> $0.calls
sed 's/.*\"prevResult\"://; s/}$//'
";
    let programs = Programs::beside(&dir.join("ambidex"));
    for (path, text) in [
        (&programs.ambidex, ambidex),
        (&programs.ambidex_cni, plugin),
    ] {
        script(path, text);
    }
    programs
}

/// Written by another process: what this one has open for writing, a process that another test starts at that moment inherits
/// for an instant, and then the script is busy and cannot be run.
fn script(path: &Path, text: &str) {
    let mut install = Command::new("install")
        .args(["-m", "755", "/dev/stdin"])
        .arg(path)
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    std::io::Write::write_all(&mut install.stdin.take().unwrap(), text.as_bytes()).unwrap();
    assert!(install.wait().unwrap().success());
}

#[test]
fn daemons_run_apart_and_can_be_killed_and_started_again() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spec, _cleanup) = spec(Mode::Node, playacting_programs(dir.path()));
    spec.agent_args = vec!["--extra".to_owned()];
    let before = traces(&spec.name);
    let lab = up(&spec, &quiet).unwrap();
    let status = lab.status();
    assert_eq!(status.first_broken(), None, "{status}");

    let log = fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
    let flags = "--mode node --node-flow hybrid --inpod-rules redirect --overlay auto --same-node hbone --verify-every 0s --extra";
    assert!(log.contains(&format!("started agent {flags}")), "{log}");

    let calls = fs::read_to_string(dir.path().join("ambidex-cni.calls")).unwrap();
    assert_eq!(calls.matches("CNI_COMMAND=ADD").count(), 4, "{calls}");
    let topology = lab.topology();
    let uid = &topology.pod("pod1-1").unwrap().1.uid;
    assert!(
        calls.contains("K8S_POD_NAME=pod1-1;") && calls.contains(&format!("K8S_POD_UID={uid};")),
        "{calls}"
    );
    assert!(!calls.contains("plain"), "{calls}");

    let pids = lab.pids();
    assert_eq!(
        pids.keys().collect::<Vec<_>>(),
        ["agent1", "agent2", "proxy1", "proxy2"]
    );
    let namespace = |pid: i32, kind: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let own = i32::try_from(std::process::id()).unwrap();
    if lab.spec().isolate {
        for kind in ["pid", "mnt"] {
            assert_ne!(
                namespace(pids["agent1"], kind),
                namespace(pids["proxy1"], kind)
            );
            assert_ne!(namespace(pids["agent1"], kind), namespace(own, kind));
        }
    }
    let netns_of = |pid: i32| Netns::open(format!("/proc/{pid}/ns/net")).unwrap().id();
    assert_eq!(netns_of(pids["agent1"]), lab.netns("node1").unwrap().id());
    assert_eq!(netns_of(pids["proxy2"]), lab.netns("proxy2").unwrap().id());

    lab.kill(1, Daemon::Proxy).unwrap();
    assert!(lab.process(1, Daemon::Proxy).is_none());
    lab.start(1, Daemon::Proxy).unwrap();
    assert!(lab.start(1, Daemon::Proxy).is_err());
    let first = lab.pids()["proxy1"];
    lab.restart(1, Daemon::Proxy).unwrap();
    assert_ne!(lab.pids()["proxy1"], first);

    // Seen from another process of the same lab, and from one pod after its deletion.
    let other = Lab::open(&spec.name).unwrap();
    assert_eq!(other.pids(), lab.pids());
    let netns = &topology.pod("pod1-2").unwrap().1.netns;
    let agent_sees_it = || {
        fs::read_to_string(format!("/proc/{}/mounts", pids["agent1"]))
            .unwrap()
            .contains(netns)
    };
    assert!(agent_sees_it());
    other.destroy_pod("pod1-2").unwrap();
    assert!(
        !agent_sees_it(),
        "the agent's mount namespace keeps the pod's namespace alive"
    );
    other.create_pod("pod1-2").unwrap();
    assert!(
        agent_sees_it(),
        "an agent must see pods that are younger than itself"
    );
    let calls = fs::read_to_string(dir.path().join("ambidex-cni.calls")).unwrap();
    assert_eq!(calls.matches("CNI_COMMAND=DEL").count(), 1, "{calls}");
    let all: Vec<Process> = lab
        .pids()
        .values()
        .filter_map(|pid| Process::of_pid(*pid))
        .collect();
    lab.down().unwrap();
    assert!(all.iter().all(|process| !process.is_alive()));
    assert_eq!(traces(&spec.name), before);
}

#[test]
fn a_daemon_that_ends_at_start_fails_the_build_with_its_log_and_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (mut spec, _cleanup) = spec(Mode::Inpod, playacting_programs(dir.path()));
    spec.daemon_env
        .insert("BREAK_PROXY".to_owned(), "1".to_owned());
    let before = traces(&spec.name);
    let mut programs_gone = spec.clone();
    // The agent of these programs is ready without a proxy, so it is kept from it.
    script(
        &dir.path().join("silent"),
        "#!/bin/sh\n[ $1 = agent ] && exec sleep 60\necho cannot start; exit 1\n",
    );
    spec.programs.ambidex = dir.path().join("silent");
    let error = format!("{:#}", up(&spec, &quiet).unwrap_err());
    assert!(
        error.contains("proxy1 does not run") && error.contains("cannot start"),
        "{error}"
    );
    assert_eq!(traces(&spec.name), before);
    programs_gone.programs = no_programs();
    let error = format!("{:#}", up(&programs_gone, &quiet).unwrap_err());
    assert!(
        error.contains("/nonexistent/ambidex, which the lab runs"),
        "{error}"
    );
    assert_eq!(traces(&spec.name), before);
}
