//! docs/modes.md, which walks through both captures: what stands between its markers is taken from labs.
//!
//! `make modes-doc` writes it. Listings are taken again in the full suite and have to be the same; what was observed (which rules a
//! connection met) differs between runs and is only proven not to be written by hand, by the digest in its marker.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod listings;
mod runtime;
mod ways;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use harness::{Scene, Variant, own};
use lab::standing::Daemon;
use lab::traffic::Check;
use listings::rules;
use ways::mermaid;

/// With this variable in the environment the document is written.
const WRITE: &str = "WRITE_MODES";
const LIMIT: Duration = Duration::from_secs(60);
const BEGIN: &str = "<!-- generated: ";
const END: &str = "<!-- end -->";

fn document() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/modes.md"))
}

/// FNV-1a: against slips of a hand, not of a forger.
fn digest(content: &str) -> String {
    let step = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3);
    let hash = content.as_bytes().iter().fold(0xcbf2_9ce4_8422_2325, step);
    format!("{hash:016x}")
}

/// A generated part: its name, the digest that its marker has, its content.
#[derive(Debug)]
struct Part {
    name: String,
    digest: String,
    content: String,
}

fn parts(text: &str) -> Vec<Part> {
    let mut parts = Vec::new();
    for piece in text.split(BEGIN).skip(1) {
        let (head, rest) = piece.split_once(" -->\n").expect("a whole marker");
        let (content, _) = rest.split_once(END).expect("a generated part ends");
        let (name, digest) = head.split_once(' ').unwrap_or((head, ""));
        parts.push(Part {
            name: name.to_owned(),
            digest: digest.to_owned(),
            content: content.to_owned(),
        });
    }
    parts
}

/// The text with these contents between its markers.
fn filled(text: &str, contents: &BTreeMap<String, String>) -> String {
    let mut pieces = text.split(BEGIN);
    let mut out = pieces.next().unwrap_or_default().to_owned();
    for piece in pieces {
        let (head, rest) = piece.split_once(" -->\n").expect("a whole marker");
        let (_, after) = rest.split_once(END).expect("a generated part ends");
        let name = head.split(' ').next().unwrap_or_default();
        let content = contents
            .get(name)
            .unwrap_or_else(|| panic!("nothing generates {name:?}"));
        let _ = write!(
            out,
            "{BEGIN}{name} {} -->\n{content}{END}{after}",
            digest(content)
        );
    }
    out
}

fn block(lines: &[String]) -> String {
    format!("```\n{}\n```\n", lines.join("\n"))
}

fn raw(scene: &Scene, target: &str, command: &str) -> String {
    let said = scene
        .lab
        .run(target, &["sh", "-c", command], LIMIT)
        .unwrap();
    said.success(command).unwrap().stdout
}

/// Commands in one place with what they say, without what differs between two machines.
fn listed(scene: &Scene, target: &str, commands: &[&str]) -> String {
    let mut lines = Vec::new();
    for command in commands {
        lines.push(format!("{target}# {command}"));
        lines.extend(rules::tidy(command, &raw(scene, target, command)));
    }
    block(&lines)
}

fn agent_log(scene: &Scene) -> String {
    let log = std::fs::read_to_string(scene.lab.log_path(1, Daemon::Agent)).unwrap();
    let mut lines = rules::tidy("log", &log);
    for (_, pod) in scene.lab.topology().pods() {
        for line in &mut lines {
            *line = line.replace(&pod.uid, "UID");
        }
    }
    block(&lines)
}

