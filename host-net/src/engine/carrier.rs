//! Carrying a change out, step by step, with a list of what takes it back.

use super::kernel::{Kernel, KernelError, Unmade};
use super::survey::{self, Rules};
use super::tables::{Edit, Gate, script};
use crate::journal::Record;
use crate::plan::{Family, Step, Sysctl};

/// What takes one operation back.
enum Undo {
    Rules(Family, Vec<Edit>),
    Unmake(Vec<Step>),
    /// An nftables table and what it held.
    Nft(String, Option<String>),
    Make(Step),
}

/// Changes the kernel and remembers how to change it back.
pub(super) struct Carrier<'a> {
    pub(super) kernel: &'a Kernel,
    rules: Rules,
    undo: Vec<Undo>,
    pub(super) made: Vec<Step>,
    pub(super) removed: Vec<Step>,
}

impl<'a> Carrier<'a> {
    pub(super) fn new(kernel: &'a Kernel, rules: Rules) -> Self {
        Self {
            kernel,
            rules,
            undo: Vec::new(),
            made: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// One restore of one family; none if the edits change nothing.
    pub(super) async fn firewall(
        &mut self,
        family: Family,
        edits: &[Edit],
        gate: Gate,
    ) -> Result<(), KernelError> {
        let before = self.rules.entry(family).or_default();
        let mut after = before.clone();
        let (effective, inverse) = after.edit(edits);
        let Some(script) = script(before, &effective, gate)? else {
            return Ok(());
        };
        self.undo.push(Undo::Rules(family, inverse));
        self.kernel
            .restore(family, script, &effective, &after)
            .await?;
        *before = after;
        Ok(())
    }

    /// As [`Carrier::firewall`], from what is there by now.
    pub(super) async fn firewall_anew(
        &mut self,
        family: Family,
        edits: &[Edit],
        gate: Gate,
    ) -> Result<(), KernelError> {
        let tables = edits.iter().map(|edit| edit.key().0).collect();
        let found = self.kernel.tables(family, tables).await?;
        self.rules.insert(family, found);
        self.firewall(family, edits, gate).await
    }

    /// What takes back a restore that is made for several plans at once.
    pub(super) fn note_rules(&mut self, family: Family, inverse: Vec<Edit>) {
        self.undo.push(Undo::Rules(family, inverse));
    }

    /// Makes one run of steps that are not iptables'.
    pub(super) async fn make(&mut self, steps: &[Step]) -> Result<(), KernelError> {
        // Noted first: an operation that fails may have done a part of its work.
        match steps {
            [Step::Sysctl(sysctl)] => {
                if let Some(value) = self.kernel.sysctl(&sysctl.key)? {
                    self.undo.push(Undo::Make(Step::Sysctl(Sysctl {
                        key: sysctl.key.clone(),
                        value,
                    })));
                }
            }
            [Step::NftTable(_), ..] => {
                let names = steps.iter().filter_map(|step| match step {
                    Step::NftTable(table) => Some(table.name.clone()),
                    _ => None,
                });
                for (name, held) in self.kernel.nft_saved(names.collect()).await? {
                    self.undo.push(Undo::Nft(name, held));
                }
            }
            _ => self.undo.push(Undo::Unmake(steps.to_vec())),
        }
        self.kernel.make(steps).await?;
        self.made.extend_from_slice(steps);
        Ok(())
    }

    /// Removes one step that is not iptables', or puts a sysctl back.
    pub(super) async fn unmake(&mut self, step: &Step, record: &Record) -> Result<(), KernelError> {
        if record.preexisting.contains(step) {
            return Ok(());
        }
        if unmake(self.kernel, step, record).await? {
            self.undo.push(Undo::Make(step.clone()));
            self.removed.push(step.clone());
        }
        Ok(())
    }

    /// Takes everything back, last first; goes on after errors and returns them.
    pub(super) async fn roll_back(&mut self) -> Vec<String> {
        let mut left = Vec::new();
        while let Some(undo) = self.undo.pop() {
            match undo {
                Undo::Rules(family, edits) => {
                    if let Err(error) = self.restore_back(family, &edits).await {
                        left.push(error.to_string());
                    }
                }
                Undo::Make(step) => {
                    if let Err(error) = self.kernel.make(&[step]).await {
                        left.push(error.to_string());
                    }
                }
                Undo::Nft(name, held) => {
                    if let Err(error) = self.kernel.nft_put_back(name, held).await {
                        left.push(error.to_string());
                    }
                }
                Undo::Unmake(steps) => {
                    for step in steps.iter().rev() {
                        if let Err(error) = self.kernel.unmake(step).await {
                            left.push(error.to_string());
                        }
                    }
                }
            }
        }
        left
    }

    /// A restore is atomic per table only: after a failure some tables may be changed and some not, so what is there
    /// is looked at again.
    async fn restore_back(&mut self, family: Family, edits: &[Edit]) -> Result<(), KernelError> {
        let tables = edits.iter().map(|edit| edit.key().0).collect();
        let before = self.kernel.tables(family, tables).await?;
        let mut after = before.clone();
        let (effective, _) = after.edit(edits);
        match script(&before, &effective, Gate::First)? {
            Some(script) => {
                let restored = self.kernel.restore(family, script, &effective, &after);
                restored.await
            }
            None => Ok(()),
        }
    }
}

/// Removes one step that is not iptables'. Returns whether it was there and is gone.
pub(super) async fn unmake(
    kernel: &Kernel,
    step: &Step,
    record: &Record,
) -> Result<bool, KernelError> {
    if let Step::Sysctl(sysctl) = step {
        return put_back(kernel, sysctl, record);
    }
    match kernel.unmake(step).await? {
        Unmade::Gone => Ok(true),
        Unmade::Absent => Ok(false),
        Unmade::NotOurs(found) => {
            tracing::info!(object = %step, found, "not ours any more, left alone");
            Ok(false)
        }
    }
}

/// Writes the value from before us, if the sysctl still has ours.
fn put_back(kernel: &Kernel, sysctl: &Sysctl, record: &Record) -> Result<bool, KernelError> {
    let (Some(previous), Some(found)) = (
        record.previous_sysctls.get(&sysctl.key),
        kernel.sysctl(&sysctl.key)?,
    ) else {
        return Ok(false);
    };
    if !survey::same_value(&found, &sysctl.value) {
        tracing::info!(
            sysctl = sysctl.key,
            ours = sysctl.value,
            found,
            previous,
            "somebody else changed it since, left alone"
        );
        return Ok(false);
    }
    if !survey::same_value(&found, previous) {
        kernel.set_sysctl(&sysctl.key, previous)?;
    }
    Ok(true)
}
