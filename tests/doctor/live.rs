//! Machines that are really so: network namespaces with something wrong in them, and a lab.

use std::net::TcpListener;
use std::process::Command;

use ambidex::doctor::Severity;
use host_net::netns::Netns;
use host_net::sysctl;
use lab::standing::Daemon;
use lab::topology::Mode;
use nix::sys::signal::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{ambidex, assert_same_dump, dump, own, spec};
use crate::runtime::{self, Done};

/// A namespace that stands for a node, with a device and a default route, and nobody's daemons.
struct Machine {
    netns: Netns,
    directory: TempDir,
}

impl Machine {
    fn new() -> Self {
        let machine = Self {
            netns: Netns::create_unnamed().unwrap(),
            directory: tempfile::tempdir().unwrap(),
        };
        for command in [
            "ip link set lo up",
            "ip link add up0 type veth peer name up1",
            "ip link set up1 up",
            "ip link set up0 up",
            "ip addr add 192.0.2.10/24 dev up0",
            "ip route add default via 192.0.2.1 dev up0",
        ] {
            machine.run(command);
        }
        machine.set("net/ipv4/ip_forward", "1");
        machine.set("net/ipv4/conf/all/rp_filter", "0");
        machine
    }

    fn set(&self, key: &str, value: &str) {
        sysctl::write(&self.netns, key, value).unwrap();
    }

    fn start(&self, command: &mut Command) -> Done {
        command.env("XTABLES_LOCKFILE", self.directory.path().join("lock"));
        self.netns.run(|| Done::of(command, b"")).unwrap()
    }

    /// Runs a command in the namespace.
    fn run(&self, command: &str) {
        let words: Vec<&str> = command.split(' ').collect();
        self.start(Command::new(words[0]).args(&words[1..]))
            .with_code(0);
    }

    /// What is wrong: id, severity, object.
    fn doctor(&self) -> Vec<(String, Severity, String)> {
        let mut command = Command::new(ambidex());
        let directory = self.directory.path();
        command
            .args(["doctor", "-o", "json", "--cni-conf-dir"])
            .arg(directory)
            .env_remove("AMBIDEX_IPTABLES")
            .env("AMBIDEX_RUN_DIR", directory)
            .env("AMBIDEX_STATE_DIR", directory);
        let said = self.start(&mut command);
        assert!(matches!(said.code, 0 | 3), "{said:?}");
        wrong(&said.stdout)
    }

    /// What a change adds to what is found; the machine itself is left as it was by looking.
    #[track_caller]
    fn finds(&self, id: &str, severity: Severity, object: &str) {
        let before = dump(&self.netns);
        let found = self.doctor();
        let wanted = (id.to_owned(), severity, object.to_owned());
        assert!(found.contains(&wanted), "no {wanted:?} in {found:#?}");
        assert_same_dump("what was looked at", &before, &dump(&self.netns));
    }
}

fn wrong(report: &str) -> Vec<(String, Severity, String)> {
    let report: Value = serde_json::from_str(report).unwrap();
    let text = |one: &Value, key: &str| one[key].as_str().unwrap_or_default().to_owned();
    let findings = report["findings"].as_array().unwrap().iter();
    findings
        .map(|one| {
            let severity = serde_json::from_value(one["severity"].clone()).unwrap();
            (text(one, "id"), severity, text(one, "object"))
        })
        .filter(|(_, severity, _)| *severity > Severity::Ok)
        .collect()
}

#[test]
fn a_plain_namespace_has_nothing_that_breaks_a_capture() {
    let machine = Machine::new();
    let broken: Vec<_> = machine
        .doctor()
        .into_iter()
        .filter(|(_, severity, _)| *severity == Severity::Fail)
        .collect();
    assert_eq!(broken, []);
}

#[test]
fn strict_reverse_paths_are_found() {
    let machine = Machine::new();
    machine.set("net/ipv4/conf/all/rp_filter", "1");
    machine.finds("node/rp-filter", Severity::Warn, "all");
    machine.run("ip route del default");
    machine.finds("node/rp-filter", Severity::Fail, "all");
}

