//! Which endpoint of a service a connection goes to.

use std::sync::Arc;

use rand::Rng;

use super::service::{HealthPolicy, LoadBalancer, LoadBalancerMode, Scope};
use super::workload::{ApplicationTunnel, Health};
use super::{NamespacedHostname, Service, Workload};

/// What a connection wants of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// One of its ports.
    Port(u16),
    /// Its HBONE port, which a waypoint or a gateway need not list among the service's ports.
    Tunnel(u16),
}

/// Chooses among `endpoints`, with the port that the choice serves what is wanted on: those that are healthy (unless the
/// service takes all) and serve that port, as near to `source` as the service wants, at random weighted by capacity.
///
/// Goes over the endpoints twice and keeps no list of them: once for the best rank and what weighs in it, once for the
/// one that is drawn.
pub(super) fn choose<'a, R: Rng + ?Sized>(
    service: &Service,
    endpoints: impl Iterator<Item = &'a Arc<Workload>> + Clone,
    source: &Workload,
    wanted: Wanted,
    rng: &mut R,
) -> Option<(Arc<Workload>, u16)> {
    if service.is_passthrough() && matches!(wanted, Wanted::Port(_)) {
        return None;
    }
    let balancer = service.load_balancer.as_ref();
    let take_all = balancer.is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
    let key = service.key();
    let ranked = endpoints.filter_map(|endpoint| {
        let healthy = take_all || endpoint.status == Health::Healthy;
        if !healthy || endpoint.capacity == 0 || !reachable(service, endpoint, source) {
            return None;
        }
        let port = target_port(service, &key, endpoint, wanted)?;
        Some((rank(balancer, source, endpoint)?, endpoint, port))
    });
    let mut best = 0;
    let mut total: u64 = 0;
    for (rank, endpoint, _) in ranked.clone() {
        if rank > best {
            (best, total) = (rank, 0);
        }
        if rank == best {
            total += u64::from(endpoint.capacity);
        }
    }
    if total == 0 {
        return None;
    }
    let mut ticket = rng.random_range(0..total);
    for (_, endpoint, port) in ranked.filter(|(rank, ..)| *rank == best) {
        let weight = u64::from(endpoint.capacity);
        if ticket < weight {
            return Some((Arc::clone(endpoint), port));
        }
        ticket -= weight;
    }
    None
}

/// The port on which an endpoint serves what is wanted: as it says itself, else as its service does. Neither is asked of
/// an endpoint behind an application tunnel, which takes any port, nor of one that is wanted for its own HBONE port.
fn target_port(
    service: &Service,
    key: &NamespacedHostname,
    endpoint: &Workload,
    wanted: Wanted,
) -> Option<u16> {
    let (Wanted::Port(port) | Wanted::Tunnel(port)) = wanted;
    let mapped = [endpoint.services.get(key), Some(&service.ports)]
        .into_iter()
        .flatten()
        .find_map(|ports| ports.get(&port).copied().filter(|target| *target != 0));
    let any = matches!(wanted, Wanted::Tunnel(_))
        || matches!(
            endpoint.application_tunnel,
            Some(ApplicationTunnel { port: Some(_), .. })
        );
    mapped.or(any.then_some(port))
}

/// An endpoint without an address can be reached through the gateway of its network, from another network; or by its
/// hostname.
fn reachable(service: &Service, endpoint: &Workload, source: &Workload) -> bool {
    let has_place = !endpoint.addresses.is_empty() || !endpoint.hostname.is_empty();
    let through_gateway = endpoint.network_gateway.is_some() && endpoint.network != source.network;
    let right_family = || {
        endpoint.addresses.is_empty()
            || endpoint
                .addresses
                .iter()
                .any(|address| service.serves_family_of(*address))
    };
    through_gateway || (has_place && right_family())
}

/// How much an endpoint has in common with the source: the number of preferences met before the first one that is not.
/// When the network is the first preference, an endpoint of another network still collects rank from the others, below
/// every endpoint of the same network. None: it does not meet all, and it has to.
fn rank(balancer: Option<&LoadBalancer>, source: &Workload, endpoint: &Workload) -> Option<usize> {
    let Some(balancer) = balancer else {
        return Some(0);
    };
    let met = |scopes: &[Scope]| {
        scopes
            .iter()
            .take_while(|scope| in_common(**scope, source, endpoint))
            .count()
    };
    let scopes = &balancer.routing_preferences[..];
    match balancer.mode {
        LoadBalancerMode::Standard | LoadBalancerMode::Passthrough => Some(0),
        LoadBalancerMode::Strict => (met(scopes) == scopes.len()).then_some(0),
        LoadBalancerMode::Failover => Some(match scopes {
            [Scope::Network, rest @ ..] if source.network == endpoint.network => {
                rest.len() + 1 + met(rest)
            }
            [Scope::Network, rest @ ..] => met(rest),
            scopes => met(scopes),
        }),
    }
}

fn in_common(scope: Scope, a: &Workload, b: &Workload) -> bool {
    match scope {
        Scope::Region => a.locality.region == b.locality.region,
        Scope::Zone => a.locality.zone == b.locality.zone,
        Scope::Subzone => a.locality.subzone == b.locality.subzone,
        Scope::Node => a.node == b.node,
        Scope::Cluster => a.cluster_id == b.cluster_id,
        Scope::Network => a.network == b.network,
    }
}

#[cfg(test)]
mod tests;
