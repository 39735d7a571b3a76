//! What a plan's iptables steps mean, given the rules that are there: what differs, and which edits make or remove it.

use std::sync::Arc;

use super::Problem;
use super::tables::{AT_END, ChainKey, Edit, Tables, is_built_in};
use crate::journal::{NftHook, Record};
use crate::plan::{Chain, ChainRule, Family, Jump, Position, Step, Table};

/// The family of an iptables step.
pub(super) fn family_of(step: &Step) -> Option<Family> {
    table_of(step).map(|(family, _)| family)
}

/// The family and the table that an iptables step is in.
pub(super) fn table_of(step: &Step) -> Option<(Family, Table)> {
    match step {
        Step::Chain(chain) => Some((chain.family, chain.table)),
        Step::ChainRule(rule) => Some((rule.family, rule.table)),
        _ => None,
    }
}

/// The table and the base chain that come into being with an iptables step, where iptables-nft is used.
pub(super) fn nft_hooks(step: &Step) -> Vec<NftHook> {
    let Some((family, table)) = table_of(step) else {
        return Vec::new();
    };
    let from = match step {
        Step::Chain(chain) => chain.jump.as_ref().map(|jump| &jump.from),
        Step::ChainRule(rule) => Some(&rule.chain),
        _ => None,
    };
    let base = from.filter(|chain| is_built_in(chain));
    [base.cloned()]
        .into_iter()
        .flatten()
        .map(Some)
        .chain([None])
        .map(|chain| NftHook {
            family,
            table,
            chain,
        })
        .collect()
}

/// All steps that are ours in one namespace, of this plan and of others: what may stand in a chain, or before a jump,
/// without being foreign.
#[derive(Debug, Clone, Default)]
pub(super) struct Ours {
    steps: Vec<Step>,
    /// Whether the steps of other plans are in it.
    others_known: bool,
}

impl Ours {
    /// Only these steps are known; rules of other plans cannot be told from strangers'.
    pub(super) fn of(steps: &[Step]) -> Self {
        Self {
            steps: steps.iter().filter(|s| s.is_firewall()).cloned().collect(),
            others_known: false,
        }
    }

    /// Adds the steps of the other plans in the namespace.
    pub(super) fn and<'a>(mut self, others: impl IntoIterator<Item = &'a Step>) -> Self {
        self.steps
            .extend(others.into_iter().filter(|s| s.is_firewall()).cloned());
        self.others_known = true;
        self
    }

    /// As [`Ours::and`], with the records of a journal.
    pub(super) fn and_recorded(self, records: &[Arc<Record>]) -> Self {
        self.and(records.iter().flat_map(|record| record.plan.steps.iter()))
    }

    fn single_rules<'a>(
        &'a self,
        family: Family,
        key: &'a ChainKey,
    ) -> impl Iterator<Item = &'a ChainRule> {
        self.steps.iter().filter_map(move |step| match step {
            Step::ChainRule(r) if r.family == family && r.table == key.0 && r.chain == key.1 => {
                Some(r)
            }
            _ => None,
        })
    }

    /// Whether one of our plans wants `rule` in that chain: as a single rule, or as a jump to an own chain.
    fn has(&self, family: Family, key: &ChainKey, rule: &str) -> bool {
        self.single_rules(family, key).any(|r| r.rule == rule)
            || self.steps.iter().any(|step| match step {
                Step::Chain(c) => {
                    c.family == family
                        && c.table == key.0
                        && c.jump.as_ref().is_some_and(|jump| jump.from == key.1)
                        && jump_rule(&c.name) == rule
                }
                _ => false,
            })
    }
}

pub(super) fn key_of(chain: &Chain) -> ChainKey {
    (chain.table, chain.name.clone())
}

fn from_key(chain: &Chain, jump: &Jump) -> ChainKey {
    (chain.table, jump.from.clone())
}

fn jump_rule(chain: &str) -> String {
    format!("-j {chain}")
}

/// What differs about a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct ChainView {
    /// None: exactly as wanted.
    pub(super) content: Option<Problem>,
    /// None: as wanted, or none wanted.
    pub(super) jump: Option<JumpProblem>,
}

/// What differs about the jump that leads to a chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum JumpProblem {
    Absent,
    /// More than one.
    Times(usize),
    /// This rule of somebody else stands before it.
    After(String),
}

/// Compares a chain with what is there.
pub(super) fn view_chain(tables: &Tables, chain: &Chain, ours: &Ours) -> ChainView {
    ChainView {
        content: content_problem(tables, chain, ours),
        jump: chain
            .jump
            .as_ref()
            .and_then(|jump| jump_problem(tables, chain, jump, ours)),
    }
}

