//! `ambidex agent` and `ambidex proxy`: flags of the two daemons.

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::Args;
use node_redirect::facts::OVERLAY_PORT;
use tokio::runtime::Runtime;

use super::Failure;
use super::sources::SourceArgs;
use crate::agent::{self, AgentConfig};
use crate::descriptors;
use crate::logging;
use crate::options::field::FieldArgs;
use crate::options::pod_source::PodSourceArgs;
use crate::options::tls::TlsArgs;
use crate::options::{CaptureArgs, duration};
use crate::proxy::{self, ProxyConfig};
use crate::run_dir::{RunDir, state_dir};

/// A proxy has at least this many worker threads.
const LEAST_WORKERS: usize = 2;

#[derive(Debug, Args)]
pub(crate) struct AgentArgs {
    #[command(flatten)]
    capture: CaptureArgs,
    #[command(flatten)]
    pods: PodSourceArgs,
    /// Unix socket on which the proxy is expected (default: ztunnel.sock in the run directory)
    #[arg(long, env = "ZTUNNEL_UDS_ADDRESS", value_name = "PATH")]
    zds_socket: Option<PathBuf>,
    /// Node capture: UDP port of the tunnels between the node and its proxy, of whichever kind they are
    #[arg(long, env = "AMBIDEX_GENEVE_PORT", value_name = "PORT", default_value_t = OVERLAY_PORT, value_parser = clap::value_parser!(u16).range(1..))]
    geneve_port: u16,
    /// Capture the pods' DNS queries too; the proxy answers them
    #[arg(
        long,
        env = "AMBIENT_DNS_CAPTURE",
        value_name = "BOOL",
        num_args = 0..=1,
        require_equals = true,
        default_value_t = false,
        default_missing_value = "true",
        action = clap::ArgAction::Set
    )]
    dns_capture: bool,
    /// Address of the health pages
    #[arg(
        long,
        env = "AMBIDEX_AGENT_HEALTH_ADDR",
        default_value = "0.0.0.0:8000"
    )]
    health: SocketAddr,
    /// Address of the metrics page
    #[arg(
        long,
        env = "AMBIDEX_AGENT_METRICS_ADDR",
        default_value = "0.0.0.0:15014"
    )]
    metrics: SocketAddr,
    /// Time between two looks at the captures of all pods, which are put back where something is missing; 0s: never
    #[arg(long, env = "AMBIDEX_VERIFY_EVERY", default_value = "5s", value_name = "DURATION", value_parser = duration::parse)]
    verify_every: Duration,
    /// How long connections may go on through the proxy when a running pod is unenrolled; 0s: they are reset
    #[arg(long, env = "AMBIDEX_AGENT_DRAIN", default_value = "1h", value_name = "DURATION", value_parser = duration::parse)]
    drain: Duration,
}

pub(crate) fn run_agent(args: AgentArgs) -> Result<(), Failure> {
    let log = logging::start()?;
    if std::env::var_os("RUST_LOG").is_none() {
        // It logs each failed request; the agent says once that the API server is away.
        log.set_level("kube_client=off")
            .map_err(anyhow::Error::msg)?;
    }
    let run_dir = RunDir::from_env();
    let config = AgentConfig {
        mode: args.capture.mode,
        variant: args.capture.variant,
        geneve_port: args.geneve_port,
        dns_capture: args.dns_capture,
        zds_socket: args
            .zds_socket
            .unwrap_or_else(|| run_dir.zds("ZTUNNEL_UDS_ADDRESS")),
        run_dir,
        state_dir: state_dir(),
        health: args.health,
        metrics: args.metrics,
        verify_every: Some(args.verify_every).filter(|every| !every.is_zero()),
        drain: args.drain,
        pods_file: args.pods.file(),
        kubernetes: args.pods.settings()?,
    };
    descriptors::make_room();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(agent::run(config))?;
    Ok(())
}

