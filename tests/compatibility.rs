//! docs/compatibility.md against the source: every name that an operator may rely on is judged there, and what the document
//! says of a name is so.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

const DOCUMENT: &str = "docs/compatibility.md";
/// Where metrics, variables and log lines of the daemons are named.
const SOURCES: [&str; 6] = [
    "modes",
    "shared-proxy/src",
    "control-plane/src",
    "node-redirect/src",
    "inpod-redirect/src",
    "host-net/src",
];
/// Beginnings of the names of metrics.
const METRICS: [&str; 5] = [
    "istio_",
    "ambidex_",
    "workload_manager_",
    "process_",
    "tokio_",
];
/// What the text format adds to a name.
const SUFFIXES: [&str; 4] = ["", "_total", "_seconds", "_bytes"];

/// Where the tests of a file begin.
const TESTS: &str = "#[cfg(test)]\nmod tests {";

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn document() -> String {
    fs::read_to_string(root().join(DOCUMENT)).unwrap()
}

/// The code of some sources, without tests and comments.
fn code(sources: &[&str]) -> String {
    fn collect(place: &Path, into: &mut String) {
        for entry in fs::read_dir(place).unwrap() {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap();
            if path.is_dir() {
                if name != "tests" {
                    collect(&path, into);
                }
            } else if name.ends_with(".rs") && name != "tests.rs" {
                let text = fs::read_to_string(&path).unwrap();
                let code = text.split(TESTS).next().unwrap();
                let lines = code.lines();
                let lines = lines.filter(|line| !line.trim_start().starts_with("//"));
                for line in lines {
                    into.push_str(line);
                    into.push('\n');
                }
            }
        }
    }
    let mut all = String::new();
    for source in sources {
        collect(&root().join(source), &mut all);
    }
    all
}

/// The texts between quotation marks. A mark behind a backslash or between apostrophes does not count.
fn literals(code: &str) -> Vec<&str> {
    let plain = |line: &str| !line.contains("\\\"") && !line.contains("'\"'");
    let lines = code.lines().filter(|line| plain(line));
    lines
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .collect()
}

fn is_name(text: &str, letter: fn(&char) -> bool) -> bool {
    !text.is_empty()
        && text
            .chars()
            .all(|c| letter(&c) || c.is_ascii_digit() || c == '_')
}

/// Names that the document has between backticks; `a_{b,c}` stands for `a_b` and `a_c`.
fn named(text: &str) -> BTreeSet<String> {
    let marked = text
        .lines()
        .flat_map(|line| line.split('`').skip(1).step_by(2));
    let mut names = BTreeSet::new();
    for name in marked {
        match name.split_once('{').and_then(|(before, rest)| {
            let (choices, after) = rest.split_once('}')?;
            Some((before, choices, after))
        }) {
            Some((before, choices, after)) => {
                let all = choices
                    .split(',')
                    .map(|choice| format!("{before}{choice}{after}"));
                names.extend(all);
            }
            None => drop(names.insert(name.to_owned())),
        }
    }
    names
}

/// What the source has and the document has not.
fn missing(names: &BTreeSet<String>, document: &str) -> Vec<String> {
    let named = named(document);
    let known = |name: &String| {
        let mut forms = SUFFIXES.iter().map(|suffix| format!("{name}{suffix}"));
        forms.any(|form| named.contains(&form))
    };
    names.iter().filter(|name| !known(name)).cloned().collect()
}

fn metrics(code: &str) -> BTreeSet<String> {
    let found = literals(code).into_iter().filter(|text| {
        let begins = |start: &&str| text.starts_with(*start) && text.len() > start.len();
        METRICS.iter().any(begins) && is_name(text, char::is_ascii_lowercase)
    });
    found.map(str::to_owned).collect()
}

/// Variables that are a flag, and those that are read by a name in capitals. Where commands are run, `PATH` is nobody's
/// setting of ours.
fn variables() -> BTreeSet<String> {
    let code = code(&[
        "modes",
        "shared-proxy/src",
        "control-plane/src",
        "host-net/src",
    ]);
    let code = code.as_str();
    let flags = code.split("env = \"").skip(1);
    let flags = flags.filter_map(|rest| rest.split('"').next());
    let own = literals(code)
        .into_iter()
        .filter(|text| text.starts_with("AMBIDEX_"));
    let read = code.split("var(\"").chain(code.split("var_os(\""));
    let read = read.skip(1).filter_map(|rest| rest.split('"').next());
    flags
        .chain(own)
        .chain(read)
        .filter(|name| is_name(name, char::is_ascii_uppercase) && *name != "PATH")
        .map(str::to_owned)
        .collect()
}

