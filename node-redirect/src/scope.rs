//! The node capture's sockets: one set of listeners and one dialler, in the proxy's own namespace, for all pods of the
//! node that the agent announced.
//!
//! Whose a connection is, is told by its addresses. The proxy speaks with pods' and clients' addresses from here; the
//! node and this namespace lead the answers back (see [`crate::plan`]).

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use host_net::netns::Netns;
use host_net::plan::MarkMatch;
use shared_proxy::capture::{
    ClientAddr, DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, Listener, LocalWorkload,
    OUTBOUND_PORT, OnBehalfOf, OrigDstAddr, Refusal, Role, SAME_NODE_HBONE_PORT, Scope, ScopeId,
};
use shared_proxy::ports::{self, SourcePorts};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use tokio::net::{TcpSocket, UdpSocket};

use crate::facts::{
    MARK_SAME_NODE, MARK_SOCKET_INBOUND, MARK_SOCKET_OUTBOUND, TUNNEL_IN, TUNNEL_OUT,
};
use crate::plan::Flow;

/// Value of the label `capture_mode`.
pub const CAPTURE_MODE: &str = "node";

/// Connections that wait to be accepted. The kernel cuts it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

/// What becomes of a connection between two captured pods of this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum SameNode {
    /// An HBONE tunnel like any other, looped on the namespace's `lo`.
    #[default]
    Hbone,
    /// Handed over inside the process, in the clear: what the field's proxy did.
    Direct,
}

impl SameNode {
    /// The word used in flags and messages.
    pub fn as_str(self) -> &'static str {
        match self {
            SameNode::Hbone => "hbone",
            SameNode::Direct => "direct",
        }
    }
}

impl fmt::Display for SameNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A word that is neither `hbone` nor `direct`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no way between two pods of one node: hbone or direct")]
pub struct UnknownSameNode(pub String);

impl FromStr for SameNode {
    type Err = UnknownSameNode;

    fn from_str(text: &str) -> Result<Self, UnknownSameNode> {
        match text {
            "hbone" => Ok(SameNode::Hbone),
            "direct" => Ok(SameNode::Direct),
            other => Err(UnknownSameNode(other.to_owned())),
        }
    }
}

/// How node-captured pods are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeScopeConfig {
    /// How the proxy's answers travel; must be the flow of the node's plan.
    pub flow: Flow,
    /// What becomes of connections between two captured pods of this node.
    pub same_node: SameNode,
    /// Addresses that are local to the *node*. The proxy never speaks with them: the answers would be delivered to the
    /// node. The node's ends of the tunnels, to which masqueraded clients are mapped, are always among them.
    pub local_addresses: Vec<IpAddr>,
}

/// The pods that the agent announced.
#[derive(Debug, Default)]
struct Announced {
    by_address: HashMap<IpAddr, LocalWorkload>,
    /// UIDs of those that have another capture by now.
    departed: HashSet<Arc<str>>,
}

/// The scope of all node-captured pods of one node.
#[derive(Debug)]
pub struct NodeScope {
    id: ScopeId,
    netns: Netns,
    flow: Flow,
    same_node: SameNode,
    never_spoofed: HashSet<IpAddr>,
    announced: RwLock<Announced>,
    ports: SourcePorts,
}

impl NodeScope {
    /// A scope whose sockets are in `proxy_netns`, the proxy's own namespace. No pod is announced.
    pub fn new(proxy_netns: Netns, config: NodeScopeConfig) -> Self {
        let tunnel_ends = [TUNNEL_IN, TUNNEL_OUT]
            .into_iter()
            .flat_map(|tunnel| [tunnel.host_addr.into(), tunnel.host_addr6.into()]);
        Self {
            id: ScopeId {
                capture_mode: CAPTURE_MODE,
                instance: Arc::from(""),
            },
            netns: proxy_netns,
            flow: config.flow,
            same_node: config.same_node,
            never_spoofed: config
                .local_addresses
                .into_iter()
                .chain(tunnel_ends)
                .collect(),
            announced: RwLock::default(),
            ports: SourcePorts::new(ports::NODE),
        }
    }