fn content_problem(tables: &Tables, chain: &Chain, ours: &Ours) -> Option<Problem> {
    let key = key_of(chain);
    let Some(found) = tables.rules(&key) else {
        return Some(Problem::Missing);
    };
    let own = without_single_rules(found, chain, ours);
    if own == chain.rules.iter().collect::<Vec<_>>() {
        return None;
    }
    // A chain without rules of its own is where other plans put theirs; without knowing those plans nothing in it
    // can be called foreign.
    if chain.rules.is_empty() && !ours.others_known {
        return None;
    }
    let mut wanted = chain.rules.iter().peekable();
    let extra: Vec<String> = own
        .iter()
        .filter(|rule| wanted.next_if_eq(*rule).is_none())
        .map(|rule| (*rule).clone())
        .collect();
    if wanted.peek().is_none() {
        return Some(Problem::Foreign { found: extra });
    }
    let mut sorted = own.clone();
    sorted.sort();
    let mut sorted_wanted: Vec<&String> = chain.rules.iter().collect();
    sorted_wanted.sort();
    if sorted == sorted_wanted {
        let (at, rule) = first_difference(&own, &chain.rules);
        return Some(Problem::Order {
            found: format!("rule {at} is `{rule}`"),
        });
    }
    let listed = |what: &str, rules: Vec<&String>| {
        let rules: Vec<String> = rules.iter().map(|rule| format!("`{rule}`")).collect();
        (!rules.is_empty()).then(|| format!("{what} {}", rules.join(", ")))
    };
    let parts = [
        listed("lacks", beyond(&sorted_wanted, &sorted)),
        listed("has", beyond(&sorted, &sorted_wanted)),
    ];
    Some(Problem::Different {
        found: parts.into_iter().flatten().collect::<Vec<_>>().join("; "),
    })
}

/// What the first list has beyond the second one, as often as it does.
fn beyond<'a>(rules: &[&'a String], than: &[&String]) -> Vec<&'a String> {
    let mut rest = than.to_vec();
    rules
        .iter()
        .filter(|rule| match rest.iter().position(|other| other == *rule) {
            Some(at) => {
                rest.swap_remove(at);
                false
            }
            None => true,
        })
        .copied()
        .collect()
}

/// The first place (counted from 1) where the lists differ, and what the found one has there.
fn first_difference<'a>(found: &[&'a String], wanted: &[String]) -> (usize, &'a str) {
    let at = found
        .iter()
        .zip(wanted)
        .take_while(|(f, w)| **f == *w)
        .count();
    (at + 1, found.get(at).map_or("", |rule| rule.as_str()))
}

/// The chain's rules without those single rules that our plans put there in addition.
fn without_single_rules<'a>(found: &'a [String], chain: &Chain, ours: &Ours) -> Vec<&'a String> {
    let key = key_of(chain);
    found
        .iter()
        .filter(|rule| {
            chain.rules.contains(rule)
                || !ours
                    .single_rules(chain.family, &key)
                    .any(|single| single.rule == **rule)
        })
        .collect()
}

fn jump_problem(tables: &Tables, chain: &Chain, jump: &Jump, ours: &Ours) -> Option<JumpProblem> {
    let key = from_key(chain, jump);
    let wanted = jump_rule(&chain.name);
    let found = tables.rules(&key).unwrap_or_default();
    match found.iter().filter(|rule| **rule == wanted).count() {
        0 => return Some(JumpProblem::Absent),
        1 => {}
        times => return Some(JumpProblem::Times(times)),
    }
    if jump.position == Position::Last {
        // What others append later comes after everything that this jump decides; it does no harm.
        return None;
    }
    found
        .iter()
        .take_while(|rule| **rule != wanted)
        .find(|rule| !ours.has(chain.family, &key, rule))
        .map(|rule| JumpProblem::After(rule.clone()))
}

/// All that differs about an iptables step, in the words of an inspection.
pub(super) fn problems(tables: &Tables, step: &Step, ours: &Ours) -> Vec<Problem> {
    match step {
        Step::Chain(chain) => {
            let view = view_chain(tables, chain, ours);
            if view.content == Some(Problem::Missing) {
                return vec![Problem::Missing];
            }
            let from = chain.jump.as_ref().map_or("", |jump| jump.from.as_str());
            let jump = view.jump.map(|problem| match problem {
                JumpProblem::Absent => Problem::Different {
                    found: format!("no jump from {from}"),
                },
                JumpProblem::Times(times) => Problem::Different {
                    found: format!("{times} jumps from {from}"),
                },
                JumpProblem::After(rule) => Problem::Order {
                    found: format!("`{rule}` stands before the jump from {from}"),
                },
            });
            view.content.into_iter().chain(jump).collect()
        }
        Step::ChainRule(rule) => rule_problems(tables, rule, ours),
        _ => Vec::new(),
    }
}

