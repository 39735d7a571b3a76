//! `ambidex plan`, `diff` and `undo`: the kernel objects of a pod or of the node, wanted, compared, removed.

use std::time::Duration;

use clap::Args;
use host_net::commands::as_commands;
use host_net::engine;
use host_net::journal::Journal;

use super::{Failure, block_on};
use crate::agent::api::{PlacedFindings, PlacedPlan, Subject, Undone};
use crate::run_dir::{RunDir, state_dir};
use crate::{agent_client, unix_http};

/// A pod or the node.
#[derive(Debug, Args)]
pub(crate) struct SubjectArgs {
    /// Pod, as namespace/name
    #[arg(required_unless_present = "node", conflicts_with = "node")]
    pod: Option<String>,
    /// The node's own objects
    #[arg(long)]
    node: bool,
}

impl SubjectArgs {
    fn subject(&self) -> Subject {
        self.pod.clone().map_or(Subject::Node, Subject::Pod)
    }
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
    let uri = format!("/v1/plan?{}", args.subject.subject().query());
    let placed: Vec<PlacedPlan> = block_on(agent_client::get(&uri))??;
    if !args.as_commands {
        println!("{}", serde_json::to_string_pretty(&placed)?);
        return Ok(());
    }
    for PlacedPlan { place, netns, plan } in placed {
        let path = netns.map_or_else(String::new, |path| format!(" ({})", path.display()));
        println!(
            "# {}: in the network namespace of the {place}{path}",
            plan.name
        );
        for command in as_commands(&plan) {
            println!("{command}");
        }
    }
    Ok(())
}

pub(crate) fn run_diff(args: SubjectArgs) -> Result<(), Failure> {
    let uri = format!("/v1/diff?{}", args.subject().query());
    let places: Vec<PlacedFindings> = block_on(agent_client::get(&uri))??;
    let mut differs = false;
    for place in places {
        for finding in place.findings {
            differs = true;
            println!("{}: {}: {finding}", place.place, place.plan);
        }
    }
    if differs {
        Err(Failure::Differs)
    } else {
        Ok(())
    }
}

pub(crate) fn run_undo(args: UndoArgs) -> Result<(), Failure> {
    let subject = args.subject.subject();
    let undone = block_on(async {
        let socket = RunDir::from_env().agent();
        let ping = unix_http::request(
            &socket,
            http::Method::GET,
            "/healthz",
            Vec::new(),
            Duration::from_secs(2),
        )
        .await;
        match (ping, &subject) {
            (Err(unix_http::RequestError::Connect(..)), Subject::Node) => undo_from_journal().await,
            _ => agent_client::post(&format!("/v1/undo?{}", subject.query())).await,
        }
    })??;
    for plan in &undone.plans {
        println!("removed {plan}");
    }
    for error in &undone.errors {
        eprintln!("error: {error}");
    }
    if undone.errors.is_empty() {
        Ok(())
    } else {
        Err(anyhow::anyhow!("not everything could be removed").into())
    }
}

/// Undoes every plan in the journal without an agent: it may have been killed half-way through any of them.
async fn undo_from_journal() -> anyhow::Result<Undone> {
    let journal = Journal::open(state_dir().join("journal"))?;
    let mut undone = Undone::default();
    for name in journal.list()?.into_iter().rev() {
        let errors = engine::undo(&name, None, &journal).await;
        undone.errors.extend(errors.iter().map(ToString::to_string));
        undone.plans.push(name);
    }
    Ok(undone)
}
