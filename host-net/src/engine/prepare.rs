//! What a change will be, worked out before anything is touched.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::apply::ApplyError;
use super::firewall::{self, JumpProblem, Ours};
use super::kernel::{Kernel, KernelError, in_words};
use super::survey::{self, Rules};
use super::tables::Edit;
use super::transition::{removals, same_object, union, vanishes_with};
use super::{Problem, whereabouts};
use crate::iptables::Iptables;
use crate::journal::{NftHook, Record, boot_id};
use crate::plan::{Chain, Family, Plan, Step};

/// A change from what the journal and the caller say is there to the wanted plan.
pub(super) struct Prepared<'a> {
    to: &'a Plan,
    /// What is ours by the journal or by the caller's word, in an order of making.
    old: Vec<Step>,
    rules: Rules,
    ours: Ours,
    /// Per step of `to`.
    problems: Vec<Vec<Problem>>,
    makes: Vec<Step>,
    removals: Vec<Step>,
    record: Record,
    caused_before: Vec<NftHook>,
}

/// What was found in the kernel before a change.
pub(super) struct Looked {
    rules: Rules,
    ours: Ours,
    /// Per step of the wanted plan.
    problems: Vec<Vec<Problem>>,
    hooks: Hooks,
}

/// The nft tables and base chains of iptables that exist, of the families that were looked at and that iptables-nft manages.
pub(super) type Hooks = BTreeMap<Family, BTreeSet<NftHook>>;

impl Looked {
    pub(super) async fn at(
        kernel: &Kernel,
        from: &Plan,
        to: &Plan,
        known: Option<&Record>,
        others: &[Arc<Record>],
    ) -> Result<Self, KernelError> {
        let old = old_steps(from, known);
        let rules = survey::rules(kernel, to.steps.iter().chain(&old)).await?;
        let ours = Ours::of(&union(&to.steps, &old)).and_recorded(others);
        Ok(Self {
            problems: survey::problems(kernel, &to.steps, &rules, &ours).await?,
            hooks: hooks(kernel, &to.steps).await?,
            rules,
            ours,
        })
    }

    /// The same of several plans with one look. Their steps must be of kinds that do not depend on what else is ours.
    pub(super) async fn at_all(
        kernel: &Kernel,
        olds: &[Vec<Step>],
        plans: &[&Plan],
    ) -> Result<Vec<Self>, KernelError> {
        let wanted: Vec<Step> = plans.iter().flat_map(|to| to.steps.clone()).collect();
        let rules = survey::rules(kernel, wanted.iter().chain(olds.iter().flatten())).await?;
        let ours = Ours::default();
        let mut problems = survey::problems(kernel, &wanted, &rules, &ours).await?;
        let hooks = hooks(kernel, &wanted).await?;
        let of_plan = |to: &&Plan| Self {
            rules: rules.clone(),
            ours: ours.clone(),
            problems: problems.drain(..to.steps.len()).collect(),
            hooks: hooks.clone(),
        };
        Ok(plans.iter().map(of_plan).collect())
    }
}

/// What is ours by the journal or by the caller's word, in an order of making.
pub(super) fn old_steps(from: &Plan, known: Option<&Record>) -> Vec<Step> {
    match known {
        Some(record) => union(&record.plan.steps, &from.steps),
        None => from.steps.clone(),
    }
}

async fn hooks(kernel: &Kernel, steps: &[Step]) -> Result<Hooks, KernelError> {
    let mut all = Hooks::new();
    for family in Family::BOTH {
        let of_family = |step: &Step| firewall::family_of(step) == Some(family);
        if steps.iter().any(of_family)
            && let Some(found) = kernel.nft_hooks(family).await?
        {
            all.insert(family, found);
        }
    }
    Ok(all)
}