#[test]
fn rules_routes_and_marks_of_others_are_found() {
    let machine = Machine::new();
    for command in [
        "ip rule add pref 101 lookup 77",
        "ip rule add pref 1024 fwmark 0x80/0x80 lookup main",
        "ip route add 10.9.0.0/16 dev up0 table 100",
        "iptables-nft -t mangle -A PREROUTING -i up0 -j MARK --set-mark 0x1",
        "nft add table inet fw",
        "nft add chain inet fw forwarded { type filter hook forward priority 0 ; policy drop ; }",
        "nft add rule inet fw forwarded tcp dport 15000-15010 drop",
    ] {
        machine.run(command);
    }
    let found = machine.doctor();
    for (id, severity, object) in [
        ("node/rule-clash", Severity::Fail, "101"),
        ("node/rule-mark", Severity::Fail, "1024"),
        ("node/table-clash", Severity::Fail, "100"),
        ("node/mark-clash", Severity::Fail, "PREROUTING"),
        ("host/hbone-dropped", Severity::Fail, "inet fw"),
        ("host/forward-drop", Severity::Warn, "FORWARD"),
    ] {
        let wanted = (id.to_owned(), severity, object.to_owned());
        assert!(found.contains(&wanted), "no {wanted:?} in {found:#?}");
    }
}

#[test]
fn devices_and_ports_of_others_are_found() {
    let machine = Machine::new();
    machine.run("ip link add istioin type veth peer name istioin-end");
    machine.run("ip link add cni0 type bridge");
    machine.run("ip link set up0 master cni0");
    machine.run("tc qdisc add dev up1 clsact");
    machine.run("ipset create ztunnel-pods-ips hash:net");
    #[allow(
        clippy::disallowed_methods,
        reason = "an application of a test, no part of the proxy"
    )]
    let listener = machine
        .netns
        .run(|| TcpListener::bind("0.0.0.0:15014"))
        .unwrap();
    let _listener = listener.unwrap();
    machine.finds("node/device-clash", Severity::Fail, "istioin");
    let found = machine.doctor();
    for (id, severity, object) in [
        ("node/pod-routes", Severity::Fail, "cni0"),
        ("node/classifiers", Severity::Warn, "up1"),
        ("node/set-clash", Severity::Fail, "ztunnel-pods-ips"),
        ("host/agent-ports", Severity::Fail, "15014"),
    ] {
        let wanted = (id.to_owned(), severity, object.to_owned());
        assert!(found.contains(&wanted), "no {wanted:?} in {found:#?}");
    }
}

#[test]
fn both_implementations_of_iptables_are_found() {
    let machine = Machine::new();
    machine.run("iptables-nft -A INPUT -p tcp --dport 9 -j ACCEPT");
    let mixed = |found: &[(String, Severity, String)]| {
        found.iter().any(|(id, ..)| id == "host/iptables-mixed")
    };
    assert!(!mixed(&machine.doctor()));
    machine.run("iptables-legacy -A INPUT -p tcp --dport 9 -j ACCEPT");
    machine.finds("host/iptables-mixed", Severity::Fail, "iptables");
}

#[test]
fn a_node_that_captures_has_nothing_that_breaks_it_until_something_does() {
    let scene = own(&spec(Mode::Mixed));
    let doctor = || {
        let said = runtime::ambidex(&scene.lab, "doctor -o json --cni-conf-dir /nonexistent");
        let mut found = wrong(&said.stdout);
        found.retain(|(_, severity, _)| *severity == Severity::Fail);
        (said.code, found)
    };
    assert_eq!(doctor(), (0, Vec::new()));

    let proxy = scene.lab.netns("proxy1").unwrap();
    sysctl::write(&proxy, "net/ipv4/tcp_fwmark_accept", "1").unwrap();
    let agent = scene.lab.process(1, Daemon::Agent).unwrap();
    agent.signal(Signal::SIGSTOP).unwrap();
    let (code, found) = doctor();
    agent.signal(Signal::SIGCONT).unwrap();
    assert_eq!(code, 3);
    for (id, object) in [
        ("node/fwmark-accept", "tcp_fwmark_accept"),
        ("host/agent", "agent"),
    ] {
        let wanted = (id.to_owned(), Severity::Fail, object.to_owned());
        assert!(found.contains(&wanted), "no {wanted:?} in {found:#?}");
    }
}
