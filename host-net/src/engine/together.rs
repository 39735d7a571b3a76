//! Changes of several plans in one namespace, with one look at the kernel and one restore where each would have its own.
//!
//! Only of plans whose steps mean the same whatever the others are: sysctls, entries of sets, routes, and single rules in
//! chains that are ours. Each keeps its own journal record, its own order and its own way back: one that fails is taken
//! back alone, and the others stand.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use super::apply::{
    Applied, ApplyError, alone, carry_out, finish, is_about, taken_back, variants, write_down,
};
use super::carrier::Carrier;
use super::kernel::{Kernel, KernelError};
use super::line::Turn;
use super::operations::{Operation, operations};
use super::prepare::{Looked, Prepared, old_steps};
use super::survey::Rules;
use super::tables::{Edit, Gate, is_built_in, script};
use crate::journal::{Journal, JournalError, Record};
use crate::plan::{Family, Place, Plan, Step};

/// What [`super::apply()`] was asked for.
pub(super) struct Change {
    pub(super) place: Place,
    pub(super) from: Plan,
    pub(super) to: Plan,
}

/// Whether a change can be carried out together with others.
pub(super) fn may_share(from: &Plan, to: &Plan, journal: &Journal) -> Result<bool, JournalError> {
    let all_fit = |plan: &Plan| plan.steps.iter().all(is_independent);
    if !all_fit(from) || !all_fit(to) {
        return Ok(false);
    }
    Ok(journal
        .load(&to.name)?
        .is_none_or(|record| all_fit(&record.plan)))
}

fn is_independent(step: &Step) -> bool {
    match step {
        Step::Sysctl(_) | Step::Member(_) | Step::Route(_) => true,
        Step::ChainRule(rule) => !is_built_in(&rule.chain),
        _ => false,
    }
}

/// What changes that are carried out together touch, each object by one of them.
#[derive(Default)]
pub(super) struct Objects {
    place: Option<String>,
    names: HashSet<String>,
    steps: HashSet<String>,
}

impl Objects {
    /// Adds those of a change; false if another one has one of them.
    pub(super) fn take(&mut self, change: &Change) -> bool {
        let place = self.place.get_or_insert_with(|| change.place.label.clone());
        let steps = change.from.steps.iter().chain(&change.to.steps);
        let steps: HashSet<String> = steps.filter_map(object).collect();
        if *place != change.place.label
            || self.names.contains(&change.to.name)
            || !self.steps.is_disjoint(&steps)
        {
            return false;
        }
        self.names.insert(change.to.name.clone());
        self.steps.extend(steps);
        true
    }
}

/// What a step is about, without its parameters.
fn object(step: &Step) -> Option<String> {
    match step {
        Step::Sysctl(sysctl) => Some(format!("sysctl {}", sysctl.key)),
        Step::Member(member) => Some(format!("member {} {}", member.set, member.ip)),
        Step::Route(route) => Some(format!("route {} {}", route.table, route.dst)),
        Step::ChainRule(rule) => Some(format!(
            "rule {:?} {:?} {} {}",
            rule.family, rule.table, rule.chain, rule.rule
        )),
        _ => None,
    }
}

/// Carries changes out that share a namespace, a journal and no object. The answers are in their order. The caller has the
/// namespace's turn.
pub(super) async fn apply(
    changes: &[Change],
    journal: &Journal,
    turn: &Arc<Turn>,
) -> Vec<Result<Applied, ApplyError>> {
    if changes.len() > 1
        && let Ok(results) = all_at_once(changes, journal, turn).await
    {
        return results;
    }
    // Also what cannot be looked at together: then the one because of which it cannot is the only one that fails.
    let mut results = Vec::with_capacity(changes.len());
    for change in changes {
        results.push(alone(&change.place, &change.from, &change.to, journal, turn).await);
    }
    results
}

/// One of the changes while it is carried out.
struct Ongoing<'a> {
    number: usize,
    before: Option<&'a Record>,
    prepared: Prepared<'a>,
    carrier: Carrier<'a>,
    left: VecDeque<Operation>,
}

