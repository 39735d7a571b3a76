//! Where a connection goes: the decision of the outbound side.
//!
//! [`pick`] decides on one snapshot, without waiting; [`Pick::at`] completes the decision with an address, which for a
//! workload that is known by hostname has to be looked up first.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use crate::capture::{HBONE_PORT, LocalWorkload, Scope};
use crate::core::Failure;
use crate::hbone::authority::Authority;
use crate::identity::Identity;
use crate::state::balancing::Wanted;
use crate::state::gateway::Gateway;
use crate::state::workload::{GatewayAddress, Protocol};
use crate::state::{Service, Snapshot, Workload};

/// A destination, chosen.
#[derive(Debug)]
pub(super) struct Destination {
    /// What is dialled.
    pub(super) endpoint: SocketAddr,
    /// What is asked for there; without a tunnel the same.
    pub(super) authority: Authority,
    /// How to get there.
    pub(super) way: Way,
    /// The workload that is dialled, if it is known.
    pub(super) workload: Option<Arc<Workload>>,
    /// The service that the client named, if it named one.
    pub(super) service: Option<Arc<Service>>,
}

/// How to reach a destination.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// TCP as the client meant it.
    Plain,
    /// A stream in a tunnel.
    Tunnel {
        /// Who may answer there, sorted.
        expected: Arc<[Identity]>,
    },
    /// A tunnel of its own inside a stream in a tunnel to a gateway, which moves its bytes on into another network.
    Nested {
        /// Who the gateway may be, sorted.
        gateway: Arc<[Identity]>,
        /// Who may answer behind it, sorted.
        expected: Arc<[Identity]>,
    },
    /// The destination pod is served by this process, and its capture wants no tunnel.
    HandOver(LocalWorkload),
}

/// A decision that may still want for an address.
#[derive(Debug)]
pub(super) struct Pick {
    place: Place,
    /// Port to dial.
    port: u16,
    way: Way,
    /// What to ask for in the tunnel; `None`: the place and the port that the workload serves.
    authority: Option<Authority>,
    target_port: u16,
    workload: Option<Arc<Workload>>,
    service: Option<Arc<Service>>,
}

/// Where a workload is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Place {
    Address(IpAddr),
    Hostname(Arc<str>),
}

/// Chooses for a connection of `source`. An address that the control plane does not know is nobody's of the mesh: plain
/// TCP, to where it was meant.
pub(super) fn pick(
    snapshot: &Snapshot,
    source: &Workload,
    dst: SocketAddr,
    rng: &mut impl Rng,
) -> Result<Pick, Failure> {
    let chooser = Chooser {
        snapshot,
        source,
        dst,
    };
    match snapshot.service_by_vip(dst.ip()) {
        Some(service) => chooser.service(service, rng),
        None => chooser.address(None, rng),
    }
}

struct Chooser<'a> {
    snapshot: &'a Snapshot,
    source: &'a Workload,
    dst: SocketAddr,
}

