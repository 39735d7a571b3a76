//! What the command line promises, through the command line: kernel objects, exit codes, output.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;

use std::collections::BTreeSet;
use std::process::Command;

use harness::guardian::Guardian;
use harness::{ambidex, assert_same_dump, dump};
use host_net::netns::Netns;
use lab::standing;
use lab::topology::{LabSpec, netns_prefix};
use rstest::rstest;
use serde_json::Value;

/// Exit code and both outputs of a command.
struct Done {
    code: i32,
    stdout: String,
    stderr: String,
}

impl Done {
    fn of(command: &mut Command) -> Self {
        let output = command.output().expect("the program starts");
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Standard output, if the exit code is `code`.
    fn with_code(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}

fn cli(arguments: &[&str]) -> Done {
    Done::of(Command::new(ambidex()).args(arguments))
}

/// A lab built and removed by the command line. Its agents mend nothing: the tests take things away and look.
struct CommandLineLab {
    name: String,
    guardian: Guardian,
}

impl CommandLineLab {
    fn up(flags: &[&str]) -> Self {
        Self::named(LabSpec::unique_name(), flags)
    }

    fn named(name: String, flags: &[&str]) -> Self {
        let guardian = Guardian::of(&name);
        let lab = Self { name, guardian };
        let up = ["lab", "up", "--no-mend", "--name", &lab.name];
        cli(&[&up, flags].concat()).with_code(0);
        lab
    }

    fn exec(&self, target: &str, argv: &[&str]) -> Done {
        cli(&[&["lab", "exec", "--name", &self.name, target, "--"], argv].concat())
    }

    /// Runs a command that must succeed.
    fn run(&self, target: &str, argv: &str) -> String {
        self.exec(target, &argv.split(' ').collect::<Vec<_>>())
            .with_code(0)
    }

    /// `ambidex` on a target.
    fn ambidex(&self, target: &str, arguments: &str) -> Done {
        let argv: Vec<&str> = std::iter::once(ambidex())
            .chain(arguments.split(' '))
            .collect();
        self.exec(target, &argv)
    }

    fn dump(&self, target: &str) -> String {
        dump(
            &Netns::open(Netns::path_of(&format!(
                "{}{target}",
                netns_prefix(&self.name)
            )))
            .unwrap(),
        )
    }

    fn pods(&self, node: &str) -> Vec<Value> {
        let json = self.ambidex(node, "get pods -o json").with_code(0);
        serde_json::from_str(&json).unwrap()
    }
}

impl Drop for CommandLineLab {
    fn drop(&mut self) {
        self.guardian.dismiss();
        let down = cli(&["lab", "down", "--name", &self.name]);
        if !std::thread::panicking() {
            down.with_code(0);
            assert!(!standing::list().unwrap().contains(&self.name));
        }
    }
}

#[track_caller]
fn contains(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "no {part:?} in:\n{text}");
    }
}

/// What `get pods` says about the addresses of pods with this mode.
fn addresses(pods: &[Value], mode: &str) -> BTreeSet<String> {
    let of_mode = pods.iter().filter(|pod| pod["mode"] == mode);
    of_mode
        .flat_map(|pod| pod["addresses"].as_array().unwrap())
        .map(|address| address.as_str().unwrap().to_owned())
        .collect()
}