#[derive(Debug, Args)]
pub(crate) struct ProxyArgs {
    /// Unix socket of the agent (default: ztunnel.sock in the run directory)
    #[arg(long, env = "INPOD_UDS", value_name = "PATH")]
    zds_socket: Option<PathBuf>,
    #[command(flatten)]
    sources: SourceArgs,
    /// Trust domain of the mesh
    #[arg(long, env = "TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
    /// Lifetime of workload certificates, in seconds; wins over SECRET_TTL
    #[arg(long, env = "AMBIDEX_CERT_TTL_SECONDS")]
    cert_ttl_seconds: Option<u64>,
    /// How long connections may go on after SIGTERM, in seconds; wins over CONNECTION_TERMINATION_DEADLINE
    #[arg(long, env = "AMBIDEX_DRAIN_SECONDS")]
    drain_seconds: Option<u64>,
    #[command(flatten)]
    field: FieldArgs,
    #[command(flatten)]
    tls: TlsArgs,
    /// Print the settings in force as JSON and end
    #[arg(long)]
    show_config: bool,
    /// Name of the network that addresses without one belong to
    #[arg(long, env = "NETWORK", default_value = "")]
    network: String,
    /// Name of this cluster
    #[arg(long, env = "CLUSTER_ID", default_value = "Kubernetes")]
    cluster_id: String,
    /// Name of this cluster; wins over CLUSTER_ID
    #[arg(long, env = "ISTIO_META_CLUSTER_ID", value_name = "CLUSTER_ID")]
    meta_cluster_id: Option<String>,
    /// Worker threads: a number, or a part of the processors such as 25% (default: one per processor; never less than two)
    #[arg(long, env = "ZTUNNEL_WORKER_THREADS", value_name = "N|P%")]
    worker_threads: Option<Workers>,
    /// Processors that the proxy may use, if they are fewer than the machine's
    #[arg(long, env = "ZTUNNEL_CPU_LIMIT", value_name = "N")]
    cpu_limit: Option<NonZeroUsize>,
    /// Address of the admin pages
    #[arg(long, env = "ADMIN_ADDR", default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    /// Address of the metrics pages
    #[arg(long, env = "STATS_ADDR", default_value = "0.0.0.0:15020")]
    metrics: SocketAddr,
    /// Address of the readiness page
    #[arg(long, env = "READINESS_ADDR", default_value = "0.0.0.0:15021")]
    readiness: SocketAddr,
}

pub(crate) fn run_proxy(args: ProxyArgs) -> Result<(), Failure> {
    let cluster_id = args
        .meta_cluster_id
        .filter(|id| !id.is_empty())
        .unwrap_or(args.cluster_id);
    let (mesh, authority) = args.sources.sources(&cluster_id)?;
    let workers = workers(args.worker_threads, args.cpu_limit);
    args.field.check()?;
    let log = logging::start()?;
    let config = ProxyConfig {
        zds_socket: args
            .zds_socket
            .unwrap_or_else(|| RunDir::from_env().zds("INPOD_UDS")),
        mesh,
        authority,
        trust_domain: args.trust_domain,
        cert_ttl: args
            .cert_ttl_seconds
            .map_or(args.field.secret_ttl, Duration::from_secs),
        drain: args
            .drain_seconds
            .map_or_else(|| args.field.drain(), Duration::from_secs),
        field: args.field,
        tls: args.tls,
        network: args.network,
        cluster_id,
        admin: args.admin,
        metrics: args.metrics,
        readiness: args.readiness,
    };
    if args.show_config {
        let mut in_force = proxy::in_force(&config);
        in_force["workerThreads"] = workers.into();
        println!("{in_force:#}");
        return Ok(());
    }
    proxy_runtime(Some(workers))?.block_on(proxy::run(config, log))?;
    Ok(())
}

/// How many worker threads are asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Workers {
    /// So many.
    Number(usize),
    /// This part of the processors, up to 1.
    Part(f64),
}

impl FromStr for Workers {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("`{text}` is no number of threads: want one, or 1% to 100%");
        match text.strip_suffix('%') {
            None => text.parse().map(Self::Number).map_err(|_| wrong()),
            Some(percent) => match percent.parse::<f64>() {
                Ok(percent) if percent > 0.0 && percent <= 100.0 => Ok(Self::Part(percent / 100.0)),
                _ => Err(wrong()),
            },
        }
    }
}

/// Worker threads: what is asked for, of the processors that there are; one alone could be kept waiting by one pod.
fn workers(asked: Option<Workers>, limit: Option<NonZeroUsize>) -> usize {
    let processors = limit
        .or_else(|| std::thread::available_parallelism().ok())
        .map_or(2, NonZeroUsize::get);
    let workers = match asked {
        None => processors,
        Some(Workers::Number(number)) => number,
        Some(Workers::Part(part)) => (processors as f64 * part).ceil() as usize,
    };
    workers.max(LEAST_WORKERS)
}

/// The runtime of whatever carries pods' bytes.
pub(crate) fn proxy_runtime(workers: Option<usize>) -> std::io::Result<Runtime> {
    descriptors::make_room();
    let workers =
        workers.unwrap_or_else(|| std::thread::available_parallelism().map_or(2, usize::from));
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers.max(LEAST_WORKERS))
        .enable_all()
        .build()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use nix::sys::resource::{Resource, getrlimit};

    use super::*;

    #[test]
    fn a_proxy_has_room_for_descriptors_before_it_opens_any() {
        let _runtime = proxy_runtime(None).unwrap();
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(soft, hard);
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("FDSize:"));
        let size: u64 = line.unwrap().trim().parse().unwrap();
        assert!(size >= descriptors::ROOM.min(hard), "{size} of {hard}");
    }
}
