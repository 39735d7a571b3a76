//! What is in the kernel, held beside the listings of the articles (`make golden`).
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod harness;
mod listings;

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use harness::{Scene, Variant, own};
use lab::standing::{Daemon, Lab};
use lab::topology::InpodRules;
use listings::known::{DEVIATIONS, EXTRAS, RECORD};
use listings::{Golden, Met, Names, Situation, compare, rules};

const THIRD_ARTICLE: &str = include_str!("golden/third-article.txt");
const NODE_1_20: &str = include_str!("golden/node-1.20.txt");
const INPOD_1_24: &str = include_str!("golden/inpod-redirect-1.24.txt");
const SECOND_ARTICLE: &str = include_str!("golden/second-article.txt");

/// As many captured pods as the third article's node has.
const PODS: u8 = 5;
/// Longest that a command may take.
const LIMIT: Duration = Duration::from_secs(60);

fn lab(variant: Variant) -> Scene {
    let mut spec = variant.spec();
    spec.pods_per_node = PODS;
    own(&spec)
}

/// What a place of the first node says.
fn says(lab: &Lab, place: &str, command: &str) -> Result<String> {
    if place == "agent" {
        return Ok(std::fs::read_to_string(lab.log_path(1, Daemon::Agent))?);
    }
    let target = match place {
        "node" => "node1",
        "proxy" => "proxy1",
        "pod" => "pod1-1",
        other => bail!("no place {other:?}"),
    };
    let said = lab.run(target, &["sh", "-c", command], LIMIT)?;
    // A table without routes may not be there.
    if said.stderr.contains("FIB table does not exist") {
        return Ok(String::new());
    }
    Ok(said.success(command)?.stdout)
}