fn set_members(lab: &CommandLineLab, node: &str, set: &str) -> BTreeSet<String> {
    let listing = lab.run(node, &format!("ipset list {set}"));
    let (_, members) = listing.split_once("Members:\n").expect("a list of members");
    members
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

#[test]
fn node_mode_has_the_objects_of_the_articles() {
    let lab = CommandLineLab::up(&["--mode", "node"]);
    let rules = lab.run("node1", "ip rule");
    contains(
        &rules,
        &[
            "\n100:\tfrom all fwmark 0x200/0x200 goto 32766",
            "\n101:\tfrom all fwmark 0x100/0x100 lookup 101",
            "\n102:\tfrom all fwmark 0x40/0x40 lookup 102",
            "\n103:\tfrom all lookup 100",
        ],
    );
    let outbound = lab.run("node1", "ip route show table 101");
    contains(&outbound, &["default via 192.168.127.2 dev istioout"]);
    let inbound = lab.run("node1", "ip route show table 100");
    let pods = lab.pods("node1");
    let captured = addresses(&pods, "node");
    assert_eq!(
        captured,
        BTreeSet::from(["10.244.1.10".to_owned(), "10.244.1.11".to_owned()])
    );
    for address in &captured {
        let route = format!("{address} via 192.168.126.2 dev istioin ");
        let route = inbound.lines().find(|line| line.starts_with(&route));
        let route = route.unwrap_or_else(|| panic!("no route to {address}:\n{inbound}"));
        contains(route, &["src 10.244.1.1"]);
    }
    assert_eq!(set_members(&lab, "node1", "ztunnel-pods-ips"), captured);
    let mangle = lab.run("proxy1", "iptables-save -t mangle");
    contains(
        &mangle,
        &[
            "-i pistioin -p tcp -m tcp --dport 15008 -j TPROXY --on-port 15008 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
            "-i pistioout -p tcp -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
            "-i pistioin -p tcp -j TPROXY --on-port 15006 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff",
        ],
    );
    assert!(
        !lab.run("pod1-1", "iptables-save").contains("ISTIO"),
        "nothing is written into a pod"
    );
}

#[test]
fn inpod_mode_has_listeners_and_rules_in_the_pod() {
    let lab = CommandLineLab::up(&["--mode", "inpod"]);
    let sockets = lab.run("pod1-1", "ss -ntl");
    for port in [15001, 15006, 15008] {
        let found = sockets
            .lines()
            .any(|line| line.contains(&format!(":{port} ")));
        assert!(found, "nothing listens on {port}:\n{sockets}");
    }
    let rules = lab.run("pod1-1", "iptables-save");
    contains(
        &rules,
        &[
            ":ISTIO_PRERT -",
            ":ISTIO_OUTPUT -",
            "-A PREROUTING -j ISTIO_PRERT",
            "-A OUTPUT -j ISTIO_OUTPUT",
        ],
    );
    contains(&rules, &["--to-ports 15001", "--to-ports 15006"]);
    let pods = lab.pods("node1");
    assert_eq!(addresses(&pods, "node"), BTreeSet::new());
    assert_eq!(
        set_members(&lab, "node1", "istio-inpod-probes-v4"),
        addresses(&pods, "inpod")
    );
    assert!(
        !lab.run("node1", "ip rule").contains("0x200/0x200"),
        "nothing of the node capture"
    );
    assert!(
        !lab.run("plain1", "iptables-save").contains("ISTIO"),
        "the plain pod is left alone"
    );
}

#[test]
fn mixed_mode_has_each_pod_in_one_capture_only() {
    let lab = CommandLineLab::up(&["--mode", "mixed", "--pods-per-node", "3"]);
    let pods = lab.pods("node1");
    let by_node = addresses(&pods, "node");
    let in_pod = addresses(&pods, "inpod");
    assert_eq!(
        by_node,
        BTreeSet::from(["10.244.1.10".to_owned(), "10.244.1.12".to_owned()])
    );
    assert_eq!(in_pod, BTreeSet::from(["10.244.1.11".to_owned()]));
    assert_eq!(set_members(&lab, "node1", "ztunnel-pods-ips"), by_node);
    assert_eq!(set_members(&lab, "node1", "istio-inpod-probes-v4"), in_pod);
    let table = lab.ambidex("node1", "get pods").with_code(0);
    contains(&table, &["NAMESPACE", "pod1-1", "pod1-2", "node", "inpod"]);
}

/// `lab exec` passes the exit code on; `status` and `list` of what is not there fail.
#[test]
fn exit_codes() {
    let lab = CommandLineLab::up(&["--mode", "inpod"]);
    assert_eq!(lab.exec("pod1-1", &["sh", "-c", "exit 7"]).code, 7);
    assert_eq!(lab.exec("pod9-9", &["true"]).code, 1);
    cli(&["lab", "status", "--name", &lab.name]).with_code(0);
    cli(&["lab", "status", "--name", "nolab"]).with_code(1);
    // Up again is fine, unless it would have to be another lab.
    let again = |mode| {
        cli(&[
            "lab",
            "up",
            "--no-mend",
            "--name",
            &lab.name,
            "--mode",
            mode,
        ])
    };
    again("inpod").with_code(0);
    let other = again("node");
    contains(&other.stderr, &[&format!("lab down --name {}", lab.name)]);
    assert_eq!(other.code, 1);

    for usage in [
        &["lab", "up"][..],
        &["lab", "up", "--mode", "nod"],
        &["plan"],
        &["nonsense"],
        &[],
    ] {
        assert_eq!(cli(usage).code, 2, "{usage:?}");
    }
    let nobody = lab.ambidex("node1", "plan alpha/nobody --as-commands");
    assert_eq!(nobody.code, 1);
    contains(&nobody.stderr, &["nobody"]);
    // Down again is fine.
    cli(&["lab", "down", "--name", "nolab"]).with_code(0);
}

/// A rule that somebody removed is found and named; without it the diff is empty.
#[rstest]
#[case::node_rule("node", "node1", "node1", "ip rule del pref 101", "diff --node", "101")]
#[case::node_chain_rule(
    "node",
    "node1",
    "node1",
    "iptables -t mangle -D ztunnel-PREROUTING -i istioout -j RETURN",
    "diff --node",
    "istioout"
)]
#[case::proxy_rule(
    "node",
    "node1",
    "proxy1",
    "ip rule del pref 20000",
    "diff --node",
    "20000"
)]
#[case::pod_route(
    "node",
    "node1",
    "node1",
    "ip route del 10.244.1.10 table 100",
    "diff alpha/pod1-1",
    "10.244.1.10"
)]
#[case::pod_member(
    "node",
    "node1",
    "node1",
    "ipset del ztunnel-pods-ips 10.244.1.10",
    "diff alpha/pod1-1",
    "10.244.1.10"
)]
#[case::inpod_chain_rule(
    "inpod",
    "node1",
    "pod1-1",
    "iptables -t nat -D ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT",
    "diff alpha/pod1-1",
    "0x111"
)]
#[case::inpod_jump(
    "inpod",
    "node1",
    "pod1-1",
    "iptables -t nat -D OUTPUT -j ISTIO_OUTPUT",
    "diff alpha/pod1-1",
    "OUTPUT"
)]
fn diff_names_what_was_removed(
    #[case] mode: &str,
    #[case] node: &str,
    #[case] place: &str,
    #[case] removal: &str,
    #[case] diff: &str,
    #[case] named: &str,
) {
    let lab = CommandLineLab::up(&["--mode", mode]);
    assert_eq!(
        lab.ambidex(node, diff).with_code(0),
        "",
        "nothing differs yet"
    );
    lab.run(place, removal);
    let difference = lab.ambidex(node, diff).with_code(3);
    contains(&difference, &[named]);
    assert_eq!(
        difference.lines().count(),
        1,
        "one thing was removed:\n{difference}"
    );
}