/// The rules that a connection from pod1-1 to pod2-1 met, by the counters of all places that it may pass.
fn met(scene: &Scene, targets: &[&str]) -> String {
    let counted = || {
        let of = |target: &&str| {
            let text = raw(scene, target, "iptables-save -c");
            let mut table = String::new();
            let mut counted = Vec::new();
            for line in text.lines() {
                if let Some(name) = line.strip_prefix('*') {
                    table = name.to_owned();
                } else if let Some((count, rule)) = line
                    .strip_prefix('[')
                    .and_then(|rest| rest.split_once("] "))
                {
                    counted.push((format!("{table} {rule}"), count.to_owned()));
                }
            }
            counted
        };
        targets.iter().map(of).collect::<Vec<_>>()
    };
    let before = counted();
    scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
    let after = counted();
    let mut lines = Vec::new();
    for ((target, before), after) in targets.iter().zip(before).zip(after) {
        let ours = |rule: &str| {
            [
                "ztunnel-",
                "ambidex-",
                "ISTIO_",
                "AMBIDEX_",
                " -A PREROUTING",
            ]
            .iter()
            .any(|part| rule.contains(part))
                && !rule.contains("KUBE-")
        };
        for (old, new) in before.iter().zip(&after) {
            if old.1 != new.1 && ours(&new.0) {
                lines.push(format!("{target}: {}", new.0));
            }
        }
    }
    block(&lines)
}

/// The connection's way, predicted from the state of the kernel.
fn explained(scene: &Scene) -> String {
    let arguments = format!("explain alpha/pod1-1 {}", scene.at("pod2-1"));
    let said = runtime::ambidex(&scene.lab, &arguments).with_code(0);
    let mut lines = vec![format!("node1# ambidex {arguments}")];
    lines.extend(said.lines().map(|line| line.trim_end().to_owned()));
    block(&lines)
}

/// A connection that nobody made before, as it was seen at each station.
fn traced(scene: &Scene) -> String {
    let arguments = format!("trace -o story beta/pod1-2 {}", scene.at("pod2-2"));
    let said = runtime::ambidex(&scene.lab, &arguments).with_code(0);
    let mut lines = vec![format!("node1# ambidex {arguments}")];
    lines.extend(said.lines().map(|line| line.trim_end().to_owned()));
    block(&lines)
}

/// The same connection's first packets, drawn.
fn drawn(scene: &Scene) -> String {
    let arguments = format!("trace -o mermaid beta/pod1-2 {}", scene.at("pod2-2"));
    let said = runtime::ambidex(&scene.lab, &arguments).with_code(0);
    mermaid::texts(&said).expect("a diagram");
    format!("```mermaid\n{said}```\n")
}

/// What is the same in every trace of one connection: times, counters and ports that the kernel chooses are not, nor how wide
/// columns are, nor the commit and the kernel of whoever took it.
fn without_measurements(text: &str) -> String {
    let known = ["8080", "15001", "15006", "15008", "15088", "6081", "*"];
    let word = |word: &str| {
        let bare = word.trim_end_matches([',', ')', ']']);
        let port = bare.rsplit_once(':').filter(|(ip, port)| {
            ip.contains('.') && !known.contains(port) && port.parse::<u16>().is_ok()
        });
        match port {
            Some((ip, _)) => format!("{ip}:*{}", &word[bare.len()..]),
            None => word.to_owned(),
        }
    };
    let line = |line: &str| {
        let mut words: Vec<String> = line.split_whitespace().map(word).collect();
        for at in 1..words.len() {
            let of = words[at].as_str();
            if ["ms", "packet", "packets"].contains(&of) && words[at - 1].parse::<f64>().is_ok() {
                words[at - 1] = "n".to_owned();
                words[at] = words[at].trim_end_matches('s').to_owned();
            }
        }
        words.join(" ")
    };
    let lines: Vec<String> = text.lines().map(line).collect();
    lines.join("\n")
}

#[test]
fn measurements_are_left_out_and_nothing_else() {
    let one = "    node1  vethp1  +0.005 ms  in by vethp1: 10.244.1.11:41949 > 10.244.2.11:8080\n  node1  -  1 packet  mark 0x100";
    let other = "    node1  vethp1  +11.2 ms   in by vethp1: 10.244.1.11:9 > 10.244.2.11:8080\n  node1  -  12 packets  mark 0x100";
    let plain = without_measurements(one);
    assert_eq!(plain, without_measurements(other));
    for (from, to) in [
        ("vethp1: ", "vethp2: "),
        ("0x100", "0x200"),
        (":8080", ":15008"),
        ("1.11:41949", "1.12:41949"),
    ] {
        let changed = one.replace(from, to);
        assert_ne!(plain, without_measurements(&changed), "{from} → {to}");
    }
}

