//! What stands under the captures' names and numbers and is nobody's that this agent knows: another mesh's, or an agent's
//! whose journal is lost. The names are the field's own, so a name proves nothing about who made an object.
//!
//! Two outcomes, never a third. What is a capture of ours to the letter, with nothing missing and nothing beside it, is
//! taken over: no other program writes all of it, and two agents cannot run on one node, so its maker is gone. Everything
//! else is refused before anything is changed, with every object named and the commands that take it away: a half that
//! fits may belong to somebody who is at work. Nothing is flushed.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use anyhow::Context;
use host_net::engine::{self, Problem};
use host_net::ipset::Ipset;
use host_net::iptables::{OwnChain, Ruleset, own_rules};
use host_net::journal::{Record, boot_id};
use host_net::netlink::{ListedRoute, ListedRule, Netlink};
use host_net::netns::Netns;
use host_net::plan::{Family, Place, Plan, Step, Table};
use inpod_redirect::facts::{
    GUARD_FORWARD_CHAIN, GUARD_INPUT_CHAIN, GUARD_OUTPUT_CHAIN, NFT_GUARD_TABLE, OLDER_INPUT_CHAIN,
    OLDER_OUTPUT_CHAIN, V6_FORWARD_CHAIN, V6_INPUT_CHAIN, V6_OUTPUT_CHAIN,
};

use super::{Agent, Pod};
use crate::doctor::mesh_of;
use crate::options::Capture;

/// Chains in a pod whose names no other program uses; all other names are the field's, too.
const OWN_NAMES: [&str; 8] = [
    GUARD_FORWARD_CHAIN,
    GUARD_INPUT_CHAIN,
    GUARD_OUTPUT_CHAIN,
    OLDER_INPUT_CHAIN,
    OLDER_OUTPUT_CHAIN,
    V6_FORWARD_CHAIN,
    V6_INPUT_CHAIN,
    V6_OUTPUT_CHAIN,
];

/// Something that nobody known made.
#[derive(Debug)]
enum Stranger {
    Chain(OwnChain),
    /// Of the family `inet`.
    NftTable(String),
    Set {
        name: String,
        members: usize,
    },
    Route(ListedRoute),
    Rule(ListedRule),
    Device(String),
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(chain) => {
                write!(
                    f,
                    "chain {} in table {} of {}",
                    chain.name,
                    chain.table,
                    chain.program()
                )?;
                match mesh_of(&chain.name) {
                    Some(mesh) => write!(f, " (a name of {mesh})"),
                    None => Ok(()),
                }
            }
            Self::NftTable(name) => {
                write!(f, "nftables table inet {name}")?;
                match mesh_of(name) {
                    Some(mesh) => write!(f, " (a name of {mesh})"),
                    None => Ok(()),
                }
            }
            Self::Set { name, members } => write!(f, "ipset {name} with {members} entries"),
            Self::Route(route) => write!(f, "route {}", route.text),
            Self::Rule(rule) => write!(f, "routing rule {rule}"),
            Self::Device(name) => write!(f, "device {name}"),
        }
    }
}

impl Stranger {
    /// Whether a step of a plan is about this object.
    fn is_meant_by(&self, step: &Step) -> bool {
        match (self, step) {
            (Self::Chain(chain), Step::Chain(step)) => {
                chain.family == step.family
                    && chain.table == step.table.as_str()
                    && chain.name == step.name
            }
            (Self::NftTable(name), Step::NftTable(step)) => *name == step.name,
            (Self::Set { name, .. }, Step::Set(step)) => *name == step.name,
            (Self::Route(route), Step::Route(step)) => {
                (route.table, route.dst) == (step.table, step.dst)
            }
            (Self::Rule(rule), Step::Rule(step)) => rule.rule.as_ref() == Some(step),
            (Self::Device(name), Step::Link(step)) => *name == step.name,
            _ => false,
        }
    }

    /// Whether it is more than the plan has, although the plan has it.
    fn is_in_use(&self) -> bool {
        matches!(self, Self::Set { members, .. } if *members > 0)
    }
}

/// A refusal: all that is in the way, and the commands that take it away.
#[derive(Debug, thiserror::Error)]
#[error(
    "{place}: captured by somebody else, or by an agent whose state is lost: {}. Nothing was changed. End its owner \
     (`ambidex doctor` knows the common ones); then: {}",
    objects.join("; "),
    commands.join("; ")
)]
struct Refusal {
    place: String,
    objects: Vec<String>,
    commands: Vec<String>,
}

