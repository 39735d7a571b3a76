//! What another mesh, or an agent whose state is lost, has left under the captures' names: taken over if it is a capture of
//! ours to the letter, else refused with everything in the way named, nothing changed, and commands that take it away.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod runtime;

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use harness::Variant::{self, Inpod, NodeHybrid};
use harness::{Stage, eventually, own};
use host_net::netns::Netns;
use lab::standing::{Daemon, Lab};
use lab::topology::Families;
use rstest::rstest;
use runtime::{Sandbox, ambidex, assert_same, dumps, start_agent, state_of};

/// How long anything may take on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

fn sh(netns: &Netns, script: &str) {
    let script = format!("set -e\n{script}");
    let done = netns.run(|| Command::new("sh").args(["-c", &script]).output());
    let done = done.unwrap().unwrap();
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(done.status.success(), "{script}: {errors}");
}

/// The state of the node, its proxy and a pod that the lab did not plan.
fn state(lab: &Lab, sandbox: &Sandbox) -> Vec<(String, String)> {
    let mut all = dumps(lab, &["node1", "proxy1"]);
    let pod = harness::dump(&Netns::open(&sandbox.netns).unwrap());
    all.push((sandbox.name.clone(), pod));
    all
}

/// Runs the commands of a refusal, as an operator of the node does.
#[track_caller]
fn follow(lab: &Lab, refusal: &str) {
    let (_, refusal) = refusal.split_once("captured by somebody else").unwrap();
    let (_, commands) = refusal.split_once("then: ").expect("commands");
    // A log goes on behind them.
    let commands = commands.split(['\n', '"']).next().unwrap();
    for command in commands.split("; ") {
        sh(&lab.netns("node1").unwrap(), command);
    }
}

/// What captures a pod already, and what a refusal has to say of it.
struct Earlier {
    script: &'static str,
    named: &'static [&'static str],
}

/// A field agent's rules, which match every packet that begins or continues a connection.
const FIELD: Earlier = Earlier {
    script: "ip rule add pref 32764 fwmark 0x111/0xfff lookup 100
        ip route add local 0.0.0.0/0 dev lo table 100
        iptables-nft -t mangle -N ISTIO_PRERT
        iptables-nft -t mangle -A ISTIO_PRERT -m mark --mark 0x539/0xfff -j CONNMARK --set-xmark 0x111/0xfff
        iptables-nft -t mangle -A PREROUTING -j ISTIO_PRERT
        iptables-nft -t nat -N ISTIO_OUTPUT
        iptables-nft -t nat -A OUTPUT -j ISTIO_OUTPUT
        iptables-nft -t nat -A ISTIO_OUTPUT -p tcp -m mark --mark 0x111/0xfff -j ACCEPT
        iptables-nft -t nat -A ISTIO_OUTPUT ! -d 127.0.0.1/32 -p tcp -m mark ! --mark 0x539/0xfff -j REDIRECT --to-ports 15001",
    named: &[
        "chain ISTIO_PRERT in table mangle of iptables-nft (a name of Istio ambient)",
        "chain ISTIO_OUTPUT in table nat",
        "-t nat -D OUTPUT -j ISTIO_OUTPUT",
        "-t nat -X ISTIO_OUTPUT",
    ],
};
/// The same names with a content that means nothing.
const NAMES: Earlier = Earlier {
    script: "iptables-nft -t nat -N ISTIO_PRERT
        iptables-nft -t nat -A ISTIO_PRERT -p tcp -j ACCEPT",
    named: &[
        "chain ISTIO_PRERT in table nat",
        "-t nat -F ISTIO_PRERT",
        "-t nat -X ISTIO_PRERT",
    ],
};
/// A sidecar's rules, in legacy tables.
const SIDECAR: Earlier = Earlier {
    script: "iptables-legacy -t nat -N ISTIO_REDIRECT
        iptables-legacy -t nat -A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports 15001
        iptables-legacy -t nat -N ISTIO_IN_REDIRECT
        iptables-legacy -t nat -A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports 15006
        iptables-legacy -t nat -A PREROUTING -p tcp -j ISTIO_IN_REDIRECT
        iptables-legacy -t nat -A OUTPUT -p tcp -j ISTIO_REDIRECT",
    named: &[
        "chain ISTIO_REDIRECT in table nat of iptables-legacy (a name of an Istio sidecar)",
        "chain ISTIO_IN_REDIRECT in table nat",
        "-t nat -D PREROUTING -p tcp -j ISTIO_IN_REDIRECT",
    ],
};

