//! Names of the mesh: what a snapshot says about a name, as seen by one client.

use std::net::IpAddr;
use std::sync::Arc;

use super::DnsConfig;
use super::names::{meanings, with_wildcards};
use crate::state::service::{HealthPolicy, IpFamilies, Service};
use crate::state::workload::{Health, Workload};
use crate::state::{NetworkAddress, Snapshot};

/// Who asks.
#[derive(Debug, Clone, Copy)]
pub struct Client<'a> {
    /// Namespace of its pod.
    pub namespace: &'a str,
    /// Network whose addresses it can reach.
    pub network: &'a str,
}

/// An address family that is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AddressFamily {
    /// A records.
    V4,
    /// AAAA records.
    V6,
}

impl AddressFamily {
    fn has(self, ip: IpAddr) -> bool {
        match self {
            Self::V4 => ip.is_ipv4(),
            Self::V6 => ip.is_ipv6(),
        }
    }
}

/// A name that the mesh knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Known {
    /// Name to which the one asked for is an alias, because a search domain was taken off.
    pub alias_of: Option<String>,
    service: Option<Arc<Service>>,
    workload: Option<Arc<Workload>>,
}

/// Looks a name up: lower-case, without the last dot.
pub fn find(
    snapshot: &Snapshot,
    config: &DnsConfig,
    client: Client<'_>,
    asked: &str,
) -> Option<Known> {
    for meaning in meanings(asked, client.namespace, &config.domain) {
        for name in with_wildcards(&meaning.name) {
            let service = preferred(snapshot.services_named(&name), config, client);
            if let Some(service) = service {
                return Some(Known {
                    alias_of: meaning.stripped,
                    service: Some(Arc::clone(service)),
                    workload: None,
                });
            }
            // One without an address is reached under this name by others: whoever is asked next may know where.
            if let Some(workload) = snapshot.workload_named(&name)
                && !workload.addresses.is_empty()
            {
                return Some(Known {
                    alias_of: meaning.stripped,
                    service: None,
                    workload: Some(workload),
                });
            }
        }
    }
    None
}

/// Of the services of one hostname: the client's namespace's, the preferred namespace's, the canonical one, the first
/// by name.
fn preferred<'a>(
    services: &'a [Arc<Service>],
    config: &DnsConfig,
    client: Client<'_>,
) -> Option<&'a Arc<Service>> {
    let of = |namespace: &str| {
        services
            .iter()
            .find(move |service| *service.namespace == *namespace)
    };
    of(client.namespace)
        .or_else(|| config.preferred_namespace.as_deref().and_then(of))
        .or_else(|| services.iter().find(|service| service.canonical))
        .or_else(|| services.iter().min_by_key(|service| &service.namespace))
}

impl Known {
    /// Its addresses of a family that the client can reach. None is an answer too: the name exists.
    pub fn addresses(
        &self,
        snapshot: &Snapshot,
        config: &DnsConfig,
        client: Client<'_>,
        family: AddressFamily,
    ) -> Vec<IpAddr> {
        if family == AddressFamily::V6 && !config.ipv6 {
            return Vec::new();
        }
        let addresses = match (&self.service, &self.workload) {
            (Some(service), _) => of_service(snapshot, service, client, family),
            (None, Some(workload)) => workload.addresses.clone(),
            (None, None) => Vec::new(),
        };
        addresses.into_iter().filter(|ip| family.has(*ip)).collect()
    }
}

fn of_service(
    snapshot: &Snapshot,
    service: &Service,
    client: Client<'_>,
    family: AddressFamily,
) -> Vec<IpAddr> {
    let served = match service.ip_families {
        None | Some(IpFamilies::Dual) => true,
        Some(IpFamilies::IPv4) => family == AddressFamily::V4,
        Some(IpFamilies::IPv6) => family == AddressFamily::V6,
    };
    if !served {
        return Vec::new();
    }
    if !service.vips.is_empty() {
        let reachable = |vip: &&NetworkAddress| *vip.network == *client.network;
        return service
            .vips
            .iter()
            .filter(reachable)
            .map(|vip| vip.ip)
            .collect();
    }
    // Without an address of its own it is where its endpoints are.
    let unhealthy_too = service
        .load_balancer
        .as_ref()
        .is_some_and(|lb| lb.health_policy == HealthPolicy::AllowAll);
    let mut addresses: Vec<IpAddr> = snapshot
        .endpoints(service)
        .iter()
        .filter(|endpoint| unhealthy_too || endpoint.status == Health::Healthy)
        .filter(|endpoint| *endpoint.network == *client.network)
        .filter_map(|endpoint| endpoint.addresses.iter().find(|ip| family.has(**ip)))
        .copied()
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

#[cfg(test)]
mod tests;
