//! Every flow that a pod, a node or an outside host can begin, and what becomes of it in each capture.

use std::fmt;

use lab::topology::Cni;

use super::column::Column;

/// A box of the lab, or an address of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum To {
    /// The application of a pod, or of the outside host.
    Application(&'static str),
    /// The cluster address of a service with one endpoint: `far` (the second node's first pod), `near` (the first node's
    /// second) or `own` (the first node's first).
    Service(&'static str),
    /// A port of a node, at the address that the client would use.
    NodePort(u8, u16),
    /// A server of the first node at one of the node's addresses.
    OnNode(&'static str),
    /// A server of the second node.
    OnOtherNode,
    /// The pod's own application, by 127.0.0.1.
    Loopback,
    /// The metrics page of a node's proxy.
    Metrics(u8),
}

/// What the client does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Act {
    /// Connects by TCP: asks who it is, then sends a marker.
    Tcp(&'static str, To),
    /// Gets a page by HTTP.
    Get(&'static str, To),
    /// Sends datagrams of this size, and wants each back.
    Udp(&'static str, &'static str, usize),
    /// Asks a server of DNS, at a link-local address of its node.
    NodeDns(&'static str),
    /// Pings.
    Ping(&'static str, &'static str),
    /// Sends and gets 300 kB at once while the link between the nodes takes packets of 1400 bytes.
    Bulk(&'static str, To),
    /// Connects by TCP while the first node's proxy is gone.
    Proxyless(&'static str, To),
}

/// Whom a server saw.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seen {
    /// The pod.
    Pod(&'static str),
    /// The address that a node's pods have as gateway.
    Gateway(u8),
    /// The address that a node has for other nodes.
    Node(u8),
    /// The address that a node has for the outside.
    Uplink(u8),
    /// The outside host.
    Outside,
    /// The address that probes have in a pod that is captured in its namespace.
    Probe,
    /// A node's proxy.
    Proxy(u8),
    /// 127.0.0.1.
    Loopback,
    /// Nobody says.
    Unknown,
}

/// Which proxies had a part in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Path {
    /// Taken on its way out, tunnelled, and both identities proven.
    Mesh,
    /// Taken on its way out, and handed on as it is.
    Outbound,
    /// Taken on its way in, as it is.
    Inbound,
    /// Both, as two connections in the clear that know nothing of each other.
    OutboundThenInbound,
    /// None: the capture leaves it alone.
    Direct,
}

/// What was readable on the link between the nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wire {
    /// Nothing of it: TLS.
    Encrypted,
    /// Everything.
    Clear,
    /// It does not pass there.
    Elsewhere,
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Seen::Pod(pod) => f.write_str(pod),
            Seen::Gateway(node) => write!(f, "node{node} as its pods' gateway"),
            Seen::Node(node) => write!(f, "node{node}"),
            Seen::Uplink(node) => write!(f, "node{node}'s uplink"),
            Seen::Outside => f.write_str("outside host"),
            Seen::Probe => f.write_str("the probes' address"),
            Seen::Proxy(node) => write!(f, "proxy{node}"),
            Seen::Loopback => f.write_str("127.0.0.1"),
            Seen::Unknown => f.write_str("-"),
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Path::Mesh => "mesh",
            Path::Outbound => "outbound",
            Path::Inbound => "inbound",
            Path::OutboundThenInbound => "outbound, then inbound",
            Path::Direct => "direct",
        })
    }
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Wire::Encrypted => "TLS",
            Wire::Clear => "clear",
            Wire::Elsewhere => "not there",
        })
    }
}

/// What becomes of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It works.
    Works(Seen, Path, Wire),
    /// It does not, and this is why.
    Refused(&'static str),
}

/// A flow.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// Short name, for the table and for messages.
    pub flow: &'static str,
    /// What is done.
    pub act: Act,
    /// Captured by the node.
    node: Outcome,
    /// Captured in the pod.
    inpod: Outcome,
}

impl Row {
    /// What is to become of it.
    pub fn outcome(&self, column: &Column) -> Outcome {
        if column.is_node() {
            if column.cni == Cni::Bridge {
                return Outcome::Refused(BRIDGE);
            }
            self.node
        } else {
            self.inpod
        }
    }
}

