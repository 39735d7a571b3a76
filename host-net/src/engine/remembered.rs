//! Rules that were read or written before, for as long as the kernel says that none has changed since.
//!
//! To read a table of iptables-nft takes a program and milliseconds, and a change of a pod's capture wants to know the same
//! tables several times. nf_tables numbers the states of a namespace's rules: while the number is the one of the reading,
//! so are the rules. A change of ours adds as many to the number as it commits tables; if the number says anything else,
//! somebody else was there, and nothing is remembered. A namespace is known by its cookie, which unlike its inode is never
//! given to another one.
//!
//! For changes only: a proof that a plan stands reads for itself.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use super::kernel::Kernel;
use super::tables::Tables;
use super::{InspectError, survey, turn};
use crate::iptables::{Iptables, RulesState};
use crate::plan::{Family, Place, Plan, Table};

/// Namespaces that are remembered: more than a node has pods.
const MOST: usize = 1024;

/// What is known of one namespace.
struct Known {
    generation: u32,
    tables: BTreeMap<(Family, Table), Tables>,
}

fn all() -> MutexGuard<'static, HashMap<u64, Known>> {
    static ALL: LazyLock<Mutex<HashMap<u64, Known>>> = LazyLock::new(Mutex::default);
    ALL.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads the rules that a change to `plan` will want to know, so that it is quicker when its time comes. What changes in
/// between is read again then. Changes nothing.
///
/// # Errors
/// When the rules cannot be read.
pub async fn read_ahead(place: &Place, plan: &Plan) -> Result<(), InspectError> {
    let _turn = turn(place.netns.id()).await;
    let kernel = Kernel::new(place, Iptables::default());
    let read = survey::rules(&kernel, &plan.steps).await;
    read.map(drop).map_err(|source| InspectError {
        place: place.label.clone(),
        source,
    })
}

/// These tables, if all of them are known in this state.
pub(super) fn recall(
    state: RulesState,
    family: Family,
    wanted: &BTreeSet<Table>,
) -> Option<Tables> {
    let all = all();
    let known = all
        .get(&state.namespace)
        .filter(|known| known.generation == state.generation)?;
    let mut found = Tables::default();
    for table in wanted {
        found.extend(known.tables.get(&(family, *table))?);
    }
    Some(found)
}

/// Notes what was read while the state was this one from the first to the last.
pub(super) fn note_read(
    state: RulesState,
    family: Family,
    tables: impl IntoIterator<Item = (Table, Tables)>,
) {
    let mut all = all();
    if all.len() >= MOST && !all.contains_key(&state.namespace) {
        all.clear();
    }
    let known = all.entry(state.namespace).or_insert(Known {
        generation: state.generation,
        tables: BTreeMap::new(),
    });
    if known.generation != state.generation {
        known.generation = state.generation;
        known.tables.clear();
    }
    for (table, content) in tables {
        known.tables.insert((family, table), content);
    }
}

