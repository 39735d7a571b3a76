//! Rules of the tree that a compiler does not check: licences, who depends on whom, file sizes, no traces of a machine.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::LazyLock;

use serde_json::Value;

/// Crate of this workspace → the crates of this workspace that it may depend on, for building and for testing.
const MAY_DEPEND_ON: [(&str, &[&str]); 9] = [
    ("fuzz-driver", &[]),
    ("shared-proxy", &["fuzz-driver"]),
    ("host-net", &["fuzz-driver"]),
    ("node-redirect", &["shared-proxy", "host-net"]),
    (
        "inpod-redirect",
        &["shared-proxy", "host-net", "fuzz-driver"],
    ),
    (
        "splice-relay",
        &["shared-proxy", "host-net", "inpod-redirect", "fuzz-driver"],
    ),
    ("control-plane", &["shared-proxy", "fuzz-driver"]),
    ("lab", &["host-net"]),
    (
        "ambidex",
        &[
            "fuzz-driver",
            "shared-proxy",
            "host-net",
            "node-redirect",
            "inpod-redirect",
            "splice-relay",
            "control-plane",
            "lab",
        ],
    ),
];

const LINES: usize = 600;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn packages(more: &[&str]) -> Vec<Value> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--offline", "--format-version", "1"])
        .args(more)
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "cargo metadata (`cargo fetch` gets what is missing): {errors}"
    );
    let metadata: Value = serde_json::from_slice(&output.stdout).unwrap();
    metadata["packages"].as_array().unwrap().clone()
}

/// The list `allow` of the section `[licenses]` in deny.toml.
static LICENCES: LazyLock<Vec<String>> = LazyLock::new(|| {
    let text = std::fs::read_to_string(root().join("deny.toml")).unwrap();
    let (_, section) = text.split_once("[licenses]").unwrap();
    let (_, list) = section.split_once("allow = [").unwrap();
    let (list, _) = list.split_once(']').unwrap();
    list.split(',')
        .map(|item| item.trim().trim_matches('"').to_owned())
        .filter(|item| !item.is_empty())
        .collect()
});

/// Whether a licence expression can be satisfied with [`LICENCES`]. `/` is an old way of writing OR.
fn permitted(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ");
    let spaced = expression.replace('(', " ( ").replace(')', " ) ");
    let tokens: Vec<&str> = spaced.split_whitespace().collect();
    let mut at = 0;
    let result = any_of(&tokens, &mut at);
    assert_eq!(at, tokens.len(), "licence expression {expression:?}");
    result
}

fn any_of(tokens: &[&str], at: &mut usize) -> bool {
    let mut result = all_of(tokens, at);
    while tokens.get(*at) == Some(&"OR") {
        *at += 1;
        result |= all_of(tokens, at);
    }
    result
}

fn all_of(tokens: &[&str], at: &mut usize) -> bool {
    let mut result = one(tokens, at);
    while tokens.get(*at) == Some(&"AND") {
        *at += 1;
        result &= one(tokens, at);
    }
    result
}

fn one(tokens: &[&str], at: &mut usize) -> bool {
    if tokens[*at] == "(" {
        *at += 1;
        let result = any_of(tokens, at);
        assert_eq!(tokens.get(*at), Some(&")"));
        *at += 1;
        return result;
    }
    let mut licence = tokens[*at].to_owned();
    *at += 1;
    if tokens.get(*at) == Some(&"WITH") {
        licence = format!("{licence} WITH {}", tokens[*at + 1]);
        *at += 2;
    }
    LICENCES.contains(&licence)
}

#[test]
fn licence_expressions_are_read_as_written() {
    assert!(permitted("MIT OR LGPL-2.1-or-later"));
    assert!(permitted("MIT/GPL-2.0"));
    assert!(permitted("(GPL-3.0 OR ISC) AND MIT"));
    assert!(permitted("GPL-3.0 OR Apache-2.0 WITH LLVM-exception"));
    assert!(!permitted("MIT AND MPL-2.0"));
    assert!(!permitted("MIT AND (GPL-3.0 OR AGPL-3.0)"));
    assert!(!permitted("GPL-2.0 WITH LLVM-exception"));
}

#[test]
fn every_dependency_is_permissively_licensed_and_from_the_registry() {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let packages = packages(&["--filter-platform", &target]);
    assert!(packages.len() > 100, "{} packages", packages.len());
    let mut bad = Vec::new();
    for package in &packages {
        let licence = package["license"].as_str().unwrap_or_default();
        let source = package["source"].as_str();
        let from =
            source.is_none_or(|s| s == "registry+https://github.com/rust-lang/crates.io-index");
        if licence.is_empty() || !permitted(licence) || !from {
            bad.push(format!("{} {licence:?} {source:?}", package["name"]));
        }
    }
    assert!(bad.is_empty(), "{bad:#?}");
}

