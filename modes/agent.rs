//! The node agent: learns of pods, enrols each in its mode, and keeps the node's own objects.
//!
//! Order is everything. Enrolment: the proxy has listeners (or the announcement) and a certificate and acknowledges, then
//! the redirect is made. Unenrolment: the redirect goes first. So there is no moment at which a pod's connections are led
//! to nobody, and none at which a pod that should be captured speaks past the proxy.
//!
//! A pod goes on the list (on disk) before the first object is made for it and leaves it after the last one is gone, and
//! the journal of host-net covers each object; so an agent that is killed at any moment is followed by one that knows
//! what to complete or to take away.

mod admission;
pub mod api;
mod check;
mod closing;
mod datapath;
pub mod draining;
mod enrol;
mod events;
mod keeper;
pub mod kubernetes;
pub mod ledger;
mod lock;
mod narrative;
mod node;
mod pages;
mod plans;
mod pod_file;
mod pods;
pub mod removal;
mod restore;
pub mod running;
mod settling;
mod strangers;
mod subject;
pub mod switching;
pub mod timings;
pub mod verify;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, anyhow};
use host_net::journal::Journal;
use host_net::netns::Netns;
use inpod_redirect::zds::server::{ZdsHandle, ZdsServer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

pub use enrol::EnrolError;
pub use lock::{LockError, StateLock};
pub use pods::{NotFound, Pod, PodState, Pods};

use crate::agent_client;
use crate::cni::PodEvent;
use crate::options::{Capture, Mode, VariantArgs};
use crate::run_dir::RunDir;

/// How long a start waits for an agent before it to end.
const PREDECESSOR_ENDS_WITHIN: Duration = Duration::from_secs(3);

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// How pods are captured.
    pub mode: Mode,
    /// Variants of the captures.
    pub variant: VariantArgs,
    /// UDP port of the node capture's tunnels.
    pub geneve_port: u16,
    /// Whether pods' DNS queries are captured.
    pub dns_capture: bool,
    /// ZDS socket.
    pub zds_socket: PathBuf,
    /// Other sockets.
    pub run_dir: RunDir,
    /// Journal and pods.
    pub state_dir: PathBuf,
    /// Address of the health pages.
    pub health: SocketAddr,
    /// Address of the metrics page.
    pub metrics: SocketAddr,
    /// Time between two looks at the captures of all pods; none: only pods are looked for that are gone.
    pub verify_every: Option<Duration>,
    /// How long connections may go on through the proxy when a running pod is unenrolled.
    pub drain: Duration,
    /// Kubernetes as the one who knows the pods; none: the runtime is, and all that it adds are captured.
    pub kubernetes: Option<kubernetes::Settings>,
    /// File that names running pods to capture.
    pub pods_file: Option<PathBuf>,
}

/// A running agent.
pub struct Agent {
    config: AgentConfig,
    host: Netns,
    journal: Journal,
    pods: Pods,
    zds: ZdsHandle,
    status: Mutex<Status>,
    /// Held while the node's own objects change.
    setting_up: tokio::sync::Mutex<()>,
    busy: enrol::Busy,
    turns: enrol::Turns,
    timings: timings::Timings,
    counters: pages::Counters,
    effects: keeper::Effects,
    awaited: draining::Awaited,
    kubernetes: Option<kubernetes::Source>,
    closings: closing::Closings,
    ledgers: ledger::Ledgers,
}

/// What stands between a pod and its enrolment.
#[derive(Debug, Default)]
struct Status {
    /// The node capture, once a proxy's namespace is known.
    setup: Option<node::NodeSetup>,
    /// Whether a proxy is connected and has its snapshot.
    proxy_ready: bool,
    /// Why the last proxy that connected could not be used.
    obstacle: Option<String>,
    /// Whether an operator took everything away.
    undone: bool,
}

