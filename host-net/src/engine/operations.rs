//! A prepared change as a list of operations on the kernel, in order.

use std::collections::BTreeSet;

use super::firewall;
use super::prepare::Prepared;
use super::tables::{Edit, Gate};
use super::transition::runs;
use crate::plan::{Family, Step};

/// One operation on the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Operation {
    /// One restore of one family; nothing, if the edits change nothing.
    Rules {
        family: Family,
        edits: Vec<Edit>,
        gate: Gate,
    },
    /// These iptables steps stand by now.
    Made(Vec<Step>),
    /// A run of steps of one kind that are not iptables'.
    Make(Vec<Step>),
    /// One step that is not iptables' goes.
    Unmake(Step),
}

/// What goes, then what comes.
pub(super) fn operations(prepared: &Prepared<'_>) -> Vec<Operation> {
    let mut all = Vec::new();
    // A family that has chains to make as well as chains to remove does both in the same restore, the last one: a
    // chain that goes may be referred to by one that is about to change.
    let merged: BTreeSet<Family> = prepared
        .makes()
        .iter()
        .filter_map(firewall::family_of)
        .collect();
    for family in Family::BOTH {
        let edits = prepared.removal_edits(family);
        if !merged.contains(&family) && !edits.is_empty() {
            all.push(Operation::Rules {
                family,
                edits,
                gate: Gate::First,
            });
        }
    }
    let (sets, rest): (Vec<&Step>, Vec<&Step>) = prepared
        .removals()
        .iter()
        .filter(|step| !step.is_firewall())
        .partition(|step| matches!(step, Step::Set(_)));
    all.extend(rest.into_iter().cloned().map(Operation::Unmake));
    let mut left = prepared.makes();
    for run in runs(prepared.makes()) {
        left = &left[run.len()..];
        if !run.iter().any(Step::is_firewall) {
            all.push(Operation::Make(run.to_vec()));
            continue;
        }
        for family in Family::BOTH {
            let of_family = |step: &Step| firewall::family_of(step) == Some(family);
            let mut edits: Vec<Edit> = Vec::new();
            if run.iter().any(of_family) && !left.iter().any(of_family) {
                edits = prepared.removal_edits(family);
            }
            edits.extend(prepared.make_edits(family, run));
            if !edits.is_empty() {
                all.push(Operation::Rules {
                    family,
                    edits,
                    gate: Gate::Last,
                });
            }
        }
        all.push(Operation::Made(run.to_vec()));
    }
    all.extend(sets.into_iter().cloned().map(Operation::Unmake));
    all
}
