//! `ambidex trace`: the way of one real connection beside the prediction.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow};
use clap::Args;

use super::explain::Form;
use super::output::print;
use super::{Failure, block_on};
use crate::explain::Asked;
use crate::trace::{self, Trace, Wanted, render};

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// Pod that begins the connection: namespace/name
    pod: String,
    /// Where to: ADDRESS:PORT, POD:PORT or SERVICE:PORT; with --from a port of the pod
    #[arg(value_name = "DST:PORT")]
    to: String,
    /// Who begins the connection, to the pod: a node, another pod, or `outside` (in a lab)
    #[arg(long, value_name = "NODE|POD|outside")]
    from: Option<String>,
    /// Bytes that are sent
    #[arg(long, default_value_t = 1, value_name = "N", conflicts_with = "follow")]
    bytes: usize,
    /// Make no connection: watch the pod's next one, which has to last long enough for the proxy to show it
    #[arg(long)]
    follow: bool,
    /// How many seconds to wait for it
    #[arg(
        long,
        default_value_t = 60,
        value_name = "SECONDS",
        requires = "follow"
    )]
    wait: u64,
    /// Of a service's endpoints the one to predict where no connection comes about (default: the first)
    #[arg(long, value_name = "ADDRESS:PORT")]
    endpoint: Option<SocketAddr>,
    /// Print it next to another trace, which `-o json` wrote: in two columns; as a list of both with -o json and yaml
    #[arg(long, value_name = "FILE")]
    compare: Option<PathBuf>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Form,
}

pub(crate) fn run(args: TraceArgs) -> Result<(), Failure> {
    if args.compare.is_some() && matches!(args.output, Form::Mermaid | Form::Story) {
        return Err(anyhow!("-o mermaid and -o story show one trace: leave out --compare").into());
    }
    let other: Option<Trace> = match &args.compare {
        Some(path) => {
            let name = || path.display().to_string();
            let text = std::fs::read(path).with_context(name)?;
            let read = serde_json::from_slice(&text);
            Some(read.with_context(|| format!("{}: no trace as `-o json` writes it", name()))?)
        }
        None => None,
    };
    let wanted = Wanted {
        asked: Asked {
            pod: args.pod,
            to: args.to,
            from: args.from,
            endpoint: args.endpoint,
        },
        bytes: args.bytes,
        follow: args.follow.then(|| Duration::from_secs(args.wait)),
    };
    let trace = block_on(trace::trace(&wanted))??;
    print(&match (other, args.output) {
        (Some(other), Form::Json) => format!(
            "{}\n",
            serde_json::to_string_pretty(&[other, trace.clone()])?
        ),
        (Some(other), Form::Yaml) => serde_saphyr::to_string(&[other, trace.clone()])?,
        (Some(other), form) => render::side_by_side(&other, &trace, form == Form::Wide),
        (None, Form::Table) => render::table(&trace, false),
        (None, Form::Wide) => render::table(&trace, true),
        (None, Form::Json) => format!("{}\n", serde_json::to_string_pretty(&trace)?),
        (None, Form::Yaml) => serde_saphyr::to_string(&trace)?,
        (None, Form::Story) => render::story(&trace),
        (None, Form::Mermaid) => render::mermaid(&trace),
    })?;
    if trace.disagreements() + trace.explanation.differences() == 0 {
        Ok(())
    } else {
        Err(Failure::Differs)
    }
}
