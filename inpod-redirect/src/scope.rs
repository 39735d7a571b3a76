//! The in-pod capture's sockets: one scope per pod, every socket in the pod's own namespace and marked.
//!
//! Whose a connection is, is fixed by the namespace it came from. The mark keeps the proxy's sockets out of the pod's
//! redirection and leads answers to spoofed clients back (see [`crate::plan`]).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, LazyLock};

use host_net::netns::Netns;
use shared_proxy::capture::{
    ClientAddr, DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, Listener, LocalWorkload,
    OUTBOUND_PORT, OnBehalfOf, OrigDstAddr, Refusal, Role, SOCKS5_PORT, Scope, ScopeId,
};
use shared_proxy::ports::{self, SourcePorts};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};

use crate::facts::MARK_PROXY;

/// Value of the label `capture_mode`.
pub const CAPTURE_MODE: &str = "inpod";

/// Connections that wait to be accepted. The kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// Why a pod cannot have a scope.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ScopeError {
    /// A pod with the host's network, or a wrong descriptor.
    #[error(
        "pod {pod}: its network namespace {netns} is the proxy's own; capturing it would capture the proxy"
    )]
    OwnNamespace {
        /// `namespace/name`.
        pod: String,
        /// The namespace.
        netns: host_net::netns::NetnsId,
    },
}

/// The scope of one pod.
#[derive(Debug)]
pub struct InpodScope {
    id: ScopeId,
    netns: Netns,
    /// Where the proxy's threads are.
    own: Netns,
    workload: LocalWorkload,
    /// Whether what the pod sends may come from other addresses.
    guests: bool,
}

/// Shared by all pods: ports belong to a namespace, but counting them together does no harm and costs no memory per pod.
static PORTS: LazyLock<SourcePorts> = LazyLock::new(|| SourcePorts::new(ports::INPOD));

impl InpodScope {
    /// A scope whose sockets are in `netns`, the pod's namespace; `own` is the proxy's, in which all threads
    /// are that will call this.
    pub fn new(netns: Netns, workload: LocalWorkload, own: &Netns) -> Result<Self, ScopeError> {
        if netns.id() == own.id() {
            return Err(ScopeError::OwnNamespace {
                pod: pod_name(&workload),
                netns: netns.id(),
            });
        }
        Ok(Self {
            id: ScopeId {
                capture_mode: CAPTURE_MODE,
                instance: Arc::clone(&workload.uid),
            },
            netns,
            own: own.clone(),
            workload,
            guests: false,
        })
    }

    /// With containers or virtual machines inside the pod whose connections are the pod's own.
    pub fn with_guests(self, guests: bool) -> Self {
        Self { guests, ..self }
    }

    /// The pod.
    pub fn workload(&self) -> &LocalWorkload {
        &self.workload
    }

    /// What is listened at: every address, in both families. Local queries are redirected to the loopback address, and
    /// answered from it; nobody but the pod is to ask there, nor by SOCKS5.
    fn places(role: Role, port: u16) -> [SocketAddr; 2] {
        match role {
            Role::Dns | Role::Socks5 => [
                (Ipv4Addr::LOCALHOST, port).into(),
                (Ipv6Addr::LOCALHOST, port).into(),
            ],
            _ => [
                (Ipv4Addr::UNSPECIFIED, port).into(),
                (Ipv6Addr::UNSPECIFIED, port).into(),
            ],
        }
    }

    /// One for each family; one for IPv4 where there is no IPv6.
    fn both<T>(
        [v4, v6]: [SocketAddr; 2],
        make: impl Fn(SocketAddr) -> io::Result<T>,
    ) -> io::Result<Vec<T>> {
        let v4 = make(v4)?;
        match make(v6) {
            Ok(v6) => Ok(vec![v4, v6]),
            Err(error) if is_without_ipv6(&error) => Ok(vec![v4]),
            Err(error) => Err(error),
        }
    }

    fn listener(&self, role: Role, address: SocketAddr) -> io::Result<Listener> {
        let socket = self.socket_in_pod(Domain::for_address(address), Protocol::TCP)?;
        // The kernel has one flag for both families.
        socket.set_ip_transparent_v4(true)?;
        self.bind(&socket, address)?;
        socket.listen(BACKLOG)?;
        Listener::new(role, TcpListener::from(socket))
    }