/// The node capture where pods are ports of a bridge.
pub const BRIDGE: &str = "pods of one bridge reach each other past the node's routes, so nothing is captured there: agent \
                          and doctor refuse it, and `--mode inpod` works";
/// A captured pod and a node port of its own node.
const OWN_NODE_PORT: &str = "an address of the pod's own node is delivered before any rule of the node capture, and \
                             captured packets are spared the DNAT: use the service's address";
/// A gateway and the node capture.
const ONE_DIRECTION: &str = "the node capture leads all packets of a pod through its tunnels, in both directions or not at \
                             all: the agent refuses a pod with `ambient.istio.io/bypass-inbound-capture`, and `--mode \
                             inpod` works";
/// No proxy.
const CLOSED: &str =
    "without its proxy a captured pod takes and makes no connection: it fails closed";

use Outcome::{Refused, Works};
use Path::{Direct, Inbound, Mesh, Outbound, OutboundThenInbound};
use Wire::{Clear, Elsewhere, Encrypted};

const A: &str = "pod1-1";
const C: &str = "pod1-2";
const B: &str = "pod2-1";
const U: &str = "plain1";
const V: &str = "plain2";
/// Whose inbound traffic is let alone.
pub const GATEWAY: &str = "pod2-2";
/// A container in [`GUESTED`].
pub const GUEST: &str = "guest";
/// The pod with a guest.
pub const GUESTED: &str = C;

/// Node ports of the lab's services.
pub const PORT_TO_A: u16 = 30021;
pub const PORT_TO_B: u16 = 30022;
/// Without masquerading, as `externalTrafficPolicy: Local` has it.
pub const PORT_TO_A_LOCAL: u16 = 30023;

const fn same(flow: &'static str, act: Act, outcome: Outcome) -> Row {
    Row {
        flow,
        act,
        node: outcome,
        inpod: outcome,
    }
}

const fn row(flow: &'static str, act: Act, node: Outcome, inpod: Outcome) -> Row {
    Row {
        flow,
        act,
        node,
        inpod,
    }
}

const fn tcp(from: &'static str, to: &'static str) -> Act {
    Act::Tcp(from, To::Application(to))
}

const fn from_pod(pod: &'static str, path: Path, wire: Wire) -> Outcome {
    Works(Seen::Pod(pod), path, wire)
}

/// What no proxy has a part in, and nobody says more of.
const ALONE: Outcome = Works(Seen::Unknown, Direct, Elsewhere);

