//! What happens to one connection: where it goes, by which way, with whose address.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use rand::rng;
use shared_proxy::capture::{
    Captured, ClientAddr, HBONE_PORT, Listener, OWN_PORTS, OnBehalfOf, OrigDstAddr, Refusal, Role,
    Scope,
};
use shared_proxy::core::Keepalive;
use shared_proxy::drain::Signal;
use shared_proxy::relay::Leg;
use shared_proxy::state::balancing::Wanted;
use shared_proxy::state::workload::Protocol;
use shared_proxy::state::{Snapshot, Store};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::header::{Header, HeaderError};
use crate::pipe::Pipes;
use crate::splice;

/// How long the way to the application may take to stand; as long as the proxy's.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How many sockets are tried when the chosen source port is in use towards the destination.
const TRIES: usize = 8;
/// Pause after an error that concerns the process (`EMFILE`): accepting at once would fail again.
const PAUSE: Duration = Duration::from_millis(50);

/// What the connections of one pod need.
#[derive(Debug, Clone)]
pub(crate) struct Service {
    pub(crate) scope: Arc<dyn Scope>,
    pub(crate) store: Arc<Store>,
    pub(crate) pipes: Arc<Pipes>,
}

/// Why a connection is not served.
#[derive(Debug, thiserror::Error)]
enum Refused {
    #[error(transparent)]
    Refusal(#[from] Refusal),
    #[error("{0} is the relay itself")]
    OwnPort(SocketAddr),
    #[error("{0} is not a workload, so no endpoint can be chosen for it")]
    UnknownClient(IpAddr),
    #[error("service {service} has no endpoint for port {port}")]
    NoEndpoint { service: String, port: u16 },
    #[error(transparent)]
    Header(#[from] HeaderError),
    #[error("{peer} speaks for {claimed}")]
    ForeignClient { peer: IpAddr, claimed: IpAddr },
    #[error("no socket towards {to}: {source}")]
    Socket { to: SocketAddr, source: io::Error },
    #[error("cannot connect to {to}: {source}")]
    Connect { to: SocketAddr, source: io::Error },
    #[error("sending the header to {to}: {source}")]
    Send { to: SocketAddr, source: io::Error },
    #[error("not connected within {CONNECT_WITHIN:?}")]
    TimedOut,
}

/// Where a connection of a pod goes.
#[derive(Debug, PartialEq, Eq)]
struct Destination {
    /// What the application listens on.
    target: SocketAddr,
    /// Whether a relay takes connections to it.
    in_mesh: bool,
}

/// Accepts until told to drain, and closes the listener then.
pub(crate) async fn accept(service: Service, listener: Listener, signal: Signal) {
    let role = listener.role();
    loop {
        let accepted = tokio::select! {
            biased;
            () = signal.draining() => return,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok(captured) => {
                tokio::spawn(serve(service.clone(), role, captured, signal.clone()));
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::debug!(scope = %service.scope.id(), %error, "accepting a connection failed");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Serves one connection to its end. One that fails is reset, which is all that is said of it: a line for each would be
/// measured too.
async fn serve(service: Service, role: Role, captured: Captured, signal: Signal) {
    let Captured {
        stream,
        client,
        dst,
    } = captured;
    let mut leg = Leg::new(stream);
    // Boxed, because it is much larger than what a standing connection needs.
    let connected = tokio::select! {
        connected = Box::pin(timeout(CONNECT_WITHIN, service.connect(role, client, dst, &mut leg))) => connected,
        () = signal.cut() => return,
    };
    let upstream = match connected.unwrap_or(Err(Refused::TimedOut)) {
        Ok(upstream) => Leg::new(upstream),
        Err(error) => {
            tracing::debug!(scope = %service.scope.id(), ?role, %client, %error, "connection failed");
            return;
        }
    };
    tokio::select! {
        // Whichever side failed, the other one hears of it; nobody else asks.
        _ = splice::between(leg, upstream, &service.pipes) => {}
        () = signal.cut() => {}
    }
}

impl Service {
    async fn connect(
        &self,
        role: Role,
        client: ClientAddr,
        dst: Result<OrigDstAddr, Refusal>,
        leg: &mut Leg,
    ) -> Result<TcpStream, Refused> {
        let dst = dst?;
        let to_application = OnBehalfOf::RemoteClient(client.0.ip());
        match role {
            Role::Outbound => {
                self.scope.owner(role, client, dst)?;
                self.outbound(client, dst.0).await
            }
            Role::InboundPlaintext => {
                let application = self.application(role, client, dst)?;
                self.dial(application, to_application).await
            }
            Role::InboundHbone => {
                let (mut read, _) = leg.split();
                let header = Header::read(&mut read).await?;
                let (peer, claimed) = (client.0.ip(), header.source.ip());
                if peer != claimed {
                    return Err(Refused::ForeignClient { peer, claimed });
                }
                let application =
                    self.application(role, client, OrigDstAddr(header.destination))?;
                self.dial(application, to_application).await
            }
            // Not among the roles that are listened for.
            Role::Dns | Role::Socks5 => Err(Refused::OwnPort(dst.0)),
        }
    }

    async fn outbound(&self, client: ClientAddr, dst: SocketAddr) -> Result<TcpStream, Refused> {
        let Destination { target, in_mesh } = choose(&self.store.load(), client.0.ip(), dst)?;
        // It would come back to the relay, for ever.
        let own = target.ip().is_loopback() || target.ip() == client.0.ip();
        if own && OWN_PORTS.contains(&target.port()) {
            return Err(Refused::OwnPort(target));
        }
        let who = OnBehalfOf::LocalWorkload(client.0.ip());
        if !in_mesh {
            return self.dial(target, who).await;
        }
        let relay = SocketAddr::new(target.ip(), HBONE_PORT);
        let mut stream = self.dial(relay, who).await?;
        let header = Header {
            source: client.0,
            destination: target,
        };
        // At once and by itself: the server may be the one to speak first.
        match stream.write_all(&header.encode()).await {
            Ok(()) => Ok(stream),
            Err(source) => Err(Refused::Send { to: relay, source }),
        }
    }

    /// The destination of an arrival, if it is an application of this scope's pod.
    fn application(
        &self,
        role: Role,
        client: ClientAddr,
        dst: OrigDstAddr,
    ) -> Result<SocketAddr, Refused> {
        self.scope.owner(role, client, dst)?;
        if OWN_PORTS.contains(&dst.0.port()) {
            return Err(Refused::OwnPort(dst.0));
        }
        Ok(dst.0)
    }

    async fn dial(&self, to: SocketAddr, who: OnBehalfOf) -> Result<TcpStream, Refused> {
        let mut tries = 0;
        loop {
            let socket = self
                .scope
                .socket(to, who)
                .and_then(|socket| {
                    set_options(&SockRef::from(&socket))?;
                    Ok(socket)
                })
                .map_err(|source| Refused::Socket { to, source })?;
            tries += 1;
            match socket.connect(to).await {
                Ok(stream) => return Ok(stream),
                Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && tries < TRIES => {}
                Err(source) => return Err(Refused::Connect { to, source }),
            }
        }
    }
}

/// The TCP options that the proxy has on its connections. Those of a listener are inherited by what it accepts.
pub(crate) fn set_options(socket: &SockRef<'_>) -> io::Result<()> {
    socket.set_tcp_nodelay(true)?;
    let Keepalive {
        time,
        interval,
        retries,
    } = Keepalive::default();
    socket.set_tcp_keepalive(
        &TcpKeepalive::new()
            .with_time(time)
            .with_interval(interval)
            .with_retries(retries),
    )
}

/// The proxy's choice: an endpoint for a service address, and a relayed connection to every workload that is captured.
fn choose(snapshot: &Snapshot, client: IpAddr, dst: SocketAddr) -> Result<Destination, Refused> {
    let service = snapshot.service_by_vip(dst.ip());
    let Some(service) = service.filter(|service| !service.is_passthrough()) else {
        let workload = snapshot.workload_by_ip(dst.ip());
        return Ok(Destination {
            target: dst,
            in_mesh: workload.is_some_and(|workload| workload.protocol == Protocol::Hbone),
        });
    };
    let source = snapshot
        .workload_by_ip(client)
        .ok_or(Refused::UnknownClient(client))?;
    let chosen = snapshot.choose_endpoint(&service, &source, Wanted::Port(dst.port()), &mut rng());
    let target = chosen.and_then(|(workload, port)| {
        let like = |address: &&IpAddr| address.is_ipv4() == dst.is_ipv4();
        let address = workload.addresses.iter().find(like)?;
        Some(Destination {
            target: SocketAddr::new(*address, port),
            in_mesh: workload.protocol == Protocol::Hbone,
        })
    });
    target.ok_or_else(|| Refused::NoEndpoint {
        service: service.hostname.to_string(),
        port: dst.port(),
    })
}

#[cfg(test)]
mod tests;