    fn bind(&self, socket: &Socket, address: SocketAddr) -> io::Result<()> {
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // Two proxies serve a pod while one replaces the other.
        socket.set_reuse_port(true)?;
        socket.bind(&SockAddr::from(address)).map_err(|error| {
            named(
                error,
                format!("listener {address} in pod {}", pod_name(&self.workload)),
            )
        })
    }

    /// A socket with the mark of the proxy's own; on a listener it is inherited by what it accepts.
    fn socket_in_pod(&self, domain: Domain, protocol: Protocol) -> io::Result<Socket> {
        let kind = match protocol {
            Protocol::UDP => Type::DGRAM,
            _ => Type::STREAM,
        };
        let socket = self.netns.run_from(&self.own, || {
            Socket::new(domain, kind.nonblocking().cloexec(), Some(protocol))
        })??;
        socket.set_mark(MARK_PROXY.value)?;
        Ok(socket)
    }
}

impl Scope for InpodScope {
    fn id(&self) -> &ScopeId {
        &self.id
    }

    fn owner(
        &self,
        role: Role,
        client: ClientAddr,
        dst: OrigDstAddr,
    ) -> Result<LocalWorkload, Refusal> {
        let address = match role {
            // Only rules on the guests' interfaces lead anybody here who has another address; who comes by himself has this
            // very port as destination.
            Role::Outbound if self.guests && dst.0.port() != OUTBOUND_PORT => {
                return Ok(self.workload.clone());
            }
            Role::Outbound => client.0.ip(),
            Role::InboundPlaintext | Role::InboundHbone => dst.0.ip(),
            // Bound to loopback: whoever reaches it is in the pod, whatever address it asks from.
            Role::Dns | Role::Socks5 => return Ok(self.workload.clone()),
        };
        // Agents without our extension do not tell a pod's addresses.
        if self.workload.addresses.is_empty() || self.workload.addresses.contains(&address) {
            Ok(self.workload.clone())
        } else {
            Err(Refusal::ForeignAddress {
                address,
                pod: pod_name(&self.workload),
            })
        }
    }

    fn listen(&self, role: Role) -> io::Result<Vec<Listener>> {
        let port = match role {
            Role::Outbound => OUTBOUND_PORT,
            Role::InboundPlaintext => INBOUND_PLAINTEXT_PORT,
            Role::InboundHbone => HBONE_PORT,
            Role::Dns => DNS_PORT,
            Role::Socks5 => SOCKS5_PORT,
        };
        Self::both(Self::places(role, port), |address| {
            self.listener(role, address)
        })
    }

    fn udp(&self, role: Role) -> io::Result<Vec<UdpSocket>> {
        if role != Role::Dns {
            return Ok(Vec::new());
        }
        Self::both(Self::places(role, DNS_PORT), |address| {
            let socket = self.socket_in_pod(Domain::for_address(address), Protocol::UDP)?;
            self.bind(&socket, address)?;
            UdpSocket::from_std(socket.into())
        })
    }

    fn datagram(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.socket_in_pod(Domain::for_address(to), Protocol::UDP)?;
        UdpSocket::from_std(socket.into())
    }

    fn reaches_loopback(&self) -> bool {
        true
    }

    fn socket(&self, to: SocketAddr, who: OnBehalfOf) -> io::Result<TcpSocket> {
        let socket = self.socket_in_pod(Domain::for_address(to), Protocol::TCP)?;
        // The pod's own address is what the namespace gives anyway; only a client's has to be put on.
        if let OnBehalfOf::RemoteClient(client) = who
            && spoofs(client, to.ip())
        {
            if client.is_ipv4() != to.is_ipv4() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{client} cannot speak to {to}: different address families"),
                ));
            }
            socket.set_ip_transparent_v4(true)?;
            PORTS
                .bind(&socket, client, to)
                .map_err(|error| named(error, format!("socket from {client} to {to}")))?;
        }
        Ok(TcpSocket::from_std_stream(TcpStream::from(socket)))
    }
}

/// With equal ends (the pod reaches itself through its service) the kernel's choice is right already.
fn spoofs(client: IpAddr, destination: IpAddr) -> bool {
    client != destination && !client.is_loopback()
}

/// Error number of a family that the kernel does not have (asm-generic/errno.h).
const EAFNOSUPPORT: i32 = 97;

/// A kernel without IPv6, or a namespace where it is switched off.
fn is_without_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

fn pod_name(workload: &LocalWorkload) -> String {
    format!("{}/{}", workload.namespace, workload.name)
}

fn named(error: io::Error, what: String) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests;