/// A pod that somebody else captures does not start; when that is gone, by the commands that the refusal names, it does.
#[rstest]
fn a_pod_of_another_mesh_is_refused(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let sandbox = Sandbox::wired(lab, "web1", Ipv4Addr::new(10, 244, 1, 140));
    let netns = Netns::open(&sandbox.netns).unwrap();
    for Earlier { script, named } in [FIELD, NAMES, SIDECAR] {
        sh(&netns, script);
        let before = state(lab, &sandbox);
        let error = sandbox.call(lab, "ADD").cni_error();
        let details = error["details"].as_str().unwrap();
        for part in ["pod gamma/web1", "Nothing was changed"]
            .iter()
            .chain(named)
        {
            assert!(details.contains(part), "no {part:?} in {details}");
        }
        let enter = format!("nsenter --net={} ip", sandbox.netns.display());
        assert!(details.contains(&enter), "{details}");
        assert_same("refused", &before, &state(lab, &sandbox));
        assert_eq!(state_of(lab, &sandbox.uid), None);
        follow(lab, details);
        sandbox.add(lab);
        ambidex(lab, "verify gamma/web1").with_code(0);
        sandbox.del(lab);
    }
    sandbox.destroy(lab);
}

/// The same by IPv6 alone: every rule of IPv4 may be another's and every one of IPv6 nobody's, and the other way round.
#[test]
fn a_pod_of_another_mesh_by_ipv6_is_refused() {
    let mut spec = Inpod.spec();
    spec.families = Families::Dual;
    let scene = own(&spec);
    let lab = &scene.lab;
    lab.del_pod("pod1-1").unwrap();
    let sandbox = Sandbox::of(lab, "pod1-1");
    sh(
        &Netns::open(&sandbox.netns).unwrap(),
        "ip -6 rule add pref 32764 fwmark 0x111/0xfff lookup 100
        ip -6 route add local ::/0 dev lo table 100
        ip6tables-nft -t nat -N ISTIO_OUTPUT
        ip6tables-nft -t nat -A OUTPUT -j ISTIO_OUTPUT
        ip6tables-nft -t nat -A ISTIO_OUTPUT ! -d ::1/128 -p tcp -j REDIRECT --to-ports 15001",
    );
    let before = state(lab, &sandbox);
    let refusal = format!("{:#}", lab.add_pod("pod1-1").unwrap_err());
    let details = refusal.as_str();
    for part in [
        "Nothing was changed",
        "chain ISTIO_OUTPUT in table nat of ip6tables-nft (a name of Istio ambient)",
        "ip6tables-nft -w -t nat -D OUTPUT -j ISTIO_OUTPUT",
        "ip -6 rule del pref 32764",
        "ip -6 route del ::/0 table 100",
    ] {
        assert!(details.contains(part), "no {part:?} in {details}");
    }
    assert_same("refused", &before, &state(lab, &sandbox));
    follow(lab, details);
    lab.add_pod("pod1-1").unwrap();
    ambidex(lab, "verify alpha/pod1-1").with_code(0);
}

/// What only differs is told with the difference.
#[test]
fn a_refusal_says_what_differs() {
    let scene = own(&Inpod.spec());
    let lab = &scene.lab;
    let sandbox = Sandbox::wired(lab, "web1", Ipv4Addr::new(10, 244, 1, 140));
    sh(&Netns::open(&sandbox.netns).unwrap(), FIELD.script);
    let error = sandbox.call(lab, "ADD").cni_error();
    let details = error["details"].as_str().unwrap();
    for part in [
        "ISTIO_OUTPUT in table nat of iptables-nft (a name of Istio ambient): different: lacks",
        "`! -d 127.0.0.1/32 -o lo -j ACCEPT`",
    ] {
        assert!(details.contains(part), "no {part:?} in {details}");
    }
    sandbox.destroy(lab);
}