/// The commands that `plan` prints, run by hand where they were taken away, make the same state.
/// The pod is the last one that was enrolled, so that its rules are the last ones in shared chains.
#[rstest]
#[case::node("node")]
#[case::inpod("inpod")]
fn plan_as_commands_is_what_is_there(#[case] mode: &str) {
    let lab = CommandLineLab::up(&["--mode", mode]);
    let places = ["node1", "pod1-2"];
    let captured = places.map(|place| lab.dump(place));
    let text = lab
        .ambidex("node1", "plan beta/pod1-2 --as-commands")
        .with_code(0);
    let json = lab.ambidex("node1", "plan beta/pod1-2").with_code(0);
    assert!(
        serde_json::from_str::<Value>(&json)
            .unwrap()
            .as_array()
            .is_some_and(|plans| !plans.is_empty())
    );
    lab.ambidex("node1", "undo beta/pod1-2").with_code(0);
    assert_ne!(
        captured,
        places.map(|place| lab.dump(place)),
        "undo changes something"
    );

    let mut place = None;
    let mut scripts: Vec<(&str, String)> = Vec::new();
    for line in text.lines() {
        if line.starts_with('#') {
            place = Some(if line.contains("namespace of the pod") {
                "pod1-2"
            } else {
                "node1"
            });
            scripts.push((place.unwrap(), String::new()));
        } else {
            assert!(place.is_some(), "a command before its place:\n{text}");
            let script = &mut scripts.last_mut().unwrap().1;
            script.push_str(line);
            script.push('\n');
        }
    }
    for (place, script) in scripts {
        lab.exec(place, &["sh", "-e", "-c", &script]).with_code(0);
    }
    for (place, before) in places.iter().zip(&captured) {
        assert_same_dump(place, before, &lab.dump(place));
    }
}

