//! Connections to captured pods: policy, then the last hop.

pub mod plaintext;

use std::net::SocketAddr;
use std::time::Instant;

use crate::capture::{ClientAddr, LocalWorkload, OWN_PORTS, OnBehalfOf};
use crate::core::{Admitted, Attachment, Failure};
use crate::drain::Signal;
use crate::identity::Identity;
use crate::relay::{Leg, Meter};
use crate::telemetry::{ConnectionRecord, Direction, Endpoint, Opening, Step};

/// A connection that has arrived at a captured pod, by whatever way.
pub(crate) struct Arrival<'a> {
    /// Who opened it: the original source.
    pub(crate) client: ClientAddr,
    /// Address on the wire: the tunnel's end, if there is a tunnel.
    pub(crate) addr: SocketAddr,
    /// What the application listens on.
    pub(crate) target: SocketAddr,
    /// Who the client proved to be.
    pub(crate) peer: Option<&'a Identity>,
    /// Whether it came through a tunnel.
    pub(crate) tunnelled: bool,
}

/// A connection that was let in and reaches its application.
pub(crate) struct Arrived {
    pub(crate) record: ConnectionRecord,
    pub(crate) application: Leg,
    /// Lives as long as the connection.
    pub(crate) admitted: Admitted,
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
    if OWN_PORTS.contains(&arrival.target.port()) {
        return Err(refused(
            attachment,
            arrival,
            Failure::OwnPort(arrival.target),
        ));
    }
    let known = attachment.workload_of(pod, arrival.target.ip()).await;
    let (snapshot, workload) = known.map_err(|failure| refused(attachment, arrival, failure))?;
    let client = arrival.client.0;
    let record = attachment.core.telemetry.open(Opening {
        direction: Direction::Inbound,
        capture_mode: attachment.scope.id().capture_mode,
        source: Endpoint {
            addr: client,
            workload: snapshot.workload_by_ip(client.ip()),
            identity: arrival.peer.cloned(),
        },
        destination: Endpoint {
            addr: arrival.addr,
            workload: Some(workload.clone()),
            identity: attachment.identity_of(pod).ok(),
        },
        destination_service: None,
        hbone_addr: arrival.tunnelled.then_some(arrival.target),
        mutual_tls: arrival.tunnelled,
    });
    let admitted = attachment.core.admit(
        &workload,
        arrival.client,
        arrival.peer,
        arrival.target,
        signal.cutter(),
    );
    let admitted = match admitted {
        Ok(admitted) => admitted,
        Err(failure) => return Err(failed(record, failure)),
    };
    attachment.took(Step::Decide, Direction::Inbound, began);
    let who = OnBehalfOf::RemoteClient(client.ip());
    match attachment.dial(arrival.target, who).await {
        Ok(stream) => Ok(Arrived {
            record,
            application: Leg::new(stream),
            admitted,
        }),
        Err(error) => Err(failed(record, error.into())),
    }
}

/// Says that an arrival was turned away before it had an account.
fn refused(attachment: &Attachment, arrival: &Arrival<'_>, failure: Failure) -> Failure {
    attachment.core.telemetry.refused(
        Direction::Inbound,
        attachment.scope.id().capture_mode,
        arrival.client,
        Some(crate::capture::OrigDstAddr(arrival.target)),
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
}
