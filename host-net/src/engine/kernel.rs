//! One namespace's kernel objects of all kinds, as the engine needs them.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use super::line::Turn;
use super::tables::{Edit, Tables};
use super::{Problem, remembered, survey};
use crate::ipset::{Ipset, IpsetError, Removal, SetEntry};
use crate::iptables::{
    BaseChain, Iptables, IptablesError, RulesState, Variant, choose, delete_nft_base_chains,
    delete_nft_tables, nft_base_chains, nft_tables, rules_state,
};
use crate::journal::NftHook;
use crate::netlink::{Netlink, NetlinkError, Presence};
use crate::netns::Netns;
use crate::nft::{self, NftError};
use crate::plan::{Family, Link, Member, NftTable, Place, Route, Set, Step, Table};
use crate::sysctl;

/// An operation on the kernel failed. The message names the object.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A link, address, rule or route.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// A set or its entries.
    #[error(transparent)]
    Ipset(#[from] IpsetError),
    /// A chain, a rule or a table.
    #[error(transparent)]
    Iptables(#[from] IptablesError),
    /// An nftables table.
    #[error(transparent)]
    Nft(#[from] NftError),
    /// A sysctl.
    #[error("{0}")]
    Sysctl(io::Error),
    /// A program that was being waited for went away with its thread.
    #[error("iptables or nft: the thread that ran it died: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// What became of an object that was to be removed.
pub(super) enum Unmade {
    Gone,
    Absent,
    /// Something else stands in its place by now: left alone.
    NotOurs(String),
}

/// Access to one namespace. Sockets are opened when first needed.
pub(super) struct Kernel {
    label: String,
    netns: Netns,
    netlink: OnceCell<Netlink>,
    /// Variants of iptables, chosen when first needed.
    iptables: Mutex<Iptables>,
    /// Whether nothing that is remembered counts.
    reads_all: bool,
    /// Kept until the last program has ended, also when nobody waits for it any more.
    turn: Option<Arc<Turn>>,
}

impl Kernel {
    /// `iptables`: variants that were chosen earlier for this plan, so that it is removed with the program that made
    /// it.
    pub(super) fn new(place: &Place, iptables: Iptables) -> Self {
        Self {
            label: place.label.clone(),
            netns: place.netns.clone(),
            netlink: OnceCell::new(),
            iptables: Mutex::new(iptables),
            reads_all: false,
            turn: None,
        }
    }

    /// Nobody else's turn begins before the programs that this one runs have ended, also when its caller is stopped.
    pub(super) fn holding(self, turn: &Arc<Turn>) -> Self {
        Self {
            turn: Some(Arc::clone(turn)),
            ..self
        }
    }

    /// For a proof: what is there counts, and nothing that was known before.
    pub(super) fn unprejudiced(place: &Place) -> Self {
        Self {
            reads_all: true,
            ..Self::new(place, Iptables::default())
        }
    }

    pub(super) fn label(&self) -> &str {
        &self.label
    }

    pub(super) fn netns(&self) -> &Netns {
        &self.netns
    }

    async fn netlink(&self) -> Result<&Netlink, NetlinkError> {
        self.netlink
            .get_or_try_init(|| Netlink::connect(&self.netns))
            .await
    }

    fn ipset(&self) -> Result<Ipset, IpsetError> {
        Ipset::open(&self.netns)
    }

    /// The variants chosen so far.
    pub(super) fn iptables_so_far(&self) -> Iptables {
        *self.iptables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn iptables(&self, family: Family) -> Result<Iptables, KernelError> {
        let so_far = self.iptables_so_far();
        if so_far.variant(family).is_ok() {
            return Ok(so_far);
        }
        let netns = self.netns.clone();
        let variant = tokio::task::spawn_blocking(move || choose(&netns, family)).await??;
        let mut chosen = self.iptables.lock().unwrap_or_else(PoisonError::into_inner);
        chosen.set(family, variant);
        Ok(*chosen)
    }

    /// Reads tables; those that do not exist are left out.
    pub(super) async fn tables(
        &self,
        family: Family,
        wanted: BTreeSet<Table>,
    ) -> Result<Tables, KernelError> {
        let iptables = self.iptables(family).await?;
        let before = self.rules_state(iptables.variant(family)?);
        if let Some(known) = before.and_then(|state| remembered::recall(state, family, &wanted)) {
            return Ok(known);
        }
        let netns = self.netns.clone();
        let read = move || -> Result<BTreeMap<Table, Tables>, IptablesError> {
            let mut all = BTreeMap::new();
            for table in wanted {
                let mut content = Tables::default();
                for (chain, rules) in iptables.save(&netns, family, table)?.chains {
                    content.set(table, &chain, rules);
                }
                all.insert(table, content);
            }
            Ok(all)
        };
        let read = tokio::task::spawn_blocking(read).await??;
        let mut tables = Tables::default();
        for content in read.values() {
            tables.extend(content);
        }
        if let Some(state) = before
            && self.rules_state(Variant::Nft) == before
        {
            remembered::note_read(state, family, read);
        }
        Ok(tables)
    }

    /// In which state the rules are, where that is known and may be relied on.
    fn rules_state(&self, variant: Variant) -> Option<RulesState> {
        match variant {
            // Where the kernel cannot tell, everything is read.
            Variant::Nft if !self.reads_all => rules_state(&self.netns).ok(),
            _ => None,
        }
    }

    /// One `iptables-restore --noflush`, after which these tables are as in `after`.
    pub(super) async fn restore(
        &self,
        family: Family,
        script: String,
        edits: &[Edit],
        after: &Tables,
    ) -> Result<(), KernelError> {
        let iptables = self.iptables(family).await?;
        let variant = iptables.variant(family)?;
        let before = self.rules_state(variant);
        let netns = self.netns.clone();
        let turn = self.turn.clone();
        let write = move || {
            let restored = iptables.restore(&netns, family, &script);
            drop(turn);
            restored
        };
        tokio::task::spawn_blocking(write).await??;
        if let Some(before) = before
            && let Some(state) = self.rules_state(variant)
        {
            let tables: BTreeSet<Table> = edits.iter().map(|edit| edit.key().0).collect();
            let written = tables.into_iter().map(|table| (table, after.only(table)));
            remembered::note_written(before, state, family, written.collect());
        }
        Ok(())
    }

    /// The nft tables and base chains of iptables that exist; none if this family is managed by iptables-legacy,
    /// whose tables nobody can delete.
    pub(super) async fn nft_hooks(
        &self,
        family: Family,
    ) -> Result<Option<BTreeSet<NftHook>>, KernelError> {
        if self.iptables(family).await?.variant(family)? != Variant::Nft {
            return Ok(None);
        }
        let netns = self.netns.clone();
        let look = move || -> Result<BTreeSet<NftHook>, KernelError> {
            let hook = |table, chain| NftHook {
                family,
                table,
                chain,
            };
            let existing = nft_tables(&netns, family)?;
            let tables = [Table::Raw, Table::Filter, Table::Mangle, Table::Nat]
                .into_iter()
                .filter(|table| existing.iter().any(|name| name == table.as_str()))
                .map(|table| hook(table, None));
            let chains = nft_base_chains(&netns, family)?;
            let chains = chains
                .into_iter()
                .map(|(table, chain)| hook(table, Some(chain)));
            Ok(tables.chain(chains).collect())
        };
        Ok(Some(tokio::task::spawn_blocking(look).await??))
    }

    /// Deletes those base chains, and then those tables, that are empty.
    pub(super) fn delete_empty_nft(&self, hooks: &[NftHook]) -> Result<(), KernelError> {
        for family in [Family::V4, Family::V6] {
            let of_family = || hooks.iter().filter(|hook| hook.family == family);
            let chains: Vec<BaseChain> = of_family()
                .filter_map(|hook| Some((hook.table, hook.chain.clone()?)))
                .collect();
            if !chains.is_empty() {
                delete_nft_base_chains(&self.netns, family, &chains)?;
            }
            let tables: Vec<Table> = of_family()
                .filter(|hook| hook.chain.is_none())
                .map(|hook| hook.table)
                .collect();
            if !tables.is_empty() {
                delete_nft_tables(&self.netns, family, &tables)?;
            }
        }
        Ok(())
    }

    /// The value of a sysctl; none if there is no such key, as for a device that is not there.
    pub(super) fn sysctl(&self, key: &str) -> Result<Option<String>, KernelError> {
        match sysctl::read(&self.netns, key) {
            Ok(value) => Ok(Some(value)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(KernelError::Sysctl(error)),
        }
    }

    pub(super) fn set_sysctl(&self, key: &str, value: &str) -> Result<(), KernelError> {
        sysctl::write(&self.netns, key, value).map_err(KernelError::Sysctl)
    }

    /// Makes a run of steps of one kind, not iptables'.
    pub(super) async fn make(&self, steps: &[Step]) -> Result<(), KernelError> {
        let mut members: Vec<Member> = Vec::new();
        let mut routes: Vec<Route> = Vec::new();
        let mut tables: Vec<NftTable> = Vec::new();
        for step in steps {
            match step {
                Step::Link(link) => {
                    self.netlink().await?.add_link(link).await?;
                }
                Step::Address(address) => {
                    self.netlink().await?.add_address(address).await?;
                }
                Step::Rule(rule) => {
                    self.netlink().await?.add_rule(rule).await?;
                }
                Step::Sysctl(sysctl) => self.set_sysctl(&sysctl.key, &sysctl.value)?,
                Step::Set(set) => {
                    self.ipset()?.create(set)?;
                }
                Step::Member(member) => members.push(member.clone()),
                Step::Route(route) => routes.push(route.clone()),
                Step::NftTable(table) => tables.push(table.clone()),
                Step::Chain(_) | Step::ChainRule(_) => {}
            }
        }
        if !tables.is_empty() {
            let netns = self.netns.clone();
            tokio::task::spawn_blocking(move || nft::apply(&netns, &tables)).await??;
        }
        if !members.is_empty() {
            self.ipset()?.add(&members)?;
        }
        if !routes.is_empty() {
            let results = self.netlink().await?.add_routes(&routes).await;
            for result in results {
                result?;
            }
        }
        Ok(())
    }

    /// What nftables tables hold, for putting it back; none for each that is not there.
    pub(super) async fn nft_saved(
        &self,
        names: Vec<String>,
    ) -> Result<Vec<(String, Option<String>)>, KernelError> {
        let netns = self.netns.clone();
        let save = move || {
            names
                .into_iter()
                .map(|name| nft::saved(&netns, &name).map(|saved| (name, saved)))
                .collect::<Result<_, NftError>>()
        };
        Ok(tokio::task::spawn_blocking(save).await??)
    }

    /// Puts an nftables table back as it was.
    pub(super) async fn nft_put_back(
        &self,
        name: String,
        saved: Option<String>,
    ) -> Result<(), KernelError> {
        let netns = self.netns.clone();
        let put_back = move || nft::put_back(&netns, &name, saved.as_deref());
        Ok(tokio::task::spawn_blocking(put_back).await??)
    }

    /// Removes one object if it is exactly the described one. Not for iptables steps and sysctls.
    pub(super) async fn unmake(&self, step: &Step) -> Result<Unmade, KernelError> {
        let was_there = match step {
            Step::Link(link) => return self.unmake_link(link).await,
            Step::Address(address) => self.netlink().await?.del_address(address).await?,
            Step::Rule(rule) => self.netlink().await?.del_rule(rule).await?,
            Step::Route(route) => self.netlink().await?.del_route(route).await?,
            Step::NftTable(table) => {
                let (netns, name) = (self.netns.clone(), table.name.clone());
                tokio::task::spawn_blocking(move || nft::delete(&netns, &name)).await??
            }
            Step::Set(set) => return self.unmake_set(set),
            Step::Member(member) => {
                return Ok(match self.ipset()?.del(member)? {
                    Removal::Removed => Unmade::Gone,
                    Removal::Absent => Unmade::Absent,
                    Removal::OwnedByOther { comment } => {
                        Unmade::NotOurs(in_words(comment.as_deref()))
                    }
                });
            }
            Step::Sysctl(_) | Step::Chain(_) | Step::ChainRule(_) => false,
        };
        Ok(if was_there {
            Unmade::Gone
        } else {
            Unmade::Absent
        })
    }

    /// MTU and state may have been changed by hand; kind, VNI and remote cannot be without making another device.
    async fn unmake_link(&self, link: &Link) -> Result<Unmade, KernelError> {
        let netlink = self.netlink().await?;
        let Some(found) = netlink.link(&link.name).await? else {
            return Ok(Unmade::Absent);
        };
        let same = found.overlay.as_ref().is_some_and(|overlay| {
            overlay.kind == link.overlay
                && overlay.vni == link.vni
                && overlay.remote == Some(link.remote.into())
                && overlay.port == link.port
        });
        if !same {
            return Ok(Unmade::NotOurs(found.to_string()));
        }
        Ok(match netlink.del_link(&link.name).await? {
            true => Unmade::Gone,
            false => Unmade::Absent,
        })
    }

    fn unmake_set(&self, set: &Set) -> Result<Unmade, KernelError> {
        let ipset = self.ipset()?;
        if let Some(found) = different_set(&ipset, set)? {
            return Ok(Unmade::NotOurs(found));
        }
        Ok(match ipset.destroy(&set.name)? {
            true => Unmade::Gone,
            false => Unmade::Absent,
        })
    }

    /// What is wrong with each of the steps that are not iptables', in their order; iptables' have nothing here.
    pub(super) async fn look(&self, steps: &[Step]) -> Result<Vec<Option<Problem>>, KernelError> {
        let routes: Vec<Route> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Route(route) => Some(route.clone()),
                _ => None,
            })
            .collect();
        let mut routes_found = if routes.is_empty() {
            Vec::new()
        } else {
            self.netlink().await?.check_routes(&routes).await?
        }
        .into_iter();
        let mut entries: BTreeMap<&str, Vec<SetEntry>> = BTreeMap::new();
        let mut problems = Vec::with_capacity(steps.len());
        for step in steps {
            problems.push(match step {
                Step::Link(link) => problem(self.netlink().await?.check_link(link).await?),
                Step::Address(a) => problem(self.netlink().await?.check_address(a).await?),
                Step::Rule(rule) => problem(self.netlink().await?.check_rule(rule).await?),
                Step::Route(_) => problem(routes_found.next().unwrap_or(Presence::Absent)),
                Step::Sysctl(sysctl) => match self.sysctl(&sysctl.key)? {
                    None => Some(Problem::Missing),
                    Some(found) if survey::same_value(&found, &sysctl.value) => None,
                    Some(found) => Some(Problem::Different { found }),
                },
                Step::NftTable(table) => {
                    let (netns, table) = (self.netns.clone(), table.clone());
                    tokio::task::spawn_blocking(move || nft::look(&netns, &table)).await??
                }
                Step::Set(set) => self.look_at_set(set)?,
                Step::Member(member) => {
                    if !entries.contains_key(member.set.as_str()) {
                        // A set of another kind is a finding about the set, not a failure to look.
                        let found = self.ipset()?.listing(&member.set)?;
                        entries.insert(&member.set, found.map_or_else(Vec::new, |f| f.entries));
                    }
                    entries
                        .get(member.set.as_str())
                        .and_then(|found| look_at_member(found, member))
                }
                Step::Chain(_) | Step::ChainRule(_) => None,
            });
        }
        Ok(problems)
    }

    fn look_at_set(&self, set: &Set) -> Result<Option<Problem>, KernelError> {
        let ipset = self.ipset()?;
        if ipset.header(&set.name)?.is_none() {
            return Ok(Some(Problem::Missing));
        }
        Ok(different_set(&ipset, set)?.map(|found| Problem::Different { found }))
    }
}

fn problem(presence: Presence) -> Option<Problem> {
    match presence {
        Presence::Same => None,
        Presence::Absent => Some(Problem::Missing),
        Presence::Different { found } => Some(Problem::Different { found }),
    }
}

/// The definition of a set of this name that is of another kind.
fn different_set(ipset: &Ipset, wanted: &Set) -> Result<Option<String>, IpsetError> {
    let found = ipset.header(&wanted.name)?.filter(|found| {
        !(found.is_hash_of(wanted.family)
            && found.options.is_empty()
            && found.comments == wanted.comments)
    });
    Ok(found.map(|found| found.definition()))
}

fn look_at_member(entries: &[SetEntry], wanted: &Member) -> Option<Problem> {
    let Some(found) = entries.iter().find(|entry| entry.ip == Some(wanted.ip)) else {
        return Some(Problem::Missing);
    };
    (found.comment != wanted.comment).then(|| Problem::Different {
        found: in_words(found.comment.as_deref()),
    })
}

/// How an entry's owner is named when it is not the wanted one.
pub(super) fn in_words(comment: Option<&str>) -> String {
    match comment {
        Some(comment) => format!("with comment {comment:?}"),
        None => "without comment".to_owned(),
    }
}