/// # Errors
/// When they could not be looked at; nothing was changed.
async fn all_at_once(
    changes: &[Change],
    journal: &Journal,
    turn: &Arc<Turn>,
) -> Result<Vec<Result<Applied, ApplyError>>, KernelError> {
    let Some(place) = changes.first().map(|change| &change.place) else {
        return Ok(Vec::new());
    };
    let mut results: Vec<Option<Result<Applied, ApplyError>>> =
        changes.iter().map(|_| None).collect();
    let mut befores = Vec::with_capacity(changes.len());
    for (change, result) in changes.iter().zip(&mut results) {
        befores.push(journal.load(&change.to.name).unwrap_or_else(|error| {
            *result = Some(Err(error.into()));
            None
        }));
    }
    // A plan's own record tells nothing about other plans that it would not tell about itself.
    let records = journal.others_in(place.netns.id(), "");
    let known = |number: usize| {
        let before: Option<&Record> = befores[number].as_ref();
        before.filter(|record| is_about(record, place))
    };
    let kernel = Kernel::new(place, variants(records.iter().map(Arc::as_ref))).holding(turn);
    let olds: Vec<Vec<Step>> = (0..changes.len())
        .map(|number| old_steps(&changes[number].from, known(number)))
        .collect();
    let plans: Vec<&Plan> = changes.iter().map(|change| &change.to).collect();
    let looked = Looked::at_all(&kernel, &olds, &plans).await?;
    let mut prepared = Vec::with_capacity(changes.len());
    for (number, (change, looked)) in changes.iter().zip(looked).enumerate() {
        let Change { from, to, .. } = change;
        prepared.push(Prepared::new(
            &kernel,
            looked,
            from,
            to,
            known(number),
            &records,
        )?);
    }
    let mut rules = Rules::new();
    let mut ongoing = Vec::new();
    for (number, prepared) in prepared.into_iter().enumerate() {
        if results[number].is_some() {
            continue;
        }
        let before = befores[number].as_ref();
        if let Err(error) = write_down(place, &prepared, before, journal) {
            results[number] = Some(Err(error));
            continue;
        }
        rules.clone_from(prepared.rules());
        ongoing.push(Ongoing {
            number,
            before,
            carrier: Carrier::new(&kernel, Rules::new()),
            left: operations(&prepared).into(),
            prepared,
        });
    }
    tracing::debug!(
        place = place.label,
        plans = ongoing.len(),
        "several plans are made at once"
    );
    let mut restores = Restores {
        kernel: &kernel,
        rules,
        stale: false,
    };
    while !ongoing.is_empty() {
        let mut failed = Vec::new();
        let mut met = Vec::new();
        for mut one in ongoing {
            match up_to_rules(&mut one).await {
                Err(source) => failed.push((one, source)),
                Ok(()) if one.left.is_empty() => {
                    let number = one.number;
                    results[number] = Some(finish(one.carrier, &one.prepared, journal));
                }
                Ok(()) => met.push(one),
            }
        }
        let (stand, refused) = restores.next(met).await;
        ongoing = stand;
        failed.extend(refused);
        for (one, source) in failed {
            restores.stale = true;
            let number = one.number;
            let error = taken_back(one.carrier, &one.prepared, one.before, source, journal).await;
            results[number] = Some(Err(error));
        }
    }
    Ok(results.into_iter().flatten().collect())
}

/// Carries out what comes before the next restore.
async fn up_to_rules(one: &mut Ongoing<'_>) -> Result<(), KernelError> {
    while let Some(operation) = one
        .left
        .pop_front_if(|next| !matches!(next, Operation::Rules { .. }))
    {
        carry_out(&mut one.carrier, operation, &one.prepared).await?;
    }
    Ok(())
}

/// The restores of all changes.
struct Restores<'a> {
    kernel: &'a Kernel,
    /// What is there.
    rules: Rules,
    /// Whether something was taken back since that was read.
    stale: bool,
}

impl<'a> Restores<'a> {
    /// Of changes that all have a restore before them, makes those of the first one's family as one. Returns those that
    /// stand, and those that the kernel refused.
    async fn next(
        &mut self,
        mut all: Vec<Ongoing<'a>>,
    ) -> (Vec<Ongoing<'a>>, Vec<(Ongoing<'a>, KernelError)>) {
        let Some(Operation::Rules { family, gate, .. }) =
            all.first().and_then(|one| one.left.front())
        else {
            return (all, Vec::new());
        };
        let (family, gate) = (*family, *gate);
        let mut wanted: Vec<Vec<Edit>> = Vec::new();
        for one in &mut all {
            let same = |next: &mut Operation| matches!(next, Operation::Rules { family: f, gate: g, .. } if (*f, *g) == (family, gate));
            wanted.push(match one.left.pop_front_if(same) {
                Some(Operation::Rules { edits, .. }) => edits,
                _ => Vec::new(),
            });
        }
        if self.at_once(family, gate, &mut all, &wanted).await.is_ok() {
            return (all, Vec::new());
        }
        self.stale = true;
        let (mut stand, mut refused) = (Vec::new(), Vec::new());
        for (mut one, edits) in all.into_iter().zip(&wanted) {
            match one.carrier.firewall_anew(family, edits, gate).await {
                Ok(()) => stand.push(one),
                Err(source) => refused.push((one, source)),
            }
        }
        (stand, refused)
    }

    async fn at_once(
        &mut self,
        family: Family,
        gate: Gate,
        all: &mut [Ongoing<'a>],
        wanted: &[Vec<Edit>],
    ) -> Result<(), KernelError> {
        if self.stale {
            let tables = wanted.iter().flatten().map(|edit| edit.key().0).collect();
            self.rules
                .insert(family, self.kernel.tables(family, tables).await?);
            self.stale = false;
        }
        let before = self.rules.entry(family).or_default();
        let mut after = before.clone();
        let mut effective = Vec::new();
        for (one, edits) in all.iter_mut().zip(wanted) {
            let (changes, inverse) = after.edit(edits);
            if !changes.is_empty() {
                one.carrier.note_rules(family, inverse);
                effective.extend(changes);
            }
        }
        if let Some(script) = script(before, &effective, gate)? {
            self.kernel
                .restore(family, script, &effective, &after)
                .await?;
        }
        *before = after;
        Ok(())
    }
}
