//! Moving a place from one plan to another, or not at all.

use std::sync::Arc;

use super::carrier::Carrier;
use super::kernel::{Kernel, KernelError};
use super::line::{Line, Turn};
use super::operations::{Operation, operations};
use super::prepare::{Looked, Prepared};
use super::together;
use super::transition::same_object;
use crate::iptables::Iptables;
use crate::journal::{Journal, JournalError, Record, boot_id};
use crate::plan::{Place, Plan, Step};

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
    let line = Line::of(place.netns.id());
    if !together::may_share(from, to, journal)? {
        let turn = Arc::new(line.turn().await);
        return alone(place, from, to, journal, &turn).await;
    }
    line.apply(place, from, to, journal).await
}

/// One change by itself. The caller has the namespace's turn.
pub(super) async fn alone(
    place: &Place,
    from: &Plan,
    to: &Plan,
    journal: &Journal,
    turn: &Arc<Turn>,
) -> Result<Applied, ApplyError> {
    let look = |source| cannot_look(place, source);
    let before = journal.load(&to.name)?;
    let others = journal.others_in(place.netns.id(), &to.name);
    let known = before.as_ref().filter(|record| is_about(record, place));
    let kernel = Kernel::new(
        place,
        variants(known.into_iter().chain(others.iter().map(Arc::as_ref))),
    )
    .holding(turn);
    let looked = Looked::at(&kernel, from, to, known, &others).await;
    let prepared = Prepared::new(&kernel, looked.map_err(look)?, from, to, known, &others);
    let prepared = prepared.map_err(look)?;
    write_down(place, &prepared, before.as_ref(), journal)?;
    let mut carrier = Carrier::new(&kernel, prepared.rules().clone());
    for operation in operations(&prepared) {
        if let Err(source) = carry_out(&mut carrier, operation, &prepared).await {
            return Err(taken_back(carrier, &prepared, before.as_ref(), source, journal).await);
        }
    }
    finish(carrier, &prepared, journal)
}

pub(super) fn cannot_look(place: &Place, source: KernelError) -> ApplyError {
    ApplyError::Look {
        place: place.label.clone(),
        source: Box::new(source),
    }
}

/// Refuses what is somebody else's, and writes down what is about to be ours.
pub(super) fn write_down(
    place: &Place,
    prepared: &Prepared<'_>,
    before: Option<&Record>,
    journal: &Journal,
) -> Result<(), ApplyError> {
    prepared.refuse_strangers(&place.label)?;
    let record = prepared.record();
    if before != Some(record) && !(before.is_none() && record.plan.steps.is_empty()) {
        journal.store(record)?;
    }
    Ok(())
}

pub(super) async fn carry_out(
    carrier: &mut Carrier<'_>,
    operation: Operation,
    prepared: &Prepared<'_>,
) -> Result<(), KernelError> {
    match operation {
        Operation::Rules {
            family,
            edits,
            gate,
        } => carrier.firewall(family, &edits, gate).await,
        Operation::Made(steps) => {
            carrier.made.extend(steps);
            Ok(())
        }
        Operation::Make(steps) => carrier.make(&steps).await,
        Operation::Unmake(step) => carrier.unmake(&step, prepared.record()).await,
    }
}

/// After a failure: everything that was done is taken back, and the journal says what stands.
pub(super) async fn taken_back(
    mut carrier: Carrier<'_>,
    prepared: &Prepared<'_>,
    before: Option<&Record>,
    source: KernelError,
    journal: &Journal,
) -> ApplyError {
    let mut left = carrier.roll_back().await;
    if let Err(error) = carrier.kernel.delete_empty_nft(&prepared.newly_caused()) {
        left.push(error.to_string());
    }
    if left.is_empty() {
        let restored = match before {
            Some(before) => journal.store(before),
            None => journal.forget(&prepared.record().plan.name),
        };
        if let Err(error) = restored {
            return error.into();
        }
    }
    ApplyError::Failed {
        place: carrier.kernel.label().to_owned(),
        source: Box::new(source),
        left,
    }
}

/// Writes down what stands after a complete change.
pub(super) fn finish(
    mut carrier: Carrier<'_>,
    prepared: &Prepared<'_>,
    journal: &Journal,
) -> Result<Applied, ApplyError> {
    let gone = prepared.removals().iter().filter(|step| step.is_firewall());
    carrier.removed.extend(gone.cloned());
    let record = prepared.record();
    conclude(carrier.kernel, prepared.wanted(), record, journal)?;
    Ok(Applied {
        made: carrier.made,
        removed: carrier.removed,
        preexisting: record.preexisting.clone(),
    })
}

/// The variant of iptables that our plans use in a namespace already, by family: this plan's own before others'.
pub(super) fn variants<'a>(records: impl Iterator<Item = &'a Record>) -> Iptables {
    records.fold(Iptables::default(), |chosen, record| Iptables {
        v4: chosen.v4.or(record.iptables.v4),
        v6: chosen.v6.or(record.iptables.v6),
    })
}

/// A record of another namespace or of an earlier boot tells nothing about this one.
pub(super) fn is_about(record: &Record, place: &Place) -> bool {
    record.netns == place.netns.id() && record.boot_id == boot_id()
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
