//! Pods whose capture reaches less far, or further, than that of others: gateways, which have what comes in to themselves,
//! and pods with guests inside, whose connections are captured as the pod's own.
#![allow(clippy::unwrap_used, clippy::expect_used)]
#![allow(
    clippy::disallowed_methods,
    reason = "applications of a test, no part of the proxy"
)]

#[path = "flows/guest.rs"]
mod guest;
mod harness;
mod runtime;
mod talk;

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use guest::Guest;
use harness::state::apply_to;
use harness::{Stage, own};
use host_net::netns::Netns;
use lab::standing::Daemon;
use lab::topology::{Families, InpodRules, Mode};
use lab::traffic::{Check, Saw};
use runtime::{Sandbox, ambidex, assert_same, diff_is_empty, dumps, pods, start_agent};
use serde_json::{Value, json};

/// Has what comes in to itself.
const GATEWAY: &str = "pod1-2";
/// Has guests.
const HOST: &str = "pod1-1";
/// What must not get through is given so long.
const IMPATIENCE: Duration = Duration::from_millis(1500);

/// A box by each family: its application, and itself.
fn in_both(scene: &Stage, target: &str) -> [(SocketAddr, IpAddr); 2] {
    [
        (scene.at(target), scene.ip(target).into()),
        (scene.at6(target), scene.ip6(target).into()),
    ]
}

/// A connection by which something is said, and heard back.
struct Talk(TcpStream);

impl Talk {
    fn open(from: &Netns, to: SocketAddr) -> Self {
        let stream = from.run(|| TcpStream::connect_timeout(&to, talk::PATIENCE));
        let stream = stream.unwrap().unwrap_or_else(|e| panic!("to {to}: {e}"));
        stream.set_read_timeout(Some(talk::PATIENCE)).unwrap();
        let mut talk = Self(stream);
        talk.say("opened");
        talk
    }

    #[track_caller]
    fn say(&mut self, when: &str) {
        let said = talk::message(&mut self.0, when.len() as u64);
        let ends = (self.0.local_addr(), self.0.peer_addr());
        assert!(said.is_ok(), "{when}: {ends:?}: {said:?}");
    }
}

