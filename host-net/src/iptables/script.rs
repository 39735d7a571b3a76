//! The text that `iptables-restore --noflush` takes, put together from single changes.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::IptablesError;
use crate::plan::Table;

/// Changes to the chains of one family in one namespace.
///
/// Tables come out in the order of [`Table`], `nat` last: a restore is atomic per table only, and `nat` is the gate
/// that begins to redirect. Within a table the changes come in this order, whatever the order of the calls: declared
/// chains, removed rules, flushed chains, appended rules, inserted rules, removed chains. So one script can replace a
/// chain and the jump that leads to it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RestoreScript {
    tables: BTreeMap<Table, Changes>,
}

#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct Changes {
    declared: Vec<String>,
    removed: Vec<(String, String)>,
    flushed: Vec<String>,
    appended: Vec<(String, String)>,
    inserted: Vec<(String, usize, String)>,
    dropped: Vec<String>,
}

impl RestoreScript {
    /// A script without changes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.tables.is_empty()
    }

    /// An own chain that shall exist and be empty before rules are appended: it is created, or flushed if it exists.
    pub fn declare(&mut self, table: Table, chain: &str) {
        self.of(table).declared.push(chain.to_owned());
    }

    /// Empties a chain.
    pub fn flush(&mut self, table: Table, chain: &str) {
        self.of(table).flushed.push(chain.to_owned());
    }

    /// Puts a rule at the end of a chain.
    pub fn append(&mut self, table: Table, chain: &str, rule: &str) {
        let rule = (chain.to_owned(), rule.to_owned());
        self.of(table).appended.push(rule);
    }

    /// Puts a rule at the beginning of a chain; several stand there in the order of the calls.
    pub fn insert(&mut self, table: Table, chain: &str, rule: &str) {
        let before = self.of(table).inserted.iter().filter(|i| i.0 == chain);
        let position = before.count() + 1;
        self.insert_at(table, chain, position, rule);
    }

    /// Makes a rule the one with this number, counted from 1, once removed rules are gone.
    pub fn insert_at(&mut self, table: Table, chain: &str, position: usize, rule: &str) {
        let rule = (chain.to_owned(), position, rule.to_owned());
        self.of(table).inserted.push(rule);
    }

    /// Removes the first rule that is equal. One that is absent fails the whole table.
    pub fn remove(&mut self, table: Table, chain: &str, rule: &str) {
        let rule = (chain.to_owned(), rule.to_owned());
        self.of(table).removed.push(rule);
    }

    /// Removes an own chain, which must be empty and not jumped to by then.
    pub fn drop_chain(&mut self, table: Table, chain: &str) {
        self.of(table).dropped.push(chain.to_owned());
    }

    fn of(&mut self, table: Table) -> &mut Changes {
        self.tables.entry(table).or_default()
    }

    /// The script as text; an error when a name or rule is empty or contains a line break.
    pub fn render(&self) -> Result<String, IptablesError> {
        Self::render_tables(self.tables.iter())
    }

    /// As [`RestoreScript::render`], with the gate first: for removing.
    pub fn render_gate_first(&self) -> Result<String, IptablesError> {
        Self::render_tables(self.tables.iter().rev())
    }

    fn render_tables<'a>(
        tables: impl Iterator<Item = (&'a Table, &'a Changes)>,
    ) -> Result<String, IptablesError> {
        let mut text = String::new();
        for (table, changes) in tables {
            push(&mut text, format_args!("*{}", table.as_str()));
            changes.render(&mut text)?;
            push(&mut text, format_args!("COMMIT"));
        }
        Ok(text)
    }
}

impl Changes {
    fn render(&self, text: &mut String) -> Result<(), IptablesError> {
        for chain in &self.declared {
            push(text, format_args!(":{} - [0:0]", checked(chain)?));
        }
        for (chain, rule) in &self.removed {
            push(
                text,
                format_args!("-D {} {}", checked(chain)?, checked(rule)?),
            );
        }
        for chain in &self.flushed {
            push(text, format_args!("-F {}", checked(chain)?));
        }
        for (chain, rule) in &self.appended {
            push(
                text,
                format_args!("-A {} {}", checked(chain)?, checked(rule)?),
            );
        }
        for (chain, position, rule) in &self.inserted {
            let (chain, rule) = (checked(chain)?, checked(rule)?);
            push(text, format_args!("-I {chain} {position} {rule}"));
        }
        for chain in &self.dropped {
            push(text, format_args!("-X {}", checked(chain)?));
        }
        Ok(())
    }
}

fn push(text: &mut String, line: std::fmt::Arguments<'_>) {
    // Writing to a String does not fail.
    let _ = writeln!(text, "{line}");
}

/// A rule is one line; a break in it would be a command of its own.
fn checked(text: &str) -> Result<&str, IptablesError> {
    if text.trim().is_empty() || text.contains(['\n', '\r', '\0']) {
        return Err(IptablesError::Text {
            text: text.to_owned(),
        });
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn the_gate_comes_last_and_removals_before_additions() {
        let mut script = RestoreScript::new();
        script.insert(Table::Nat, "PREROUTING", "-j A");
        script.insert(Table::Nat, "PREROUTING", "-j B");
        script.insert(Table::Nat, "OUTPUT", "-j A");
        script.append(Table::Nat, "A", "-j ACCEPT");
        script.declare(Table::Nat, "A");
        script.drop_chain(Table::Mangle, "OLD");
        script.flush(Table::Mangle, "OLD");
        script.remove(Table::Mangle, "OUTPUT", "-j OLD");
        script.append(Table::Raw, "OUTPUT", "-j ACCEPT");
        assert_eq!(
            script.render().unwrap(),
            "*raw\n-A OUTPUT -j ACCEPT\nCOMMIT\n\
             *mangle\n-D OUTPUT -j OLD\n-F OLD\n-X OLD\nCOMMIT\n\
             *nat\n:A - [0:0]\n-A A -j ACCEPT\n-I PREROUTING 1 -j A\n-I PREROUTING 2 -j B\n-I OUTPUT 1 -j A\nCOMMIT\n"
        );
    }

    #[test]
    fn a_rule_cannot_smuggle_in_a_second_command() {
        for rule in ["-j ACCEPT\n-P INPUT DROP", "", " ", "-j ACCEPT\r"] {
            let mut script = RestoreScript::new();
            script.append(Table::Filter, "INPUT", rule);
            assert!(script.render().is_err(), "{rule:?}");
        }
    }
}