/// Keys of the access log: the fields of its events.
fn log_keys() -> BTreeSet<String> {
    let path = root().join("shared-proxy/src/telemetry/access_log.rs");
    let text = fs::read_to_string(path).unwrap();
    let keys = text
        .lines()
        .filter_map(|line| line.trim().split_once(" = "));
    let keys = keys.map(|(key, _)| key);
    keys.filter(|key| {
        !key.contains(' ')
            && key
                .chars()
                .all(|c| c.is_ascii_lowercase() || "._".contains(c))
    })
    .map(str::to_owned)
    .collect()
}

/// Labels of a connection's metrics, and what their flag may be.
fn labels(code: &str) -> BTreeSet<String> {
    let path = root().join("shared-proxy/src/telemetry/labels.rs");
    let text = fs::read_to_string(path).unwrap();
    let plain = text.split(TESTS).next().unwrap();
    let mut names: BTreeSet<String> = literals(plain)
        .into_iter()
        .filter(|text| text.contains('_') && is_name(text, char::is_ascii_lowercase))
        .map(str::to_owned)
        .collect();
    let (_, flags) = code.split_once("impl ResponseFlag").unwrap();
    let flags = flags.split("\n}").next().unwrap();
    let flags = literals(flags).into_iter();
    names.extend(flags.map(str::to_owned));
    names
}

fn assert_judged(what: &str, names: &BTreeSet<String>, least: usize) {
    assert!(
        names.len() >= least,
        "{what}: only {names:?} are found in the source"
    );
    let missing = missing(names, &document());
    assert!(
        missing.is_empty(),
        "{DOCUMENT} says nothing of the {what} {missing:?}"
    );
    let without = document().replace(names.first().unwrap(), "");
    assert!(
        !self::missing(names, &without).is_empty(),
        "{what}: nothing is ever missing"
    );
}

#[test]
fn every_name_of_the_source_is_judged() {
    let code = code(&SOURCES);
    assert_judged("metrics", &metrics(&code), 30);
    assert_judged("variables", &variables(), 50);
    assert_judged("keys of the access log", &log_keys(), 15);
    assert_judged("labels and flags", &labels(&code), 15);
}

/// Rows of the tables under a heading: names, and the verdict.
fn rows(document: &str, heading: &str) -> Vec<(BTreeSet<String>, String)> {
    let (_, section) = document
        .split_once(&format!("\n## {heading}\n"))
        .expect(heading);
    let section = section.split("\n## ").next().unwrap();
    let rows = section.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let mut cells = row.split('|').map(str::trim).skip(1);
        let names = named(cells.next().unwrap());
        (names, cells.next().unwrap().to_owned())
    })
    .collect()
}

/// A name that is the same or differs is read by the program; one that is absent is not.
#[test]
fn verdicts_about_variables_and_metrics_hold() {
    let (document, code) = (document(), code(&SOURCES));
    let literals: BTreeSet<&str> = literals(&code).into_iter().collect();
    let mut judged = 0;
    for heading in [
        "Environment of the proxy",
        "Environment of the agent",
        "Metrics",
    ] {
        for (names, verdict) in rows(&document, heading) {
            for name in names {
                let plain = name.trim_end_matches('*');
                let mut forms = SUFFIXES.iter().map(|suffix| plain.strip_suffix(suffix));
                let there = match name.strip_suffix('*') {
                    Some(start) => literals.iter().any(|text| text.starts_with(start)),
                    None => forms.any(|form| form.is_some_and(|form| literals.contains(form))),
                };
                match verdict.as_str() {
                    "same" | "differs" | "ours" => {
                        assert!(there, "{name}: {verdict}, but no source names it")
                    }
                    "absent" => assert!(!there, "{name}: absent, but the source names it"),
                    other => panic!("{name}: the verdict is {other:?}"),
                }
                judged += 1;
            }
        }
    }
    assert!(judged > 80, "only {judged} names are in the tables");
}
