//! The seam between the core and the ways of capturing traffic.
//!
//! The core needs three things from a capture: listen for a role, make an upstream socket on somebody's behalf, and say
//! who owns a connection. Everything else about a capture is host programming, which is data and lives elsewhere. There
//! is one dynamic call per connection here and none per byte.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use tokio::net::{TcpListener, TcpSocket, TcpStream, UdpSocket};

/// Port of captured outbound traffic (the field's number).
pub const OUTBOUND_PORT: u16 = 15001;
/// Port of captured inbound plaintext.
pub const INBOUND_PLAINTEXT_PORT: u16 = 15006;
/// Port of HBONE: HTTP/2 CONNECT over mutual TLS.
pub const HBONE_PORT: u16 = 15008;
/// Port of the DNS proxy.
pub const DNS_PORT: u16 = 15053;
/// SOCKS5, when it is on.
pub const SOCKS5_PORT: u16 = 15080;
/// HBONE between two pods of one node when the capture loops it through one namespace.
pub const SAME_NODE_HBONE_PORT: u16 = 15088;

/// Ports that are ours in every captured namespace. A connection whose original destination names one of them on the
/// pod's own address would make the proxy dial itself; it is refused.
pub const OWN_PORTS: [u16; 6] = [
    OUTBOUND_PORT,
    INBOUND_PLAINTEXT_PORT,
    HBONE_PORT,
    DNS_PORT,
    SOCKS5_PORT,
    SAME_NODE_HBONE_PORT,
];

/// What a listener is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Connections that a captured pod opens (15001).
    Outbound,
    /// Plaintext connections to a captured pod (15006).
    InboundPlaintext,
    /// HBONE connections to a captured pod (15008).
    InboundHbone,
    /// DNS queries of a captured pod (15053).
    Dns,
    /// SOCKS5 requests of a captured pod (15080).
    Socks5,
}

/// Source address of a captured connection. A newtype, so that it cannot be swapped with the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientAddr(pub SocketAddr);

/// Destination that the client meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OrigDstAddr(pub SocketAddr);

impl fmt::Display for ClientAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for OrigDstAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Whose address an upstream socket has to speak with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum OnBehalfOf {
    /// A captured pod of this node: the tunnel, or plain TCP, to its destination.
    LocalWorkload(IpAddr),
    /// The client of an inbound connection: the last hop, to the application.
    RemoteClient(IpAddr),
}

/// Names one scope in pool keys, logs and metrics.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ScopeId {
    /// Value of the label `capture_mode`; the core never compares it with anything.
    pub capture_mode: &'static str,
    /// Distinguishes scopes of one mode: the pod's UID, or the empty string for a node-wide scope.
    pub instance: Arc<str>,
}

impl fmt::Display for ScopeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.instance.is_empty() {
            f.write_str(self.capture_mode)
        } else {
            write!(f, "{}/{}", self.capture_mode, self.instance)
        }
    }
}

/// A captured pod of this node, as the agent announced it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LocalWorkload {
    /// Kubernetes pod UID.
    pub uid: Arc<str>,
    /// Pod name.
    pub name: Arc<str>,
    /// Pod namespace.
    pub namespace: Arc<str>,
    /// Service account: with the namespace, the pod's identity.
    pub service_account: Arc<str>,
    /// The pod's addresses. May be empty when the agent does not tell (the field's agents); then any address is the
    /// pod's that arrives in its own scope.
    pub addresses: Arc<[IpAddr]>,
}

impl LocalWorkload {
    /// The pod's address of a connection that it opened from `client`: that one, unless it is a guest's, whom nobody knows.
    pub fn address_of(&self, client: IpAddr) -> IpAddr {
        if self.addresses.contains(&client) {
            return client;
        }
        let of_its_family = |address: &&IpAddr| address.is_ipv4() == client.is_ipv4();
        let addresses = self.addresses.iter();
        let known = addresses.clone().find(of_its_family).or(addresses.last());
        known.copied().unwrap_or(client)
    }
}

/// Why a connection is not served. Logged and counted with the address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The owner cannot be found: nobody announced this address to be captured here.
    #[error("{0} is not a pod that is captured here: the agent has not announced it to this proxy")]
    UnknownOwner(IpAddr),
    /// The connection arrived in a pod's scope with another pod's address.
    #[error("{address} does not belong to pod {pod}")]
    ForeignAddress {
        /// The address seen.
        address: IpAddr,
        /// `namespace/name` of the scope's pod.
        pod: String,
    },
    /// Neither TPROXY nor REDIRECT brought this connection: it was made to our port directly.
    #[error("no original destination: the connection was made to our own port {0}")]
    OwnPort(u16),
}

