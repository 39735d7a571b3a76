//! `ambidex lab relay`: the benchmark's bound, run where the lab runs the node proxy.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use splice_relay::RelayConfig;
use tokio::signal::unix::{SignalKind, signal};

use crate::cli::Failure;
use crate::cli::daemons::proxy_runtime;
use crate::logging;
use crate::run_dir::RunDir;

/// As those of `ambidex proxy`, where they have a meaning.
#[derive(Debug, Args)]
pub(crate) struct RelayArgs {
    /// Unix socket of the agent (default: ztunnel.sock in the run directory)
    #[arg(long, env = "INPOD_UDS", value_name = "PATH")]
    zds_socket: Option<PathBuf>,
    /// File with workloads and services in LOCAL_XDS form; reloaded when it changes
    #[arg(long, env = "LOCAL_XDS_PATH", value_name = "FILE")]
    local_xds: PathBuf,
    /// How long connections may go on after SIGTERM, in seconds
    #[arg(long, env = "AMBIDEX_DRAIN_SECONDS", default_value_t = 5)]
    drain_seconds: u64,
    /// Name of the network that addresses without one belong to
    #[arg(long, env = "NETWORK", default_value = "")]
    network: String,
    /// Worker threads (default: one per core, at least two)
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS")]
    worker_threads: Option<usize>,
}

pub(crate) fn run(args: RelayArgs) -> Result<(), Failure> {
    let _log = logging::start()?;
    let config = RelayConfig {
        zds_socket: args
            .zds_socket
            .unwrap_or_else(|| RunDir::from_env().zds("INPOD_UDS")),
        local_xds: args.local_xds,
        network: args.network,
        drain: Duration::from_secs(args.drain_seconds),
    };
    proxy_runtime(args.worker_threads)?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let asked_to_end = async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        splice_relay::run(config, asked_to_end).await?;
        Ok(())
    })
}
