//! `ambidex bug-report`: what is in it, what is not, and that it needs nobody who lives.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::Command;

use flate2::read::GzDecoder;
use lab::standing::{Daemon, Lab};
use lab::topology::Mode;
use serde_json::Value;

use crate::harness::{ambidex, own, spec};
use crate::runtime::Done;

/// A token as Kubernetes makes them.
const WEB_TOKEN: &str =
    "eyJhbGciOiJSUzI1NiIsImtpZCI6IngifQ.eyJpc3MiOiJrdWJlcm5ldGVzIn0.c2lnbmF0dXJlLW9mLWl0";
/// A token that is known from the environment only.
const PLAIN_TOKEN: &str = "correct-horse-battery-staple";
const BEARER: &str = "bGVnYWN5LXRva2Vu.x1";

/// The files of an archive by their names below its only directory.
fn unpacked(path: &Path) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(GzDecoder::new(File::open(path).unwrap()));
    let mut files = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let name = entry.path().unwrap().to_str().unwrap().to_owned();
        let (root, name) = name.split_once('/').unwrap();
        assert_eq!(root, "report");
        let mut text = String::new();
        entry.read_to_string(&mut text).unwrap();
        assert_eq!(entry.header().mode().unwrap(), 0o600);
        files.insert(name.to_owned(), text);
    }
    files
}

fn report(lab: &Lab, directory: &Path) -> (Done, BTreeMap<String, String>) {
    let out = directory.join("report.tar.gz");
    let mut command = Command::new(ambidex());
    command
        .args(["bug-report", "--cni-conf-dir", "/nonexistent", "--out"])
        .arg(&out)
        .arg("--log")
        .arg(directory.join("some.log"))
        .envs(lab.environment(1))
        .env("AUTH_TOKEN", PLAIN_TOKEN);
    let node = lab.netns("node1").unwrap();
    let said = node.run(|| Done::of(&mut command, b"")).unwrap();
    assert_eq!(said.code, 0, "{said:?}");
    (said, unpacked(&out))
}

#[track_caller]
fn has<'a>(files: &'a BTreeMap<String, String>, beginning: &str, end: &str) -> &'a str {
    let mut found = files
        .iter()
        .filter(|(name, _)| name.starts_with(beginning) && name.ends_with(end));
    let names: Vec<&String> = files.keys().collect();
    let (_, text) = found
        .next()
        .unwrap_or_else(|| panic!("no {beginning}…{end} in {names:#?}"));
    text
}

#[test]
fn one_archive_has_everything_but_secrets_and_needs_nobody() {
    let mut spec = spec(Mode::Mixed);
    spec.proxy_args = vec!["--auth-token".to_owned(), PLAIN_TOKEN.to_owned()];
    let scene = own(&spec);
    let lab = &scene.lab;
    let directory = tempfile::tempdir().unwrap();
    let key =
        fs::read_to_string(Path::new(&lab.environment(1)["AMBIDEX_CA_DIR"]).join("root-key.pem"))
            .unwrap();
    let body: Vec<&str> = key
        .lines()
        .filter(|line| !line.starts_with("-----"))
        .collect();
    fs::write(
        directory.path().join("some.log"),
        format!("first\n{key}\nraw {}\nAuthorization: Bearer {BEARER}\n{WEB_TOKEN}\n{PLAIN_TOKEN}\nlast\n", body[0]),
    )
    .unwrap();

    let (said, files) = report(lab, directory.path());
    for (beginning, end, content) in [
        ("versions.json", "", "\"kernel\": \"Linux"),
        ("doctor.json", "", "\"recommended\""),
        ("facts.json", "", "\"features\""),
        ("node/dump.txt", "", "ztunnel-pods-ips"),
        ("state/journal/host-node.json", "", "istioin"),
        ("pods/", "/dump.txt", "rule4 "),
        ("pods/", "/plan.json", "\"steps\""),
        ("pods/", "/diff.json", "["),
        ("agent/health.txt", "", "ready"),
        ("agent/pods.json", "", "\"captured\""),
        ("agent/verify.json", "", "\"listeners\""),
        ("agent/plan-node.json", "", "\"steps\""),
        ("agent/diff-node.json", "", "["),
        ("agent/command.txt", "", " agent "),
        ("agent/log.txt", "", "\"level\""),
        ("agent/metrics.txt", "", "ztunnel_connected"),
        ("proxies/", "/config_dump.json", "certChain"),
        ("proxies/", "/dump.txt", "pistioin"),
        ("proxies/", "/metrics.txt", "istio_"),
        ("proxies/", "/log.txt", "\"level\""),
        ("proxies/", "/command.txt", "--auth-token [redacted]"),
        ("certificates/root-cert.pem", "", "BEGIN CERTIFICATE"),
        ("logs/", "some.log", "first\n[redacted]\n"),
    ] {
        let text = has(&files, beginning, end);
        assert!(
            text.contains(content),
            "{beginning}…{end} without {content:?}: {text:.3000}"
        );
    }
    assert!(has(&files, "logs/", "some.log").ends_with("last\n"));
    assert!(
        said.stderr.contains("√ agent/verify.json\n"),
        "{}",
        said.stderr
    );
    let verified: Value = serde_json::from_str(&files["agent/verify.json"]).unwrap();
    assert!(verified.as_array().unwrap().len() > 2, "{verified:#}");
    assert_eq!(files["missing.txt"], "", "{}", said.stderr);
    no_secrets(&files, &body);

    for daemon in [Daemon::Agent, Daemon::Proxy] {
        lab.kill(1, daemon).unwrap();
    }
    let (said, files) = report(lab, directory.path());
    assert!(
        said.stderr.contains("× agent/health.txt: "),
        "{}",
        said.stderr
    );
    assert!(
        files["missing.txt"].contains("agent/health.txt: "),
        "{}",
        files["missing.txt"]
    );
    assert!(!files.contains_key("agent/pods.json"));
    for (beginning, end, content) in [
        ("node/dump.txt", "", "ztunnel-pods-ips"),
        ("pods/", "/dump.txt", "rule4 "),
        ("state/pods/", ".json", "\"netns\""),
        ("doctor.json", "", "host/captured-without-proxy"),
    ] {
        let text = has(&files, beginning, end);
        assert!(
            text.contains(content),
            "{beginning}…{end} without {content:?}: {text:.3000}"
        );
    }
    no_secrets(&files, &body);
}

fn no_secrets(files: &BTreeMap<String, String>, key: &[&str]) {
    for (name, text) in files {
        let secrets = key
            .iter()
            .chain(&["PRIVATE KEY", WEB_TOKEN, PLAIN_TOKEN, BEARER]);
        for secret in secrets {
            assert!(!text.contains(secret), "{secret:?} in {name}");
        }
    }
}