/// Compares and says what of the lists of differences was met.
fn held_beside(scene: &Scene, situation: Situation, files: &[(&'static str, &str)]) -> Met {
    let names = Names::of(&scene.lab.topology());
    let mut met = Met::default();
    let mut errors = String::new();
    for (name, text) in files {
        let golden = Golden::parse(name, text).unwrap();
        let ask = |place: &str, command: &str| says(&scene.lab, place, command);
        if let Err(error) = compare(&golden, &names, situation, &mut met, ask) {
            errors.push_str(&format!("{error:#}\n"));
        }
    }
    assert!(errors.is_empty(), "{errors}");
    met
}

/// Every entry of the lists has its use: one that nothing needs any more goes.
fn assert_all_met(met: &Met, situation: Situation, not_here: &[&str]) {
    let extras = EXTRAS.iter().map(|extra| (extra.name, extra.situations));
    let deviations = DEVIATIONS.iter().map(|it| (it.name, it.situations));
    let unmet: Vec<&str> = extras
        .chain(deviations)
        .filter(|(name, situations)| {
            situations.contains(&situation) && !met.0.contains(name) && !not_here.contains(name)
        })
        .map(|(name, _)| name)
        .collect();
    assert!(unmet.is_empty(), "not met in {situation:?}: {unmet:?}");
}

/// Devices in detail are compared where the overlay is geneve: tests/geneve.
const IN_DETAIL: [&str; 2] = [
    "length of queue, in detail",
    "length of queue, in detail, of the other one",
];

#[test]
fn node_tunnel_is_the_third_article_s() {
    let scene = lab(Variant::NodeTunnel);
    let files = [("third article", THIRD_ARTICLE), ("1.20", NODE_1_20)];
    let met = held_beside(&scene, Situation::Tunnel, &files);
    assert_all_met(&met, Situation::Tunnel, &IN_DETAIL);
}

#[test]
fn node_hybrid_is_that_of_1_20() {
    let scene = lab(Variant::NodeHybrid);
    let files = [("third article", THIRD_ARTICLE), ("1.20", NODE_1_20)];
    let met = held_beside(&scene, Situation::Hybrid, &files);
    assert_all_met(&met, Situation::Hybrid, &IN_DETAIL);
}

#[test]
fn inpod_redirect_is_that_of_1_24() {
    let scene = lab(Variant::Inpod);
    let met = held_beside(&scene, Situation::InpodRedirect, &[("1.24", INPOD_1_24)]);
    assert_all_met(&met, Situation::InpodRedirect, &[]);
}

#[test]
fn inpod_tproxy_is_the_second_article_s() {
    let mut spec = Variant::Inpod.spec();
    spec.pods_per_node = PODS;
    spec.inpod_rules = InpodRules::Tproxy;
    let scene = own(&spec);
    // Sockets aside: it lists them of a proxy that speaks IPv6, and SOCKS5.
    let (introduction, rules) = SECOND_ARTICLE.split_once("== pod: ss ").unwrap();
    let (_, rules) = rules.split_once("== ").unwrap();
    let rules = format!("{introduction}== {rules}");
    let met = held_beside(
        &scene,
        Situation::InpodTproxy,
        &[("second article", &rules)],
    );
    // The article lists two tables, and no routing rules.
    let unlisted = ["AMBIDEX_GUARD_IN", "AMBIDEX_GUARD_OUT", "rule 32765"];
    assert_all_met(&met, Situation::InpodTproxy, &unlisted);
}

/// A rule that is gone, one more, one in another place and a line that is otherwise: each is seen, and nothing else.
#[test]
fn one_change_is_one_difference() {
    let scene = lab(Variant::NodeTunnel);
    let names = Names::of(&scene.lab.topology());
    let golden = Golden::parse("1.20", NODE_1_20).unwrap();
    let differences = || {
        let ask = |place: &str, command: &str| says(&scene.lab, place, command);
        let mut met = Met::default();
        let compared = compare(&golden, &names, Situation::Tunnel, &mut met, ask);
        let text = compared
            .err()
            .map(|error| error.to_string())
            .unwrap_or_default();
        let lines = text.lines().filter(|line| line.starts_with("  "));
        lines.map(|line| line.trim().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(differences(), Vec::<String>::new());
    let run = |target: &str, command: &str| {
        let done = scene.lab.run(target, &["sh", "-c", command], LIMIT);
        done.unwrap().success(command).unwrap();
    };
    run("node1", "ip rule del pref 102");
    assert_eq!(
        differences(),
        ["-102: from all fwmark 0x40/0x40 lookup 102"]
    );
    run("node1", "ip rule add pref 102 fwmark 0x40/0x40 lookup 103");
    assert_eq!(
        differences(),
        [
            "-102: from all fwmark 0x40/0x40 lookup 102",
            "+102: from all fwmark 0x40/0x40 lookup 103"
        ]
    );
    run(
        "node1",
        "ip rule del pref 102; ip rule add pref 102 fwmark 0x40/0x40 lookup 102",
    );
    run(
        "proxy1",
        "iptables -t mangle -A PREROUTING -p tcp -j ACCEPT",
    );
    assert_eq!(differences(), ["+mangle -A PREROUTING -p tcp -j ACCEPT"]);
    let moved = "PREROUTING -i pistioout -p tcp -j TPROXY --on-port 15001 --on-ip 127.0.0.1 --tproxy-mark 0x400/0xfff";
    run(
        "proxy1",
        &format!(
            "iptables -t mangle -D PREROUTING -p tcp -j ACCEPT; iptables -t mangle -D {moved}; iptables -t mangle -A {moved}"
        ),
    );
    let line = format!("mangle -A {moved}");
    let both = BTreeSet::from([format!("-{line}"), format!("+{line}")]);
    assert_eq!(differences().into_iter().collect::<BTreeSet<_>>(), both);
}

/// The record of decisions names each extra, each deviation and each rule, and has no other.
#[test]
fn the_record_names_every_difference() {
    let named: BTreeSet<&str> = RECORD
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once("` |"))
        .map(|(name, _)| name)
        .collect();
    let extras = EXTRAS.iter().map(|extra| (extra.name, extra.reason));
    let deviations = DEVIATIONS.iter().map(|it| (it.name, it.reason));
    let reasons = extras.chain(deviations);
    let mut wanted: BTreeSet<&str> = rules::names().collect();
    for (name, reason) in reasons {
        assert!(!reason.is_empty(), "{name}");
        assert!(RECORD.contains(reason), "the record lacks: {reason}");
        wanted.insert(name);
    }
    assert_eq!(named, wanted);
}

#[test]
fn all_files_of_listings_are_used() {
    let directory = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");
    let listed = |text: &str| {
        let parsed = Golden::parse("", text).context("parse").unwrap();
        assert!(
            parsed
                .listings
                .iter()
                .all(|listing| !listing.lines.is_empty())
        );
    };
    for text in [THIRD_ARTICLE, NODE_1_20, INPOD_1_24, SECOND_ARTICLE] {
        listed(text);
    }
    let mut files: Vec<String> = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    assert_eq!(
        files,
        [
            "geneve-devices.txt",
            "inpod-redirect-1.24.txt",
            "node-1.20.txt",
            "second-article.txt",
            "third-article.txt"
        ]
    );
}
