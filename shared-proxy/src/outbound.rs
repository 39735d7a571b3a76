//! Connections that captured pods open.

mod headers;
mod route;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use rand::rng;
use tokio::time::timeout;

use crate::capture::{
    Captured, ClientAddr, LocalWorkload, OWN_PORTS, OnBehalfOf, OrigDstAddr, Role,
};
use crate::core::{Admitted, Attachment, Failure, Subject};
use crate::drain::Signal;
use crate::hbone::authority::Authority;
use crate::hbone::client::{StreamError, Tunnel};
use crate::hbone::stream::HboneStream;
use crate::hbone::stream_io::StreamIo;
use crate::identity::{Identity, PeerStanding};
use crate::inbound;
use crate::pool::{Lease, PoolKey};
use crate::relay::{self, End, Leg, Meter};
use crate::state::Workload;
use crate::telemetry::{ConnectionRecord, Direction, Endpoint, Opening, ResponseFlag, Step};
use route::{Destination, Pick, Way};

/// Who opened a connection.
struct Source {
    client: ClientAddr,
    /// The pod's: another one than the client's if that is a guest of it.
    address: IpAddr,
    identity: Identity,
    workload: Arc<Workload>,
}

/// What the client's connection is relayed to.
enum Upstream {
    Tcp(Leg),
    Tunnel(Stream),
}

/// A stream of a tunnel, or of a tunnel inside a tunnel.
struct Stream {
    stream: HboneStream,
    /// Goes with the stream: it is the stream's place in the connection.
    lease: Lease<Tunnel>,
    /// Of the peer of the inner tunnel.
    inner: PeerStanding,
}

impl Stream {
    /// A tunnel that ends breaks its streams.
    fn is_revoked(lease: &Lease<Tunnel>, inner: &PeerStanding) -> bool {
        lease.connection().peer_standing().is_revoked() || inner.is_revoked()
    }
}

/// The accounts of a connection: ours, and the destination's if that is served by this process without a tunnel.
struct Accounts {
    source: ConnectionRecord,
    destination: Option<(ConnectionRecord, Admitted)>,
}

/// Serves one connection to its end.
pub(crate) async fn serve(attachment: Attachment, captured: Captured, signal: Signal) {
    let Captured {
        stream,
        client,
        dst,
    } = captured;
    let leg = Leg::new(stream);
    if let Ok(ready) = open(&attachment, client, dst, &signal).await {
        ready.relay(leg, &signal).await;
    }
}

/// A connection whose other side is there.
pub(crate) struct Ready {
    accounts: Accounts,
    upstream: Upstream,
}

/// Makes the connection that a client asks for. An error has been told to telemetry.
pub(crate) async fn open(
    attachment: &Attachment,
    client: ClientAddr,
    dst: Result<OrigDstAddr, crate::capture::Refusal>,
    signal: &Signal,
) -> Result<Ready, ResponseFlag> {
    // Boxed, because it is much larger than what a standing connection needs.
    tokio::select! {
        prepared = Box::pin(prepare(attachment, client, dst, signal)) => prepared,
        () = signal.cut() => Err(ResponseFlag::None),
    }
}

impl Ready {
    /// Relays to the end of the connection.
    pub(crate) async fn relay(self, leg: Leg, signal: &Signal) {
        let Self { accounts, upstream } = self;
        let result = tokio::select! {
            result = relay(leg, upstream, &accounts) => result,
            () = signal.cut() => Err(accounts.cut()),
        };
        accounts.finish(result);
    }
}

async fn relay(leg: Leg, upstream: Upstream, accounts: &Accounts) -> Result<(), Failure> {
    match upstream {
        Upstream::Tcp(upstream) => relay::between_tcp(leg, upstream, accounts).await?,
        Upstream::Tunnel(Stream {
            stream,
            lease,
            inner,
        }) => {
            let relayed = relay::through_tunnel(leg, End::Client, stream, accounts).await;
            relayed.map_err(|error| match Stream::is_revoked(&lease, &inner) {
                true => Failure::TunnelRevoked,
                false => error.into(),
            })?;
        }
    }
    Ok(())
}

