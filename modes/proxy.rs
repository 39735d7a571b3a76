//! The node proxy's start-up: certificates, workloads, the core, telemetry pages, and the agent's requests.

mod dump;
mod handler;
pub(crate) mod local_pages;
mod pages;
mod profiling;
pub mod sources;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::Netns;
use inpod_redirect::zds::client::{self, ClientOptions};
use serde_json::{Value, json};
use shared_proxy::core::{Core, CoreConfig};
use shared_proxy::identity::{Certificates, RefreshPolicy};
use shared_proxy::state::Store;
use shared_proxy::telemetry::{Readiness, Telemetry, TelemetryOptions};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::logging::Log;
use crate::options::field::FieldArgs;
use crate::options::tls::TlsArgs;
use sources::{AuthoritySource, MeshSource};

/// What a proxy is started with.
#[derive(Debug, Clone)]
pub struct ProxyConfig {
    /// The agent's ZDS socket.
    pub zds_socket: PathBuf,
    /// Where workloads, services and policies come from.
    pub mesh: MeshSource,
    /// Where certificates come from.
    pub authority: AuthoritySource,
    /// Trust domain.
    pub trust_domain: String,
    /// Lifetime of workload certificates.
    pub cert_ttl: Duration,
    /// Settings under the field's names.
    pub field: FieldArgs,
    /// Revocation lists and what is written down.
    pub tls: TlsArgs,
    /// How long connections may go on after SIGTERM.
    pub drain: Duration,
    /// Network that addresses without one belong to.
    pub network: String,
    /// Cluster name.
    pub cluster_id: String,
    /// Admin pages.
    pub admin: SocketAddr,
    /// Metrics pages.
    pub metrics: SocketAddr,
    /// Readiness page.
    pub readiness: SocketAddr,
}

fn core_config(config: &ProxyConfig) -> CoreConfig {
    config.field.apply(CoreConfig {
        trust_domain: config.trust_domain.as_str().into(),
        cluster: config.cluster_id.as_str().into(),
        network: config.network.as_str().into(),
        ..CoreConfig::default()
    })
}

/// The settings that a proxy would run with.
pub fn in_force(config: &ProxyConfig) -> Value {
    let core = core_config(config);
    let mut described = config.field.describe(&core, config.drain, config.cert_ttl);
    described["mesh"] = config.mesh.describe();
    described["authority"] = config.authority.describe();
    described["inpodUds"] = json!(config.zds_socket);
    described["adminAddr"] = json!(config.admin);
    described["statsAddr"] = json!(config.metrics);
    described["readinessAddr"] = json!(config.readiness);
    described["crlPath"] = json!(config.tls.crl);
    described["debugTlsKeyLog"] = json!(config.tls.debug_tls_key_log);
    described
}

/// Runs a proxy until SIGTERM or SIGINT, then drains.
pub async fn run(config: ProxyConfig, log: Log) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let own_netns = Netns::current()?;
    config.field.check()?;
    config.field.require_compliance()?;

    let store = Arc::new(Store::in_network(config.network.as_str()));
    let ca = config
        .authority
        .open(&config.trust_domain, config.cert_ttl)?;
    let telemetry = Arc::new(Telemetry::new(TelemetryOptions {
        component: "ambidex-proxy".to_owned(),
        tag: env!("CARGO_PKG_VERSION").to_owned(),
        ..TelemetryOptions::default()
    }));
    let (tls, _followed) = config.tls.open(&telemetry)?;
    let policy = RefreshPolicy::default();
    let certificates = Arc::new(Certificates::with_options(ca, policy, tls));
    telemetry.counter(
        "ambidex_log_lines_lost",
        "Lines of the log that were lost because nobody read it for long",
        log.lost_lines(),
    );
    telemetry.watch_runtime(tokio::runtime::Handle::current());
    let core = Core::new(
        core_config(&config),
        Arc::clone(&store),
        Arc::clone(&certificates),
        Arc::clone(&telemetry),
    );

    let readiness = Readiness::new();
    let mesh = config.mesh.follow(&store, &telemetry, &readiness)?;
    let handler = Arc::new(handler::Workloads::new(
        core.clone(),
        Arc::clone(&certificates),
        Arc::clone(&telemetry),
        own_netns.clone(),
        &config,
        readiness.clone(),
    ));
    let quit = Arc::new(Notify::new());
    let sources = pages::Sources {
        store: &store,
        certificates: &certificates,
        workloads: &handler,
        telemetry: &telemetry,
        in_force: in_force(&config),
    };
    let (pages, _local) = pages::start(&config, &sources, readiness, log, &quit)?;
    let zds = tokio::spawn(client::run(
        ClientOptions {
            path: config.zds_socket.clone(),
            extension: true,
            own_netns,
            default_drain: config.drain,
        },
        Arc::clone(&handler),
        std::future::pending(),
    ));
    tracing::info!(zds = %config.zds_socket.display(), "proxy started");

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = quit.notified() => {}
    }
    tracing::info!(deadline = ?config.drain, "draining");
    zds.abort();
    drop(mesh);
    tokio::select! {
        () = core.shutdown(config.drain) => tracing::info!("drained"),
        // Whoever asks twice does not want to wait.
        _ = terminate.recv() => tracing::info!("asked again: connections are cut"),
        _ = interrupt.recv() => tracing::info!("asked again: connections are cut"),
    }
    drop(pages);
    Ok(())
}
