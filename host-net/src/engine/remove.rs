//! Taking a plan away: in the reverse order, going on after errors.

use super::apply::is_about;
use super::carrier::unmake;
use super::firewall::{self, Ours};
use super::kernel::{Kernel, KernelError};
use super::tables::{Edit, Gate, script};
use super::transition::runs;
use super::{Problem, survey, turn, whereabouts};
use crate::journal::{Journal, JournalError, Record, boot_id};
use crate::netns::Netns;
use crate::plan::{Family, Place, Plan, Step};

/// Something that could not be removed.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    /// An object.
    #[error("{place}: {source}")]
    Kernel {
        /// Where.
        place: String,
        /// What failed.
        source: KernelError,
    },
    /// A chain or table that the journal does not know has other rules than the plan; it may be somebody else's.
    #[error(
        "{place}: {object} is not in the journal and has other rules than planned ({found}): left alone"
    )]
    NotOurs {
        /// Where.
        place: String,
        /// The chain.
        object: String,
        /// How it differs.
        found: String,
    },
    /// The journal could not be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

/// Takes everything of `plan` away, and whatever else the journal has under its name. What is absent is fine; what
/// stood there before us stays; sysctls get their previous values back if they still have ours. The record is
/// forgotten when nothing failed.
pub async fn remove(place: &Place, plan: &Plan, journal: &Journal) -> Vec<RemoveError> {
    let _turn = turn(place.netns.id()).await;
    let recorded = match journal.load(&plan.name) {
        Ok(record) => record,
        Err(error) => return vec![error.into()],
    };
    let here = recorded.filter(|record| is_about(record, place));
    take_away(place, &plan.name, &plan.steps, here, journal).await
}

/// Takes away everything that the journal has under `name`, without knowing the plan. `netns` is where, if the caller
/// has it open; otherwise it is looked for by the recorded path, by name and among all processes.
///
/// A namespace that is gone took its objects along: the record is forgotten, and that is no error. The same holds for
/// a record of an earlier boot.
pub async fn undo(name: &str, netns: Option<&Netns>, journal: &Journal) -> Vec<RemoveError> {
    let record = match journal.load(name) {
        Ok(Some(record)) => record,
        Ok(None) => return Vec::new(),
        Err(error) => return vec![error.into()],
    };
    let found = if record.boot_id == boot_id() {
        netns
            .filter(|netns| netns.id() == record.netns)
            .cloned()
            .or_else(|| whereabouts::open(record.netns, record.netns_path.as_deref()))
    } else {
        None
    };
    let Some(netns) = found else {
        tracing::info!(name, netns = %record.netns, "the namespace is gone, record forgotten");
        return journal
            .forget(name)
            .err()
            .map(Into::into)
            .into_iter()
            .collect();
    };
    let place = Place {
        label: record.place_label.clone(),
        netns,
    };
    let _turn = turn(place.netns.id()).await;
    // Somebody may have changed it while this call waited for its turn.
    match journal.load(name) {
        Ok(record) => take_away(&place, name, &[], record, journal).await,
        Err(error) => vec![error.into()],
    }
}

async fn take_away(
    place: &Place,
    name: &str,
    planned: &[Step],
    recorded: Option<Record>,
    journal: &Journal,
) -> Vec<RemoveError> {
    let known = recorded.is_some();
    let mut record = recorded.unwrap_or_else(|| Record {
        plan: Plan::empty(name),
        place_label: place.label.clone(),
        netns: place.netns.id(),
        netns_path: None,
        boot_id: boot_id(),
        previous_sysctls: Default::default(),
        preexisting: Vec::new(),
        nft_caused: Vec::new(),
        iptables: Default::default(),
    });
    if !known {
        // With a record the plan adds nothing: every object was recorded before it was made.
        record.plan.steps = planned.to_vec();
    }
    let mut errors = Vec::new();
    let kernel = Kernel::new(place, record.iptables);
    let removal = Removal {
        kernel: &kernel,
        record: &record,
        known,
    };
    removal.run(&mut errors).await;
    if errors.is_empty()
        && let Err(error) = journal.forget(name)
    {
        errors.push(error.into());
    }
    errors
}

struct Removal<'a> {
    kernel: &'a Kernel,
    record: &'a Record,
    /// Whether the record is from the journal, and not merely the plan.
    known: bool,
}