/// Decides where the connection goes, opens its accounts and connects.
async fn prepare(
    attachment: &Attachment,
    client: ClientAddr,
    dst: Result<OrigDstAddr, crate::capture::Refusal>,
    signal: &Signal,
) -> Result<Ready, ResponseFlag> {
    let telemetry = &attachment.core.telemetry;
    let known = dst.as_ref().ok().copied();
    let began = Instant::now();
    // Whose it is, the capture knows by which it came. Where it goes is decided by the one that its pod has.
    let owned = dst.and_then(|dst| {
        let owner = attachment.scope.owner(Role::Outbound, client, dst)?;
        Ok((owner, dst))
    });
    let pods = match &owned {
        Ok((owner, _)) => owner.address_of(client.0.ip()),
        Err(_) => client.0.ip(),
    };
    let whose = Subject {
        direction: Direction::Outbound,
        client: client.0,
        destination: known.map_or(client.0, |dst| dst.0),
    };
    let released = attachment.clone().released(pods, whose);
    let attachment = &released.await;
    let capture_mode = attachment.scope.id().capture_mode;
    let (source, destination) = match decide(attachment, client, owned).await {
        Ok(decision) => decision,
        Err(failure) => {
            let flag = failure.flag();
            let reason = failure.into();
            telemetry.refused(Direction::Outbound, capture_mode, client, known, &reason);
            return Err(flag);
        }
    };
    attachment.took(Step::Decide, Direction::Outbound, began);
    let mut accounts = Accounts {
        source: telemetry.open(opening(attachment, &source, &destination)),
        destination: None,
    };
    accounts.source.ended_by(signal.cutter());
    match connect(attachment, &source, &destination, &mut accounts, signal).await {
        Ok(upstream) => {
            attachment.took(Step::Total, Direction::Outbound, began);
            Ok(Ready { accounts, upstream })
        }
        Err(failure) => {
            let flag = failure.flag();
            accounts.finish(Err(failure));
            Err(flag)
        }
    }
}

async fn decide(
    attachment: &Attachment,
    client: ClientAddr,
    owned: Result<(LocalWorkload, OrigDstAddr), crate::capture::Refusal>,
) -> Result<(Source, Destination), Failure> {
    let (owner, dst) = owned?;
    refuse_own_port(&owner, client, dst.0)?;
    let identity = attachment.identity_of(&owner)?;
    let pods = owner.address_of(client.0.ip());
    let (_, workload) = attachment.workload_of(&owner, pods).await?;
    let snapshot = attachment.mesh_for(dst.0.ip()).await?;
    let pick = route::pick(&snapshot, &workload, dst.0, &mut rng())?;
    let address = match pick.address() {
        Some(address) => address,
        None => resolve(attachment, &pick, dst.0.is_ipv4()).await?,
    };
    let destination = pick.at(&*attachment.scope, address);
    if let Some(target) = destination.authority.address() {
        refuse_own_port(&owner, client, target)?;
    }
    let source = Source {
        client,
        address: pods,
        identity,
        workload,
    };
    Ok((source, destination))
}

/// Looks up the name of a workload that has no address of its own.
async fn resolve(
    attachment: &Attachment,
    pick: &Pick,
    prefers_ipv4: bool,
) -> Result<IpAddr, Failure> {
    let hostname = pick.hostname().cloned().unwrap_or_default();
    let failed = |reason: String| Failure::Unresolved {
        hostname: hostname.clone(),
        reason,
    };
    let config = &attachment.core.config;
    let found = timeout(config.connect_timeout, config.resolver.resolve(&hostname))
        .await
        .map_err(|_| failed(format!("no answer within {:?}", config.connect_timeout)))?
        .map_err(|error| failed(error.to_string()))?;
    let mut suitable = found.into_iter().filter(|address| pick.suits(*address));
    let first = suitable.next();
    first
        .filter(|address| address.is_ipv4() == prefers_ipv4)
        .or_else(|| suitable.find(|address| address.is_ipv4() == prefers_ipv4))
        .or(first)
        .ok_or_else(|| failed("it has none of a family that the service has".to_owned()))
}

/// A connection to one of our ports on the pod's own address would come back to us, for ever.
fn refuse_own_port(
    owner: &LocalWorkload,
    client: ClientAddr,
    to: SocketAddr,
) -> Result<(), Failure> {
    let own = to.ip().is_loopback()
        || to.ip().is_unspecified()
        || to.ip() == client.0.ip()
        || owner.addresses.contains(&to.ip());
    if own && OWN_PORTS.contains(&to.port()) {
        return Err(Failure::OwnPort(to));
    }
    Ok(())
}