impl Chooser<'_> {
    /// The client named a service.
    fn service(&self, service: Arc<Service>, rng: &mut impl Rng) -> Result<Pick, Failure> {
        if let Some(waypoint) = service.choose_waypoint(rng)
            && !self.snapshot.is_waypoint_of_service(&service, self.source)
        {
            return self.waypoint(waypoint, Some(&service), rng);
        }
        if service.is_passthrough() {
            return self.address(Some(service), rng);
        }
        let port = self.dst.port();
        let no_endpoint = || Failure::NoHealthyEndpoint {
            service: service.hostname.to_string(),
            port,
        };
        let (workload, target_port) = self
            .snapshot
            .choose_endpoint(&service, self.source, Wanted::Port(port), rng)
            .ok_or_else(no_endpoint)?;
        if workload.network != self.source.network
            && let Some(gateway) = &workload.network_gateway
        {
            let expected = self.in_network_of(&workload, &service)?;
            return self.through(gateway, service, expected, rng);
        }
        let place = place_of(&workload, self.dst.ip(), Some(&service)).ok_or_else(no_endpoint)?;
        self.workload(place, workload, target_port, Some(service))
    }

    /// The client named an address, or a service that wants it so.
    fn address(&self, service: Option<Arc<Service>>, rng: &mut impl Rng) -> Result<Pick, Failure> {
        let place = Place::Address(self.dst.ip());
        let port = self.dst.port();
        let Some(workload) = self.snapshot.workload_by_ip(self.dst.ip()) else {
            return Ok(Pick {
                place,
                port,
                way: Way::Plain,
                authority: None,
                target_port: port,
                workload: None,
                service,
            });
        };
        match &workload.waypoint {
            Some(waypoint)
                if service.is_none()
                    && !self
                        .snapshot
                        .is_waypoint_of_workload(&workload, self.source) =>
            {
                self.waypoint(waypoint, None, rng)
            }
            _ => self.workload(place, workload, port, service),
        }
    }

    /// To a workload itself.
    fn workload(
        &self,
        place: Place,
        workload: Arc<Workload>,
        target_port: u16,
        service: Option<Arc<Service>>,
    ) -> Result<Pick, Failure> {
        let (port, way) = match workload.protocol {
            Protocol::Tcp => (target_port, Way::Plain),
            Protocol::Hbone => {
                let expected = accepted([&*workload], service.as_deref())?;
                (HBONE_PORT, Way::Tunnel { expected })
            }
        };
        let authority = match &place {
            Place::Hostname(hostname) if way != Way::Plain => {
                Some(Authority::Hostname(hostname.clone(), target_port))
            }
            _ => None,
        };
        Ok(Pick {
            place,
            port,
            way,
            authority,
            target_port,
            workload: Some(workload),
            service,
        })
    }

    /// To the waypoint of what the client named, which is asked for the destination that the client meant.
    fn waypoint(
        &self,
        named: &GatewayAddress,
        service: Option<&Arc<Service>>,
        rng: &mut impl Rng,
    ) -> Result<Pick, Failure> {
        let found = self.gateway("waypoint", named, rng)?;
        let expected = accepted([&*found.workload], found.service.as_deref())?;
        if found.workload.network != self.source.network
            && let Some(gateway) = &found.workload.network_gateway
            && let Some(service) = service
        {
            return self.through(gateway, service.clone(), expected, rng);
        }
        let way = Way::Tunnel { expected };
        let authority = Authority::Address(self.dst);
        self.to_gateway(found, named, way, authority, service.cloned())
    }

    /// Through the gateway of another network, which is asked for the service by name: addresses mean nothing there.
    fn through(
        &self,
        named: &GatewayAddress,
        service: Arc<Service>,
        expected: Arc<[Identity]>,
        rng: &mut impl Rng,
    ) -> Result<Pick, Failure> {
        let found = self.gateway("network gateway", named, rng)?;
        let way = Way::Nested {
            gateway: accepted([&*found.workload], found.service.as_deref())?,
            expected,
        };
        let authority = Authority::Hostname(service.hostname.clone(), self.dst.port());
        self.to_gateway(found, named, way, authority, Some(service))
    }

    fn gateway(
        &self,
        what: &'static str,
        named: &GatewayAddress,
        rng: &mut impl Rng,
    ) -> Result<Gateway, Failure> {
        let found = self.snapshot.gateway(named, self.source, rng);
        found.ok_or_else(|| Failure::UnknownGateway {
            what,
            name: named.destination.to_string(),
        })
    }

    fn to_gateway(
        &self,
        found: Gateway,
        named: &GatewayAddress,
        way: Way,
        authority: Authority,
        service: Option<Arc<Service>>,
    ) -> Result<Pick, Failure> {
        let place = match &found.address {
            Some(address) => Some(Place::Address(address.ip)),
            None => place_of(&found.workload, self.dst.ip(), found.service.as_deref()),
        };
        Ok(Pick {
            place: place.ok_or_else(|| Failure::UnknownGateway {
                what: "address of gateway",
                name: named.destination.to_string(),
            })?,
            port: found.port,
            way,
            target_port: authority.port(),
            authority: Some(authority),
            workload: Some(found.workload),
            service,
        })
    }

    /// Who may answer for a service in the network of an endpoint: its gateway chooses among all that are there.
    fn in_network_of(
        &self,
        endpoint: &Workload,
        service: &Service,
    ) -> Result<Arc<[Identity]>, Failure> {
        let there = self
            .snapshot
            .endpoints(service)
            .iter()
            .map(|workload| &**workload)
            .filter(|workload| workload.network == endpoint.network);
        accepted(there, Some(service))
    }
}

