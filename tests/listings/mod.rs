//! Live listings held beside listings that were typed by hand from articles: what differs, line by line.
//!
//! Before they are compared, names of the lab become the article's ([`Names`]), what differs between any two machines is
//! left out by a named rule ([`rules`]), and what is ours beyond the article or deviates from it is taken for so only if
//! [`known`] says so with a reason. What remains must be the article's listing.
#![allow(dead_code, reason = "each test program uses another part")]

pub mod known;
pub mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use anyhow::{Context, Result, bail};
use lab::topology::Topology;

pub use known::Situation;

/// One command in one place, and what it prints.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// `node`, `proxy`, `pod` or `agent`.
    pub place: String,
    /// The command line, with the article's names.
    pub command: String,
    /// What it prints.
    pub lines: Vec<String>,
}

/// A file of listings.
#[derive(Debug)]
pub struct Golden {
    /// Its name.
    pub name: &'static str,
    /// In the file's order.
    pub listings: Vec<Listing>,
}

impl Golden {
    /// Reads a file: `== PLACE: COMMAND` begins a listing, `#` a remark.
    pub fn parse(name: &'static str, text: &str) -> Result<Self> {
        let mut listings: Vec<Listing> = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            if let Some(head) = line.strip_prefix("== ") {
                let (place, command) = head.split_once(": ").context(head.to_owned())?;
                listings.push(Listing {
                    place: place.to_owned(),
                    command: command.to_owned(),
                    lines: Vec::new(),
                });
            } else if !line.is_empty() {
                let listing = listings.last_mut().context("a line before any listing")?;
                listing.lines.push(line.to_owned());
            }
        }
        if listings.is_empty() {
            bail!("{name}: no listing");
        }
        Ok(Self { name, listings })
    }
}

/// The lab's names and the article's: addresses, devices, pods, their namespaces and UIDs.
#[derive(Debug, Default)]
pub struct Names {
    to_article: BTreeMap<String, String>,
    to_lab: BTreeMap<String, String>,
    absent: BTreeSet<&'static str>,
}

/// The captured pods of the third article's node: name, address, UID where the article has it.
const PODS: [(&str, &str, &str); 5] = [
    (
        "reviews-v1-6494d87c7b-zrpks",
        "10.244.1.4",
        "uid-of-reviews-v1",
    ),
    (
        "reviews-v2-79857b95b-m4q2g",
        "10.244.1.5",
        "0ff78312-3a13-4a02-b39d-644bfb91e861",
    ),
    (
        "reviews-v3-75f494fccb-92nq5",
        "10.244.1.6",
        "e41edf7c-a347-45cb-a144-97492faa77bf",
    ),
    (
        "productpage-v1-7c548b785b-w9zl6",
        "10.244.1.7",
        "uid-of-productpage",
    ),
    (
        "ratings-v1-85c74b6cb4-57m52",
        "10.244.1.8",
        "uid-of-ratings",
    ),
];

impl Names {
    /// Those of a lab's first node. Pods of the article that the lab has no counterpart of are absent.
    pub fn of(topology: &Topology) -> Self {
        let mut names = Self::default();
        let Some(node) = topology.node(1) else {
            return names;
        };
        names.put(&node.pod_gateway.to_string(), "10.244.1.1");
        names.put(&node.proxy_ip.to_string(), "10.244.1.2");
        names.put(&node.proxy_veth, "veth5db63c11");
        let captured: Vec<_> = node
            .pods
            .iter()
            .filter(|pod| pod.capture.is_some())
            .collect();
        for (index, (name, address, uid)) in PODS.into_iter().enumerate() {
            let Some(pod) = captured.get(index) else {
                names.absent.insert(address);
                continue;
            };
            names.put(&pod.name, name);
            names.put(&pod.ip.to_string(), address);
            names.put(&pod.uid, uid);
            // Of many names only the way back to the article is wanted.
            names
                .to_article
                .insert(pod.namespace.clone(), "default".to_owned());
        }
        names
    }

    fn put(&mut self, lab: &str, article: &str) {
        self.to_article.insert(lab.to_owned(), article.to_owned());
        self.to_lab.insert(article.to_owned(), lab.to_owned());
    }