/// Makes the agent of node1 forget what it made in the pod's namespace.
fn lose_state(lab: &Lab, sandbox: &Sandbox) {
    lab.stop(1, Daemon::Agent).unwrap();
    let state = lab.state_dir(1);
    fs::remove_file(state.join(format!("journal/pod-{}.json", sandbox.uid))).unwrap();
    fs::remove_file(state.join(format!("pods/{}.json", sandbox.uid))).unwrap();
    start_agent(lab);
}

/// A capture of ours whose journal is lost is taken over whole, and goes with the pod; half of one is refused.
#[test]
fn a_capture_without_a_journal_is_taken_over() {
    let scene = own(&Inpod.spec());
    let lab = &scene.lab;
    let sandbox = Sandbox::wired(lab, "web1", Ipv4Addr::new(10, 244, 1, 140));
    let netns = Netns::open(&sandbox.netns).unwrap();
    let before = state(lab, &sandbox);
    sandbox.add(lab);
    let captured = state(lab, &sandbox);
    lose_state(lab, &sandbox);
    assert_eq!(state_of(lab, &sandbox.uid), None);
    sandbox.add(lab);
    assert_same("taken over", &captured, &state(lab, &sandbox));
    ambidex(lab, "verify gamma/web1").with_code(0);
    let log = fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap();
    assert!(log.contains("took over a capture"), "{log}");
    sandbox.del(lab);
    assert_same("gone with the pod", &before, &state(lab, &sandbox));

    // The pod runs by now: what was made for one that starts is taken over, and changed.
    sandbox.add(lab);
    lose_state(lab, &sandbox);
    let enrol = format!("enrol gamma/web1 --netns {}", sandbox.netns.display());
    ambidex(lab, &enrol).with_code(0);
    ambidex(lab, "verify gamma/web1").with_code(0);
    ambidex(lab, "undo gamma/web1").with_code(0);
    assert_same("undone", &before, &state(lab, &sandbox));

    sandbox.add(lab);
    lose_state(lab, &sandbox);
    sh(&netns, "iptables-nft -t mangle -F ISTIO_OUTPUT");
    let half = state(lab, &sandbox);
    let error = sandbox.call(lab, "ADD").cni_error();
    let details = error["details"].as_str().unwrap();
    assert!(details.contains("chain AMBIDEX_GUARD_OUT"), "{details}");
    assert_same("half is refused", &half, &state(lab, &sandbox));
    follow(lab, details);
    sandbox.add(lab);
    sandbox.del(lab);
    sandbox.destroy(lab);
}

