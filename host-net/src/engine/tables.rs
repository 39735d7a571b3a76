//! iptables rules of one family as a value, and changes to them as one `iptables-restore` script.
//!
//! The script is computed from what is there, so that nothing is doubled and nothing of others is touched; the inverse
//! of every change is computed with it, for rolling back.

use std::collections::BTreeMap;

use crate::iptables::{IptablesError, RestoreScript};
use crate::plan::Table;

/// Chains that the kernel provides; they are neither declared nor deleted.
const BUILT_IN: [&str; 5] = ["PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING"];

/// Whether `chain` is one of the kernel's own.
pub(super) fn is_built_in(chain: &str) -> bool {
    BUILT_IN.contains(&chain)
}

/// A chain's place: table and name.
pub(super) type ChainKey = (Table, String);

/// Rules of all chains of one family that were looked at, as `iptables-save` prints them, without `-A CHAIN`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Tables {
    chains: BTreeMap<ChainKey, Vec<String>>,
}

/// One change. Each is a no-op where the kernel is already as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Edit {
    /// The chain exists and holds exactly these rules.
    Fill(ChainKey, Vec<String>),
    /// The chain does not exist. Jumps to it must be gone by then.
    Drop(ChainKey),
    /// The rule stands in the chain; if it does not yet, at this index, counted from 0; past the end appends.
    Insert(ChainKey, String, usize),
    /// The rule is gone, however often it stood there.
    Delete(ChainKey, String),
}

/// Position of [`Edit::Insert`] that appends.
pub(super) const AT_END: usize = usize::MAX;

impl Tables {
    pub(super) fn set(&mut self, table: Table, chain: &str, rules: Vec<String>) {
        self.chains.insert((table, chain.to_owned()), rules);
    }

    /// Adds the chains of other tables.
    pub(super) fn extend(&mut self, more: &Self) {
        let chains = more.chains.iter();
        self.chains
            .extend(chains.map(|(key, rules)| (key.clone(), rules.clone())));
    }

    /// The chains of one table.
    pub(super) fn only(&self, table: Table) -> Self {
        let chains = self.chains.iter().filter(|((of, _), _)| *of == table);
        Self {
            chains: chains
                .map(|(key, rules)| (key.clone(), rules.clone()))
                .collect(),
        }
    }

    /// Rules of a chain; a built-in chain that nobody used yet is empty, any other is absent.
    pub(super) fn rules(&self, key: &ChainKey) -> Option<&[String]> {
        match self.chains.get(key) {
            Some(rules) => Some(rules),
            None if is_built_in(&key.1) => Some(&[]),
            None => None,
        }
    }

    /// Carries the edits out on the value. Returns what really changes, and the edits that undo it, in the order in
    /// which they have to be carried out.
    pub(super) fn edit(&mut self, edits: &[Edit]) -> (Vec<Edit>, Vec<Edit>) {
        let mut effective = Vec::new();
        let mut inverse = Vec::new();
        for edit in edits {
            let Some(undo) = self.edit_one(edit) else {
                continue;
            };
            effective.push(edit.clone());
            inverse.splice(0..0, undo);
        }
        (effective, inverse)
    }

    fn edit_one(&mut self, edit: &Edit) -> Option<Vec<Edit>> {
        match edit {
            Edit::Fill(key, rules) => match self.chains.insert(key.clone(), rules.clone()) {
                Some(old) if old == *rules => None,
                Some(old) => Some(vec![Edit::Fill(key.clone(), old)]),
                None => Some(vec![Edit::Drop(key.clone())]),
            },
            Edit::Drop(key) => self
                .chains
                .remove(key)
                .map(|old| vec![Edit::Fill(key.clone(), old)]),
            Edit::Insert(key, rule, at) => {
                let chain = self.chains.entry(key.clone()).or_default();
                if chain.contains(rule) {
                    return None;
                }
                let at = (*at).min(chain.len());
                chain.insert(at, rule.clone());
                Some(vec![Edit::Delete(key.clone(), rule.clone())])
            }
            Edit::Delete(key, rule) => {
                let chain = self.chains.get_mut(key)?;
                let at = chain.iter().position(|r| r == rule)?;
                chain.retain(|r| r != rule);
                Some(vec![Edit::Insert(key.clone(), rule.clone(), at)])
            }
        }
    }
}

/// Which table is changed first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Gate {
    /// `nat`, which starts redirecting, last: for making.
    Last,
    /// `nat` first: for removing.
    First,
}

/// The edits as one input of `iptables-restore --noflush`. `before` is what the edits were computed from; every edit
/// must be effective (see [`Tables::edit`]). None if there is nothing to do.
///
/// # Errors
/// A rule that is not one line.
pub(super) fn script(
    before: &Tables,
    edits: &[Edit],
    gate: Gate,
) -> Result<Option<String>, IptablesError> {
    let mut script = RestoreScript::new();
    let mut now = before.clone();
    for (number, edit) in edits.iter().enumerate() {
        // What a chain holds before it is filled or dropped as a whole does not matter.
        let superseded = edits[number + 1..].iter().any(|later| {
            later.key() == edit.key() && matches!(later, Edit::Fill(..) | Edit::Drop(_))
        });
        if !superseded {
            now.write(edit, &mut script);
        }
        now.edit_one(edit);
    }
    if script.is_empty() {
        return Ok(None);
    }
    match gate {
        Gate::Last => script.render(),
        Gate::First => script.render_gate_first(),
    }
    .map(Some)
}

impl Edit {
    pub(super) fn key(&self) -> &ChainKey {
        match self {
            Edit::Fill(key, _) | Edit::Drop(key) | Edit::Insert(key, ..) | Edit::Delete(key, _) => {
                key
            }
        }
    }
}

impl Tables {
    fn write(&self, edit: &Edit, script: &mut RestoreScript) {
        let (table, chain) = edit.key();
        let rules = self.rules(edit.key()).unwrap_or_default();
        match edit {
            Edit::Fill(_, rules) => {
                // Under --noflush a declaration empties the chain; the commit swaps the content atomically.
                script.declare(*table, chain);
                for rule in rules {
                    script.append(*table, chain, rule);
                }
            }
            Edit::Drop(_) => {
                // Emptied first, so that chains which refer to each other can go together.
                script.declare(*table, chain);
                script.drop_chain(*table, chain);
            }
            Edit::Insert(_, rule, at) if *at >= rules.len() => script.append(*table, chain, rule),
            Edit::Insert(_, rule, at) => script.insert_at(*table, chain, at + 1, rule),
            Edit::Delete(_, rule) => {
                for _ in rules.iter().filter(|found| *found == rule) {
                    script.remove(*table, chain, rule);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
