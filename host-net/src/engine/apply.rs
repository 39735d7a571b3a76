//! Moving a place from one plan to another, or not at all.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::carrier::Carrier;
use super::firewall;
use super::kernel::{Kernel, KernelError};
use super::prepare::Prepared;
use super::tables::{Edit, Gate};
use super::transition::{runs, same_object};
use super::turn;
use crate::iptables::Iptables;
use crate::journal::{Journal, JournalError, Record, boot_id};
use crate::plan::{Family, Place, Plan, Step};

/// What [`apply`] did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Objects made or changed in place, in order.
    pub made: Vec<Step>,
    /// Objects removed, in order.
    pub removed: Vec<Step>,
    /// Wanted objects that stood there before us; they stay when the plan goes.
    pub preexisting: Vec<Step>,
}

/// Why [`apply`] failed.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// The two plans have different names: they are not two states of one thing.
    #[error("cannot move from plan {from} to plan {to}: the names differ")]
    Names {
        /// Name of the plan to move from.
        from: String,
        /// Name of the plan to move to.
        to: String,
    },
    /// Something that is not ours stands where the plan wants an object. Nothing was changed.
    #[error("{place}: {object} is there already and is not ours ({found}): {fix}")]
    Conflict {
        /// Where.
        place: String,
        /// The object, as the plan wants it.
        object: String,
        /// What stands there.
        found: String,
        /// What to do about it.
        fix: &'static str,
    },
    /// The journal could not be read or written. Nothing was changed, unless the message is about the last step,
    /// forgetting what is gone.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The kernel could not be looked at. Nothing was changed.
    #[error("{place}: {source}")]
    Look {
        /// Where.
        place: String,
        /// What failed.
        source: Box<KernelError>,
    },
    /// A change failed. What this call had done was taken back, except for what `left` says.
    #[error("{place}: {source}; {}", rolled_back(left))]
    Failed {
        /// Where.
        place: String,
        /// What failed.
        source: Box<KernelError>,
        /// What could not be taken back, and why. The journal still covers it: `undo` can be tried again.
        left: Vec<String>,
    },
}

fn rolled_back(left: &[String]) -> String {
    if left.is_empty() {
        "everything done before was taken back".to_owned()
    } else {
        format!("could not be taken back: {}", left.join("; "))
    }
}

/// Makes `to` from `from` in `place`: removes what `to` does not have, makes what is missing, changes chains in place.
///
/// `from` is what the caller believes to be there; what the journal has under the plan's name counts as well, so after
/// a crash an empty `from` is fine. Objects of `to` that are gone or were changed by others are made again. The
/// journal is written before the kernel is touched. A place that is already as wanted is not touched.
///
/// If the future is dropped half-way, the change stays half done; the journal covers it, and applying again or [`undo`]
/// completes it either way.
///
/// [`undo`]: super::undo
///
/// # Errors
/// See [`ApplyError`]. On every error the place is as it was before, or the error says what is not.
pub async fn apply(
    place: &Place,
    from: &Plan,
    to: &Plan,
    journal: &Journal,
) -> Result<Applied, ApplyError> {
    if from.name != to.name {
        return Err(ApplyError::Names {
            from: from.name.clone(),
            to: to.name.clone(),
        });
    }
    let _turn = turn(place.netns.id()).await;
    let look = |source| ApplyError::Look {
        place: place.label.clone(),
        source: Box::new(source),
    };
    let before = journal.load(&to.name)?;
    let others = journal.others_in(place.netns.id(), &to.name);
    let known = before.as_ref().filter(|record| is_about(record, place));
    let kernel = Kernel::new(
        place,
        variants(known.into_iter().chain(others.iter().map(Arc::as_ref))),
    );
    let prepared = Prepared::new(&kernel, from, to, known, &others)
        .await
        .map_err(look)?;
    prepared.refuse_strangers(&place.label)?;
    let record = prepared.record();
    if before.as_ref() != Some(record) && !(before.is_none() && record.plan.steps.is_empty()) {
        journal.store(record)?;
    }

    let mut carrier = Carrier::new(&kernel, prepared.rules().clone());
    if let Err(source) = transit(&mut carrier, &prepared).await {
        let mut left = carrier.roll_back().await;
        if let Err(error) = kernel.delete_empty_nft(&prepared.newly_caused()) {
            left.push(error.to_string());
        }
        if left.is_empty() {
            match &before {
                Some(before) => journal.store(before)?,
                None => journal.forget(&to.name)?,
            }
        }
        return Err(ApplyError::Failed {
            place: place.label.clone(),
            source: Box::new(source),
            left,
        });
    }
    let applied = Applied {
        made: carrier.made,
        removed: carrier.removed,
        preexisting: record.preexisting.clone(),
    };
    conclude(&kernel, to, record, journal)?;
    Ok(applied)
}

