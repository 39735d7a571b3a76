//! What is counted about revocation.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;

use super::PeerRole;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    reporter: &'static str,
}

impl From<PeerRole> for Labels {
    fn from(role: PeerRole) -> Self {
        let reporter = role.reporter();
        Self { reporter }
    }
}

#[derive(Debug, Default)]
pub(super) struct RevocationMetrics {
    rejections: Family<Labels, Counter>,
    closed: Family<Labels, Counter>,
    failed_loads: Counter,
    revoked: Gauge,
}

impl RevocationMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register(
            "istio_crl_policy_rejections",
            "Tunnels that were refused or closed because the peer's certificate is revoked",
            self.rejections.clone(),
        );
        registry.register(
            "ambidex_crl_closed_tunnels",
            "Standing tunnels that were closed because the peer's certificate was revoked",
            self.closed.clone(),
        );
        registry.register(
            "ambidex_crl_failed_loads",
            "Versions of the file of revocation lists that could not be used",
            self.failed_loads.clone(),
        );
        registry.register(
            "ambidex_crl_revoked_certificates",
            "Certificates that the revocation lists in force have",
            self.revoked.clone(),
        );
    }

    pub(super) fn rejected(&self, role: PeerRole) {
        self.rejections.get_or_create(&role.into()).inc();
    }

    pub(super) fn closed(&self, role: PeerRole) {
        self.closed.get_or_create(&role.into()).inc();
    }

    pub(super) fn failed_load(&self) {
        self.failed_loads.inc();
    }

    pub(super) fn in_force(&self, revoked: usize) {
        self.revoked.set(i64::try_from(revoked).unwrap_or(i64::MAX));
    }
}
