//! Numbers and names that an operator may set. Nothing here knows a capture mode.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::resolve::{Resolve, SystemResolver};
use crate::dns::DnsConfig;
use crate::hbone::HboneConfig;
use crate::pool::PoolConfig;

/// TCP keepalive of every connection. A captured connection lives in conntrack tables for days after its ends are gone,
/// so the proxy has to find out by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keepalive {
    /// Silence before the first probe.
    pub time: Duration,
    /// Pause between two probes.
    pub interval: Duration,
    /// Unanswered probes before the connection counts as dead.
    pub retries: u32,
}

impl Default for Keepalive {
    /// The field's values: 180 s, 180 s, 9.
    fn default() -> Self {
        Self {
            time: Duration::from_secs(180),
            interval: Duration::from_secs(180),
            retries: 9,
        }
    }
}

/// Connection tracking forgets a silent half-closed connection after one or two minutes (`nf_conntrack_tcp_timeout_close_wait`,
/// `_fin_wait`), so an hour ends none that anything else would have let live.
const HALF_OPEN: Duration = Duration::from_secs(3600);

impl Keepalive {
    fn to_socket(&self) -> socket2::TcpKeepalive {
        socket2::TcpKeepalive::new()
            .with_time(self.time)
            .with_interval(self.interval)
            .with_retries(self.retries)
    }
}

/// Configuration of the core. The numbers' defaults are the field's, so that a mixed mesh behaves alike.
#[derive(Debug, Clone)]
pub struct CoreConfig {
    /// Trust domain of every identity that is served and accepted.
    pub trust_domain: Arc<str>,
    /// Name of the cluster, for telemetry and the `baggage` header.
    pub cluster: Arc<str>,
    /// Name of the network; addresses are unique in it.
    pub network: Arc<str>,
    /// How long a TCP connection may take to stand.
    pub connect_timeout: Duration,
    /// How long a connection waits for its workload to appear in the [`Store`](crate::state::Store): the agent may tell
    /// of a pod before the control plane does.
    pub workload_wait: Duration,
    /// How workloads are found that are known by hostname only.
    pub resolver: Arc<dyn Resolve>,
    /// Answers to tunnels' peers carry the `baggage` of the destination. The field's `ENABLE_RESPONSE_BAGGAGE`.
    pub response_baggage: bool,
    /// Application tunnels end at the pod's loopback address, where nobody but the pod and its proxy can reach them; in a
    /// capture that does not reach it, at the pod's own. The field's `LOCALHOST_APP_TUNNEL`.
    pub localhost_app_tunnel: bool,
    /// What policies say of each connection is logged at INFO; otherwise at DEBUG. The field's `AUTHZ_POLICY_INFO_LOGGING`.
    pub policy_info_logging: bool,
    /// TCP keepalive, on accepted and on dialled connections; `None` turns it off.
    pub keepalive: Option<Keepalive>,
    /// How long data may stay unacknowledged before the connection counts as dead (`TCP_USER_TIMEOUT`); `None` leaves it to
    /// the kernel.
    pub user_timeout: Option<Duration>,
    /// How long a connection may be silent of which one end has ended its direction; it is reset then. Not the field's,
    /// which waits for ever; `None` does.
    pub half_open_timeout: Option<Duration>,
    /// HTTP/2 of the tunnels.
    pub hbone: HboneConfig,
    /// Reuse of the tunnels.
    pub pool: PoolConfig,
    /// The DNS proxy; without one, no scope has its listeners.
    pub dns: Option<Arc<DnsConfig>>,
    /// SOCKS5, with how the names in its requests are meant; without it, no scope has its listeners.
    pub socks5: Option<Arc<DnsConfig>>,
}

impl CoreConfig {
    /// Sets what finds dead connections.
    pub(super) fn set_liveness(&self, socket: &socket2::SockRef<'_>) -> io::Result<()> {
        if let Some(keepalive) = &self.keepalive {
            socket.set_tcp_keepalive(&keepalive.to_socket())?;
        }
        if let Some(timeout) = self.user_timeout {
            socket.set_tcp_user_timeout(Some(timeout))?;
        }
        Ok(())
    }

    /// Defaults for a trust domain.
    pub fn new(trust_domain: impl Into<Arc<str>>) -> Self {
        Self {
            trust_domain: trust_domain.into(),
            ..Self::default()
        }
    }
}

impl Default for CoreConfig {
    fn default() -> Self {
        Self {
            trust_domain: "cluster.local".into(),
            cluster: "Kubernetes".into(),
            network: "".into(),
            connect_timeout: Duration::from_secs(10),
            workload_wait: Duration::from_secs(5),
            resolver: Arc::new(SystemResolver),
            response_baggage: false,
            localhost_app_tunnel: true,
            policy_info_logging: false,
            keepalive: Some(Keepalive::default()),
            user_timeout: None,
            half_open_timeout: Some(HALF_OPEN),
            hbone: HboneConfig::default(),
            pool: PoolConfig::default(),
            dns: None,
            socks5: None,
        }
    }
}
