//! Taking over what stands there complete, although no journal knows it.

use std::collections::BTreeMap;

use super::apply::{ApplyError, is_about};
use super::firewall::{self, Ours};
use super::kernel::{Kernel, KernelError};
use super::{survey, turn, whereabouts};
use crate::journal::{Journal, NftHook, Record, boot_id};
use crate::plan::{Family, Place, Plan};

/// Writes into the journal that every object of `plan` is ours, if all of them stand there exactly as planned: then
/// [`undo`] takes them away, which [`apply`] alone would leave to whoever made them. Returns whether it is so. The kernel
/// is not touched.
///
/// For plans that nobody else would write to the letter, where their maker is known to be gone. Values that sysctls had
/// before are lost with the maker's journal.
///
/// [`apply`]: super::apply()
/// [`undo`]: super::undo
///
/// # Errors
/// When the kernel cannot be looked at, or the journal cannot be read or written.
pub async fn adopt(place: &Place, plan: &Plan, journal: &Journal) -> Result<bool, ApplyError> {
    let _turn = turn(place.netns.id()).await;
    if journal
        .load(&plan.name)?
        .is_some_and(|record| is_about(&record, place))
    {
        return Ok(true);
    }
    let look = |source| ApplyError::Look {
        place: place.label.clone(),
        source: Box::new(source),
    };
    let kernel = Kernel::unprejudiced(place);
    let others = journal.others_in(place.netns.id(), &plan.name);
    let ours = Ours::of(&plan.steps).and_recorded(&others);
    let rules = survey::rules(&kernel, &plan.steps).await.map_err(look)?;
    let problems = survey::problems(&kernel, &plan.steps, &rules, &ours).await;
    let complete = problems.map_err(look)?.iter().all(Vec::is_empty);
    if !complete || plan.steps.is_empty() {
        return Ok(false);
    }
    journal.store(&Record {
        plan: plan.clone(),
        place_label: place.label.clone(),
        netns: place.netns.id(),
        netns_path: whereabouts::named_path(place.netns.id()),
        boot_id: boot_id(),
        previous_sysctls: BTreeMap::new(),
        preexisting: Vec::new(),
        nft_caused: hooks_of(&kernel, plan).await.map_err(look)?,
        iptables: kernel.iptables_so_far(),
    })?;
    Ok(true)
}

/// The tables and base chains that the plan's maker found or made: they go when they are empty.
async fn hooks_of(kernel: &Kernel, plan: &Plan) -> Result<Vec<NftHook>, KernelError> {
    let mut caused = Vec::new();
    for family in [Family::V4, Family::V6] {
        let of_family = |step: &&_| firewall::family_of(step) == Some(family);
        let steps = plan.steps.iter().filter(of_family);
        let wanted: Vec<NftHook> = steps.flat_map(firewall::nft_hooks).collect();
        if wanted.is_empty() {
            continue;
        }
        let existing = kernel.nft_hooks(family).await?.unwrap_or_default();
        for hook in wanted {
            if existing.contains(&hook) && !caused.contains(&hook) {
                caused.push(hook);
            }
        }
    }
    Ok(caused)
}