/// One way of capturing traffic, seen from the core: sockets and ownership.
///
/// All calls are synchronous and short. They may enter another network namespace on the calling thread and return from it
/// before they return.
pub trait Scope: fmt::Debug + Send + Sync + 'static {
    /// Name in pool keys, logs and metrics.
    fn id(&self) -> &ScopeId;

    /// Who owns this connection: outbound, the workload that opened it; inbound, the one it goes to.
    fn owner(
        &self,
        role: Role,
        client: ClientAddr,
        dst: OrigDstAddr,
    ) -> Result<LocalWorkload, Refusal>;

    /// Bound, listening sockets for a role. Empty when this capture does not serve the role.
    fn listen(&self, role: Role) -> io::Result<Vec<Listener>>;

    /// An unconnected socket to `to` that speaks with the address of `who`. The caller connects it; on `EADDRNOTAVAIL`
    /// (the chosen source port is in use towards that destination) it asks for another one.
    fn socket(&self, to: SocketAddr, who: OnBehalfOf) -> io::Result<TcpSocket>;

    /// Bound datagram sockets for a role. Empty, the default, when this capture does not serve the role over UDP. An answer
    /// goes out of the socket that its query came in by.
    fn udp(&self, role: Role) -> io::Result<Vec<UdpSocket>> {
        let _ = role;
        Ok(Vec::new())
    }

    /// A datagram socket for the proxy's own queries to `to` about a captured pod's query. Its traffic is not captured,
    /// and answers find their way back to it; which address it speaks with is the capture's choice. The caller connects it.
    ///
    /// # Errors
    /// `Unsupported`, the default, from a capture without UDP.
    fn datagram(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        Err(io::Error::new(
            io::ErrorKind::Unsupported,
            format!("{} has no datagram sockets: {to}", self.id()),
        ))
    }

    /// Whether the sockets of this capture are in the pod's own namespace, so that its loopback address is the pod's. The
    /// default is no: a connection to a loopback address would reach the proxy itself.
    fn reaches_loopback(&self) -> bool {
        false
    }

    /// The pod at `dst` if connections to it are handed over inside this process instead of through a tunnel
    /// (upstream's same-node short cut). The default is never.
    fn hand_over(&self, dst: IpAddr) -> Option<LocalWorkload> {
        let _ = dst;
        None
    }
}

/// A listening socket together with the rule by which its connections' original destination is read.
#[derive(Debug)]
pub struct Listener {
    inner: TcpListener,
    role: Role,
    port: u16,
    /// Where all its connections are meant to go, if it stands for one destination.
    destination: Option<OrigDstAddr>,
}

/// One captured connection.
#[derive(Debug)]
pub struct Captured {
    /// The client's side of the connection.
    pub stream: TcpStream,
    /// Who opened it.
    pub client: ClientAddr,
    /// Where it was meant to go, or why that cannot be told.
    pub dst: Result<OrigDstAddr, Refusal>,
}

impl Listener {
    /// Wraps a bound, listening, non-blocking socket. Must be called on a Tokio runtime.
    pub fn new(role: Role, socket: std::net::TcpListener) -> io::Result<Self> {
        let port = socket.local_addr()?.port();
        Ok(Self {
            inner: TcpListener::from_std(socket)?,
            role,
            port,
            destination: None,
        })
    }

    /// As [`Listener::new`], for a listener that stands for one destination: all its connections are meant for `dst`,
    /// whatever address they were made to. For captures without redirection.
    pub fn for_destination(
        role: Role,
        socket: std::net::TcpListener,
        dst: OrigDstAddr,
    ) -> io::Result<Self> {
        Ok(Self {
            destination: Some(dst),
            ..Self::new(role, socket)?
        })
    }

    /// What it listens for.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The port it is bound to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The socket, to set options that its connections inherit.
    pub fn as_socket(&self) -> socket2::SockRef<'_> {
        socket2::SockRef::from(&self.inner)
    }

    /// Waits for the next connection. An error concerns one connection (`ECONNABORTED`) or resources (`EMFILE`); the
    /// caller logs it, waits a little and goes on.
    pub async fn accept(&self) -> io::Result<Captured> {
        let (stream, peer) = self.inner.accept().await?;
        let client = ClientAddr(canonical(peer));
        let dst = self.original_destination(&stream);
        Ok(Captured {
            stream,
            client,
            dst,
        })
    }

    /// Original destination, per connection and without guessing: 15008 is reached directly (or by TPROXY), so the local
    /// address is it. Otherwise a local port that differs from the listener's means TPROXY: the local address again. An
    /// equal one means REDIRECT: conntrack knows (`SO_ORIGINAL_DST`); if it does not, the connection was made to our own
    /// port and nobody else's destination is known.
    fn original_destination(&self, stream: &TcpStream) -> Result<OrigDstAddr, Refusal> {
        if let Some(dst) = self.destination {
            return Ok(dst);
        }
        let local = stream
            .local_addr()
            .map(canonical)
            .map_err(|_| Refusal::OwnPort(self.port))?;
        if self.role == Role::InboundHbone || local.port() != self.port {
            return Ok(OrigDstAddr(local));
        }
        let socket = socket2::SockRef::from(stream);
        let from_conntrack = if local.is_ipv4() {
            socket.original_dst_v4()
        } else {
            socket.original_dst_v6()
        };
        match from_conntrack
            .ok()
            .and_then(|address| address.as_socket())
            .map(canonical)
        {
            Some(dst) if !OWN_PORTS.contains(&dst.port()) => Ok(OrigDstAddr(dst)),
            _ => Err(Refusal::OwnPort(self.port)),
        }
    }
}

/// The address with an IPv4-mapped IPv6 address written as IPv4.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}
