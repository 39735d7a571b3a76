//! The command line: one file per verb.
//!
//! Exit codes are a contract: 0 fine, 1 failed, 2 usage, 3 differs (`diff`, `verify`, `doctor`, `explain`, `trace`), 4 timed out.

mod bench;
mod bug_report;
mod cni;
mod completions;
mod control;
mod daemons;
mod doctor;
mod dump;
mod enrol;
mod experiment;
mod explain;
mod get;
mod lab;
mod man;
mod mode;
mod output;
mod plan;
mod sources;
mod trace;
mod verify;
mod version;

use std::process::ExitCode;

use clap::error::{ContextKind, ContextValue};
use clap::{CommandFactory, Parser, Subcommand};

use crate::unix_http::RequestError;

/// One node proxy, two hands: a Layer-4 mutual-TLS proxy with two interchangeable ways of capturing pod traffic.
#[derive(Debug, Parser)]
#[command(name = "ambidex", version = version::line(), about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Measure both captures, and none, side by side in a two-node lab, with proof of the path the bytes took
    Bench(bench::BenchArgs),
    /// Build, look into and remove a two-node lab of network namespaces
    Lab(lab::LabArgs),
    /// Run the node agent: enrols pods and keeps their redirects
    Agent(daemons::AgentArgs),
    /// Run the node proxy
    Proxy(Box<daemons::ProxyArgs>),
    /// Run a control plane: serves a mesh from YAML files, and certificates, to proxies
    Control(control::ControlArgs),
    /// Put the CNI plugin into a container runtime, or take it out
    Cni(cni::CniArgs),
    /// Show what the agent of this node knows
    Get(get::GetArgs),
    /// Show the kernel objects that a pod's capture, or the node's, consists of
    Plan(plan::PlanArgs),
    /// Compare the kernel with the plans (exit code 3 when it differs)
    Diff(plan::SubjectArgs),
    /// Prove that pods are captured: kernel objects, listeners, and a connection that goes the whole way (exit code 3 when
    /// something is wrong)
    Verify(verify::VerifyArgs),
    /// Look at this machine: whether each capture would work here, and what mends what does not (exit code 3 when
    /// something breaks the capture that was asked for)
    Doctor(doctor::DoctorArgs),
    /// Predict the way of a connection hop by hop, from the state of the kernel and what the plans say of it (exit code 3
    /// where they differ)
    Explain(explain::ExplainArgs),
    /// Make one connection, or watch the next one, and show what was seen of it beside the prediction (exit code 3 where they
    /// disagree)
    Trace(trace::TraceArgs),
    /// Capture a pod that is running; connections that it has go on outside the mesh
    Enrol(enrol::EnrolArgs),
    /// Stop capturing a running pod; its connections through the proxy go on for a time
    Unenrol(enrol::UnenrolArgs),
    /// Change by which capture a running pod is captured
    Mode(mode::ModeArgs),
    /// Run a scripted migration in a lab under load, and say whether what has to be so is so
    Experiment(experiment::ExperimentArgs),
    /// Remove exactly what was made for a pod, or for the whole node
    Undo(plan::UndoArgs),
    /// Write one archive with the state of this node for whoever looks at it from afar, without secrets
    BugReport(bug_report::BugReportArgs),
    /// Print the network state of a namespace in a canonical form
    Dump(dump::DumpArgs),
    /// Print what makes a shell complete command lines of this program
    Completions(completions::CompletionsArgs),
    /// Print the manual page, or write those of all commands
    Man(man::ManArgs),
    /// Say which version this is, and what its TLS runs on
    Version(version::VersionArgs),
}

/// Why a command ends with a code other than 0.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Code 1, with a message.
    Failed(anyhow::Error),
    /// Code 3: something differs from what it should be; already printed.
    Differs,
    /// Another program's exit code, passed on.
    Code(u8),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Failed(error.into())
    }
}

/// The definition of the command line: names, flags, variables and defaults.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Entry point of the binary `ambidex`.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            if let Some(variable) = variable_of(&error) {
                eprintln!("The value comes from the environment variable {variable}.");
            }
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let outcome = match cli.command {
        Command::Bench(args) => bench::run(args),
        Command::Lab(args) => lab::run(args),
        Command::Agent(args) => daemons::run_agent(args),
        Command::Proxy(args) => daemons::run_proxy(*args),
        Command::Control(args) => control::run(args),
        Command::Cni(args) => cni::run(args),
        Command::Get(args) => get::run(args),
        Command::Plan(args) => plan::run_plan(args),
        Command::Diff(args) => plan::run_diff(args),
        Command::Verify(args) => verify::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::BugReport(args) => bug_report::run(args),
        Command::Explain(args) => explain::run(args),
        Command::Trace(args) => trace::run(args),
        Command::Enrol(args) => enrol::run_enrol(args),
        Command::Unenrol(args) => enrol::run_unenrol(args),
        Command::Mode(args) => mode::run(args),
        Command::Experiment(args) => experiment::run(args),
        Command::Undo(args) => plan::run_undo(args),
        Command::Dump(args) => dump::run(args),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args),
        Command::Version(args) => version::run(args),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(Failure::Failed(error)) => {
            eprintln!("error: {error:#}");
            ExitCode::from(if is_timeout(&error) { 4 } else { 1 })
        }
        Err(Failure::Differs) => ExitCode::from(3),
        Err(Failure::Code(code)) => ExitCode::from(code),
    }
}

/// The environment variable that a wrong value came from: clap names the flag in its place.
fn variable_of(error: &clap::Error) -> Option<String> {
    let ContextValue::String(argument) = error.get(ContextKind::InvalidArg)? else {
        return None;
    };
    let flag = argument.split([' ', '=', '[']).next()?;
    if std::env::args().any(|given| given.split('=').next() == Some(flag)) {
        return None;
    }
    let program = Cli::command();
    let name = std::env::args().nth(1)?;
    let variable = program
        .find_subcommand(name)?
        .get_arguments()
        .find(|argument| argument.get_long() == flag.strip_prefix("--"))?
        .get_env()?;
    std::env::var_os(variable)?;
    Some(variable.to_string_lossy().into_owned())
}

/// Whether the reader of standard output has seen enough.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// Whether a daemon did not answer in time.
fn is_timeout(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref::<RequestError>(),
        Some(RequestError::Timeout(..))
    )
}

/// A runtime for commands that talk to a daemon or to the kernel and end.
pub(crate) fn block_on<F: Future>(future: F) -> anyhow::Result<F::Output> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    Ok(runtime.block_on(future))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        super::Cli::command().debug_assert();
    }
}