fn opening(attachment: &Attachment, source: &Source, destination: &Destination) -> Opening {
    let tunnelled = matches!(destination.way, Way::Tunnel { .. } | Way::Nested { .. });
    let hbone_addr = tunnelled.then(|| destination.authority.clone());
    Opening {
        direction: Direction::Outbound,
        capture_mode: attachment.scope.id().capture_mode,
        source: Endpoint {
            addr: source.client.0,
            workload: Some(source.workload.clone()),
            identity: Some(source.identity.clone()),
        },
        destination: Endpoint {
            addr: destination.endpoint,
            identity: destination
                .workload
                .as_ref()
                .filter(|_| tunnelled)
                .and_then(|workload| route::identity(workload).ok()),
            workload: destination.workload.clone(),
        },
        destination_service: destination.service.clone(),
        hbone_addr,
        mutual_tls: tunnelled,
    }
}

async fn connect(
    attachment: &Attachment,
    source: &Source,
    destination: &Destination,
    accounts: &mut Accounts,
    signal: &Signal,
) -> Result<Upstream, Failure> {
    let to = destination.endpoint;
    match &destination.way {
        Way::Plain => {
            let who = OnBehalfOf::LocalWorkload(source.address);
            let leg = Leg::new(attachment.dial(to, who).await?);
            inbound::note_leg(&accounts.source, &leg);
            Ok(Upstream::Tcp(leg))
        }
        Way::Tunnel { expected } => {
            let key = pool_key(attachment, source, to, expected);
            let headers = headers::connect(source, destination);
            let (stream, lease) =
                open_stream(attachment, &key, &destination.authority, headers).await?;
            note_stream(accounts, &lease, &stream);
            Ok(Upstream::Tunnel(Stream {
                stream,
                lease,
                inner: PeerStanding::default(),
            }))
        }
        Way::Nested { gateway, expected } => {
            let key = pool_key(attachment, source, to, gateway);
            let headers = headers::connect(source, destination);
            let (outer, lease) =
                open_stream(attachment, &key, &destination.authority, headers).await?;
            note_stream(accounts, &lease, &outer);
            let (stream, inner) =
                open_nested(attachment, source, destination, expected, outer).await?;
            Ok(Upstream::Tunnel(Stream {
                stream,
                lease,
                inner,
            }))
        }
        Way::HandOver(pod) => {
            let peer = Some(&source.identity);
            let arrived = inbound::arrive(
                attachment,
                &inbound::Arrival {
                    client: source.client,
                    addr: to,
                    authority: &destination.authority,
                    peer,
                    tunnelled: false,
                    claims: inbound::Claims::default(),
                },
                pod,
                signal,
            )
            .await?;
            accounts.destination = Some((arrived.record, arrived.admitted));
            Ok(Upstream::Tcp(arrived.application))
        }
    }
}

fn pool_key(
    attachment: &Attachment,
    source: &Source,
    destination: SocketAddr,
    expected: &Arc<[Identity]>,
) -> PoolKey {
    PoolKey {
        scope: attachment.scope.id().clone(),
        attachment: attachment.number,
        source: source.identity.clone(),
        source_address: source.address,
        destination,
        expected: expected.clone(),
    }
}

/// A tunnel inside a stream of a tunnel to a gateway, and the one stream in it. It is not shared: the gateway chooses an
/// endpoint for each stream, and another connection may be for another one.
async fn open_nested(
    attachment: &Attachment,
    source: &Source,
    destination: &Destination,
    expected: &[Identity],
    outer: HboneStream,
) -> Result<(HboneStream, PeerStanding), Failure> {
    let config = &attachment.core.config;
    let tunnel = async {
        let certificate = attachment.core.certificates.get(&source.identity).await?;
        let (io, peer) = (StreamIo::new(outer), destination.endpoint);
        Tunnel::open(io, peer, &certificate, expected, &config.hbone).await
    };
    let tunnel = tunnel
        .await
        .map_err(|error| Failure::Tunnel(Arc::new(error)))?;
    let mut headers = headers::connect(source, destination);
    headers::add_network(&mut headers, &source.workload.network);
    let limit = config.connect_timeout * 2;
    let stream = tunnel
        .connect(&destination.authority, headers, limit)
        .await?;
    Ok((stream, tunnel.peer_standing().clone()))
}