/// Objects of another mesh's agent on the node, by capture.
fn earlier_agent(variant: Variant) -> Earlier {
    match variant {
        Inpod => Earlier {
            script: "ipset create istio-inpod-probes-v4 hash:ip comment
                ipset add istio-inpod-probes-v4 10.244.1.77 comment uid-of-another
                iptables-nft -t nat -N ISTIO_POSTRT
                iptables-nft -t nat -A POSTROUTING -j ISTIO_POSTRT
                iptables-nft -t nat -A ISTIO_POSTRT -p tcp -m owner --socket-exists -m set --match-set istio-inpod-probes-v4 dst -j SNAT --to-source 169.254.7.127",
            named: &[
                "ipset istio-inpod-probes-v4 with 1 entries",
                "chain ISTIO_POSTRT in table nat",
                "ipset destroy istio-inpod-probes-v4",
            ],
        },
        _ => Earlier {
            script: "ipset create ztunnel-pods-ips hash:ip
                ipset add ztunnel-pods-ips 10.244.1.77
                ip link add istioin type vxlan id 1000 remote 192.0.2.9 dstport 6081
                ip link add istioout type vxlan id 1001 remote 192.0.2.9 dstport 6081
                ip rule add pref 101 fwmark 0x100/0x100 lookup 101
                ip rule add pref 103 lookup 100
                ip route add 10.244.1.77/32 dev lo table 100
                ip route add 10.244.1.78/32 dev lo table 101
                ip route add 10.244.1.79/32 dev lo table 102
                iptables-nft -t mangle -N ztunnel-PREROUTING
                iptables-nft -t mangle -A PREROUTING -j ztunnel-PREROUTING
                iptables-nft -t mangle -A ztunnel-PREROUTING -i istioin -j MARK --set-xmark 0x200/0x200",
            named: &[
                "ipset ztunnel-pods-ips with 1 entries",
                "device istioin",
                "device istioout",
                "routing rule 101: fwmark 0x100/0x100 lookup 101",
                "routing rule 103: lookup 100",
                "route 10.244.1.77/32 dev lo table 100",
                "route 10.244.1.78/32 dev lo table 101",
                "route 10.244.1.79/32 dev lo table 102",
                "chain ztunnel-PREROUTING in table mangle",
                "ip rule del pref 101",
                "ip link del istioout",
            ],
        },
    }
}

fn refusal_of_node(stage: &Stage, variant: Variant) -> Option<String> {
    let lab = &stage.lab;
    let text = match variant {
        // Nobody is ready, and the plugin says why.
        NodeHybrid => {
            let answer = Sandbox::of(lab, "pod1-1").call(lab, "ADD");
            (answer.code == 1)
                .then(|| answer.cni_error()["details"].as_str().unwrap().to_owned())?
        }
        _ => fs::read_to_string(lab.log_path(1, Daemon::Agent)).unwrap(),
    };
    text.contains("Nothing was changed").then_some(text)
}

/// A node that another mesh's agent has set up is not set up once more; doctor names what is in the way, too.
#[rstest]
fn a_node_of_another_mesh_is_refused(#[values(NodeHybrid, Inpod)] variant: Variant) {
    let scene = own(&variant.spec());
    let lab = &scene.lab;
    let places = ["node1", "proxy1"];
    lab.stop(1, Daemon::Agent).unwrap();
    ambidex(lab, "undo --node").with_code(0);
    let Earlier { script, named } = earlier_agent(variant);
    sh(&lab.netns("node1").unwrap(), script);
    let before = dumps(lab, &places);
    let log = lab.log_path(1, Daemon::Agent);
    fs::write(&log, "").unwrap();
    lab.start(1, Daemon::Agent).unwrap();
    let mut refusal = String::new();
    eventually("it is refused", LIMIT, || {
        refusal = refusal_of_node(&scene, variant).unwrap_or_default();
        !refusal.is_empty()
    });
    for part in named {
        assert!(refusal.contains(part), "no {part:?} in {refusal}");
    }
    assert_same("refused", &before, &dumps(lab, &places));

    let mode = variant.capture();
    let doctor = ambidex(lab, &format!("doctor --mode {mode}"));
    assert_eq!(doctor.code, 3, "{doctor:?}");
    let objects: &[&str] = match variant {
        Inpod => &["inpod/set-clash", "ISTIO_POSTRT"],
        _ => &[
            "node/set-clash",
            "node/device-clash",
            "node/rule-clash",
            "node/table-clash",
            "ztunnel-PREROUTING",
        ],
    };
    for object in objects {
        assert!(doctor.stdout.contains(object), "no {object} in {doctor:?}");
    }

    follow(lab, &refusal);
    if lab.process(1, Daemon::Agent).is_none() {
        lab.start(1, Daemon::Agent).unwrap();
    }
    lab.wait_ready(1, &|_| {}).unwrap();
    Sandbox::of(lab, "pod1-1").add(lab);
    scene.check("pod1-1", scene.at("pod2-1"), lab::traffic::Check::Who);
}
