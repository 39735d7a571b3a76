//! Proxies on the way: waypoints and the gateways of networks.

use std::sync::Arc;

use rand::Rng;

use super::balancing::Wanted;
use super::workload::{GatewayAddress, GatewayDestination};
use super::{NetworkAddress, Service, Snapshot, Workload};

/// A proxy on the way, found.
#[derive(Debug, Clone)]
pub struct Gateway {
    /// The workload that is it.
    pub workload: Arc<Workload>,
    /// Its port for HBONE.
    pub port: u16,
    /// The service that it was chosen from, if it was named as one: its names may answer too.
    pub service: Option<Arc<Service>>,
    /// Its address, if it was named by that.
    pub address: Option<NetworkAddress>,
}

impl Snapshot {
    /// The workload behind the name of a waypoint or gateway, for a connection of `source`. None: nobody has that name, or
    /// nobody who has it is healthy.
    pub fn gateway<R: Rng + ?Sized>(
        &self,
        named: &GatewayAddress,
        source: &Workload,
        rng: &mut R,
    ) -> Option<Gateway> {
        let service = match &named.destination {
            GatewayDestination::Hostname(key) => Some(self.service(key)?),
            GatewayDestination::Address(address) => self.service_by_address(address),
        };
        if let Some(service) = service {
            let wanted = Wanted::Tunnel(named.hbone_mtls_port);
            let (workload, port) = self.choose_endpoint(&service, source, wanted, rng)?;
            return Some(Gateway {
                workload,
                port,
                service: Some(service),
                address: None,
            });
        }
        let GatewayDestination::Address(address) = &named.destination else {
            return None;
        };
        Some(Gateway {
            workload: self.workload_by_address(address)?,
            port: named.hbone_mtls_port,
            service: None,
            address: Some(address.clone()),
        })
    }

    /// Whether a workload is the waypoint or gateway of this name, or one of those that are.
    pub fn is_gateway(&self, named: &GatewayAddress, workload: &Workload) -> bool {
        match &named.destination {
            GatewayDestination::Hostname(key) => workload.services.contains_key(key),
            GatewayDestination::Address(address) => {
                workload.network_addresses().any(|own| own == *address)
                    || self
                        .service_by_address(address)
                        .is_some_and(|service| workload.services.contains_key(&service.key()))
            }
        }
    }

    /// Whether a workload is a waypoint of this service.
    pub fn is_waypoint_of_service(&self, service: &Service, workload: &Workload) -> bool {
        service
            .waypoints()
            .any(|waypoint| self.is_gateway(waypoint, workload))
    }

    /// Whether `workload` is the waypoint of another workload, or of a service that this other one serves.
    pub fn is_waypoint_of_workload(&self, other: &Workload, workload: &Workload) -> bool {
        let own = other.waypoint.as_ref();
        own.is_some_and(|waypoint| self.is_gateway(waypoint, workload))
            || other
                .services
                .keys()
                .filter_map(|key| self.service(key))
                .any(|service| self.is_waypoint_of_service(&service, workload))
    }
}

impl Service {
    /// All its waypoints.
    pub fn waypoints(&self) -> impl Iterator<Item = &GatewayAddress> {
        let weighted = self.weighted_waypoints.iter().map(|w| &w.destination);
        let only = self.waypoint.as_ref();
        weighted.chain(only.filter(|_| self.weighted_waypoints.is_empty()))
    }

    /// The waypoint for one connection.
    pub fn choose_waypoint<R: Rng + ?Sized>(&self, rng: &mut R) -> Option<&GatewayAddress> {
        let weighted = &self.weighted_waypoints;
        if weighted.is_empty() {
            return self.waypoint.as_ref();
        }
        let total: u64 = weighted.iter().map(|w| u64::from(w.weight)).sum();
        if total == 0 {
            // Weights that say nothing must not lead past the waypoints.
            return weighted.first().map(|w| &w.destination);
        }
        let mut ticket = rng.random_range(0..total);
        for waypoint in weighted {
            let weight = u64::from(waypoint.weight);
            if ticket < weight {
                return Some(&waypoint.destination);
            }
            ticket -= weight;
        }
        None
    }
}
