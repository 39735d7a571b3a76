//! From one list of steps to another: what goes, what comes, in which order.

use crate::plan::{RuleAction, Step};

/// Whether two steps are the same object, perhaps with other parameters.
pub(super) fn same_object(a: &Step, b: &Step) -> bool {
    match (a, b) {
        (Step::Link(a), Step::Link(b)) => a.name == b.name,
        (Step::Address(a), Step::Address(b)) => a.dev == b.dev && a.addr.addr() == b.addr.addr(),
        (Step::Route(a), Step::Route(b)) => a.table == b.table && a.dst == b.dst,
        (Step::Rule(a), Step::Rule(b)) => {
            // Several rules with one preference are several objects, but only one of two gotos is ever reached.
            let gotos = [a, b].map(|rule| matches!(rule.action, RuleAction::Goto(_)));
            let selector = |rule: &crate::plan::Rule| (rule.family, rule.priority, rule.fwmark);
            a == b || (gotos == [true; 2] && selector(a) == selector(b))
        }
        (Step::Sysctl(a), Step::Sysctl(b)) => a.key == b.key,
        (Step::NftTable(a), Step::NftTable(b)) => a.name == b.name,
        (Step::Set(a), Step::Set(b)) => a.name == b.name,
        (Step::Member(a), Step::Member(b)) => a.set == b.set && a.ip == b.ip,
        (Step::Chain(a), Step::Chain(b)) => {
            a.family == b.family && a.table == b.table && a.name == b.name
        }
        _ => a == b,
    }
}

/// Both lists in an order of making from which the reverse is a safe order of removing: what only `old` has was made
/// on top of what both have, and goes first.
pub(super) fn union(wanted: &[Step], old: &[Step]) -> Vec<Step> {
    let mut all = Vec::with_capacity(wanted.len() + old.len());
    for step in wanted.iter().chain(old) {
        if !all.contains(step) {
            all.push(step.clone());
        }
    }
    all
}

/// Steps of `old` that have to go, in the order of going: what `wanted` does not have, what `broken` names as unlike
/// what it should be, and what the kernel would take away together with these.
///
/// Left out is what is changed in place: chains, nftables tables and sysctls that `wanted` has with other content. Sets go last,
/// because a chain that is changed in place may refer to them until it is.
pub(super) fn removals(old: &[Step], wanted: &[Step], broken: &[Step]) -> Vec<Step> {
    let mut going: Vec<&Step> = old
        .iter()
        .filter(|step| match step {
            Step::Sysctl(_) | Step::Chain(_) | Step::NftTable(_) | Step::Set(_) => {
                !wanted.iter().any(|w| same_object(w, step))
            }
            _ => !wanted.contains(step) || broken.contains(step),
        })
        .collect();
    loop {
        let more: Vec<&Step> = old
            .iter()
            .filter(|step| !matches!(step, Step::Sysctl(_)) && !going.contains(step))
            .filter(|step| going.iter().any(|gone| vanishes_with(step, gone)))
            .collect();
        if more.is_empty() {
            break;
        }
        going.extend(more);
    }
    let (sets, rest): (Vec<&Step>, Vec<&Step>) = old
        .iter()
        .rev()
        .filter(|step| going.contains(step))
        .partition(|step| matches!(step, Step::Set(_)));
    rest.into_iter().chain(sets).cloned().collect()
}

/// Whether the kernel takes `step` away by itself when `gone` is removed.
pub(super) fn vanishes_with(step: &Step, gone: &Step) -> bool {
    let dev = match gone {
        Step::Link(link) => &link.name,
        Step::Address(address) => {
            // Routes through the address' subnet or with it as their source.
            return matches!(step, Step::Route(r) if r.dev == address.dev);
        }
        Step::Set(set) => {
            return matches!(step, Step::Member(m) if m.set == set.name);
        }
        _ => return false,
    };
    match step {
        Step::Address(address) => address.dev == *dev,
        Step::Route(route) => route.dev == *dev,
        Step::Sysctl(sysctl) => sysctl.key.split('/').any(|part| part == dev),
        _ => false,
    }
}

/// A part of a plan that is one operation on the kernel.
pub(super) fn runs(steps: &[Step]) -> impl Iterator<Item = &[Step]> {
    steps.chunk_by(|a, b| match (a, b) {
        (Step::Chain(_) | Step::ChainRule(_), Step::Chain(_) | Step::ChainRule(_))
        | (Step::NftTable(_), Step::NftTable(_))
        | (Step::Route(_), Step::Route(_)) => true,
        (Step::Member(a), Step::Member(b)) => a.set == b.set,
        _ => false,
    })
}

#[cfg(test)]
mod tests;
