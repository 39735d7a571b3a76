//! `ambidex plan`, `diff` and `undo`: the kernel objects of a pod or of the node, wanted, compared, removed.

use std::fmt::Write;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;
use host_net::commands::as_commands;
use host_net::journal::Journal;

use super::output::print;
use super::{Failure, block_on};
use crate::agent::api::{PlacedFindings, PlacedPlan, Subject, Undone};
use crate::agent::{Pods, StateLock, removal};
use crate::agent_client::{self, Life};
use crate::run_dir::{RunDir, state_dir};

/// How long an undo waits for an agent that is ending, and for what a killed one had started.
const AGENT_ENDS_WITHIN: Duration = Duration::from_secs(3);

/// A pod or the node.
#[derive(Debug, Args)]
pub(crate) struct SubjectArgs {
    /// Pod: namespace/name, or its UID
    #[arg(required_unless_present = "node", conflicts_with = "node")]
    pod: Option<String>,
    /// The node's own objects
    #[arg(long)]
    node: bool,
}

impl SubjectArgs {
    fn subject(&self) -> anyhow::Result<Subject> {
        self.pod.as_deref().map_or(Ok(Subject::Node), pod_subject)
    }
}

/// The pod that an operator means.
pub(super) fn pod_subject(pod: &str) -> anyhow::Result<Subject> {
    // What a pod's name consists of, and what a query may consist of.
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    anyhow::ensure!(
        pod.chars().all(allowed),
        "{pod:?} is not the name of a pod: want NAMESPACE/NAME"
    );
    Ok(Subject::Pod(pod.to_owned()))
}

#[derive(Debug, Args)]
pub(crate) struct PlanArgs {
    #[command(flatten)]
    subject: SubjectArgs,
    /// Print the commands that would make the objects by hand
    #[arg(long)]
    as_commands: bool,
}

#[derive(Debug, Args)]
pub(crate) struct UndoArgs {
    #[command(flatten)]
    subject: SubjectArgs,
}

pub(crate) fn run_plan(args: PlanArgs) -> Result<(), Failure> {
    let uri = format!("/v1/plan?{}", args.subject.subject()?.query());
    let placed: Vec<PlacedPlan> = block_on(agent_client::get(&uri))??;
    if !args.as_commands {
        print(&format!("{}\n", serde_json::to_string_pretty(&placed)?))?;
        return Ok(());
    }
    let mut out = String::new();
    for PlacedPlan {
        place, netns, plan, ..
    } in placed
    {
        let path = netns.map_or_else(String::new, |path| format!(" ({})", path.display()));
        let name = &plan.name;
        let _ = writeln!(
            out,
            "# {name}: in the network namespace of the {place}{path}"
        );
        for command in as_commands(&plan) {
            let _ = writeln!(out, "{command}");
        }
    }
    print(&out)?;
    Ok(())
}

pub(crate) fn run_diff(args: SubjectArgs) -> Result<(), Failure> {
    let uri = format!("/v1/diff?{}", args.subject()?.query());
    let places: Vec<PlacedFindings> = block_on(agent_client::get(&uri))??;
    let mut out = String::new();
    for place in places {
        for finding in place.findings {
            let _ = writeln!(out, "{}: {}: {finding}", place.place, place.plan);
        }
    }
    print(&out)?;
    if out.is_empty() {
        Ok(())
    } else {
        Err(Failure::Differs)
    }
}

pub(crate) fn run_undo(args: UndoArgs) -> Result<(), Failure> {
    let subject = args.subject.subject()?;
    let undone = block_on(async {
        match agent_client::life().await {
            Life::Answers => agent_client::post(&format!("/v1/undo?{}", subject.query())).await,
            Life::Nobody => undo_without_agent(&subject).await,
            Life::Hung(error) => {
                let agent = match agent_client::pid(&RunDir::from_env()).await {
                    Some(pid) => format!("the agent (pid {pid}) does not answer"),
                    None => "the agent does not answer".to_owned(),
                };
                Err(anyhow!(
                    "{agent}, and nothing is taken away behind its back: end it, then undo again: {error}"
                ))
            }
        }
    })??;
    let mut out = String::new();
    for plan in &undone.plans {
        let _ = writeln!(out, "removed {plan}");
    }
    print(&out)?;
    for error in &undone.errors {
        eprintln!("error: {error}");
    }
    if undone.errors.is_empty() {
        Ok(())
    } else {
        Err(anyhow::anyhow!("not everything could be removed").into())
    }
}

/// Undoes from the journal what an agent left that may have been killed half-way through anything. Pods that were not
/// named stay captured.
async fn undo_without_agent(subject: &Subject) -> anyhow::Result<Undone> {
    let state_dir = state_dir();
    let _lock = StateLock::take(&state_dir, AGENT_ENDS_WITHIN)
        .context("no agent answers, but its state is in use: try again")?;
    let journal = Journal::open(state_dir.join("journal"))?;
    let pods = Pods::open(&state_dir)?;
    Ok(match subject {
        Subject::Node => removal::node_without_agent(&journal, &pods).await,
        Subject::Pod(name) => removal::pod_without_agent(&pods.find(name)?, &journal, &pods).await,
    })
}