/// The variant of iptables that our plans use in a namespace already, by family: this plan's own before others'.
fn variants<'a>(records: impl Iterator<Item = &'a Record>) -> Iptables {
    records.fold(Iptables::default(), |chosen, record| Iptables {
        v4: chosen.v4.or(record.iptables.v4),
        v6: chosen.v6.or(record.iptables.v6),
    })
}

/// A record of another namespace or of an earlier boot tells nothing about this one.
pub(super) fn is_about(record: &Record, place: &Place) -> bool {
    record.netns == place.netns.id() && record.boot_id == boot_id()
}

/// Removes what goes and makes what comes.
async fn transit(carrier: &mut Carrier<'_>, prepared: &Prepared<'_>) -> Result<(), KernelError> {
    // A family that has chains to make as well as chains to remove does both in the same restore, the last one: a
    // chain that goes may be referred to by one that is about to change.
    let merged: BTreeSet<Family> = prepared
        .makes()
        .iter()
        .filter_map(firewall::family_of)
        .collect();
    for family in [Family::V4, Family::V6] {
        let edits = prepared.removal_edits(family);
        if !merged.contains(&family) && !edits.is_empty() {
            carrier.firewall(family, &edits, Gate::First).await?;
        }
    }
    let (sets, rest): (Vec<&Step>, Vec<&Step>) = prepared
        .removals()
        .iter()
        .filter(|step| !step.is_firewall())
        .partition(|step| matches!(step, Step::Set(_)));
    for step in rest {
        carrier.unmake(step, prepared.record()).await?;
    }
    let mut left = prepared.makes();
    for run in runs(prepared.makes()) {
        left = &left[run.len()..];
        if !run.iter().any(Step::is_firewall) {
            carrier.make(run).await?;
            continue;
        }
        for family in [Family::V4, Family::V6] {
            let of_family = |step: &Step| firewall::family_of(step) == Some(family);
            let mut edits: Vec<Edit> = Vec::new();
            if run.iter().any(of_family) && !left.iter().any(of_family) {
                edits = prepared.removal_edits(family);
            }
            edits.extend(prepared.make_edits(family, run));
            carrier.firewall(family, &edits, Gate::Last).await?;
        }
        carrier.made.extend_from_slice(run);
    }
    for set in sets {
        carrier.unmake(set, prepared.record()).await?;
    }
    carrier.removed.extend(
        prepared
            .removals()
            .iter()
            .filter(|step| step.is_firewall())
            .cloned(),
    );
    Ok(())
}

/// Cleans up behind a complete change and writes down what stands.
fn conclude(
    kernel: &Kernel,
    to: &Plan,
    written: &Record,
    journal: &Journal,
) -> Result<(), ApplyError> {
    let mut record = written.clone();
    if to.steps.is_empty() {
        if let Err(error) = kernel.delete_empty_nft(&record.nft_caused) {
            // The next undo finds the record and tries again.
            tracing::warn!(%error, place = record.place_label, "empty tables stay behind");
            record.plan.steps.clear();
            return Ok(journal.store(&record)?);
        }
        return Ok(journal.forget(&to.name)?);
    }
    record.plan = to.clone();
    record
        .preexisting
        .retain(|kept| to.steps.iter().any(|step| same_object(step, kept)));
    record.previous_sysctls.retain(|key, _| {
        to.steps
            .iter()
            .any(|step| matches!(step, Step::Sysctl(s) if s.key == *key))
    });
    if record != *written {
        journal.store(&record)?;
    }
    Ok(())
}