    /// A command of the article's as the lab has to be asked.
    pub fn in_lab(&self, text: &str) -> String {
        replaced(text, &self.to_lab)
    }

    /// What the lab said as the article would.
    pub fn in_article(&self, text: &str) -> String {
        replaced(text, &self.to_article)
    }

    /// Whether a line of the article's is about a pod that the lab does not have.
    fn is_absent(&self, line: &str) -> bool {
        words(line).any(|word| self.absent.contains(word))
    }
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !is_of_a_word(c))
}

fn is_of_a_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_')
}

/// Whole words only: 10.244.1.1 is no part of 10.244.1.10.
fn replaced(text: &str, table: &BTreeMap<String, String>) -> String {
    let mut out = String::new();
    for part in text.split_inclusive(|c: char| !is_of_a_word(c)) {
        let word = part.trim_end_matches(|c: char| !is_of_a_word(c));
        out.push_str(table.get(word).map_or(word, String::as_str));
        out.push_str(&part[word.len()..]);
    }
    out
}

/// What was met of what is known to differ; so that a list of differences has no entry without a use.
#[derive(Debug, Default)]
pub struct Met(pub BTreeSet<&'static str>);

/// Compares all listings of a file with what `run` says of a place. The error has every line that differs.
pub fn compare(
    golden: &Golden,
    names: &Names,
    situation: Situation,
    met: &mut Met,
    mut run: impl FnMut(&str, &str) -> Result<String>,
) -> Result<()> {
    let mut differences = String::new();
    for listing in &golden.listings {
        let asked = names.in_lab(&listing.command);
        let live =
            run(&listing.place, &asked).with_context(|| format!("{}: {asked}", listing.place))?;
        let live = rules::tidy(&listing.command, &names.in_article(&live));
        let live = known::without_extras(listing, live, situation, met);
        let typed: Vec<String> = listing
            .lines
            .iter()
            .filter(|line| !names.is_absent(line))
            .cloned()
            .collect();
        let is_excerpt = typed
            .iter()
            .any(|line| line == "..." || listing.place == "agent");
        let typed = rules::tidy(&listing.command, &typed.join("\n"));
        let typed = known::with_deviations(listing, typed, situation, met);
        let lines = if is_excerpt {
            not_among(&typed, &live)
        } else {
            difference(&typed, &live)
        };
        if !lines.is_empty() {
            let _ = writeln!(differences, "{}: {}:", listing.place, listing.command);
            lines.iter().for_each(|line| {
                let _ = writeln!(differences, "  {line}");
            });
        }
    }
    if differences.is_empty() {
        return Ok(());
    }
    bail!(
        "{} ({situation:?}): - is the article's, + is here\n{differences}",
        golden.name
    )
}

/// The typed lines that are not in `live` in their order.
fn not_among(typed: &[String], live: &[String]) -> Vec<String> {
    let mut rest = live.iter();
    let mut missing = Vec::new();
    for line in typed {
        let from_here = rest.clone();
        if !rest.any(|other| other == line) {
            missing.push(format!("-{line}"));
            rest = from_here;
        }
    }
    missing
}

/// By the longest common subsequence: a line that only moved shows up as both.
fn difference(typed: &[String], live: &[String]) -> Vec<String> {
    let mut longest = vec![vec![0_usize; live.len() + 1]; typed.len() + 1];
    for (i, a) in typed.iter().enumerate().rev() {
        for (j, b) in live.iter().enumerate().rev() {
            longest[i][j] = if a == b {
                longest[i + 1][j + 1] + 1
            } else {
                longest[i + 1][j].max(longest[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut lines = Vec::new();
    while i < typed.len() || j < live.len() {
        if i < typed.len() && j < live.len() && typed[i] == live[j] {
            (i, j) = (i + 1, j + 1);
        } else if j == live.len() || i < typed.len() && longest[i + 1][j] >= longest[i][j + 1] {
            lines.push(format!("-{}", typed[i]));
            i += 1;
        } else {
            lines.push(format!("+{}", live[j]));
            j += 1;
        }
    }
    lines
}
