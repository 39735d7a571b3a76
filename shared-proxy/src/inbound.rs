//! Connections to captured pods: policy, then the last hop.

#[cfg(test)]
mod fuzz;
pub mod plaintext;
mod proxy_protocol;
mod target;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use crate::capture::{
    ClientAddr, DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, LocalWorkload, OUTBOUND_PORT,
    OWN_PORTS, OnBehalfOf,
};
use crate::core::{Admitted, Attachment, DialError, Failure, Subject};
use crate::drain::Signal;
use crate::hbone::authority::Authority;
use crate::identity::Identity;
use crate::relay::{End, Leg, Meter};
use crate::state::{Service, Snapshot, Workload};
use crate::telemetry::{ApplicationLeg, ConnectionRecord, Direction, Endpoint, Opening, Step};
use target::Target;

/// A connection that has arrived at a captured pod, by whatever way.
pub(crate) struct Arrival<'a> {
    /// Who opened it: the original source.
    pub(crate) client: ClientAddr,
    /// Address on the wire: the tunnel's end, if there is a tunnel.
    pub(crate) addr: SocketAddr,
    /// What it asks for.
    pub(crate) authority: &'a Authority,
    /// Who the client proved to be.
    pub(crate) peer: Option<&'a Identity>,
    /// Whether it came through a tunnel.
    pub(crate) tunnelled: bool,
    /// What the peer's headers say.
    pub(crate) claims: Claims,
}

/// What a peer says of a connection, for telemetry alone.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    /// Hostname of the service that the client named.
    pub(crate) service: Option<String>,
    /// Who the client is, if it is in another network: its address means nothing here.
    pub(crate) foreign_source: Option<Arc<Workload>>,
}

/// A connection that was let in and reaches its application.
pub(crate) struct Arrived {
    pub(crate) record: ConnectionRecord,
    pub(crate) application: Leg,
    /// Lives as long as the connection.
    pub(crate) admitted: Admitted,
    /// Where it has arrived.
    pub(crate) workload: Arc<Workload>,
}

/// Opens the account of an arrival, asks the policies, and connects to the application with the client's address. What
/// fails after the account was opened is written there too. `signal` is that of the task that will serve it: a change of
/// policy cuts it.
pub(crate) async fn arrive(
    attachment: &Attachment,
    arrival: &Arrival<'_>,
    pod: &LocalWorkload,
    signal: &Signal,
) -> Result<Arrived, Failure> {
    let began = Instant::now();
    let whose = Subject {
        direction: Direction::Inbound,
        client: arrival.client.0,
        destination: arrival.addr,
    };
    let released = attachment.clone().released(arrival.addr.ip(), whose);
    let attachment = &released.await;
    let refused = |failure| refused(attachment, arrival, failure);
    let known = attachment.workload_of(pod, arrival.addr.ip()).await;
    let (snapshot, workload) = known.map_err(refused)?;
    let target = if arrival.peer.is_some() {
        target::find(&snapshot, &workload, arrival.addr, arrival.authority).map_err(refused)?
    } else {
        // Plaintext goes where it was meant to go, whatever is in front of the workload.
        Target::plain(arrival.addr)
    };
    if OWN_PORTS.contains(&target.meant.port()) || LISTENED.contains(&target.application.port()) {
        return Err(refused(Failure::OwnPort(target.application)));
    }
    let client = arrival.client.0;
    let source_workload = match &arrival.claims.foreign_source {
        Some(workload) => Some(workload.clone()),
        None => snapshot.workload_by_ip(client.ip()),
    };
    let record = attachment.core.telemetry.open(Opening {
        direction: Direction::Inbound,
        capture_mode: attachment.scope.id().capture_mode,
        source: Endpoint {
            addr: client,
            workload: source_workload,
            identity: arrival.peer.cloned(),
        },
        destination: Endpoint {
            addr: arrival.addr,
            workload: Some(workload.clone()),
            identity: attachment.identity_of(pod).ok(),
        },
        destination_service: service_of(&snapshot, &workload, &target, &arrival.claims),
        hbone_addr: arrival
            .tunnelled
            .then(|| arrival.authority.address().unwrap_or(target.meant).into()),
        mutual_tls: arrival.tunnelled,
    });
    record.ended_by(signal.cutter());
    let admitted = attachment.core.admit(
        &workload,
        arrival.client,
        arrival.peer,
        target.meant,
        signal.cutter(),
    );
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(failure) => return Err(failed(record, failure)),
    };
    attachment.took(Step::Decide, Direction::Inbound, began);
    let (application, from) = last_hop(attachment, &target, client.ip());
    let who = OnBehalfOf::RemoteClient(from);
    let dialled = match attachment.dial(application, who).await {
        Ok(stream) if target.announced => announce(stream, arrival, &target).await,
        dialled => dialled,
    };
    match dialled {
        Ok(stream) => {
            let application = Leg::new(stream);
            note_leg(&record, &application);
            Ok(Arrived {
                record,
                application,
                admitted,
                workload,
            })
        }
        Err(error) => Err(failed(record, error.into())),
    }
}

