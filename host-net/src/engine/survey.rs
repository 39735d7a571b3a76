//! Looking at the kernel before anything is changed: each step of a plan compared with what is there.

use std::collections::{BTreeMap, BTreeSet};

use super::Problem;
use super::firewall::{self, Ours};
use super::kernel::{Kernel, KernelError};
use super::tables::Tables;
use crate::plan::{Family, Step, Table};

/// iptables rules of both families, as far as a change or an inspection needs them.
pub(super) type Rules = BTreeMap<Family, Tables>;

/// Reads the tables that the steps are in.
pub(super) async fn rules<'a>(
    kernel: &Kernel,
    steps: impl IntoIterator<Item = &'a Step>,
) -> Result<Rules, KernelError> {
    let mut needed: BTreeMap<Family, BTreeSet<Table>> = BTreeMap::new();
    for step in steps {
        if let Some((family, table)) = firewall::table_of(step) {
            needed.entry(family).or_default().insert(table);
        }
    }
    let mut rules = Rules::new();
    for (family, tables) in needed {
        rules.insert(family, kernel.tables(family, tables).await?);
    }
    Ok(rules)
}

/// What is wrong with each step; an empty list means nothing. In the order of the steps.
pub(super) async fn problems(
    kernel: &Kernel,
    steps: &[Step],
    rules: &Rules,
    ours: &Ours,
) -> Result<Vec<Vec<Problem>>, KernelError> {
    let looked = kernel.look(steps).await?;
    let each = steps.iter().zip(looked);
    Ok(each
        .map(|(step, looked)| match firewall::family_of(step) {
            Some(family) => match rules.get(&family) {
                Some(tables) => firewall::problems(tables, step, ours),
                None => vec![Problem::Missing],
            },
            None => looked.into_iter().collect(),
        })
        .collect())
}

/// Whether two texts of a sysctl are the same value; the kernel separates several numbers by tabs.
pub(super) fn same_value(a: &str, b: &str) -> bool {
    a.split_ascii_whitespace().eq(b.split_ascii_whitespace())
}
