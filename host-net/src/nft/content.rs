//! A table as nft lists it, and how two of them differ.

use std::collections::BTreeMap;

use crate::engine::Problem;

/// What a table holds: the lines of each chain or set, by its heading. The order of chains has no meaning.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Content(BTreeMap<String, Vec<String>>);

impl Content {
    /// Reads a listing of one table. Its outermost braces are the table's.
    pub(super) fn parse(listing: &str) -> Self {
        let mut content = BTreeMap::<String, Vec<String>>::new();
        let mut open: Option<String> = None;
        let lines = listing.lines().map(str::trim);
        for line in lines.filter(|line| !line.is_empty() && !line.starts_with("table ")) {
            match (&open, line.strip_suffix(" {"), line) {
                (None, Some(heading), _) => {
                    content.entry(heading.to_owned()).or_default();
                    open = Some(heading.to_owned());
                }
                (Some(_), _, "}") => open = None,
                (Some(heading), ..) => {
                    content
                        .entry(heading.clone())
                        .or_default()
                        .push(line.to_owned());
                }
                (None, None, _) => {}
            }
        }
        Self(content)
    }

    /// What is wrong with `found`, where `self` is wanted.
    pub(super) fn problem(&self, found: &Self) -> Option<Problem> {
        if self == found {
            return None;
        }
        let mut lacks = Vec::new();
        let mut extra = Vec::new();
        let mut moved = Vec::new();
        let nothing = Vec::new();
        for heading in self
            .0
            .keys()
            .chain(found.0.keys().filter(|h| !self.0.contains_key(*h)))
        {
            let wanted = self.0.get(heading).unwrap_or(&nothing);
            let there = found.0.get(heading).unwrap_or(&nothing);
            let (less, more) = (beyond(wanted, there), beyond(there, wanted));
            if less.is_empty() && more.is_empty() && wanted != there {
                moved.push(heading.clone());
            }
            // The heading alone says it where a whole chain is gone or foreign.
            match (self.0.contains_key(heading), found.0.contains_key(heading)) {
                (true, false) => lacks.push(heading.clone()),
                (false, true) => extra.push(heading.clone()),
                _ => {
                    lacks.extend(less.into_iter().map(|rule| format!("{heading}: {rule}")));
                    extra.extend(more.into_iter().map(|rule| format!("{heading}: {rule}")));
                }
            }
        }
        Some(match (lacks.is_empty(), extra.is_empty()) {
            (true, false) => Problem::Foreign { found: extra },
            (true, true) => Problem::Order {
                found: moved.join(", "),
            },
            (false, _) => Problem::Different {
                found: [("lacks", lacks), ("has", extra)]
                    .into_iter()
                    .filter(|(_, rules)| !rules.is_empty())
                    .map(|(what, rules)| format!("{what} `{}`", rules.join("`, `")))
                    .collect::<Vec<_>>()
                    .join("; "),
            },
        })
    }
}

/// What the first list has beyond the second one, as often as it does.
fn beyond(rules: &[String], than: &[String]) -> Vec<String> {
    let mut rest: Vec<&String> = than.iter().collect();
    let left = |rule: &&String| match rest.iter().position(|other| other == rule) {
        Some(at) => {
            rest.swap_remove(at);
            false
        }
        None => true,
    };
    rules.iter().filter(left).cloned().collect()
}