impl<'a> Prepared<'a> {
    pub(super) fn new(
        kernel: &Kernel,
        looked: Looked,
        from: &Plan,
        to: &'a Plan,
        known: Option<&Record>,
        others: &[Arc<Record>],
    ) -> Result<Self, KernelError> {
        let old = old_steps(from, known);
        let Looked {
            rules,
            ours,
            problems,
            hooks,
        } = looked;

        let broken: Vec<Step> = to
            .steps
            .iter()
            .zip(&problems)
            .filter(|(step, p)| {
                matches!(step, Step::Link(_)) && p.iter().any(|p| *p != Problem::Missing)
            })
            .map(|(step, _)| step.clone())
            .collect();
        let removals = removals(&old, &to.steps, &broken);
        let makes = to
            .steps
            .iter()
            .zip(&problems)
            .filter(|(step, problems)| {
                !problems.is_empty()
                    || removals.contains(step)
                    || removals.iter().any(|gone| vanishes_with(step, gone))
            })
            .map(|(step, _)| step.clone())
            .collect();

        let mut prepared = Self {
            to,
            rules,
            ours,
            problems,
            makes,
            removals,
            caused_before: known.map_or_else(Vec::new, |r| r.nft_caused.clone()),
            record: Record {
                plan: Plan {
                    name: to.name.clone(),
                    steps: union(&to.steps, &old),
                },
                place_label: kernel.label().to_owned(),
                netns: kernel.netns().id(),
                netns_path: known
                    .and_then(|r| r.netns_path.clone())
                    .into_iter()
                    .chain(others.iter().filter_map(|r| r.netns_path.clone()))
                    .find(|path| whereabouts::leads_to(path, kernel.netns().id()))
                    .or_else(|| whereabouts::named_path(kernel.netns().id())),
                boot_id: boot_id(),
                previous_sysctls: known
                    .map_or_else(Default::default, |r| r.previous_sysctls.clone()),
                preexisting: known.map_or_else(Vec::new, |r| r.preexisting.clone()),
                nft_caused: Vec::new(),
                iptables: Iptables::default(),
            },
            old,
        };
        prepared.record.preexisting = prepared.preexisting();
        prepared.add_previous_sysctls(kernel)?;
        prepared.record.nft_caused = prepared.nft_caused(&hooks, others);
        prepared.record.iptables = kernel.iptables_so_far();
        Ok(prepared)
    }

    /// What is ours in `step`'s place, if anything.
    fn owned(&self, step: &Step) -> bool {
        self.old.iter().any(|old| same_object(old, step))
    }

    fn view(&self, chain: &Chain) -> Option<firewall::ChainView> {
        let tables = self.rules.get(&chain.family)?;
        Some(firewall::view_chain(tables, chain, &self.ours))
    }

    /// Everything that stood there before us: as recorded, unless it went in the meantime (then what is made instead
    /// is ours), and what stands there identical although nothing says that we made it.
    fn preexisting(&self) -> Vec<Step> {
        let mut kept = self.record.preexisting.clone();
        for (step, problems) in self.to.steps.iter().zip(&self.problems) {
            let recorded = kept.iter().position(|k| same_object(k, step));
            if let Some(at) = recorded {
                if problems.contains(&Problem::Missing) {
                    kept.remove(at);
                }
                continue;
            }
            if self.owned(step) || matches!(step, Step::Sysctl(_)) {
                continue;
            }
            if problems.is_empty() {
                kept.push(step.clone());
            } else if let Step::Chain(chain) = step
                && self.only_jump_is_absent(chain)
            {
                kept.push(Step::Chain(Chain {
                    jump: None,
                    ..chain.clone()
                }));
            }
        }
        kept
    }

    fn only_jump_is_absent(&self, chain: &Chain) -> bool {
        self.view(chain)
            .is_some_and(|view| view.content.is_none() && view.jump == Some(JumpProblem::Absent))
    }

    fn add_previous_sysctls(&mut self, kernel: &Kernel) -> Result<(), KernelError> {
        for step in &self.to.steps {
            if let Step::Sysctl(sysctl) = step
                && !self.record.previous_sysctls.contains_key(&sysctl.key)
                // A sysctl of a device that the plan makes has no previous value, and goes with the device.
                && let Some(value) = kernel.sysctl(&sysctl.key)?
            {
                self.record
                    .previous_sysctls
                    .insert(sysctl.key.clone(), value);
            }
        }
        Ok(())
    }