    /// Serves this pod from here on: connections from and to its addresses are its own. Announced again, it is replaced;
    /// an address that another pod held is the new one's (addresses are re-used faster than deletions arrive).
    pub fn announce(&self, workload: LocalWorkload) {
        let mut announced = self.announced_mut();
        announced.departed.remove(&workload.uid);
        announced
            .by_address
            .retain(|_, other| other.uid != workload.uid);
        for address in workload.addresses.iter() {
            announced.by_address.insert(*address, workload.clone());
        }
    }

    /// The pod has another capture from here on. What is on its way to this one is still its own; nobody in this process
    /// or this namespace is led to it any more.
    pub fn depart(&self, uid: &Arc<str>) {
        self.announced_mut().departed.insert(Arc::clone(uid));
    }

    /// As [`NodeScope::withdraw`], unless the pod has come back.
    pub fn withdraw_departed(&self, uid: &str) -> bool {
        let departed = self.announced().departed.contains(uid);
        departed && self.withdraw(uid)
    }

    /// Refuses the pod's connections from here on. Returns whether it was announced.
    pub fn withdraw(&self, uid: &str) -> bool {
        let mut announced = self.announced_mut();
        announced.departed.remove(uid);
        let before = announced.by_address.len();
        announced.by_address.retain(|_, pod| &*pod.uid != uid);
        announced.by_address.len() != before
    }

    fn answering(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let domain = Domain::for_address(address);
        let socket = self.netns.run(|| udp_socket(domain))??;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket
            .bind(&SockAddr::from(address))
            .map_err(|error| named(error, format!("UDP {address} in {:?}", self.netns)))?;
        UdpSocket::from_std(socket.into())
    }

    fn announced(&self) -> RwLockReadGuard<'_, Announced> {
        self.announced
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn announced_mut(&self) -> RwLockWriteGuard<'_, Announced> {
        self.announced
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn pod_at(&self, address: IpAddr) -> Option<LocalWorkload> {
        self.announced().by_address.get(&address).cloned()
    }

    /// The pod at an address, if the node's capture is the one that it has.
    fn captured_at(&self, address: IpAddr) -> Option<LocalWorkload> {
        let announced = self.announced();
        let pod = announced.by_address.get(&address)?;
        (!announced.departed.contains(&pod.uid)).then(|| pod.clone())
    }

    /// Whether the proxy may speak with `source` towards `destination`.
    fn spoofs(&self, source: IpAddr, destination: IpAddr) -> bool {
        // With equal ends the packet would be dropped as one of the receiver's own.
        source != destination && !source.is_loopback() && !self.never_spoofed.contains(&source)
    }

    /// Whether this is a tunnel to a pod of this node, which no route leads to from here.
    fn loops(&self, to: SocketAddr, who: OnBehalfOf) -> bool {
        self.same_node == SameNode::Hbone
            && to.port() == HBONE_PORT
            && matches!(who, OnBehalfOf::LocalWorkload(_))
            && self.captured_at(to.ip()).is_some()
    }

    /// The mark that leads a listener's answers back into the tunnel through which the client came.
    fn answer_mark(&self, role: Role) -> Option<MarkMatch> {
        match (self.flow, role) {
            (Flow::Hybrid, _) => None,
            (Flow::Tunnel, Role::Outbound | Role::Dns) => Some(MARK_SOCKET_OUTBOUND),
            (Flow::Tunnel, _) => Some(MARK_SOCKET_INBOUND),
        }
    }

    /// Listeners on a port for both families; one for IPv4 where there is no IPv6.
    fn listeners(
        &self,
        role: Role,
        port: u16,
        mark: Option<MarkMatch>,
    ) -> io::Result<Vec<Listener>> {
        let v4 = self.listener(role, (Ipv4Addr::UNSPECIFIED, port).into(), mark)?;
        let v6 = self.listener(role, (Ipv6Addr::UNSPECIFIED, port).into(), mark);
        match v6 {
            Ok(v6) => Ok(vec![v4, v6]),
            Err(error) if is_without_ipv6(&error) => Ok(vec![v4]),
            Err(error) => Err(error),
        }
    }