impl Removal<'_> {
    async fn run(&self, errors: &mut Vec<RemoveError>) {
        let runs: Vec<&[Step]> = runs(&self.record.plan.steps).collect();
        for run in runs.into_iter().rev() {
            if run.iter().any(Step::is_firewall) {
                for family in [Family::V4, Family::V6] {
                    self.firewall(family, run, errors).await;
                }
                continue;
            }
            for step in run.iter().rev() {
                if self.record.preexisting.contains(step)
                    || !self.known && self.is_strangers(step, errors).await
                {
                    continue;
                }
                if let Err(source) = unmake(self.kernel, step, self.record).await {
                    errors.push(self.failed(source));
                }
            }
        }
        if let Err(source) = self.kernel.delete_empty_nft(&self.record.nft_caused) {
            errors.push(self.failed(source));
        }
    }

    fn failed(&self, source: KernelError) -> RemoveError {
        RemoveError::Kernel {
            place: self.record.place_label.clone(),
            source,
        }
    }

    /// All chains and rules of a run in one restore; if that fails, each alone, so that one that cannot go does not
    /// keep the others.
    async fn firewall(&self, family: Family, run: &[Step], errors: &mut Vec<RemoveError>) {
        let steps: Vec<&Step> = run
            .iter()
            .rev()
            .filter(|step| firewall::family_of(step) == Some(family))
            .collect();
        if steps.is_empty() {
            return;
        }
        let steps = match self.own_only(family, steps, errors).await {
            Ok(steps) => steps,
            Err(source) => {
                errors.push(self.failed(source));
                return;
            }
        };
        if self.restore(family, &steps).await.is_ok() {
            return;
        }
        for step in steps {
            if let Err(source) = self.restore(family, &[step]).await {
                errors.push(self.failed(source));
            }
        }
    }

    /// As [`Removal::own_only`], for an nftables table.
    async fn is_strangers(&self, step: &Step, errors: &mut Vec<RemoveError>) -> bool {
        if !matches!(step, Step::NftTable(_)) {
            return false;
        }
        let looked = self.kernel.look(std::slice::from_ref(step)).await;
        match looked.map(|problems| problems.into_iter().flatten().next()) {
            Ok(None | Some(Problem::Missing)) => return false,
            Ok(Some(problem)) => errors.push(RemoveError::NotOurs {
                place: self.record.place_label.clone(),
                object: step.to_string(),
                found: problem.to_string(),
            }),
            Err(source) => errors.push(self.failed(source)),
        }
        true
    }

    /// Without a journal only the content says that a chain is ours.
    async fn own_only<'s>(
        &self,
        family: Family,
        steps: Vec<&'s Step>,
        errors: &mut Vec<RemoveError>,
    ) -> Result<Vec<&'s Step>, KernelError> {
        if self.known {
            return Ok(steps);
        }
        let mut rules = survey::rules(self.kernel, steps.iter().copied()).await?;
        let tables = rules.remove(&family).unwrap_or_default();
        let ours = Ours::of(&self.record.plan.steps);
        let mut own = Vec::new();
        for step in steps {
            let Step::Chain(chain) = step else {
                own.push(step);
                continue;
            };
            match firewall::view_chain(&tables, chain, &ours).content {
                None | Some(Problem::Missing) => own.push(step),
                Some(problem) => errors.push(RemoveError::NotOurs {
                    place: self.record.place_label.clone(),
                    object: step.to_string(),
                    found: problem.to_string(),
                }),
            }
        }
        Ok(own)
    }

    async fn restore(&self, family: Family, steps: &[&Step]) -> Result<(), KernelError> {
        let mut rules = survey::rules(self.kernel, steps.iter().copied()).await?;
        let before = rules.remove(&family).unwrap_or_default();
        let edits: Vec<Edit> = steps
            .iter()
            .flat_map(|step| firewall::unmake(step, &self.record.preexisting))
            .collect();
        let mut after = before.clone();
        let (effective, _) = after.edit(&edits);
        match script(&before, &effective, Gate::First)? {
            Some(script) => {
                let restored = self.kernel.restore(family, script, &effective, &after);
                restored.await
            }
            None => Ok(()),
        }
    }
}
