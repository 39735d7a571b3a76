//! What an arriving connection asks for, and whether this workload is where to ask.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::core::Failure;
use crate::hbone::authority::Authority;
use crate::state::workload::{ApplicationProtocol, ApplicationTunnel};
use crate::state::{NamespacedHostname, Service, Snapshot, Workload};

/// Where a connection goes inside its workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Target {
    /// What the client meant to reach, on the workload's address: policies are about this.
    pub(super) meant: SocketAddr,
    /// What is dialled.
    pub(super) application: SocketAddr,
    /// The application is told of the connection in a header of the PROXY protocol.
    pub(super) announced: bool,
    /// The service that the client named, if it named one.
    pub(super) service: Option<Arc<Service>>,
}

impl Target {
    /// Of a connection that came without a tunnel.
    pub(super) fn plain(dst: SocketAddr) -> Self {
        Self {
            meant: dst,
            application: dst,
            announced: false,
            service: None,
        }
    }
}

/// Checks an authority that was asked for in a tunnel to `local`, an address of `workload`. The authority's own address is
/// never dialled: the target is on the workload's, always.
pub(super) fn find(
    snapshot: &Snapshot,
    workload: &Workload,
    local: SocketAddr,
    authority: &Authority,
) -> Result<Target, Failure> {
    let tunnel = workload
        .application_tunnel
        .as_ref()
        .filter(|tunnel| tunnel.protocol == ApplicationProtocol::Proxy);
    let (port, service) = match authority {
        Authority::Address(asked) => {
            let service = snapshot.service_by_vip(asked.ip());
            let here = asked.ip() == local.ip()
                || tunnel.is_some()
                || is_its_waypoint(snapshot, workload, service.as_deref(), *asked);
            if !here {
                return Err(Failure::NotServed {
                    authority: authority.clone(),
                    local: local.ip(),
                });
            }
            (asked.port(), service)
        }
        Authority::Hostname(hostname, port) => {
            by_hostname(snapshot, workload, tunnel, hostname, *port)
                .ok_or_else(|| Failure::UnknownHostname(authority.clone()))?
        }
    };
    let meant = SocketAddr::new(local.ip(), port);
    let application = SocketAddr::new(
        local.ip(),
        tunnel.and_then(|tunnel| tunnel.port).unwrap_or(port),
    );
    Ok(Target {
        meant,
        application,
        announced: tunnel.is_some(),
        service,
    })
}

/// Whether the workload is the waypoint of the service or of the workload that has the address.
fn is_its_waypoint(
    snapshot: &Snapshot,
    workload: &Workload,
    service: Option<&Service>,
    asked: SocketAddr,
) -> bool {
    if let Some(service) = service {
        return snapshot.is_waypoint_of_service(service, workload);
    }
    snapshot
        .workload_by_ip(asked.ip())
        .and_then(|other| other.waypoint.clone())
        .is_some_and(|waypoint| snapshot.is_gateway(&waypoint, workload))
}

/// The port, on the workload, of a service's port that was asked for by name.
fn by_hostname(
    snapshot: &Snapshot,
    workload: &Workload,
    tunnel: Option<&ApplicationTunnel>,
    hostname: &str,
    port: u16,
) -> Option<(u16, Option<Arc<Service>>)> {
    let mut served = workload
        .services
        .iter()
        .filter(|(key, _)| *key.hostname == *hostname);
    let found = served.find_map(|(key, own)| {
        let service = snapshot.service(key);
        let general = service.as_ref().map(|service| &service.ports);
        let ports = [Some(own), general].into_iter().flatten();
        let target = ports
            .filter_map(|ports| ports.get(&port).copied())
            .find(|target| *target != 0);
        let any = tunnel.and_then(|tunnel| tunnel.port).map(|_| port);
        Some((target.or(any)?, service))
    });
    found.or_else(|| {
        let own_name = *workload.hostname == *hostname;
        let waypoint_of = || {
            // A cluster's own names say their namespace; other names are looked for in the workload's own.
            let written = hostname.split('.').nth(1).unwrap_or_default();
            let named = [&*workload.namespace, written]
                .into_iter()
                .map(|namespace| {
                    snapshot.service(&NamespacedHostname {
                        namespace: namespace.into(),
                        hostname: hostname.into(),
                    })
                });
            let mut named = named.flatten();
            named.find(|service| snapshot.is_waypoint_of_service(service, workload))
        };
        if own_name {
            return Some((port, None));
        }
        match waypoint_of() {
            Some(service) => Some((port, Some(service.clone()))),
            None => tunnel.map(|_| (port, None)),
        }
    })
}
