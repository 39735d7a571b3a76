//! Admin, metrics and readiness pages of the proxy.

use std::sync::Arc;

use anyhow::Context;
use serde_json::Value;
use shared_proxy::identity::Certificates;
use shared_proxy::state::Store;
use shared_proxy::telemetry::admin::{
    self, Admin, AdminAddresses, AdminListeners, AdminServer, LogControl,
};
use shared_proxy::telemetry::{Readiness, Telemetry};
use tokio::sync::Notify;

use super::handler::Workloads;
use super::local_pages::{self, SocketFile};
use super::{ProxyConfig, dump};
use crate::logging::Log;
use crate::run_dir::RunDir;

impl LogControl for Log {
    fn current(&self) -> String {
        self.level()
    }

    fn set(&self, filter: &str) -> Result<(), String> {
        self.set_level(filter)
    }
}

/// What the pages show.
pub(super) struct Sources<'a> {
    pub(super) store: &'a Arc<Store>,
    pub(super) certificates: &'a Arc<Certificates>,
    pub(super) workloads: &'a Arc<Workloads>,
    pub(super) telemetry: &'a Arc<Telemetry>,
    /// The settings, which do not change.
    pub(super) in_force: Value,
}

/// Starts the three servers on their own thread. They stop when the result is dropped.
pub(super) fn start(
    config: &ProxyConfig,
    sources: &Sources<'_>,
    readiness: Readiness,
    log: Log,
    quit: &Arc<Notify>,
) -> anyhow::Result<(AdminServer, Option<SocketFile>)> {
    let mut listeners = AdminListeners::bind(&AdminAddresses {
        admin: config.admin,
        metrics: config.metrics,
        readiness: config.readiness,
    })?;
    // Without it the pages are still there on their port.
    let directory = RunDir::proxies(&config.zds_socket);
    let file = match local_pages::listen(&directory) {
        Ok((listener, file)) => {
            listeners.local = Some(listener);
            Some(file)
        }
        Err(error) => {
            tracing::warn!(directory = %directory.display(), %error, "`ambidex get` will not find this proxy");
            None
        }
    };
    let (workloads_of, services_of, policies_of, staged_of) = (
        Arc::clone(sources.store),
        Arc::clone(sources.store),
        Arc::clone(sources.store),
        Arc::clone(sources.store),
    );
    let certificates = Arc::clone(sources.certificates);
    let workloads = Arc::clone(sources.workloads);
    let quit = Arc::clone(quit);
    let in_force = sources.in_force.clone();
    let pages = Admin::new(Arc::clone(sources.telemetry), readiness)
        .section("workloads", move || {
            dump::list(workloads_of.load().workloads())
        })
        .section("services", move || dump::services(&services_of.load()))
        .section("policies", move || {
            dump::list(policies_of.load().policies())
        })
        .section("stagedServices", move || {
            dump::staged_services(&staged_of.load())
        })
        .section("certificates", move || {
            certificates.list().iter().map(dump::certificate).collect()
        })
        .section("config", move || in_force.clone())
        .section("workloadState", move || workloads.state())
        .logging(log)
        .profiles(super::profiling::ThisProcess)
        .on_shutdown(move || quit.notify_one());
    let server = admin::serve(pages, listeners).context("admin pages")?;
    Ok((server, file))
}