/// The strangers in a namespace that would be in the way of `plan`, given the plans that are known there.
async fn look(netns: &Netns, plan: &Plan, known: &[Arc<Record>]) -> anyhow::Result<Vec<Stranger>> {
    let mut found: Vec<Stranger> = rules(netns, plan).await?;
    let of_plan = |wanted: &dyn Fn(&Step) -> bool| plan.steps.iter().any(wanted);
    if of_plan(&|step| matches!(step, Step::Set(_))) {
        found.extend(sets(netns, plan)?);
    }
    if of_plan(&|step| matches!(step, Step::Link(_) | Step::Route(_) | Step::Rule(_))) {
        let netlink = Netlink::connect(netns).await?;
        for family in Family::BOTH {
            // Nothing of a kind and family that the plan does not have is in its way.
            let has_routes = |step: &Step| matches!(step, Step::Route(r) if r.dst.addr().is_ipv4() == family.is_v4());
            let routes = match of_plan(&has_routes) {
                true => netlink.routes(family).await?,
                false => Vec::new(),
            };
            for route in routes {
                let meant = |step: &Step| {
                    matches!(step, Step::Route(r) if r.table == route.table
                        && r.dst.addr().is_ipv4() == family.is_v4())
                };
                if of_plan(&meant) {
                    found.push(Stranger::Route(route));
                }
            }
            let has_rules = |step: &Step| matches!(step, Step::Rule(r) if r.family == family);
            let rules = match of_plan(&has_rules) {
                true => netlink.rules(family).await?,
                false => Vec::new(),
            };
            for rule in rules {
                let meant = |step: &Step| {
                    matches!(step, Step::Rule(r) if r.priority == rule.priority()
                        && r.family == family)
                };
                if of_plan(&meant) {
                    found.push(Stranger::Rule(rule));
                }
            }
        }
        let links = match of_plan(&|step| matches!(step, Step::Link(_))) {
            true => netlink.links().await?,
            false => Vec::new(),
        };
        for link in links {
            if of_plan(&|step| matches!(step, Step::Link(l) if l.name == link.name)) {
                found.push(Stranger::Device(link.name));
            }
        }
    }
    let is_known = |stranger: &Stranger| {
        let mut steps = known.iter().flat_map(|record| &record.plan.steps);
        steps.any(|step| stranger.is_meant_by(step))
    };
    found.retain(|stranger| !is_known(stranger));
    Ok(found)
}

async fn rules(netns: &Netns, plan: &Plan) -> anyhow::Result<Vec<Stranger>> {
    let looked_in = netns.clone();
    let (all, tables) = tokio::task::spawn_blocking(move || own_rules(&looked_in)).await??;
    let tables = tables
        .into_iter()
        .filter(|name| mesh_of(name).is_some() || name == NFT_GUARD_TABLE);
    let has_our_name = |chain: &OwnChain| {
        mesh_of(&chain.name).is_some()
            || OWN_NAMES.contains(&chain.name.as_str())
            || plan
                .steps
                .iter()
                .any(|step| matches!(step, Step::Chain(c) if c.name == chain.name))
    };
    Ok(all
        .into_iter()
        .filter(has_our_name)
        .map(Stranger::Chain)
        .chain(tables.map(Stranger::NftTable))
        .collect())
}

fn sets(netns: &Netns, plan: &Plan) -> anyhow::Result<Vec<Stranger>> {
    let ipset = Ipset::open(netns)?;
    let mut found = Vec::new();
    for step in &plan.steps {
        let Step::Set(set) = step else { continue };
        // A set of another kind has no entries that could be read as ours; the plan refuses it.
        if ipset.header(&set.name)?.is_none() {
            continue;
        }
        let listing = ipset.listing(&set.name)?;
        found.push(Stranger::Set {
            name: set.name.clone(),
            members: listing.map_or(0, |listing| listing.entries.len()),
        });
    }
    Ok(found)
}

/// How the objects differ from what the plan wants, by the step's name.
async fn differences(place: &Place, plan: &Plan, strangers: &[Stranger]) -> Vec<Option<String>> {
    // Only to say more: what cannot be compared is refused as it is.
    let findings = engine::inspect(place, plan).await.unwrap_or_default();
    let difference = |stranger: &Stranger| {
        let mut about = findings
            .iter()
            .filter(|finding| stranger.is_meant_by(&finding.step));
        about.find_map(|finding| match &finding.problem {
            Problem::Missing => None,
            problem => Some(problem.to_string()),
        })
    };
    strangers.iter().map(difference).collect()
}