/// What the machine says again whenever it is asked.
fn listings() -> BTreeMap<String, String> {
    let mut contents = BTreeMap::new();
    let scene = own(&Variant::NodeTunnel.spec());
    let mut put = |name: &str, content: String| {
        contents.insert(name.to_owned(), content);
    };
    put("agent-log", agent_log(&scene));
    put(
        "node-sets",
        listed(
            &scene,
            "node1",
            &["ipset list -n", "ipset list ztunnel-pods-ips"],
        ),
    );
    put("node-rules", listed(&scene, "node1", &["ip rule"]));
    put(
        "node-tables",
        listed(
            &scene,
            "node1",
            &[
                "ip route show table 100",
                "ip route show table 101",
                "ip route show table 102",
                "ip route show table 103",
                "ip route get 10.244.1.10",
            ],
        ),
    );
    put(
        "node-mangle",
        listed(&scene, "node1", &["iptables-save -t mangle"]),
    );
    put(
        "node-guard",
        listed(&scene, "node1", &["iptables-save -t filter"]),
    );
    put(
        "proxy",
        listed(
            &scene,
            "proxy1",
            &[
                "ip rule",
                "ip route show table 100",
                "ip route show table 101",
                "ip route show table 102",
                "iptables-save -t mangle",
            ],
        ),
    );
    drop(scene);
    let scene = own(&Variant::Inpod.spec());
    put(
        "pod",
        listed(
            &scene,
            "pod1-1",
            &["ip rule", "ip route show table 100", "iptables-save"],
        ),
    );
    put(
        "pod-sockets",
        listed(&scene, "pod1-1", &["ss -ntlH | awk '{print $4}' | sort"]),
    );
    put(
        "inpod-node",
        listed(
            &scene,
            "node1",
            &["ipset list istio-inpod-probes-v4", "iptables-save -t nat"],
        ),
    );
    contents
}

/// Traces, each in a lab of its own: the first connection of a pod brings its tunnel along.
fn traces() -> BTreeMap<String, String> {
    let mut contents = BTreeMap::new();
    for (variant, name) in [
        (Variant::NodeTunnel, "tunnel"),
        (Variant::NodeHybrid, "hybrid"),
        (Variant::Inpod, "inpod"),
    ] {
        let scene = own(&variant.spec());
        contents.insert(format!("traced-{name}"), traced(&scene));
        contents.insert(format!("drawn-{name}"), drawn(&scene));
    }
    contents
}

/// Two traces of one connection next to each other: node capture in both flows, and each beside the in-pod capture.
fn compared() -> BTreeMap<String, String> {
    let mut contents = BTreeMap::new();
    let what = "beta/pod1-2 10.244.2.11:8080";
    let json = |scene: &Scene| {
        let said = runtime::ambidex(&scene.lab, &format!("trace -o json {what}"));
        said.with_code(0)
    };
    let tunnel = json(&own(&Variant::NodeTunnel.spec()));
    for (variant, name) in [
        (Variant::NodeHybrid, "tunnel-hybrid"),
        (Variant::Inpod, "tunnel-inpod"),
    ] {
        let scene = own(&variant.spec());
        let file = scene.lab.dir().join("tunnel.json");
        std::fs::write(&file, &tunnel).unwrap();
        let arguments = format!("trace --compare {} {what}", file.display());
        let said = runtime::ambidex(&scene.lab, &arguments).with_code(0);
        let mut lines = vec![format!("node1# ambidex trace --compare tunnel.json {what}")];
        lines.extend(said.lines().map(|line| line.trim_end().to_owned()));
        contents.insert(format!("compared-{name}"), block(&lines));
    }
    contents
}