/// Ports that we listen on in a pod. One of the others may be the port of an application tunnel.
const LISTENED: [u16; 4] = [OUTBOUND_PORT, INBOUND_PLAINTEXT_PORT, HBONE_PORT, DNS_PORT];

/// What is dialled, and with whose address. A tunnel on the pod's loopback address is dialled from there: its header says
/// who the client is, and a foreign address on a loopback connection would be dropped.
fn last_hop(attachment: &Attachment, target: &Target, client: IpAddr) -> (SocketAddr, IpAddr) {
    let to = target.application;
    let localhost = target.announced
        && attachment.core.config.localhost_app_tunnel
        && attachment.scope.reaches_loopback();
    if !localhost {
        return (to, client);
    }
    let loopback = match to {
        SocketAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    (SocketAddr::new(loopback, to.port()), loopback)
}

/// Tells the application of its connection, ahead of the connection's bytes.
async fn announce(
    mut stream: TcpStream,
    arrival: &Arrival<'_>,
    target: &Target,
) -> Result<TcpStream, DialError> {
    let header = proxy_protocol::header(
        arrival.client.0,
        arrival.authority,
        target.meant,
        arrival.peer,
    );
    // Far less than what an empty send buffer takes at once.
    match stream.write_all(&header).await {
        Ok(()) => Ok(stream),
        Err(source) => Err(DialError::Connect {
            to: target.application,
            source,
        }),
    }
}

/// The service that the client named: what was asked for says it, or else the peer.
fn service_of(
    snapshot: &Snapshot,
    workload: &Workload,
    target: &Target,
    claims: &Claims,
) -> Option<Arc<Service>> {
    if target.service.is_some() {
        return target.service.clone();
    }
    let claimed = claims.service.as_deref()?;
    let mut served = workload.services.keys();
    snapshot.service(served.find(|key| *key.hostname == *claimed)?)
}

/// Tells the operator which connection was made. Without its addresses it has just ended.
pub(crate) fn note_leg(record: &ConnectionRecord, leg: &Leg) {
    if let (Ok(local), Ok(peer)) = (leg.stream().local_addr(), leg.stream().peer_addr()) {
        record.to_application(ApplicationLeg { local, peer });
    }
}

/// Says that an arrival was turned away before it had an account.
fn refused(attachment: &Attachment, arrival: &Arrival<'_>, failure: Failure) -> Failure {
    attachment.core.telemetry.refused(
        Direction::Inbound,
        attachment.scope.id().capture_mode,
        arrival.client,
        Some(crate::capture::OrigDstAddr(arrival.addr)),
        &failure.describe(),
    );
    failure
}

fn failed(record: ConnectionRecord, failure: Failure) -> Failure {
    record.finish(Err(failure.describe()));
    failure
}

impl Meter for ConnectionRecord {
    fn to_application(&self, bytes: u64) {
        self.sent(bytes);
    }

    fn to_client(&self, bytes: u64) {
        self.received(bytes);
    }

    fn ended(&self, end: End) {
        match end {
            End::Client => self.client_ended(),
            End::Application => self.application_ended(),
        }
    }
}
