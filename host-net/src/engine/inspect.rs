//! What of a plan is missing, different, out of order or foreign.

use super::firewall::Ours;
use super::kernel::{Kernel, KernelError};
use super::{Finding, survey, turn};
use crate::plan::{Place, Plan, Step};

/// Why a plan could not be compared with the kernel.
#[derive(Debug, thiserror::Error)]
#[error("{place}: cannot be inspected: {source}")]
pub struct InspectError {
    /// Where.
    pub place: String,
    /// What failed.
    pub source: KernelError,
}

/// Compares a plan with the kernel; an empty answer means that everything is there, as planned and in order. Changes
/// nothing.
///
/// Rules that other plans of this node put into a shared chain are not known here, so a chain without rules of its
/// own may hold anything; and the jump of another plan that stands before one of this plan is reported. Where other
/// plans are applied in the same place, [`inspect_among`] is exact.
///
/// # Errors
/// When the kernel cannot be looked at.
pub async fn inspect(place: &Place, plan: &Plan) -> Result<Vec<Finding>, InspectError> {
    compare(place, plan, Ours::of(&plan.steps)).await
}

/// As [`inspect`], knowing all other plans that are applied in the same place.
///
/// # Errors
/// When the kernel cannot be looked at.
pub async fn inspect_among(
    place: &Place,
    plan: &Plan,
    others: &[&Plan],
) -> Result<Vec<Finding>, InspectError> {
    let others = others.iter().flat_map(|other| &other.steps);
    compare(place, plan, Ours::of(&plan.steps).and(others)).await
}

async fn compare(place: &Place, plan: &Plan, ours: Ours) -> Result<Vec<Finding>, InspectError> {
    // Not while a change is half done.
    let _turn = turn(place.netns.id()).await;
    look(place, &plan.steps, &ours)
        .await
        .map_err(|source| InspectError {
            place: place.label.clone(),
            source,
        })
}

async fn look(place: &Place, steps: &[Step], ours: &Ours) -> Result<Vec<Finding>, KernelError> {
    let kernel = Kernel::unprejudiced(place);
    let rules = survey::rules(&kernel, steps).await?;
    let problems = survey::problems(&kernel, steps, &rules, ours).await?;
    let findings = steps.iter().zip(problems).flat_map(|(step, problems)| {
        problems.into_iter().map(|problem| Finding {
            step: step.clone(),
            problem,
        })
    });
    Ok(findings.collect())
}