/// What was seen once, on the machine that wrote the document.
fn observations() -> BTreeMap<String, String> {
    let mut contents = BTreeMap::new();
    for (variant, name, predicted) in [
        (Variant::NodeTunnel, "met-tunnel", "predicted-tunnel"),
        (Variant::NodeHybrid, "met-hybrid", "predicted-hybrid"),
        (Variant::Inpod, "met-inpod", "predicted-inpod"),
    ] {
        let scene = own(&variant.spec());
        // What a first connection needs besides (the tunnel between the proxies) is there then.
        scene.check("pod1-1", scene.at("pod2-1"), Check::Who);
        let targets: &[&str] = match variant.is_node() {
            true => &["node1", "proxy1", "node2", "proxy2"],
            false => &["pod1-1", "node1", "node2", "pod2-1"],
        };
        contents.insert(name.to_owned(), met(&scene, targets));
        contents.insert(predicted.to_owned(), explained(&scene));
        if variant == Variant::NodeTunnel {
            let devices = ["istioin", "istioout"].map(|device| {
                let command = format!("ip -d link show {device}");
                let lines = rules::tidy("ip -d link", &raw(&scene, "node1", &command));
                format!("node1# {command}\n{}", lines.join("\n"))
            });
            contents.insert("node-devices".to_owned(), block(&devices));
        }
    }
    let said = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    };
    let commit = said("git", &["rev-parse", "--short", "HEAD"]);
    let kernel = said("uname", &["-r"]);
    contents.insert(
        "taken".to_owned(),
        format!("Taken from commit {commit}, on Linux {kernel}, by `make modes-doc`.\n"),
    );
    contents
}

#[test]
fn the_document_says_what_the_machine_says() {
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    if !all && std::env::var_os(WRITE).is_none() {
        eprintln!("listings are taken again with AMBIDEX_TEST_SUITE=all only");
        return;
    }
    let text = std::fs::read_to_string(document()).unwrap();
    let listings = listings();
    if std::env::var_os(WRITE).is_some() {
        let mut contents = observations();
        contents.extend(listings);
        contents.extend(traces());
        contents.extend(compared());
        std::fs::write(document(), filled(&text, &contents)).unwrap();
        return;
    }
    let parts = parts(&text);
    for (name, content) in &listings {
        let part = parts.iter().find(|part| part.name == *name);
        let part = part.unwrap_or_else(|| panic!("docs/modes.md has no part {name:?}"));
        assert_eq!(&part.content, content, "{name}: `make modes-doc` writes it");
    }
    // Diagrams and columns are of the same traces.
    for (name, content) in traces()
        .iter()
        .filter(|(name, _)| name.starts_with("traced"))
    {
        let part = parts.iter().find(|part| part.name == *name);
        let part = part.unwrap_or_else(|| panic!("docs/modes.md has no part {name:?}"));
        let (written, seen) = (&part.content, content);
        assert_eq!(
            without_measurements(written),
            without_measurements(seen),
            "{name}: `make modes-doc` writes it"
        );
    }
}

#[test]
fn no_generated_part_is_written_by_hand() {
    let text = std::fs::read_to_string(document()).unwrap();
    let parts = parts(&text);
    assert!(parts.len() >= 22, "{}", parts.len());
    for part in &parts {
        assert_eq!(part.digest, digest(&part.content), "{}", part.name);
        assert!(part.content.lines().count() > 0, "{} is empty", part.name);
    }
    let of = |name: &str| {
        let part = parts.iter().find(|part| part.name == name);
        &part.unwrap_or_else(|| panic!("no part {name}")).content
    };
    for (name, stations) in [("tunnel", 2), ("hybrid", 2), ("inpod", 0)] {
        let told = of(&format!("traced-{name}"));
        assert!(told.contains("everything was seen as predicted"), "{name}");
        let marks = told.matches("--tproxy-mark 0x400/0xfff").count();
        assert_eq!(marks, stations, "{name}");
        let drawn = of(&format!("drawn-{name}"));
        let diagram = drawn.strip_prefix("```mermaid\n").unwrap();
        mermaid::texts(diagram.strip_suffix("```\n").unwrap()).unwrap();
    }
    // The digest is of all of it.
    let changed = text.replace("ztunnel-PREROUTING", "ztunnel-prerouting");
    let broken = self::parts(&changed);
    assert!(
        broken
            .iter()
            .any(|part| part.digest != digest(&part.content))
    );
}
