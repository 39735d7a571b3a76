//! The core: serves the connections that scopes bring.
//!
//! [`Core::attach`] takes a scope's listeners and accepts in a task each; every connection is a task of its own. What is
//! done with it is in [`crate::outbound`] and [`crate::inbound`].

mod accept;
mod config;
mod delays;
mod dial;
mod ending;
mod enforce;
mod half_open;
mod pod_end;
mod recapture;
mod resolve;
mod switching;
mod workload;

use std::collections::HashMap;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::join_all;
use tokio::task::JoinHandle;

pub use config::{CoreConfig, Keepalive};
pub(crate) use delays::Subject;
pub use delays::{Delayed, Delays};
pub use dial::DialError;
pub(crate) use ending::Failure;
pub(crate) use enforce::Admitted;
pub use pod_end::PodEnding;
pub use resolve::{Resolve, SystemResolver};
pub use switching::Hold;

use crate::capture::{Listener, Role, Scope, ScopeId};
use crate::dns::DnsMetrics;
use crate::dns::serve::Server as DnsServer;
use crate::drain::{Drain, Drainer};
use crate::hbone::client::{Tunnel, TunnelError};
use crate::identity::Certificates;
use crate::pool::{Pool, PoolKey};
use crate::state::Store;
use crate::telemetry::{ConnectionInfo, Telemetry};

/// The roles that every scope serves.
const ROLES: [Role; 3] = [Role::Outbound, Role::InboundPlaintext, Role::InboundHbone];

/// The proxy. Cheap to clone; clones are the same proxy.
#[derive(Clone)]
pub struct Core {
    shared: Arc<Shared>,
}

/// What every connection needs, of whatever scope.
pub(crate) struct Shared {
    pub(crate) config: CoreConfig,
    pub(crate) store: Arc<Store>,
    pub(crate) certificates: Arc<Certificates>,
    pub(crate) telemetry: Arc<Telemetry>,
    pub(crate) pool: Pool<PoolKey, Tunnel, TunnelError>,
    dns_metrics: DnsMetrics,
    admissions: enforce::Admissions,
    pod_tunnels: pod_end::PodTunnels,
    pub(crate) captures: Arc<switching::Captures>,
    own_connections: recapture::OwnConnections,
    attachments: Mutex<HashMap<u64, Drainer>>,
    next_attachment: AtomicU64,
    ended: AtomicBool,
}

/// What every connection of one scope needs.
#[derive(Clone)]
pub(crate) struct Attachment {
    pub(crate) core: Arc<Shared>,
    pub(crate) scope: Arc<dyn Scope>,
    /// Tells two attachments of scopes with one name apart.
    pub(crate) number: u64,
}

/// A scope whose connections are served. Dropping it closes its listeners and cuts its connections; [`Attached::detach`]
/// lets them end.
#[must_use = "dropping it cuts the scope's connections"]
pub struct Attached {
    shared: Arc<Shared>,
    scope: Arc<dyn Scope>,
    number: u64,
    drainer: Drainer,
    listeners: Vec<JoinHandle<()>>,
}

/// Why a scope is not served. Nothing of it is left listening.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The scope has no listener for a role.
    #[error("{scope}: cannot listen for {role:?}: {source}")]
    Listen {
        /// Which scope.
        scope: ScopeId,
        /// Which role.
        role: Role,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The proxy is shutting down.
    #[error("{0}: the proxy is shutting down")]
    ShuttingDown(ScopeId),
}

impl Core {
    /// A proxy that serves nothing yet. Must be called on a Tokio runtime.
    pub fn new(
        config: CoreConfig,
        store: Arc<Store>,
        certificates: Arc<Certificates>,
        telemetry: Arc<Telemetry>,
    ) -> Self {
        let pool = Pool::new(config.pool.clone());
        let dns_metrics = DnsMetrics::default();
        telemetry.register(|registry| dns_metrics.register(registry));
        let shared = Arc::new(Shared {
            config,
            store,
            certificates,
            telemetry,
            pool,
            dns_metrics,
            admissions: enforce::Admissions::default(),
            pod_tunnels: pod_end::PodTunnels::default(),
            captures: Arc::default(),
            own_connections: recapture::OwnConnections::default(),
            attachments: Mutex::default(),
            next_attachment: AtomicU64::new(1),
            ended: AtomicBool::new(false),
        });
        tokio::spawn(enforce::enforce(Arc::downgrade(&shared)));
        if let Some(limit) = shared.config.half_open_timeout {
            tokio::spawn(half_open::close(Arc::downgrade(&shared), limit));
        }
        let weak = Arc::downgrade(&shared);
        shared.telemetry.counter(
            "ambidex_captured_twice",
            "Connections of this proxy's own that came back to it and were refused",
            move || {
                let core = weak.upgrade();
                core.map_or(0, |core| core.own_connections.refused())
            },
        );
        let weak = Arc::downgrade(&shared);
        shared.telemetry.gauge(
            "ambidex_pooled_tunnels",
            "Tunnels to other pods that this proxy has opened and keeps",
            move || {
                let tunnels = weak.upgrade().map_or(0, |it| it.pool.connections());
                i64::try_from(tunnels).unwrap_or(i64::MAX)
            },
        );
        Self { shared }
    }

