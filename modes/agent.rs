//! The node agent: learns of pods, enrols each in its mode, and keeps the node's own objects.
//!
//! Order is everything. Enrolment: the proxy has listeners (or the announcement) and a certificate and acknowledges, then
//! the redirect is made. Unenrolment: the redirect goes first. So there is no moment at which a pod's connections are led
//! to nobody, and none at which a pod that should be captured speaks past the proxy.

pub mod api;
mod enrol;
mod events;
mod node;
mod pods;
mod subject;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::anyhow;
use host_net::journal::Journal;
use host_net::netns::Netns;
use inpod_redirect::zds::server::{ZdsHandle, ZdsServer};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

pub use enrol::EnrolError;
pub use pods::{Pod, PodState, Pods};

use crate::options::{Capture, Mode, VariantArgs};
use crate::run_dir::RunDir;

/// What an agent is started with.
#[derive(Debug, Clone)]
pub struct AgentConfig {
    /// How pods are captured.
    pub mode: Mode,
    /// Variants of the captures.
    pub variant: VariantArgs,
    /// ZDS socket.
    pub zds_socket: PathBuf,
    /// Other sockets.
    pub run_dir: RunDir,
    /// Journal and pods.
    pub state_dir: PathBuf,
}

/// A running agent.
pub struct Agent {
    config: AgentConfig,
    host: Netns,
    journal: Journal,
    pods: Pods,
    zds: ZdsHandle,
    /// The node's own objects, once a proxy's namespace is known.
    node: Mutex<Option<node::NodeSetup>>,
    /// Whether a proxy is connected and has its snapshot.
    proxy_ready: Mutex<bool>,
    busy: enrol::Busy,
}

/// Runs an agent until SIGTERM or SIGINT. Redirects stay in place when it ends: pods stay captured.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    // Said at once, not when the first proxy comes.
    crate::options::require_overlay(config.mode, config.variant.overlay).await?;
    let host = Netns::current()?;
    let journal = Journal::open(config.state_dir.join("journal"))?;
    let pods = Pods::open(&config.state_dir)?;
    let server = ZdsServer::bind(&config.zds_socket)?;
    let zds = server.handle();
    let agent = Arc::new(Agent {
        config,
        host,
        journal,
        pods,
        zds,
        node: Mutex::new(None),
        proxy_ready: Mutex::new(false),
        busy: enrol::Busy::default(),
    });
    agent.make_inpod_host_objects().await?;
    agent.restore_pods().await;
    agent.converge_pods(Capture::Inpod).await;
    let (events, proxies) = mpsc::unbounded_channel();
    let zds_task =
        tokio::spawn(server.run(Arc::new(node::PrepareNode(Arc::clone(&agent))), events));
    let follower = Arc::clone(&agent);
    let follow_task = tokio::spawn(async move { follower.follow_proxies(proxies).await });
    let events_task = events::serve(Arc::clone(&agent))?;
    let api_listener = crate::unix_http::listen(&agent.config.run_dir.agent())?;
    let for_api = Arc::clone(&agent);
    let api_task = tokio::spawn(crate::unix_http::serve(
        api_listener,
        move |method, uri, _body| api::answer(Arc::clone(&for_api), method, uri),
    ));
    tracing::info!(mode = %agent.config.mode, node_flow = %agent.config.variant.node_flow, "agent started");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = zds_task => return Err(anyhow!("the ZDS server ended: {ended:?}")),
    }
    follow_task.abort();
    events_task.abort();
    api_task.abort();
    tracing::info!("agent stopped; redirects stay in place");
    Ok(())
}

impl Agent {
    /// How a pod of this name is captured, if at all.
    fn mode_of(&self, pod_name: &str) -> Option<Capture> {
        self.config.mode.of_pod(pod_name)
    }

    /// Whether a pod could be enrolled now; the error says what is missing.
    pub fn ready(&self) -> anyhow::Result<()> {
        if !*self
            .proxy_ready
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            return Err(anyhow!(
                "no proxy is connected on {}",
                self.config.zds_socket.display()
            ));
        }
        if self.config.mode.uses_node() && self.node_setup().is_none() {
            return Err(anyhow!("the node's own objects are not in place yet"));
        }
        Ok(())
    }

    fn set_proxy_ready(&self, ready: bool) {
        *self
            .proxy_ready
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner) = ready;
    }

    /// How long a deleted pod's connections may drain.
    fn del_drain(&self) -> Duration {
        Duration::from_secs(5)
    }
}
