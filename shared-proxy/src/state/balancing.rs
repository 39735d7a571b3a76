//! Which endpoint of a service a connection goes to.

use std::sync::Arc;

use rand::Rng;

use super::service::{HealthPolicy, LoadBalancer, LoadBalancerMode, Scope};
use super::workload::Health;
use super::{Service, Workload};

/// Chooses among `endpoints`, with the port that the choice serves `port` on: those that are healthy (unless the service
/// takes all) and serve that port, as near to `source` as the service wants, at random weighted by capacity.
pub(super) fn choose<R: Rng + ?Sized>(
    service: &Service,
    endpoints: &[Arc<Workload>],
    source: &Workload,
    port: u16,
    rng: &mut R,
) -> Option<(Arc<Workload>, u16)> {
    if service.is_passthrough() {
        return None;
    }
    let balancer = service.load_balancer.as_ref();
    let take_all = balancer.is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
    let key = service.key();
    let usable = endpoints.iter().filter_map(|endpoint| {
        let healthy = take_all || endpoint.status == Health::Healthy;
        let target = [endpoint.services.get(&key), Some(&service.ports)]
            .into_iter()
            .flatten()
            .find_map(|ports| ports.get(&port).copied().filter(|target| *target != 0))?;
        (healthy && endpoint.capacity > 0 && reachable(endpoint, source))
            .then_some((endpoint, target))
    });
    let candidates: Vec<_> = match balancer {
        Some(lb) if lb.mode == LoadBalancerMode::Strict => {
            let all = full_rank(lb);
            usable
                .filter(|(endpoint, _)| rank(lb, source, endpoint) == all)
                .collect()
        }
        Some(lb) if lb.mode == LoadBalancerMode::Failover => best(
            usable
                .map(|(endpoint, target)| (rank(lb, source, endpoint), (endpoint, target)))
                .collect(),
        ),
        _ => usable.collect(),
    };
    weighted(&candidates, rng).map(|(endpoint, target)| (Arc::clone(endpoint), *target))
}

/// An endpoint without an address can be reached through the gateway of its network, from another network. One that is
/// known by hostname only has no address to dial.
fn reachable(endpoint: &Workload, source: &Workload) -> bool {
    !endpoint.addresses.is_empty()
        || (endpoint.network_gateway.is_some() && endpoint.network != source.network)
}

/// How much an endpoint has in common with the source: the number of preferences met before the first one that is not.
/// When the network is the first preference, an endpoint of another network still collects rank from the others, below
/// every endpoint of the same network.
fn rank(balancer: &LoadBalancer, source: &Workload, endpoint: &Workload) -> usize {
    let met = |scopes: &[Scope]| {
        scopes
            .iter()
            .take_while(|scope| in_common(**scope, source, endpoint))
            .count()
    };
    match &balancer.routing_preferences[..] {
        [Scope::Network, rest @ ..] if source.network == endpoint.network => {
            rest.len() + 1 + met(rest)
        }
        [Scope::Network, rest @ ..] => met(rest),
        scopes => met(scopes),
    }
}

/// The rank of an endpoint that meets every preference.
fn full_rank(balancer: &LoadBalancer) -> usize {
    match &balancer.routing_preferences[..] {
        [Scope::Network, rest @ ..] => 2 * rest.len() + 1,
        scopes => scopes.len(),
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

/// Those of the highest rank.
fn best<T>(ranked: Vec<(usize, T)>) -> Vec<T> {
    let highest = ranked.iter().map(|(rank, _)| *rank).max();
    ranked
        .into_iter()
        .filter(|(rank, _)| Some(*rank) == highest)
        .map(|(_, candidate)| candidate)
        .collect()
}

fn weighted<'a, 'w, R: Rng + ?Sized>(
    candidates: &'a [(&'w Arc<Workload>, u16)],
    rng: &mut R,
) -> Option<&'a (&'w Arc<Workload>, u16)> {
    let total: u64 = candidates.iter().map(|(w, _)| u64::from(w.capacity)).sum();
    if total == 0 {
        return None;
    }
    let mut ticket = rng.random_range(0..total);
    candidates.iter().find(|(workload, _)| {
        let weight = u64::from(workload.capacity);
        let won = ticket < weight;
        ticket = ticket.saturating_sub(weight);
        won
    })
}

#[cfg(test)]
mod tests;