    fn listener(
        &self,
        role: Role,
        address: SocketAddr,
        mark: Option<MarkMatch>,
    ) -> io::Result<Listener> {
        let domain = Domain::for_address(address);
        let socket = self.netns.run(|| tcp_socket(domain))??;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        // The kernel has one flag for both families.
        socket.set_ip_transparent_v4(true)?;
        if let Some(mark) = mark {
            socket.set_mark(mark.value)?;
        }
        socket
            .bind(&SockAddr::from(address))
            .map_err(|error| named(error, format!("listener {address} in {:?}", self.netns)))?;
        socket.listen(BACKLOG)?;
        Listener::new(role, TcpListener::from(socket))
    }
}

impl Scope for NodeScope {
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
            Role::Outbound | Role::Dns | Role::Socks5 => client.0.ip(),
            Role::InboundPlaintext | Role::InboundHbone => dst.0.ip(),
        };
        self.pod_at(address).ok_or(Refusal::UnknownOwner(address))
    }

    fn listen(&self, role: Role) -> io::Result<Vec<Listener>> {
        let mark = self.answer_mark(role);
        match role {
            Role::Outbound => self.listeners(role, OUTBOUND_PORT, mark),
            Role::InboundPlaintext => self.listeners(role, INBOUND_PLAINTEXT_PORT, mark),
            Role::InboundHbone => {
                let mut listeners = self.listeners(role, HBONE_PORT, mark)?;
                if self.same_node == SameNode::Hbone {
                    listeners.extend(self.listeners(
                        role,
                        SAME_NODE_HBONE_PORT,
                        Some(MARK_SAME_NODE),
                    )?);
                }
                Ok(listeners)
            }
            Role::Dns => self.listeners(role, DNS_PORT, mark),
            // Asked for at the pod's loopback address, where no socket of this namespace can be.
            Role::Socks5 => Ok(Vec::new()),
        }
    }

    /// Queries come to the proxy's own address, by a rewriting on the node that is undone for the answers.
    fn udp(&self, role: Role) -> io::Result<Vec<UdpSocket>> {
        if role != Role::Dns {
            return Ok(Vec::new());
        }
        let v4 = self.answering((Ipv4Addr::UNSPECIFIED, DNS_PORT).into())?;
        match self.answering((Ipv6Addr::UNSPECIFIED, DNS_PORT).into()) {
            Ok(v6) => Ok(vec![v4, v6]),
            Err(error) if is_without_ipv6(&error) => Ok(vec![v4]),
            Err(error) => Err(error),
        }
    }

    /// With the proxy's own address, which every route leads back to.
    fn datagram(&self, to: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.netns.run(|| udp_socket(Domain::for_address(to)))??;
        UdpSocket::from_std(socket.into())
    }

    fn socket(&self, to: SocketAddr, who: OnBehalfOf) -> io::Result<TcpSocket> {
        let (OnBehalfOf::LocalWorkload(source) | OnBehalfOf::RemoteClient(source)) = who;
        let socket = self.netns.run(|| tcp_socket(Domain::for_address(to)))??;
        let loops = self.loops(to, who);
        if loops {
            socket.set_mark(MARK_SAME_NODE.value)?;
        }
        // A looped socket has the pod's address in any case, because the route is one to the pod's address as our own.
        if loops || self.spoofs(source, to.ip()) {
            if source.is_ipv4() != to.is_ipv4() {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("{source} cannot speak to {to}: different address families"),
                ));
            }
            socket.set_ip_transparent_v4(true)?;
            self.ports
                .bind(&socket, source, to)
                .map_err(|error| named(error, format!("socket from {source} to {to}")))?;
        }
        Ok(TcpSocket::from_std_stream(TcpStream::from(socket)))
    }

    fn hand_over(&self, dst: IpAddr) -> Option<LocalWorkload> {
        match self.same_node {
            SameNode::Hbone => None,
            SameNode::Direct => self.captured_at(dst),
        }
    }
}

/// Error number of a family that the kernel does not have (asm-generic/errno.h).
const EAFNOSUPPORT: i32 = 97;

/// A kernel without IPv6, or a namespace where no device has it.
fn is_without_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

fn tcp_socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(
        domain,
        Type::STREAM.nonblocking().cloexec(),
        Some(Protocol::TCP),
    )
}

fn udp_socket(domain: Domain) -> io::Result<Socket> {
    Socket::new(
        domain,
        Type::DGRAM.nonblocking().cloexec(),
        Some(Protocol::UDP),
    )
}

fn named(error: io::Error, what: String) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

#[cfg(test)]
mod tests;