    /// Serves a scope. When this returns, every listener of the scope is bound and its connections are accepted.
    ///
    /// # Errors
    /// The scope cannot listen, or the proxy is shutting down.
    pub async fn attach(&self, scope: Arc<dyn Scope>) -> Result<Attached, AttachError> {
        let id = scope.id().clone();
        let listen_error = |role, source| AttachError::Listen {
            scope: id.clone(),
            role,
            source,
        };
        let dns_config = self.shared.config.dns.clone();
        let dns_role = dns_config.is_some().then_some(Role::Dns);
        let socks5_role = self.shared.config.socks5.as_ref().map(|_| Role::Socks5);
        let mut listeners = Vec::new();
        for role in ROLES.into_iter().chain(dns_role).chain(socks5_role) {
            let bound = scope.listen(role).and_then(|bound| {
                for listener in &bound {
                    self.set_options(listener)?;
                }
                Ok(bound)
            });
            listeners.extend(bound.map_err(|source| listen_error(role, source))?);
        }
        let datagrams = match dns_role {
            Some(role) => scope
                .udp(role)
                .map_err(|source| listen_error(role, source))?,
            None => Vec::new(),
        };
        let number = self.shared.next_attachment.fetch_add(1, Ordering::Relaxed);
        let drainer = Drainer::new();
        {
            let mut attachments = self.shared.attachments();
            // Under the lock, so that a shutdown either sees this scope or is seen here.
            if self.shared.ended.load(Ordering::Acquire) {
                return Err(AttachError::ShuttingDown(id));
            }
            attachments.insert(number, drainer.clone());
        }
        let attachment = Attachment {
            core: self.shared.clone(),
            scope: scope.clone(),
            number,
        };
        let dns = dns_config.map(|config| {
            DnsServer::new(attachment.clone(), config, self.shared.dns_metrics.clone())
        });
        let mut listeners: Vec<_> = listeners
            .into_iter()
            .map(|listener| {
                let signal = drainer.signal();
                let dns = dns.clone().filter(|_| listener.role() == Role::Dns);
                tokio::spawn(accept::run(attachment.clone(), dns, listener, signal))
            })
            .collect();
        if let Some(dns) = dns {
            listeners.extend(datagrams.into_iter().map(|socket| {
                tokio::spawn(crate::dns::serve::udp(
                    dns.clone(),
                    socket,
                    drainer.signal(),
                ))
            }));
        }
        Ok(Attached {
            shared: self.shared.clone(),
            scope,
            number,
            drainer,
            listeners,
        })
    }

    /// Ends everything: no listener any more, GOAWAY on every HBONE server connection, connections get until `deadline`
    /// to end and are cut then.
    pub async fn shutdown(&self, deadline: Duration) {
        let drainers: Vec<Drainer> = {
            let mut attachments = self.shared.attachments();
            self.shared.ended.store(true, Ordering::Release);
            attachments.drain().map(|(_, drainer)| drainer).collect()
        };
        for drainer in &drainers {
            drainer.drain();
        }
        self.shared.pool.forget(|_| true);
        join_all(
            drainers
                .iter()
                .map(|drainer| drainer.run(Drain::within(deadline))),
        )
        .await;
    }

    /// The open connections, oldest first.
    pub fn connections(&self) -> Vec<ConnectionInfo> {
        self.shared.telemetry.connections()
    }

    /// How many tunnels this proxy has opened and keeps.
    pub fn pooled_tunnels(&self) -> usize {
        self.shared.pool.connections()
    }

    /// Sets on the listener what its connections inherit, which saves the calls for each of them.
    fn set_options(&self, listener: &Listener) -> io::Result<()> {
        let socket = listener.as_socket();
        socket.set_tcp_nodelay(true)?;
        self.shared.config.set_liveness(&socket)
    }
}

impl Shared {
    fn attachments(&self) -> MutexGuard<'_, HashMap<u64, Drainer>> {
        self.attachments
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Releases what was kept for an attachment.
    fn release(&self, number: u64) {
        self.pool.forget(|key| key.attachment == number);
    }
}

impl Attached {
    /// Which scope.
    pub fn id(&self) -> &ScopeId {
        self.scope.id()
    }

    /// How many connections of this scope are open, listeners and tunnels included.
    pub fn open(&self) -> usize {
        self.drainer.members()
    }

    /// Stops serving the scope. The listeners are closed at once, peers' tunnels get GOAWAY, connections end by
    /// themselves until the deadline and are cut then. Returns when the last one has ended.
    pub async fn detach(mut self, drain: Drain) {
        self.stop_accepting().await;
        self.shared.release(self.number);
        self.drainer.run(drain).await;
    }

    /// The first part of [`Attached::detach`]: when it returns, every listener is closed and peers' tunnels are told.
    /// Connections go on.
    pub async fn stop_accepting(&mut self) {
        self.drainer.drain();
        for listener in std::mem::take(&mut self.listeners) {
            // A listener's task ends by returning; it is not cancelled by anyone, and a panic has ended it too.
            let _ = listener.await;
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        self.drainer.cut();
        // A scope of one pod is called by its UID.
        let id = self.scope.id();
        self.shared
            .pod_tunnels
            .forget(&id.instance, id.capture_mode);
        self.shared.release(self.number);
        self.shared.attachments().remove(&self.number);
    }
}

impl fmt::Debug for Core {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Core")
            .field("scopes", &self.shared.attachments().len())
            .field("pooled_tunnels", &self.pooled_tunnels())
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Attached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Attached")
            .field("id", self.id())
            .field("open", &self.open())
            .finish_non_exhaustive()
    }
}