/// Notes that a restore has left these tables so, of which each was changed. What is known of others stays known if nobody
/// else changed anything between the two states.
pub(super) fn note_written(
    before: RulesState,
    after: RulesState,
    family: Family,
    written: Vec<(Table, Tables)>,
) {
    let mut all = all();
    let commits = u32::try_from(written.len()).unwrap_or(u32::MAX);
    let undisturbed = before.namespace == after.namespace
        && before.generation.checked_add(commits) == Some(after.generation);
    let known = all
        .get_mut(&before.namespace)
        .filter(|known| undisturbed && known.generation == before.generation);
    let Some(known) = known else {
        all.remove(&before.namespace);
        return;
    };
    known.generation = after.generation;
    for (table, content) in written {
        known.tables.insert((family, table), content);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]

    use super::super::tables::{AT_END, Edit, Gate, script};
    use super::*;
    use crate::iptables::{Variant, rules_state};
    use crate::netns::Netns;

    const FAMILY: Family = Family::V4;

    fn state(namespace: u64, generation: u32) -> RulesState {
        RulesState {
            namespace,
            generation,
        }
    }

    fn content(table: Table, rule: &str) -> (Table, Tables) {
        let mut tables = Tables::default();
        tables.set(table, "OUTPUT", vec![rule.to_owned()]);
        (table, tables)
    }

    fn rule_of(state: RulesState, table: Table) -> Option<String> {
        let found = recall(state, FAMILY, &BTreeSet::from([table]))?;
        let rules = found.rules(&(table, "OUTPUT".to_owned()))?;
        rules.first().cloned()
    }

    #[test]
    fn what_is_known_is_of_one_state() {
        let namespace = u64::MAX;
        note_read(
            state(namespace, 7),
            FAMILY,
            [content(Table::Nat, "a"), content(Table::Raw, "b")],
        );
        assert_eq!(
            rule_of(state(namespace, 7), Table::Nat).as_deref(),
            Some("a")
        );
        assert_eq!(rule_of(state(namespace, 8), Table::Nat), None);
        assert_eq!(rule_of(state(namespace, 7), Table::Mangle), None);
        assert_eq!(rule_of(state(namespace - 1, 7), Table::Nat), None);
    }

    #[test]
    fn a_change_of_ours_is_known_unless_somebody_else_was_there() {
        let namespace = u64::MAX - 2;
        let read = || note_read(state(namespace, 7), FAMILY, [content(Table::Raw, "b")]);
        let written = || vec![content(Table::Nat, "c"), content(Table::Mangle, "d")];
        read();
        note_written(state(namespace, 7), state(namespace, 9), FAMILY, written());
        let now = state(namespace, 9);
        assert_eq!(rule_of(now, Table::Nat).as_deref(), Some("c"));
        assert_eq!(rule_of(now, Table::Raw).as_deref(), Some("b"));
        // One more than ours; and one between the reading and ours.
        for (before, after) in [(7, 10), (8, 10)] {
            read();
            let (before, after) = (state(namespace, before), state(namespace, after));
            note_written(before, after, FAMILY, written());
            assert_eq!(rule_of(after, Table::Nat), None);
            assert_eq!(rule_of(after, Table::Raw), None);
        }
    }

    /// What iptables really commits: one transaction for each table, whose rules read as they were written.
    #[tokio::test]
    async fn the_kernel_numbers_our_changes_so() {
        let place = Place {
            label: "test".to_owned(),
            netns: Netns::create_unnamed().unwrap(),
        };
        let kernel = Kernel::new(&place, Iptables::both(Variant::Nft));
        let wanted = BTreeSet::from([Table::Raw, Table::Mangle, Table::Nat]);
        let recalled = || recall(rules_state(&place.netns).unwrap(), FAMILY, &wanted);
        let mut before = kernel.tables(FAMILY, wanted.clone()).await.unwrap();
        let own = (Table::Mangle, "own".to_owned());
        let output = |table| (table, "OUTPUT".to_owned());
        let jump = "-j own".to_owned();
        let rule = "-p tcp -m tcp --dport 9 -j ACCEPT".to_owned();
        for edits in [
            vec![
                Edit::Fill(own.clone(), vec![rule.clone()]),
                Edit::Insert(output(Table::Mangle), jump.clone(), 0),
                Edit::Insert(output(Table::Nat), rule.clone(), AT_END),
            ],
            vec![
                Edit::Insert(output(Table::Raw), "-j ACCEPT".to_owned(), AT_END),
                Edit::Delete(output(Table::Mangle), jump),
                Edit::Drop(own),
                Edit::Delete(output(Table::Nat), rule),
            ],
        ] {
            let mut after = before.clone();
            let (effective, _) = after.edit(&edits);
            let script = script(&before, &effective, Gate::Last).unwrap().unwrap();
            kernel
                .restore(FAMILY, script, &effective, &after)
                .await
                .unwrap();
            assert_eq!(recalled(), Some(after.clone()));
            let reader = Kernel::unprejudiced(&place);
            let read = reader.tables(FAMILY, wanted.clone()).await.unwrap();
            for key in [
                output(Table::Raw),
                output(Table::Mangle),
                output(Table::Nat),
            ] {
                assert_eq!(read.rules(&key), after.rules(&key));
            }
            assert_eq!(kernel.tables(FAMILY, wanted.clone()).await.unwrap(), after);
            before = after;
        }
        let stranger = "*nat\n-A OUTPUT -j RETURN\nCOMMIT\n";
        let by_hand = Iptables::both(Variant::Nft);
        by_hand.restore(&place.netns, FAMILY, stranger).unwrap();
        assert_eq!(recalled(), None);
        let found = kernel.tables(FAMILY, wanted.clone()).await.unwrap();
        let rules = found.rules(&output(Table::Nat)).unwrap();
        assert_eq!(rules, ["-j RETURN"]);
    }
}