/// The commands that take the strangers away, without saying where they are to be run.
fn removal(netns: &Netns, strangers: &[Stranger]) -> Vec<String> {
    let chains: Vec<&OwnChain> = strangers
        .iter()
        .filter_map(|stranger| match stranger {
            Stranger::Chain(chain) => Some(chain),
            _ => None,
        })
        .collect();
    let mut commands = jumps(netns, &chains);
    for verb in ["-F", "-X"] {
        commands.extend(chains.iter().map(|chain| {
            format!(
                "{} -w -t {} {verb} {}",
                chain.program(),
                chain.table,
                chain.name
            )
        }));
    }
    // Devices go last, because routes go with them.
    let rank = |stranger: &&Stranger| match stranger {
        Stranger::Chain(_) | Stranger::NftTable(_) => 0,
        Stranger::Rule(_) => 1,
        Stranger::Route(_) => 2,
        Stranger::Set { .. } => 3,
        Stranger::Device(_) => 4,
    };
    let mut rest: Vec<&Stranger> = strangers.iter().collect();
    rest.sort_by_key(rank);
    commands.extend(rest.into_iter().filter_map(|stranger| match stranger {
        Stranger::Chain(_) => None,
        Stranger::NftTable(name) => Some(format!("nft delete table inet {name}")),
        Stranger::Rule(rule) => {
            let ip = if rule.family.is_v4() { "ip" } else { "ip -6" };
            Some(format!("{ip} rule del pref {}", rule.priority()))
        }
        Stranger::Route(route) => {
            let ip = if route.dst.addr().is_ipv4() {
                "ip"
            } else {
                "ip -6"
            };
            Some(format!(
                "{ip} route del {} table {}",
                route.dst, route.table
            ))
        }
        Stranger::Set { name, .. } => Some(format!("ipset destroy {name}")),
        Stranger::Device(name) => Some(format!("ip link del {name}")),
    }));
    commands
}

/// What leads from other chains into these.
fn jumps(netns: &Netns, chains: &[&OwnChain]) -> Vec<String> {
    let mut tables: BTreeMap<_, Vec<&OwnChain>> = BTreeMap::new();
    for chain in chains {
        let table = (chain.program(), chain.table.as_str());
        tables.entry(table).or_default().push(chain);
    }
    let mut commands = Vec::new();
    for ((program, table), chains) in tables {
        let Some(saved) = saved(netns, chains[0]) else {
            continue;
        };
        for (from, rules) in &saved.chains {
            if chains.iter().any(|chain| chain.name == *from) {
                continue;
            }
            let leads_there = |rule: &&String| {
                let words: Vec<&str> = rule.split(' ').collect();
                let mut pairs = words.windows(2);
                pairs.any(|pair| {
                    matches!(pair[0], "-j" | "-g") && chains.iter().any(|c| c.name == pair[1])
                })
            };
            let deleted = rules.iter().filter(leads_there);
            commands
                .extend(deleted.map(|rule| format!("{program} -w -t {table} -D {from} {rule}")));
        }
    }
    commands
}

fn saved(netns: &Netns, chain: &OwnChain) -> Option<Ruleset> {
    let known = [Table::Raw, Table::Filter, Table::Mangle, Table::Nat];
    let table = known
        .into_iter()
        .find(|table| table.as_str() == chain.table)?;
    let iptables = host_net::iptables::Iptables::both(chain.variant);
    iptables.save(netns, chain.family, table).ok()
}

/// The namespace in a command, for an operator on the node.
fn entering(path: &std::path::Path, commands: Vec<String>) -> Vec<String> {
    let enter = format!("nsenter --net={}", path.display());
    commands
        .iter()
        .map(|command| format!("{enter} {command}"))
        .collect()
}

impl Agent {
    fn known_in(&self, netns: &Netns) -> Vec<Arc<Record>> {
        let mut known = self.journal.others_in(netns.id(), "");
        let boot = boot_id();
        known.retain(|record| record.boot_id == boot);
        known
    }

