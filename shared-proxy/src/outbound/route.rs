//! Where a connection goes: the decision of the outbound side.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use rand::Rng;

use crate::capture::{HBONE_PORT, LocalWorkload, Scope};
use crate::core::Failure;
use crate::identity::Identity;
use crate::state::workload::Protocol;
use crate::state::{Service, Snapshot, Workload};

/// A destination, chosen.
#[derive(Debug)]
pub(super) struct Destination {
    /// What the application listens on.
    pub(super) target: SocketAddr,
    /// How to get there.
    pub(super) way: Way,
    /// The workload there, if it is known.
    pub(super) workload: Option<Arc<Workload>>,
    /// The service that the client named, if it named one.
    pub(super) service: Option<Arc<Service>>,
}

/// How to reach a destination.
#[derive(Debug)]
pub(super) enum Way {
    /// TCP as the client meant it.
    Plain,
    /// A stream in a tunnel.
    Tunnel {
        /// Where the tunnel ends.
        endpoint: SocketAddr,
        /// Who may answer there, sorted.
        expected: Arc<[Identity]>,
    },
    /// The destination pod is served by this process, and its capture wants no tunnel.
    HandOver(LocalWorkload),
}

/// Chooses for a connection of `source`. An address that the control plane does not know is nobody's of the mesh: plain
/// TCP, to where it was meant.
pub(super) fn choose(
    snapshot: &Snapshot,
    scope: &dyn Scope,
    source: &Workload,
    dst: SocketAddr,
    rng: &mut impl Rng,
) -> Result<Destination, Failure> {
    let service = snapshot.service_by_vip(dst.ip());
    if let Some(service) = service.as_ref().filter(|service| !service.is_passthrough()) {
        let no_endpoint = || Failure::NoHealthyEndpoint {
            service: service.hostname.to_string(),
            port: dst.port(),
        };
        let (workload, port) = snapshot
            .choose_endpoint(service, source, dst.port(), rng)
            .ok_or_else(no_endpoint)?;
        let address = address_of(&workload, dst.ip()).ok_or_else(no_endpoint)?;
        let target = SocketAddr::new(address, port);
        let way = way(scope, &workload, Some(service), target)?;
        return Ok(Destination {
            target,
            way,
            workload: Some(workload),
            service: Some(service.clone()),
        });
    }
    let workload = snapshot.workload_by_ip(dst.ip());
    let way = match &workload {
        Some(workload) => way(scope, workload, None, dst)?,
        None => Way::Plain,
    };
    Ok(Destination {
        target: dst,
        way,
        workload,
        service,
    })
}

fn way(
    scope: &dyn Scope,
    workload: &Workload,
    service: Option<&Service>,
    target: SocketAddr,
) -> Result<Way, Failure> {
    if workload.protocol != Protocol::Hbone {
        return Ok(Way::Plain);
    }
    if let Some(pod) = scope.hand_over(target.ip()) {
        return Ok(Way::HandOver(pod));
    }
    let mut expected = vec![identity(workload)?];
    // A service may vouch for endpoints that speak with another name. One that is not a workload's identity can never
    // be proven by a peer, so it is left out.
    let names = service.map_or(&[][..], |service| &service.subject_alt_names);
    expected.extend(names.iter().filter_map(|name| name.parse().ok()));
    expected.sort();
    expected.dedup();
    Ok(Way::Tunnel {
        endpoint: SocketAddr::new(target.ip(), HBONE_PORT),
        expected: expected.into(),
    })
}

/// The address of a workload that is of the same family as the one that the client used, else its first.
fn address_of(workload: &Workload, like: IpAddr) -> Option<IpAddr> {
    let addresses = &workload.addresses;
    addresses
        .iter()
        .find(|address| address.is_ipv4() == like.is_ipv4())
        .or(addresses.first())
        .copied()
}

/// Who a workload is, as the control plane says.
pub(super) fn identity(workload: &Workload) -> Result<Identity, Failure> {
    workload
        .identity()
        .map_err(|error| Failure::Identity(error.to_string()))
}