#[test]
fn crates_depend_on_each_other_in_one_direction() {
    let packages = packages(&["--no-deps"]);
    let names: BTreeSet<_> = packages
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, MAY_DEPEND_ON.map(|(name, _)| name).into());
    // Without cycles, because each crate may depend only on those listed before it.
    for (at, (name, allowed)) in MAY_DEPEND_ON.iter().enumerate() {
        let before = &MAY_DEPEND_ON[..at];
        assert!(
            allowed.iter().all(|a| before.iter().any(|(b, _)| a == b)),
            "{name}"
        );
        let package = packages.iter().find(|p| p["name"] == *name).unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let on = dependency["name"].as_str().unwrap();
            assert!(
                !names.contains(on) || allowed.contains(&on),
                "{name} must not depend on {on}"
            );
        }
    }
}

/// Files of the tree, without what git does not keep.
fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            let built = ["target", "out"].map(|name| root().join(name));
            if !built.contains(&entry.path()) && name != ".git" && name != "__pycache__" {
                files(&entry.path(), found);
            }
        } else if kind.is_file()
            && name != ".git"
            && entry.path().extension() != Some("pcap".as_ref())
        {
            found.push(entry.path());
        }
    }
}

fn tree() -> Vec<PathBuf> {
    let mut found = Vec::new();
    files(root(), &mut found);
    assert!(found.iter().any(|path| path.ends_with("capture.rs")));
    found
}

#[test]
fn no_source_file_is_too_long() {
    let mut long = Vec::new();
    for path in tree() {
        if path.extension() == Some("rs".as_ref()) {
            let lines = std::fs::read_to_string(&path).unwrap().lines().count();
            if lines > LINES {
                long.push(format!("{}: {lines} lines", path.display()));
            }
        }
    }
    assert!(long.is_empty(), "more than {LINES}: {long:#?}");
}

/// Where a distribution of Kubernetes has the CNI plugins on every node: nobody's machine in particular.
const GKE_PLUGINS: &str = concat!("/", "home/kubernetes/bin");

#[test]
fn no_file_names_a_place_on_somebodys_machine() {
    // Put together here, so that this file does not contain them.
    let mut places: Vec<String> = ["home", "root", "Users", "builds", "work"]
        .map(|top| format!("/{top}/"))
        .into();
    // A checkout at a place like /src would find harmless paths.
    if root().components().count() > 2 {
        places.push(root().display().to_string());
    }
    places.extend(std::env::var("CARGO_HOME"));
    let mut traces = Vec::new();
    for path in tree() {
        let bytes = std::fs::read(&path).unwrap();
        let text = String::from_utf8_lossy(&bytes);
        for (number, line) in text.lines().enumerate() {
            let line = &line.replace(GKE_PLUGINS, "");
            if places.iter().any(|place| starts_a_path(line, place)) {
                traces.push(format!("{}:{}: {line}", path.display(), number + 1));
            }
        }
    }
    assert!(traces.is_empty(), "{traces:#?}");
}

/// Whether `place` stands in `line` as the beginning of an absolute path, not in the middle of one or of a URL.
fn starts_a_path(line: &str, place: &str) -> bool {
    line.match_indices(place).any(|(at, _)| {
        !line[..at].ends_with(|before: char| before.is_alphanumeric() || "._-}".contains(before))
    })
}

/// The tables of docs/compatibility.md name the tests that hold each row: `module::function` or `module::function::case`.
#[test]
fn tests_that_the_documents_name_exist() {
    let path = root().join("docs/compatibility.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, rows) = text.split_once("## Decisions, row by row").unwrap();
    let sources = tree();
    let mut named = 0;
    let mut missing = Vec::new();
    for name in rows.split('`').filter(|name| name.contains("::")) {
        named += 1;
        if !sources.iter().any(|source| holds_test(source, name)) {
            missing.push(name);
        }
    }
    assert!(named > 100, "{named} names are read");
    assert!(missing.is_empty(), "no such tests: {missing:#?}");
    // A row without a test would be a promise.
    let rows = rows.lines().filter(|line| line.starts_with("| "));
    let without: Vec<&str> = rows
        .filter(|line| !line.contains("Tests |") && !line.contains("::"))
        .collect();
    assert!(without.is_empty(), "{without:#?}");
}

/// Whether a source is the module of this test, `module.rs` or `module/tests.rs`, and has it.
fn holds_test(source: &Path, name: &str) -> bool {
    let mut parts = name.split("::");
    let module = parts.next().unwrap_or_default();
    let stem = |path: &Path| path.file_stem().is_some_and(|stem| stem == module);
    let of_module =
        stem(source) || (source.ends_with("tests.rs") && source.parent().is_some_and(stem));
    if !of_module || source.extension().is_none_or(|kind| kind != "rs") {
        return false;
    }
    let text = std::fs::read_to_string(source).unwrap();
    let has = |part: String| text.contains(&part);
    let function = parts.next().unwrap_or_default();
    has(format!("fn {function}(")) && parts.all(|case| has(format!("#[case::{case}(")))
}