/// A stream in a pooled tunnel. A tunnel that turns out to be going away, or was dead when it was found in the pool, is
/// replaced once: the peer has not opened anything for us yet.
async fn open_stream(
    attachment: &Attachment,
    key: &PoolKey,
    target: &Authority,
    headers: http::HeaderMap,
) -> Result<(HboneStream, Lease<Tunnel>), Failure> {
    let pool = &attachment.core.pool;
    // The peer connects to its application before it answers, and has as long for that as we have.
    let limit = attachment.core.config.connect_timeout * 2;
    let open = || {
        let (attachment, key) = (attachment.clone(), key.clone());
        async move { open_tunnel(&attachment, &key).await }
    };
    let failed = |error: Option<Arc<_>>| error.map_or(Failure::TunnelAbandoned, Failure::Tunnel);
    let began = Instant::now();
    let lease = pool.lease(key, open).await.map_err(failed)?;
    attachment.took(Step::Tunnel, Direction::Outbound, began);
    let began = Instant::now();
    let error = match lease
        .connection()
        .connect(target, headers.clone(), limit)
        .await
    {
        Ok(stream) => {
            attachment.took(Step::Request, Direction::Outbound, began);
            return Ok((stream, lease));
        }
        Err(error) => error,
    };
    let retry = match &error {
        StreamError::NotTaken(_) => true,
        StreamError::Broken(_) => !lease.is_fresh(),
        _ => false,
    };
    if !retry {
        return Err(error.into());
    }
    let lease = pool.replace(key, lease, open).await.map_err(failed)?;
    let stream = lease.connection().connect(target, headers, limit).await?;
    Ok((stream, lease))
}

pub(crate) async fn open_tunnel(
    attachment: &Attachment,
    key: &PoolKey,
) -> Result<Tunnel, crate::hbone::client::TunnelError> {
    let certificate = attachment.core.certificates.get(&key.source).await?;
    let who = OnBehalfOf::LocalWorkload(key.source_address);
    let tcp = attachment.dial(key.destination, who).await?;
    let local = tcp.local_addr();
    let hbone = &attachment.core.config.hbone;
    let (to, expected) = (key.destination, &key.expected);
    let mut tunnel = Tunnel::open(tcp, to, &certificate, expected, hbone).await?;
    if let Ok(local) = local {
        tunnel = tunnel.made_of(local, key.destination);
    }
    let capture_mode = key.scope.capture_mode;
    attachment.core.telemetry.took(
        Step::TlsHandshake,
        capture_mode,
        Direction::Outbound,
        tunnel.tls_handshake(),
    );
    Ok(tunnel)
}

/// Tells the operator which stream of which tunnel it is.
fn note_stream(accounts: &Accounts, lease: &Lease<Tunnel>, stream: &HboneStream) {
    if let Some(leg) = lease.connection().leg(stream) {
        accounts.source.through_tunnel(leg);
    }
}

impl Meter for Accounts {
    fn to_application(&self, bytes: u64) {
        self.source.sent(bytes);
        if let Some((record, _)) = &self.destination {
            record.sent(bytes);
        }
    }

    fn to_client(&self, bytes: u64) {
        self.source.received(bytes);
        if let Some((record, _)) = &self.destination {
            record.received(bytes);
        }
    }

    fn ended(&self, end: End) {
        self.source.ended(end);
        if let Some((record, _)) = &self.destination {
            record.ended(end);
        }
    }
}

impl Accounts {
    /// Why the connection was cut.
    fn cut(&self) -> Failure {
        let admitted = self.destination.as_ref().map(|(_, admitted)| admitted);
        admitted.map_or(Failure::Cut, Admitted::cut)
    }

    fn finish(self, result: Result<(), Failure>) {
        let result = result.map_err(crate::telemetry::ConnectionError::from);
        if let Some((record, _)) = self.destination {
            record.finish(result.clone());
        }
        self.source.finish(result);
    }
}