fn rule_problems(tables: &Tables, rule: &ChainRule, ours: &Ours) -> Vec<Problem> {
    let key = (rule.table, rule.chain.clone());
    let found = tables.rules(&key).unwrap_or_default();
    match found.iter().filter(|r| **r == rule.rule).count() {
        0 => return vec![Problem::Missing],
        1 => {}
        times => {
            return vec![Problem::Different {
                found: format!("the rule stands there {times} times"),
            }];
        }
    }
    if rule.position == Position::First
        && let Some(before) = found
            .iter()
            .take_while(|r| **r != rule.rule)
            .find(|r| is_built_in(&rule.chain) && !ours.has(rule.family, &key, r))
    {
        return vec![Problem::Order {
            found: format!("`{before}` stands before it"),
        }];
    }
    Vec::new()
}

/// Edits that make an iptables step from whatever is there. Whether that may be touched is the caller's decision.
pub(super) fn make(tables: &Tables, step: &Step, ours: &Ours) -> Vec<Edit> {
    match step {
        Step::Chain(chain) => {
            let view = view_chain(tables, chain, ours);
            let mut edits = Vec::new();
            if view.content.is_some() {
                edits.push(Edit::Fill(key_of(chain), refilled(tables, chain, ours)));
            }
            if let (Some(jump), Some(problem)) = (&chain.jump, view.jump) {
                let from = from_key(chain, jump);
                let rule = jump_rule(&chain.name);
                if problem != JumpProblem::Absent {
                    edits.push(Edit::Delete(from.clone(), rule.clone()));
                }
                edits.push(Edit::Insert(from, rule, index(jump.position)));
            }
            edits
        }
        Step::ChainRule(rule) => {
            let key = (rule.table, rule.chain.clone());
            match rule_problems(tables, rule, ours).as_slice() {
                [] => Vec::new(),
                [Problem::Missing] => {
                    vec![Edit::Insert(key, rule.rule.clone(), index(rule.position))]
                }
                _ => vec![
                    Edit::Delete(key.clone(), rule.rule.clone()),
                    Edit::Insert(key, rule.rule.clone(), index(rule.position)),
                ],
            }
        }
        _ => Vec::new(),
    }
}

fn index(position: Position) -> usize {
    match position {
        Position::First => 0,
        Position::Last => AT_END,
    }
}

/// The chain's own rules, between the single rules of our plans that are in it.
fn refilled(tables: &Tables, chain: &Chain, ours: &Ours) -> Vec<String> {
    let key = key_of(chain);
    let present = tables.rules(&key).unwrap_or_default();
    let singles = |position| {
        ours.single_rules(chain.family, &key)
            .filter(move |r| {
                r.position == position
                    && present.contains(&r.rule)
                    && !chain.rules.contains(&r.rule)
            })
            .map(|r| r.rule.clone())
    };
    let mut rules: Vec<String> = singles(Position::First).collect();
    rules.extend(chain.rules.iter().cloned());
    rules.extend(singles(Position::Last));
    // Two plans may want the same single rule; it stands there once.
    let mut seen = std::collections::HashSet::new();
    rules.retain(|rule| chain.rules.contains(rule) || seen.insert(rule.clone()));
    rules
}

/// Edits that remove an iptables step. `kept` is what stood there before us: the chain alone, or the chain with its
/// jump, or the rule.
pub(super) fn unmake(step: &Step, kept: &[Step]) -> Vec<Edit> {
    match step {
        Step::Chain(chain) => {
            let stood = kept.iter().find_map(|step| match step {
                Step::Chain(c) if c.family == chain.family && key_of(c) == key_of(chain) => Some(c),
                _ => None,
            });
            let mut edits = Vec::new();
            if let Some(jump) = &chain.jump
                && stood.is_none_or(|c| c.jump.as_ref() != Some(jump))
            {
                edits.push(Edit::Delete(from_key(chain, jump), jump_rule(&chain.name)));
            }
            if stood.is_none() {
                edits.push(Edit::Drop(key_of(chain)));
            }
            edits
        }
        Step::ChainRule(rule) if !kept.contains(step) => vec![Edit::Delete(
            (rule.table, rule.chain.clone()),
            rule.rule.clone(),
        )],
        _ => Vec::new(),
    }
}

/// Deletes the jump of a chain's earlier version if the wanted one is entered from elsewhere.
pub(super) fn delete_moved_jump(old: &Chain, wanted: &Chain) -> Option<Edit> {
    let jump = old.jump.as_ref()?;
    let same = wanted.jump.as_ref().is_some_and(|w| w.from == jump.from);
    (!same).then(|| Edit::Delete(from_key(old, jump), jump_rule(&old.name)))
}

#[cfg(test)]
mod tests;