impl Pick {
    /// The name that has to be looked up before the connection can be made.
    pub(super) fn hostname(&self) -> Option<&Arc<str>> {
        match &self.place {
            Place::Hostname(hostname) => Some(hostname),
            Place::Address(_) => None,
        }
    }

    /// The address, if there is nothing to look up.
    pub(super) fn address(&self) -> Option<IpAddr> {
        match &self.place {
            Place::Address(address) => Some(*address),
            Place::Hostname(_) => None,
        }
    }

    /// Which of several addresses suits.
    pub(super) fn suits(&self, address: IpAddr) -> bool {
        self.service
            .as_ref()
            .is_none_or(|service| service.serves_family_of(address))
    }

    /// The decision, with the address of its place.
    pub(super) fn at(self, scope: &dyn Scope, address: IpAddr) -> Destination {
        let target = SocketAddr::new(address, self.target_port);
        let native = self.workload.as_ref().is_some_and(|w| w.native_tunnel);
        let mut endpoint = SocketAddr::new(address, self.port);
        let mut way = self.way;
        if let Way::Tunnel { .. } = way
            && !native
            && let Some(pod) = scope.hand_over(address)
        {
            way = Way::HandOver(pod);
            endpoint = target;
        }
        Destination {
            endpoint,
            authority: self.authority.unwrap_or(Authority::Address(target)),
            way,
            workload: self.workload,
            service: self.service,
        }
    }
}

/// Who may answer for these workloads, sorted. A service may vouch for endpoints that speak with another name. One that
/// is not a workload's identity can never be proven by a peer, so it is left out.
fn accepted<'a>(
    workloads: impl IntoIterator<Item = &'a Workload>,
    service: Option<&Service>,
) -> Result<Arc<[Identity]>, Failure> {
    let mut expected = Vec::with_capacity(1);
    for workload in workloads {
        expected.push(identity(workload)?);
    }
    let names = service.map_or(&[][..], |service| &service.subject_alt_names);
    expected.extend(names.iter().filter_map(|name| name.parse().ok()));
    expected.sort();
    expected.dedup();
    Ok(expected.into())
}

/// Where a workload is: an address that its service allows, of the family that the client used if there is one; else its
/// hostname.
fn place_of(workload: &Workload, like: IpAddr, service: Option<&Service>) -> Option<Place> {
    let allowed = || {
        let addresses = workload.addresses.iter().copied();
        addresses.filter(|address| service.is_none_or(|s| s.serves_family_of(*address)))
    };
    let address = allowed()
        .find(|address| address.is_ipv4() == like.is_ipv4())
        .or_else(|| allowed().next());
    match address {
        Some(address) => Some(Place::Address(address)),
        None if workload.addresses.is_empty() && !workload.hostname.is_empty() => {
            Some(Place::Hostname(workload.hostname.clone()))
        }
        None => None,
    }
}

/// Who a workload is, as the control plane says.
pub(super) fn identity(workload: &Workload) -> Result<Identity, Failure> {
    workload
        .identity()
        .map_err(|error| Failure::Identity(error.to_string()))
}

#[cfg(test)]
mod tests;
