//! The DNS proxy: answers captured pods' queries for names of the mesh, and passes everything else on.
//!
//! A query arrives by UDP or TCP in a scope (`serve`), is read ([`message`]), and looked up as its pod would mean it: with
//! the search domains of the pod's namespace ([`names`], [`lookup`]). What the mesh does not know goes to the resolvers of
//! the proxy's `resolv.conf`, by the transport that it came by, and their answer goes back as it is (`upstream`). Nothing is
//! cached: an answer of the mesh is one map lookup, and resolvers cache by themselves.

#[cfg(test)]
mod fuzz;
pub mod lookup;
pub mod message;
mod metrics;
pub mod names;
pub mod resolv_conf;
pub(crate) mod serve;
mod upstream;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

pub(crate) use metrics::DnsMetrics;
pub use resolv_conf::{ResolvConf, ResolvConfError};

/// Seconds that an answer of the mesh may be kept: the field's number.
pub const TTL: u32 = 30;

/// How queries are answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DnsConfig {
    /// Domain of the cluster, under which `svc` names its services.
    pub domain: Arc<str>,
    /// Namespace whose service is meant when several namespaces have one of a hostname and the client's is not among them.
    pub preferred_namespace: Option<Arc<str>>,
    /// Whether the mesh has IPv6. Without it there are names, but no AAAA records of them.
    pub ipv6: bool,
    /// Who answers for everything else; in this order, each asked once in a round.
    pub upstreams: Vec<SocketAddr>,
    /// How long one upstream may take.
    pub upstream_timeout: Duration,
    /// Rounds through the upstreams before a query has failed.
    pub attempts: u32,
    /// Queries of one scope that wait for an upstream at the same time. More are refused with SERVFAIL at once.
    pub waiting: usize,
    /// TCP connections of one scope that are open at the same time. More are closed at once.
    pub connections: usize,
}

impl Default for DnsConfig {
    /// The domain `cluster.local`, no upstream; the waiting times of `resolv.conf`(5).
    fn default() -> Self {
        Self {
            domain: "cluster.local".into(),
            preferred_namespace: None,
            ipv6: true,
            upstreams: Vec::new(),
            upstream_timeout: Duration::from_secs(5),
            attempts: 2,
            waiting: 256,
            connections: 64,
        }
    }
}

impl DnsConfig {
    /// The same with the resolvers, waiting time and rounds of a `resolv.conf`.
    pub fn with_resolvers(self, conf: &ResolvConf) -> Self {
        Self {
            upstreams: conf.nameservers.clone(),
            upstream_timeout: conf.timeout,
            attempts: conf.attempts,
            ..self
        }
    }
}