    /// A hook that another plan of ours caused is caused by this one too: whichever goes last deletes it.
    fn nft_caused(&self, hooks: &Hooks, others: &[Arc<Record>]) -> Vec<NftHook> {
        let mut caused = self.caused_before.clone();
        for (family, existing) in hooks {
            let steps = self.to.steps.iter();
            let wanted = steps
                .filter(|step| firewall::family_of(step) == Some(*family))
                .flat_map(firewall::nft_hooks);
            for hook in wanted {
                let ours = !existing.contains(&hook)
                    || others.iter().any(|r| r.nft_caused.contains(&hook));
                if ours && !caused.contains(&hook) {
                    caused.push(hook);
                }
            }
        }
        caused
    }

    /// Fails if something that is not ours stands where the plan wants an object.
    pub(super) fn refuse_strangers(&self, place: &str) -> Result<(), ApplyError> {
        for (step, problems) in self.to.steps.iter().zip(&self.problems) {
            let Some(problem) = problems.iter().find(|p| **p != Problem::Missing) else {
                continue;
            };
            let (allowed, fix) = match step {
                Step::Sysctl(_) => (true, ""),
                Step::Chain(chain) => (
                    self.owned(step) || self.only_jump_is_absent(chain),
                    "another mesh? remove it, or try `ambidex undo`",
                ),
                Step::ChainRule(_) => (self.owned(step), "remove the rule that is in the way"),
                Step::Member(_) => (
                    self.old.iter().any(|old| {
                        matches!(old, Step::Member(m) if same_object(old, step)
                            && *problem == Problem::Different { found: in_words(m.comment.as_deref()) })
                    }),
                    "the address belongs to another pod: undo that one first",
                ),
                Step::Link(_) => (
                    self.owned(step),
                    "another mesh or overlay? delete the device, or try `ambidex undo`",
                ),
                _ => (self.owned(step), "remove it, or try `ambidex undo`"),
            };
            if !allowed {
                return Err(ApplyError::Conflict {
                    place: place.to_owned(),
                    object: step.to_string(),
                    found: problem.to_string(),
                    fix,
                });
            }
        }
        Ok(())
    }

    /// Edits that remove the chains and rules of one family that go, and jumps that have moved.
    pub(super) fn removal_edits(&self, family: Family) -> Vec<Edit> {
        let going = self
            .removals
            .iter()
            .filter(|step| firewall::family_of(step) == Some(family));
        let mut edits: Vec<Edit> = going
            .flat_map(|step| firewall::unmake(step, &self.record.preexisting))
            .collect();
        for step in &self.to.steps {
            if let Step::Chain(wanted) = step
                && wanted.family == family
            {
                let moved = self.old.iter().filter_map(|old| match old {
                    Step::Chain(chain) if same_object(old, step) => {
                        firewall::delete_moved_jump(chain, wanted)
                    }
                    _ => None,
                });
                edits.extend(moved);
            }
        }
        edits
    }

    /// Edits that make the steps of one family in `run`.
    pub(super) fn make_edits(&self, family: Family, run: &[Step]) -> Vec<Edit> {
        let Some(tables) = self.rules.get(&family) else {
            return Vec::new();
        };
        run.iter()
            .filter(|step| firewall::family_of(step) == Some(family))
            .flat_map(|step| firewall::make(tables, step, &self.ours))
            .collect()
    }

    pub(super) fn rules(&self) -> &Rules {
        &self.rules
    }

    /// The plan that is to stand.
    pub(super) fn wanted(&self) -> &Plan {
        self.to
    }

    /// Steps to be made, in the plan's order.
    pub(super) fn makes(&self) -> &[Step] {
        &self.makes
    }

    /// Steps to be removed, in order.
    pub(super) fn removals(&self) -> &[Step] {
        &self.removals
    }

    /// What the journal has to say before the first change.
    pub(super) fn record(&self) -> &Record {
        &self.record
    }

    /// Hooks that exist because of this change.
    pub(super) fn newly_caused(&self) -> Vec<NftHook> {
        let caused = self.record.nft_caused.iter();
        caused
            .filter(|hook| !self.caused_before.contains(hook))
            .cloned()
            .collect()
    }
}