/// Says back what it hears by either family, until the test ends. Returns its port.
fn echo(netns: &Netns) -> u16 {
    let listener = netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 0)));
    let listener = listener.unwrap().unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            std::thread::spawn(move || {
                let (mut from, mut to) = (&stream, &stream);
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = from.read(&mut buffer) {
                    if to.write_all(&buffer[..length]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    port
}

fn run(scene: &Stage, target: &str, command: &str) {
    let limit = Duration::from_secs(30);
    let done = scene.lab.run(target, &["sh", "-ec", command], limit);
    done.unwrap().success(command).unwrap();
}

fn enrol(scene: &Stage, name: &str, flags: &str) -> String {
    let sandbox = Sandbox::of(&scene.lab, name);
    let enrol = format!(
        "enrol {}/{name} --netns {} --uid {} --service-account {} {flags}",
        sandbox.namespace,
        sandbox.netns.display(),
        sandbox.uid,
        sandbox.service_account
    );
    ambidex(&scene.lab, &enrol).with_code(0)
}

fn named(scene: &Stage, name: &str) -> String {
    format!("{}/{name}", Sandbox::of(&scene.lab, name).namespace)
}

/// Straight in although nobody may come in without an identity, in tunnels both ways for the rest, and nobody else's way to
/// the proxy's ports.
fn gateway_works(scene: &Stage, when: &str) {
    let mark = scene.mark(1);
    let far = scene.mark(2);
    for ((to, _), (there, client)) in in_both(scene, GATEWAY)
        .into_iter()
        .zip(in_both(scene, "plain1"))
    {
        assert_eq!(scene.seen("plain1", to), client, "{when}");
        assert_eq!(
            scene.seen(GATEWAY, there).is_ipv4(),
            client.is_ipv4(),
            "{when}"
        );
    }
    for ((to, gateway), (there, peer)) in in_both(scene, GATEWAY)
        .into_iter()
        .zip(in_both(scene, "pod2-1"))
    {
        assert_eq!(scene.seen("pod2-1", to), peer, "{when}");
        assert_eq!(scene.seen(GATEWAY, there), gateway, "{when}");
        let (to, there) = (to.to_string(), there.to_string());
        for (mark, direction, end) in [(mark, "inbound", &to), (far, "inbound", &there)] {
            let line = scene.access_line(
                mark,
                &[("direction", direction), ("dst.hbone_addr", end.as_str())],
            );
            assert!(line["src.identity"].is_string(), "{when}: {line}");
        }
    }
    // Nothing of the uncaptured client passed a proxy on its way in.
    let clients = in_both(scene, "plain1").map(|(_, ip)| ip);
    for line in scene.access_lines(mark) {
        let source = line["src.addr"].as_str().unwrap_or_default();
        let source: Option<SocketAddr> = source.parse().ok();
        let is_client = source.is_some_and(|source| clients.contains(&source.ip()));
        assert!(!is_client, "{when}: {line}");
    }
}

/// A guest's connections are the pod's: in a tunnel to captured pods, and as the pod to others.
fn guests_are_captured(scene: &Stage, guest: &Guest, when: &str) {
    let mark = scene.mark(1);
    for (family, (peer, _)) in in_both(scene, "pod2-1").into_iter().enumerate() {
        let (_, host) = in_both(scene, HOST)[family];
        let (plain, _) = in_both(scene, "plain2")[family];
        for to in [peer, plain] {
            let outcome = guest.attempt(to, Check::Who, Duration::from_secs(60));
            assert!(outcome.ok, "{when}: {outcome:?}");
            assert_eq!(outcome.seen.unwrap().ip(), host, "{when}: {to}");
        }
        let line = scene.access_line(
            mark,
            &[
                ("direction", "outbound"),
                ("dst.hbone_addr", &peer.to_string()),
            ],
        );
        assert_eq!(line["src.workload"], HOST, "{when}");
        assert_eq!(line["dst.identity"], *scene.identity("pod2-1"), "{when}");
        let source: SocketAddr = line["src.addr"].as_str().unwrap().parse().unwrap();
        assert_eq!(source.ip(), guest.addresses[family], "{when}: {line}");
    }
    // What the pod itself sends, and what comes to it, is captured as ever.
    for ((to, _), (_, host)) in in_both(scene, "pod2-1")
        .into_iter()
        .zip(in_both(scene, HOST))
    {
        assert_eq!(scene.seen(HOST, to), host, "{when}");
    }
    assert_eq!(
        scene.seen("pod2-1", scene.at(HOST)),
        IpAddr::from(scene.ip("pod2-1")),
        "{when}"
    );
}

/// Takes away what redirects guests; what stands beside it keeps them in.
fn nothing_passes_beside(scene: &Stage, guest: &Guest, rules: InpodRules) {
    let (damage, to) = match rules {
        InpodRules::Redirect => ("iptables -t nat -F ISTIO_PRERT", scene.at("plain2")),
        InpodRules::Tproxy => ("ip6tables -t nat -F ISTIO_PRERT", scene.at6("plain2")),
        InpodRules::Nftables => (
            "nft flush chain inet istio-ambient-nat istio-prerouting",
            scene.at("plain2"),
        ),
    };
    run(scene, HOST, damage);
    let outcome = guest.attempt(to, Check::Who, IMPATIENCE);
    assert_eq!(outcome.saw, Some(Saw::Timeout), "{rules}: {outcome:?}");
    if rules == InpodRules::Redirect {
        // It is they that keep it in: without them it gets through, with the pod's address.
        run(scene, HOST, "iptables -F AMBIDEX_GUARD_FWD");
        let outcome = guest.attempt(to, Check::Who, Duration::from_secs(60));
        assert!(outcome.ok, "{outcome:?}");
    }
}

/// What operators are told.
fn is_told(scene: &Stage) {
    let told = ambidex(&scene.lab, "verify").with_code(0);
    for part in [
        "what comes in is not captured, but for tunnels",
        "TCP of guests behind br0 is captured as the pod's own",
    ] {
        assert!(told.contains(part), "no {part:?} in {told}");
    }
    let wide = ambidex(&scene.lab, "get pods -o wide").with_code(0);
    for (name, captured) in [(GATEWAY, "outbound"), (HOST, "both ways, guests of br0")] {
        let row = wide
            .lines()
            .find(|row| row.contains(&format!(" {name} ")))
            .unwrap();
        assert!(row.contains(captured), "{row}");
    }
    let of = |name: &str| {
        let pods = pods(&scene.lab);
        pods.into_iter().find(|pod| pod["name"] == name).unwrap()
    };
    assert_eq!(of(GATEWAY)["bypass_inbound"], json!(true));
    assert_eq!(of(HOST)["virtual_interfaces"], json!(["br0"]));
    assert_eq!(of(HOST)["bypass_inbound"], Value::Null);
}

/// In each style, one after the other on running pods, by both families: as asked, open connections go on, and nothing is
/// left in the end.
#[test]
fn gateways_and_guests_in_every_style() {
    let mut spec = harness::spec(Mode::Inpod);
    spec.families = Families::Dual;
    let scene = own(&spec);
    let lab = &scene.lab;
    let guest = Guest::inside(&scene, HOST);
    let strict = json!([[[{"notPrincipals": [{"Presence": []}]}]]]);
    let _changed = scene.with_state(|state| apply_to(state, GATEWAY, "Deny", strict));
    for name in [GATEWAY, HOST] {
        lab.del_pod(name).unwrap();
    }
    let places = [GATEWAY, HOST, "node1"];
    let apart = dumps(lab, &places);

    let echo = |target: &str| echo(&lab.netns(target).unwrap());
    let (plain, gateway) = (echo("plain2"), echo(GATEWAY));
    let families = |target: &str, port: u16| in_both(&scene, target).map(|(_, ip)| (ip, port));
    let plain1 = lab.netns("plain1").unwrap();
    let mut talks = Vec::new();
    for to in families("plain2", plain) {
        talks.push(Talk::open(&guest.netns, to.into()));
    }
    for to in families(GATEWAY, gateway) {
        talks.push(Talk::open(&plain1, to.into()));
    }
    enrol(&scene, GATEWAY, "--bypass-inbound-capture");
    let said = enrol(&scene, HOST, "--virtual-interfaces br0");
    assert!(said.contains(&format!("captured pod {}", named(&scene, HOST))));
    for to in families("plain2", plain) {
        talks.push(Talk::open(&guest.netns, to.into()));
    }
    for to in families(GATEWAY, gateway) {
        talks.push(Talk::open(&plain1, to.into()));
    }
    // Past what is captured there is no way to the proxy's own ports.
    for (ip, port) in families(GATEWAY, 15001)
        .into_iter()
        .chain(families(GATEWAY, 15006))
    {
        let outcome = scene.attempt("plain1", (ip, port).into(), Check::Who, IMPATIENCE);
        assert!(!outcome.ok, "{outcome:?}");
    }
    for (number, rules) in [
        InpodRules::Redirect,
        InpodRules::Tproxy,
        InpodRules::Nftables,
    ]
    .into_iter()
    .enumerate()
    {
        if number > 0 {
            lab.choose_inpod_rules(rules).unwrap();
            lab.stop(1, Daemon::Agent).unwrap();
            start_agent(lab);
        }
        let when = rules.to_string();
        for name in [GATEWAY, HOST] {
            diff_is_empty(lab, &named(&scene, name));
        }
        gateway_works(&scene, &when);
        guests_are_captured(&scene, &guest, &when);
        is_told(&scene);
        for talk in &mut talks {
            talk.say(&when);
        }
        nothing_passes_beside(&scene, &guest, rules);
    }
    drop(talks);
    for name in [GATEWAY, HOST] {
        ambidex(
            lab,
            &format!("unenrol {} --drain 0s --wait", named(&scene, name)),
        )
        .with_code(0);
    }
    assert_same("let go", &apart, &dumps(lab, &places));
}