/// Undoing the node takes away all that the agent ever made: the namespaces are those of a lab without one.
#[rstest]
#[case::node_hybrid(&["--mode", "node"])]
#[case::node_tunnel(&["--mode", "node", "--node-flow", "tunnel"])]
#[case::inpod(&["--mode", "inpod"])]
#[case::mixed(&["--mode", "mixed"])]
fn undo_of_the_node_leaves_nothing(
    #[case] flags: &[&str],
    #[values(false, true)] agent_killed: bool,
) {
    let places = ["node1", "proxy1", "pod1-1", "pod1-2", "plain1"];
    let name = LabSpec::unique_name();
    // The same name, because the lab's own rules carry it.
    let without = CommandLineLab::named(name.clone(), &["--mode", "none"]);
    let before = places.map(|place| without.dump(place));
    drop(without);
    let lab = CommandLineLab::named(name, flags);
    assert_ne!(before[0], lab.dump("node1"));
    if agent_killed {
        let standing = standing::Lab::open(&lab.name).unwrap();
        standing.kill(1, standing::Daemon::Agent).unwrap();
    }
    lab.ambidex("node1", "undo --node").with_code(0);
    for (place, before) in places.iter().zip(&before) {
        assert_same_dump(place, before, &lab.dump(place));
    }
}

/// `ambidex dump` of a namespace is the state as text, and as JSON.
#[test]
fn dump_prints_the_state() {
    let lab = CommandLineLab::up(&["--mode", "node"]);
    assert_eq!(lab.ambidex("node1", "dump").with_code(0), lab.dump("node1"));
    let json = lab.ambidex("node1", "dump --json").with_code(0);
    assert!(serde_json::from_str::<Value>(&json).unwrap().is_object());
}

/// A kernel without geneve is told so in one sentence that names both ways out; the other kernel builds the lab.
#[test]
fn geneve_or_a_sentence() {
    let name = LabSpec::unique_name();
    let guardian = Guardian::of(&name);
    let up = cli(&[
        "lab",
        "up",
        "--name",
        &name,
        "--mode",
        "node",
        "--overlay",
        "geneve",
    ]);
    let supported = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
        .block_on(host_net::netlink::overlay_supported(
            host_net::plan::OverlayKind::Geneve,
        ));
    if supported {
        assert_eq!(up.code, 0, "{}", up.stderr);
    } else {
        assert_eq!(up.code, 1);
        contains(&up.stderr, &["modprobe geneve", "--overlay vxlan"]);
        assert_eq!(up.stderr.lines().count(), 1, "{}", up.stderr);
    }
    cli(&["lab", "down", "--name", &name]).with_code(0);
    guardian.dismiss();
}
