//! The lab's links, addresses and routes as input for `ip -batch`, one text per network namespace.
//!
//! A pod is wired as one of two CNI plugins does it. `ptp` ([`Cni::Routed`]): the node's end of each veth has the gateway's
//! address as a /32, the node has one /32 route per pod, the pod reaches its gateway on-link and everything else through
//! it. `bridge` ([`Cni::Bridge`], with `isDefaultGateway` and `hairpinMode`, as flannel has it written): the node's ends
//! are ports of one bridge, which has the gateway's address, and pods of a node are each other's neighbours.

use std::net::Ipv4Addr;

use super::{Cni, Families, Node, OUTSIDE, Topology, ipv6};

/// MTU of the links between nodes and to the outside: that of an ordinary Ethernet.
const MTU: u16 = 1500;
/// The bridge of [`Cni::Bridge`]: the name that the plugin gives it where its configuration names none.
pub const BRIDGE: &str = "cni0";

/// One veth from a node to a pod or proxy.
#[derive(Debug, Clone, Copy)]
pub struct Attachment<'a> {
    /// Node-side device.
    pub veth: &'a str,
    /// Namespace of the other end, `eth0` there.
    pub netns: &'a str,
    /// Address of the other end.
    pub ip: Ipv4Addr,
    /// The node's address towards it.
    pub gateway: Ipv4Addr,
    /// How it is wired.
    pub cni: Cni,
    /// Which addresses both ends have; `ip` and `gateway` have twins ([`ipv6::twin`]).
    pub families: Families,
}

impl Node {
    /// All attachments of the node: its proxy and its pods.
    pub fn attachments(&self) -> Vec<Attachment<'_>> {
        let proxy = Attachment {
            veth: &self.proxy_veth,
            netns: &self.proxy_netns,
            ip: self.proxy_ip,
            gateway: self.pod_gateway,
            cni: self.cni,
            // The overlay's outer packets are IPv4.
            families: match self.families {
                Families::V6 => Families::Dual,
                other => other,
            },
        };
        let pods = self.pods.iter().map(|pod| Attachment {
            veth: &pod.veth,
            netns: &pod.netns,
            ip: pod.ip,
            gateway: self.pod_gateway,
            cni: self.cni,
            families: self.families,
        });
        std::iter::once(proxy).chain(pods).collect()
    }
}

impl Families {
    /// An input of `ip -batch` that is written for IPv4, for these families.
    fn applied(self, v4: String) -> String {
        match self {
            Families::V4 => v4,
            Families::Dual => format!("{v4}{}", ipv6::batch(&v4)),
            Families::V6 => format!("{}{}", ipv6::only_links(&v4), ipv6::batch(&v4)),
        }
    }
}

impl Attachment<'_> {
    /// For `ip -batch` in the node's namespace.
    pub fn node_side(&self) -> String {
        self.families.applied(self.node_side_v4())
    }

    /// For `ip -batch` in the pod's or proxy's namespace, after [`Attachment::node_side`].
    pub fn pod_side(&self) -> String {
        self.families.applied(self.pod_side_v4())
    }

    fn node_side_v4(&self) -> String {
        let Self {
            veth,
            netns,
            ip,
            gateway,
            cni,
            ..
        } = self;
        if *cni == Cni::Bridge {
            return format!(
                "link add {veth} type veth peer name eth0 netns {netns}\n\
                 link set {veth} master {BRIDGE}\n\
                 link set {veth} type bridge_slave hairpin on\n\
                 link set {veth} up\n"
            );
        }
        format!(
            "link add {veth} type veth peer name eth0 netns {netns}\n\
             address add {gateway}/32 dev {veth}\n\
             link set {veth} up\n\
             route add {ip}/32 dev {veth} scope link\n"
        )
    }

    fn pod_side_v4(&self) -> String {
        let Self {
            ip, gateway, cni, ..
        } = self;
        if *cni == Cni::Bridge {
            return format!(
                "link set lo up\n\
                 address add {ip}/24 dev eth0\n\
                 link set eth0 up\n\
                 route add default via {gateway} dev eth0\n"
            );
        }
        format!(
            "link set lo up\n\
             address add {ip}/32 dev eth0\n\
             link set eth0 up\n\
             route add {gateway}/32 dev eth0 scope link\n\
             route add default via {gateway} dev eth0\n"
        )
    }
}

impl Topology {
    /// All batches in the order in which they must run: (namespace, input of `ip -batch`).
    pub fn ip_batches(&self) -> Vec<(String, String)> {
        let both = |batch: String| match self.families {
            Families::V4 => batch,
            Families::Dual | Families::V6 => Families::Dual.applied(batch),
        };
        let mut batches = vec![(self.outside_netns.clone(), both(self.outside_links()))];
        for node in &self.nodes {
            let mut batch = both(self.node_links(node));
            for attachment in node.attachments() {
                batch.push_str(&attachment.node_side());
            }
            batches.push((node.netns.clone(), batch));
        }
        for node in &self.nodes {
            for attachment in node.attachments() {
                batches.push((attachment.netns.to_owned(), attachment.pod_side()));
            }
        }
        batches
    }

    /// The outside host makes the veths to the nodes, so that it runs first and needs nothing of them.
    fn outside_links(&self) -> String {
        let mut batch = format!("link set lo up\naddress add {OUTSIDE}/32 dev lo\n");
        for node in &self.nodes {
            let Node {
                name,
                netns,
                outside_gateway,
                ..
            } = node;
            batch.push_str(&format!(
                "link add {name} mtu {MTU} type veth peer name eth1 mtu {MTU} netns {netns}\n\
                 address add {outside_gateway}/24 dev {name}\n\
                 link set {name} up\n"
            ));
        }
        batch
    }

    /// The first node makes the uplink; the others find their end.
    fn node_links(&self, node: &Node) -> String {
        let mut batch = "link set lo up\n".to_owned();
        for peer in self.nodes.iter().filter(|peer| peer.index > node.index) {
            let netns = &peer.netns;
            batch.push_str(&format!(
                "link add eth0 mtu {MTU} type veth peer name eth0 mtu {MTU} netns {netns}\n"
            ));
        }
        let Node {
            address,
            outside_address,
            outside_gateway,
            ..
        } = node;
        batch.push_str(&format!(
            "address add {address}/24 dev eth0\n\
             link set eth0 up\n\
             address add {outside_address}/24 dev eth1\n\
             link set eth1 up\n\
             route add default via {outside_gateway} dev eth1\n"
        ));
        for peer in self.nodes.iter().filter(|peer| peer.index != node.index) {
            let Node {
                pod_cidr, address, ..
            } = peer;
            batch.push_str(&format!("route add {pod_cidr} via {address} dev eth0\n"));
        }
        if node.cni == Cni::Bridge {
            let gateway = node.pod_gateway;
            batch.push_str(&format!(
                "link add {BRIDGE} type bridge\n\
                 address add {gateway}/24 dev {BRIDGE}\n\
                 link set {BRIDGE} up\n"
            ));
        }
        batch
    }
}