/// Runs an agent until SIGTERM or SIGINT. Redirects stay in place when it ends: pods stay captured.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Said at once, not when the first proxy comes.
    crate::options::require_overlay(config.mode, config.variant.overlay).await?;
    let host = Netns::current()?;
    let _lock = match StateLock::take(&config.state_dir, PREDECESSOR_ENDS_WITHIN) {
        Ok(lock) => lock,
        Err(error) => {
            let other = match agent_client::pid(&config.run_dir).await {
                Some(pid) => format!("an agent runs with pid {pid}"),
                None => "one agent only for one state directory".to_owned(),
            };
            return Err(error).context(other);
        }
    };
    let kubernetes = match &config.kubernetes {
        Some(settings) => Some(kubernetes::Source::new(settings, config.mode).await?),
        None => None,
    };
    let pages = pages::Listeners::bind(config.health, config.metrics).await?;
    let journal = Journal::open(config.state_dir.join("journal"))?;
    let pods = Pods::open(&config.state_dir)?;
    let ledgers = ledger::Ledgers::open(&config.state_dir)?;
    let server = ZdsServer::bind(&config.zds_socket)?;
    let zds = server.handle();
    let agent = Arc::new(Agent {
        config,
        host,
        journal,
        pods,
        zds,
        status: Mutex::default(),
        setting_up: tokio::sync::Mutex::default(),
        busy: enrol::Busy::default(),
        turns: enrol::Turns::default(),
        timings: timings::Timings::default(),
        counters: pages::Counters::default(),
        effects: keeper::Effects::default(),
        awaited: draining::Awaited::default(),
        kubernetes,
        closings: closing::Closings::default(),
        ledgers,
    });
    let page_tasks = pages.serve(&agent);
    let log_task = pages::take_logs(&agent)?;
    agent.make_inpod_host_objects().await?;
    agent.restore_pods().await?;
    agent.restore_closed()?;
    agent.converge_pods(Capture::Inpod).await;
    let (events, proxies) = mpsc::unbounded_channel();
    let zds_task =
        tokio::spawn(server.run(Arc::new(node::PrepareNode(Arc::clone(&agent))), events));
    let follower = Arc::clone(&agent);
    let follow_task = tokio::spawn(async move { follower.follow_proxies(proxies).await });
    let events_task = events::serve(Arc::clone(&agent))?;
    agent.counters.serves();
    let api_listener = crate::unix_http::listen(&agent.config.run_dir.agent())?;
    let for_api = Arc::clone(&agent);
    let api_task = tokio::spawn(crate::unix_http::serve(
        api_listener,
        move |method, uri, body, caller| {
            api::answer(Arc::clone(&for_api), method, uri, body, caller)
        },
    ));
    let drainer = Arc::clone(&agent);
    let drain_task = tokio::spawn(async move { drainer.attend_drains().await });
    let settle_task = tokio::spawn(Arc::clone(&agent).attend_older_connections());
    let source_tasks = agent.kubernetes.as_ref().map(|source| source.start(&agent));
    let named = agent.config.pods_file.clone().map(|path| {
        let follower = Arc::clone(&agent);
        tokio::spawn(async move { follower.follow_pod_file(path).await })
    });
    let keep_task = tokio::spawn(Arc::clone(&agent).keep(agent.config.verify_every));
    tracing::info!(mode = %agent.config.mode, node_flow = %agent.config.variant.node_flow, "agent started");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = zds_task => return Err(anyhow!("the ZDS server ended: {ended:?}")),
    }
    follow_task.abort();
    events_task.abort();
    api_task.abort();
    drain_task.abort();
    settle_task.abort();
    keep_task.abort();
    named.iter().for_each(|task| task.abort());
    log_task.abort();
    page_tasks.iter().for_each(|task| task.abort());
    source_tasks.iter().flatten().for_each(|task| task.abort());
    tracing::info!("agent stopped; redirects stay in place");
    Ok(())
}

impl Agent {
    /// How a pod of this name is captured, if at all.
    fn mode_of(&self, pod_name: &str) -> Option<Capture> {
        self.config.mode.of_pod(pod_name)
    }

    /// How the pod of an event is captured, if at all, by whoever knows.
    async fn wanted(&self, event: &PodEvent) -> Result<Option<kubernetes::Wanted>, EnrolError> {
        match &self.kubernetes {
            Some(source) => source.wanted(event).await,
            None => Ok(self
                .mode_of(&event.pod_name)
                .map(|mode| kubernetes::Wanted {
                    mode,
                    identity: None,
                })),
        }
    }

    /// Whether it is known which pods are to be captured; the error says who has not said it.
    fn knows_pods(&self) -> anyhow::Result<()> {
        match &self.kubernetes {
            Some(source) => source.ready().map_err(anyhow::Error::msg),
            None => Ok(()),
        }
    }

    /// Whether a pod could be enrolled now; the error says what is missing.
    pub fn ready(&self) -> anyhow::Result<()> {
        self.refuse_after_undo()?;
        let status = self.status();
        if !status.proxy_ready {
            let socket = self.config.zds_socket.display();
            return Err(match &status.obstacle {
                Some(obstacle) => anyhow!("no proxy is ready: {obstacle}"),
                None => anyhow!("no proxy is connected on {socket}"),
            });
        }
        if self.config.mode.uses_node() && status.setup.is_none() {
            return Err(anyhow!("the node's own objects are not in place yet"));
        }
        Ok(())
    }

    /// After an undo of the node nothing is made any more: who asked for it wants the node as it was.
    fn refuse_after_undo(&self) -> anyhow::Result<()> {
        if self.status().undone {
            return Err(anyhow!(
                "everything was taken away by `ambidex undo --node`: restart the agent to capture pods again"
            ));
        }
        Ok(())
    }

    fn status(&self) -> MutexGuard<'_, Status> {
        self.status.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