/// All flows, in the order in which they are tried: a smaller link and a missing proxy last.
#[rustfmt::skip]
pub const ROWS: &[Row] = &[
    // Between captured pods.
    same("pod → service, other node", Act::Tcp(A, To::Service("far")), from_pod(A, Mesh, Encrypted)),
    same("pod → service, same node", Act::Tcp(A, To::Service("near")), from_pod(A, Mesh, Elsewhere)),
    row("pod → its own service", Act::Tcp(A, To::Service("own")),
        Works(Seen::Proxy(1), Mesh, Elsewhere), from_pod(A, Mesh, Elsewhere)),
    same("pod → pod, other node", tcp(A, B), from_pod(A, Mesh, Encrypted)),
    same("pod → pod, other node, back", tcp(B, A), from_pod(B, Mesh, Encrypted)),
    same("pod → pod, same node", tcp(A, C), from_pod(A, Mesh, Elsewhere)),
    // One of them captured.
    same("uncaptured → pod, other node", tcp(U, B), from_pod(U, Inbound, Clear)),
    same("uncaptured → pod, same node", tcp(U, A), from_pod(U, Inbound, Elsewhere)),
    same("uncaptured → service, other node", Act::Tcp(U, To::Service("far")), from_pod(U, Inbound, Clear)),
    same("uncaptured → service, same node", Act::Tcp(U, To::Service("near")), from_pod(U, Inbound, Elsewhere)),
    same("pod → uncaptured, other node", tcp(A, V), from_pod(A, Outbound, Clear)),
    same("pod → uncaptured, same node", tcp(A, U), from_pod(A, Outbound, Elsewhere)),
    same("pod → outside", tcp(A, "out"), Works(Seen::Uplink(1), Outbound, Elsewhere)),
    // Nodes and their ports.
    row("probe of the pod's node", tcp("node1", A),
        Works(Seen::Gateway(1), Direct, Elsewhere), Works(Seen::Probe, Direct, Elsewhere)),
    same("other node → pod", tcp("node2", A), Works(Seen::Node(2), Inbound, Clear)),
    row("node → service, same node", Act::Tcp("node1", To::Service("near")),
        Works(Seen::Proxy(1), Inbound, Elsewhere), Works(Seen::Probe, Direct, Elsewhere)),
    same("node → service, other node", Act::Tcp("node1", To::Service("far")), Works(Seen::Node(1), Inbound, Clear)),
    row("node port → pod, same node", Act::Tcp("out", To::NodePort(1, PORT_TO_A)),
        Works(Seen::Proxy(1), Inbound, Elsewhere), Works(Seen::Gateway(1), Inbound, Elsewhere)),
    same("node port → pod, other node", Act::Tcp("out", To::NodePort(1, PORT_TO_B)), Works(Seen::Node(1), Inbound, Clear)),
    same("node port → pod, not masqueraded", Act::Tcp("out", To::NodePort(1, PORT_TO_A_LOCAL)),
        Works(Seen::Outside, Inbound, Elsewhere)),
    row("pod → node port of another node", Act::Tcp(A, To::NodePort(2, PORT_TO_B)),
        Works(Seen::Proxy(2), OutboundThenInbound, Clear), Works(Seen::Gateway(2), OutboundThenInbound, Clear)),
    row("pod → node port of its own node", Act::Tcp(A, To::NodePort(1, PORT_TO_B)),
        Refused(OWN_NODE_PORT), Works(Seen::Node(1), OutboundThenInbound, Clear)),
    row("pod → its node's server, pods' gateway", Act::Tcp(A, To::OnNode("gateway")),
        from_pod(A, Direct, Elsewhere), from_pod(A, Outbound, Elsewhere)),
    row("pod → its node's server, nodes' address", Act::Tcp(A, To::OnNode("address")),
        from_pod(A, Direct, Elsewhere), from_pod(A, Outbound, Elsewhere)),
    row("pod → its node's server, uplink", Act::Tcp(A, To::OnNode("uplink")),
        from_pod(A, Direct, Elsewhere), from_pod(A, Outbound, Elsewhere)),
    row("pod → its node's server, link-local", Act::Tcp(A, To::OnNode("link-local")),
        from_pod(A, Direct, Elsewhere), from_pod(A, Outbound, Elsewhere)),
    same("pod → another node's server", Act::Tcp(A, To::OnOtherNode), Works(Seen::Node(1), Outbound, Clear)),
    // The proxy's own, and the pod's own.
    same("proxy → outside (control plane)", tcp("proxy1", "out"), Works(Seen::Uplink(1), Direct, Elsewhere)),
    same("proxy → pod of the control plane, other node", tcp("proxy1", V), Works(Seen::Proxy(1), Direct, Clear)),
    same("proxy → pod of the control plane, same node", tcp("proxy1", U), Works(Seen::Proxy(1), Direct, Elsewhere)),
    same("uncaptured → proxy's metrics", Act::Get(U, To::Metrics(1)), ALONE),
    row("pod → proxy's metrics, same node", Act::Get(A, To::Metrics(1)),
        ALONE, Works(Seen::Unknown, Outbound, Elsewhere)),
    same("pod → proxy's metrics, other node", Act::Get(A, To::Metrics(2)), Works(Seen::Unknown, Outbound, Clear)),
    same("pod → itself, 127.0.0.1", Act::Tcp(A, To::Loopback), Works(Seen::Loopback, Direct, Elsewhere)),
    same("pod → itself, its address", tcp(A, A), from_pod(A, Direct, Elsewhere)),
    // Pods with guests, and pods that have what comes in to themselves.
    same("guest in a pod → pod, other node", tcp(GUEST, B), from_pod(GUESTED, Mesh, Encrypted)),
    same("guest in a pod → service, other node", Act::Tcp(GUEST, To::Service("far")), from_pod(GUESTED, Mesh, Encrypted)),
    same("guest in a pod → pod, same node", tcp(GUEST, A), from_pod(GUESTED, Mesh, Elsewhere)),
    same("guest in a pod → uncaptured, other node", tcp(GUEST, V), from_pod(GUESTED, Outbound, Clear)),
    row("uncaptured → gateway, other node", tcp(U, GATEWAY), Refused(ONE_DIRECTION), from_pod(U, Direct, Clear)),
    row("pod → gateway, other node", tcp(A, GATEWAY), Refused(ONE_DIRECTION), from_pod(A, Mesh, Encrypted)),
    row("gateway → pod, other node", tcp(GATEWAY, A), Refused(ONE_DIRECTION), from_pod(GATEWAY, Mesh, Encrypted)),
    row("gateway → uncaptured, other node", tcp(GATEWAY, U), Refused(ONE_DIRECTION), from_pod(GATEWAY, Outbound, Clear)),
    // What is not TCP.
    same("UDP pod → pod, other node", Act::Udp(A, B, 100), ALONE),
    same("UDP pod → pod, same node", Act::Udp(A, C, 100), ALONE),
    same("UDP pod → uncaptured", Act::Udp(A, V, 100), ALONE),
    same("UDP uncaptured → pod, other node", Act::Udp(V, A, 100), ALONE),
    same("UDP uncaptured → pod, same node", Act::Udp(U, A, 100), ALONE),
    same("UDP node → pod", Act::Udp("node1", A, 100), ALONE),
    same("UDP other node → pod", Act::Udp("node2", A, 100), ALONE),
    same("DNS pod → server of its node", Act::NodeDns(A), ALONE),
    same("UDP in fragments, pod → pod, other node", Act::Udp(A, B, 4000), ALONE),
    same("UDP in fragments, pod → pod, same node", Act::Udp(A, C, 4000), ALONE),
    same("UDP in fragments, uncaptured → pod", Act::Udp(V, A, 4000), ALONE),
    same("UDP in fragments, node → pod", Act::Udp("node1", A, 4000), ALONE),
    same("ICMP pod → pod, other node", Act::Ping(A, B), ALONE),
    same("ICMP pod → pod, same node", Act::Ping(A, C), ALONE),
    same("ICMP pod → uncaptured", Act::Ping(A, V), ALONE),
    same("ICMP uncaptured → pod", Act::Ping(V, A), ALONE),
    same("ICMP pod → outside", Act::Ping(A, "out"), ALONE),
    same("ICMP node → pod", Act::Ping("node1", A), ALONE),
    same("ICMP other node → pod", Act::Ping("node2", A), ALONE),
    // A smaller link between the nodes.
    same("300 kB over a smaller link, pod → pod", Act::Bulk(A, To::Application(B)), from_pod(A, Mesh, Encrypted)),
    same("300 kB over a smaller link, pod → pod, back", Act::Bulk(B, To::Application(A)), from_pod(B, Mesh, Encrypted)),
    same("300 kB over a smaller link, uncaptured → pod", Act::Bulk(U, To::Application(B)), from_pod(U, Inbound, Clear)),
    same("300 kB over a smaller link, pod → uncaptured", Act::Bulk(A, To::Application(V)), from_pod(A, Outbound, Clear)),
    same("300 kB over a smaller link, node port → pod", Act::Bulk("out", To::NodePort(1, PORT_TO_B)),
        Works(Seen::Node(1), Inbound, Clear)),
    // No proxy.
    same("without proxy, pod → pod", Act::Proxyless(A, To::Application(B)), Refused(CLOSED)),
    same("without proxy, pod → service", Act::Proxyless(A, To::Service("far")), Refused(CLOSED)),
    same("without proxy, pod → uncaptured", Act::Proxyless(A, To::Application(U)), Refused(CLOSED)),
    same("without proxy, pod → outside", Act::Proxyless(A, To::Application("out")), Refused(CLOSED)),
    same("without proxy, uncaptured → pod", Act::Proxyless(V, To::Application(A)), Refused(CLOSED)),
    same("without proxy, pod → this pod", Act::Proxyless(B, To::Application(A)), Refused(CLOSED)),
    same("without proxy, probe of the pod's node", Act::Proxyless("node1", To::Application(A)),
        ALONE),
    same("without proxy, uncaptured → uncaptured", Act::Proxyless(U, To::Application(V)), ALONE),
];