    /// Before a plan of the node's own namespace is made for the first time: takes it over if it stands there to the letter,
    /// and refuses what else of its names is there.
    pub(super) async fn refuse_strangers_on_node(&self, plan: &Plan) -> anyhow::Result<()> {
        let place = self.host_place();
        let known = self.known_in(&place.netns);
        if known.iter().any(|record| record.plan.name == plan.name) {
            return Ok(());
        }
        let strangers = look(&place.netns, plan, &known)
            .await
            .context("looking for other meshes on the node")?;
        match self
            .take_over(&place, std::slice::from_ref(plan), strangers)
            .await?
        {
            Some(refusal) => Err(refusal.into()),
            None => Ok(()),
        }
    }

    /// The same for a pod, whichever way it is to be captured: two captures of one pod lead its connections in circles.
    pub(super) async fn refuse_strangers_in_pod(&self, pod: &Pod) -> anyhow::Result<()> {
        let netns = pod.open_netns()?;
        let place = Place {
            label: format!("pod {}", pod.qualified_name()),
            netns,
        };
        let wanted = match pod.mode {
            Capture::Node => Plan::empty(format!("pod-{}", pod.uid)),
            Capture::Inpod => match self.plan_in_pod(pod).await? {
                Some(plan) => plan,
                None => return Ok(()),
            },
        };
        let known = self.known_in(&place.netns);
        let strangers = look(&place.netns, &wanted, &known)
            .await
            .context("looking for other meshes in the pod")?;
        if strangers.is_empty() {
            return Ok(());
        }
        let plans = match pod.mode {
            Capture::Node => vec![wanted],
            Capture::Inpod => self.plans_in_pod(pod).await?,
        };
        match self.take_over(&place, &plans, strangers).await? {
            Some(mut refusal) => {
                refusal.commands = entering(&pod.netns, refusal.commands);
                Err(refusal.into())
            }
            None => Ok(()),
        }
    }

    /// The plan in the pod's namespace as it is wanted, then as an earlier agent may have made it.
    async fn plans_in_pod(&self, pod: &Pod) -> anyhow::Result<Vec<Plan>> {
        let mut plans: Vec<Plan> = Vec::new();
        let dns = pod.dns_capture.unwrap_or(self.config.dns_capture);
        for (live, dns) in [
            (pod.live, dns),
            (!pod.live, dns),
            (pod.live, !dns),
            (!pod.live, !dns),
        ] {
            let as_made = Pod {
                live,
                dns_capture: Some(dns),
                ..pod.clone()
            };
            plans.extend(self.plan_in_pod(&as_made).await?);
        }
        Ok(plans)
    }

    async fn plan_in_pod(&self, pod: &Pod) -> anyhow::Result<Option<Plan>> {
        let mut made = self.pod_plans(pod).await?.into_iter();
        let in_pod = made.find(|(place, _)| place.netns.id() == pod.netns_id);
        Ok(in_pod.map(|(_, plan)| plan))
    }

    /// Takes over the first of the plans that stands there whole, if it is all that stands there; else says why not.
    async fn take_over(
        &self,
        place: &Place,
        plans: &[Plan],
        strangers: Vec<Stranger>,
    ) -> anyhow::Result<Option<Refusal>> {
        if strangers.is_empty() {
            return Ok(None);
        }
        for plan in plans {
            let is_ours = |stranger: &Stranger| {
                !stranger.is_in_use() && plan.steps.iter().any(|step| stranger.is_meant_by(step))
            };
            if strangers.iter().all(is_ours) && engine::adopt(place, plan, &self.journal).await? {
                tracing::warn!(
                    place = place.label,
                    plan = plan.name,
                    objects = strangers.len(),
                    "took over a capture of an earlier agent whose state is lost"
                );
                return Ok(None);
            }
        }
        let differences = match plans.first() {
            Some(wanted) => differences(place, wanted, &strangers).await,
            None => Vec::new(),
        };
        let mut differences = differences.into_iter();
        let objects = strangers.iter().map(|stranger| {
            let difference = differences.next().flatten();
            difference.map_or_else(|| stranger.to_string(), |how| format!("{stranger}: {how}"))
        });
        let objects = objects.collect();
        let netns = place.netns.clone();
        let commands = tokio::task::spawn_blocking(move || removal(&netns, &strangers)).await?;
        Ok(Some(Refusal {
            place: place.label.clone(),
            objects,
            commands,
        }))
    }
}
