//! `ambidex explain`: the way of a connection, predicted.

use std::net::SocketAddr;

use clap::{Args, ValueEnum};

use super::output::print;
use super::{Failure, block_on};
use crate::explain::{self, Asked, render};

/// How a way is printed, predicted or observed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Form {
    /// One line a hop, without rules that change nothing
    Table,
    /// Every rule that is met
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// One line a station of each connection's first packet, as ipset, iptables-save and ip would show it
    Story,
    /// A sequence diagram for Mermaid
    Mermaid,
}

#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// Pod that begins the connection: namespace/name
    pod: String,
    /// Where to: ADDRESS:PORT, POD:PORT or SERVICE:PORT; with --from a port of the pod
    #[arg(value_name = "DST:PORT")]
    to: String,
    /// Who begins the connection, to the pod: a node, another pod, or `outside` (in a lab)
    #[arg(long, value_name = "NODE|POD|outside")]
    from: Option<String>,
    /// Of a service's endpoints the one that the proxy chooses (default: the first)
    #[arg(long, value_name = "ADDRESS:PORT")]
    endpoint: Option<SocketAddr>,
    /// Output format
    #[arg(short, long, value_enum, default_value = "table")]
    output: Form,
}

pub(crate) fn run(args: ExplainArgs) -> Result<(), Failure> {
    let asked = Asked {
        pod: args.pod,
        to: args.to,
        from: args.from,
        endpoint: args.endpoint,
    };
    let explanation = block_on(explain::ask(&asked))??;
    print(&match args.output {
        Form::Table => render::table(&explanation, false),
        Form::Wide => render::table(&explanation, true),
        Form::Json => format!("{}\n", serde_json::to_string_pretty(&explanation)?),
        Form::Yaml => serde_saphyr::to_string(&explanation)?,
        Form::Story => render::story(&explanation),
        Form::Mermaid => render::mermaid(&explanation),
    })?;
    if explanation.differences() == 0 {
        Ok(())
    } else {
        Err(Failure::Differs)
    }
}
