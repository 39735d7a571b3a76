//! What a lab consists of, as data: names, namespaces, addresses, identities.
//!
//! ```text
//!                    out (203.0.113.10)
//!        172.31.1.0/24 │            │ 172.31.2.0/24
//!                 eth1 │            │ eth1
//!   pod1-1 … plain1 ─ node1 ──eth0── node2 ─ pod2-1 … plain2
//!            proxy1 ─┘  172.30.0.0/24  └─ proxy2
//! ```
//!
//! Every box is a network namespace named `adx-<lab>-<box>`. Pods and proxies hang on their node by one veth each, with a
//! /32 host route or as a port of a bridge ([`network`]). Nothing here touches the kernel; [`crate::standing`] does.

pub mod ipv6;
pub mod kube_proxy;
pub mod network;
pub mod spec;
pub mod workloads;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use spec::{
    Capture, Cni, Families, InpodRules, LabSpec, Mode, NodeFlow, Overlay, Programs, SameNode,
    SpecError,
};

/// Address of the outside host, the same from both nodes (TEST-NET-3).
pub const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// Cluster address of the service `echo`.
pub const SERVICE_VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 10);
/// Port of the service `echo` on its cluster address.
pub const SERVICE_PORT: u16 = 80;
/// Port on which applications in pods serve.
pub const APPLICATION_PORT: u16 = 8080;
/// All pods of all nodes.
pub const CLUSTER_CIDR: &str = "10.244.0.0/16";
/// All service addresses.
pub const SERVICE_CIDR: &str = "10.96.0.0/16";
/// Pods that answer for the service `echo`: one on each node, so that it has a near and a far endpoint everywhere.
pub const SERVICE_ENDPOINTS: [&str; 2] = ["pod1-2", "pod2-1"];
/// Labs live in this directory, one directory each. It is on tmpfs on every distribution, so nothing outlives a reboot.
pub const LABS_DIR: &str = "/run/ambidex-lab";
/// Most pods that a node's prefix has addresses for, besides the one that is never captured.
pub const MOST_PODS: u8 = 240;
/// The last part of the address of the pod that is never captured.
const PLAIN_OCTET: u8 = 200;
/// Number of nodes. The wiring (one uplink) is for two.
const NODES: u8 = 2;

/// A network namespace of the lab, by what it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A cluster node: where its agent runs and the CNI plugin is called.
    Node,
    /// The namespace of a node's proxy, wired like a pod.
    Proxy,
    /// An application pod.
    Pod,
    /// The host outside the cluster.
    Outside,
}

/// A pod: its place, its identity, and how it is to be captured.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// `pod1-2` or `plain1`.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes service account.
    pub service_account: String,
    /// Name of its network namespace.
    pub netns: String,
    /// Its address.
    pub ip: Ipv4Addr,
    /// Node-side end of its veth; its own end is `eth0`.
    pub veth: String,
    /// How it is captured.
    pub capture: Option<Capture>,
    /// UID of the pod object: another one each time that the pod is created.
    pub uid: String,
    /// Identifier of its sandbox container: 64 hexadecimal digits.
    pub container_id: String,
}

/// A node, its proxy and its pods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Node {
    /// 1 or 2.
    pub index: u8,
    /// `node1`.
    pub name: String,
    /// Name of its network namespace.
    pub netns: String,
    /// Its address on the link between the nodes.
    pub address: Ipv4Addr,
    /// The address that its pods have as gateway, and that it has towards its pods (`HOST` of the node capture).
    pub pod_gateway: Ipv4Addr,
    /// How its pods are connected to it.
    pub cni: Cni,
    /// Which addresses its pods have: their own ones, the twins of these ([`ipv6::twin`]), or both.
    pub families: Families,
    /// Prefix of its pods.
    pub pod_cidr: String,
    /// Its address on the link to the outside host.
    pub outside_address: Ipv4Addr,
    /// The outside host's address on that link.
    pub outside_gateway: Ipv4Addr,
    /// `proxy1`.
    pub proxy_name: String,
    /// Name of its proxy's network namespace.
    pub proxy_netns: String,
    /// Its proxy's address.
    pub proxy_ip: Ipv4Addr,
    /// Node-side end of its proxy's veth.
    pub proxy_veth: String,
    /// Its pods; the last one is never captured.
    pub pods: Vec<Pod>,
}

/// Everything in one lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Name of the lab.
    pub lab: String,
    /// Which addresses its pods have.
    pub families: Families,
    /// Its nodes.
    pub nodes: Vec<Node>,
    /// Name of the outside host's network namespace.
    pub outside_netns: String,
}

impl Topology {
    /// The lab that `spec` describes. `generations` says how often each pod was created anew (absent: never), because
    /// a pod that comes back has another UID.
    pub fn new(spec: &LabSpec, generations: &BTreeMap<String, u32>) -> Self {
        Self::grown(spec, generations, &BTreeMap::new())
    }

    /// The same lab after [`crate::standing::Lab::create_pods`]: `created` says how many pods came to each node, by its
    /// index.
    pub fn grown(
        spec: &LabSpec,
        generations: &BTreeMap<String, u32>,
        created: &BTreeMap<u8, u8>,
    ) -> Self {
        let nodes = (1..=NODES)
            .map(|index| {
                let more = created.get(&index).copied().unwrap_or(0);
                let pods = spec.pods_per_node.saturating_add(more);
                node(spec, index, pods, generations)
            })
            .collect();
        Self {
            lab: spec.name.clone(),
            families: spec.families,
            nodes,
            outside_netns: netns_name(&spec.name, "out"),
        }
    }

    /// The node with this index, counted from 1.
    pub fn node(&self, index: u8) -> Option<&Node> {
        self.nodes.iter().find(|node| node.index == index)
    }

    /// The pod with this name (`pod1-2`, `plain1`), with or without its namespace (`beta/pod1-2`), and its node.
    pub fn pod(&self, name: &str) -> Option<(&Node, &Pod)> {
        let (namespace, name) = match name.split_once('/') {
            Some((namespace, name)) => (Some(namespace), name),
            None => (None, name),
        };
        self.pods().find(|(_, pod)| {
            pod.name == name && namespace.is_none_or(|wanted| wanted == pod.namespace)
        })
    }

    /// All pods with their nodes, captured or not.
    pub fn pods(&self) -> impl Iterator<Item = (&Node, &Pod)> {
        self.nodes
            .iter()
            .flat_map(|node| node.pods.iter().map(move |pod| (node, pod)))
    }

    /// The namespace behind a target of `lab exec`: `node1`, `proxy1`, `pod1-2`, `plain1`, `out`; what it is, and the
    /// index of its node if it belongs to one.
    pub fn target(&self, name: &str) -> Option<(Kind, String, Option<u8>)> {
        if name == "out" {
            return Some((Kind::Outside, self.outside_netns.clone(), None));
        }
        for node in &self.nodes {
            if node.name == name {
                return Some((Kind::Node, node.netns.clone(), Some(node.index)));
            }
            if node.proxy_name == name {
                return Some((Kind::Proxy, node.proxy_netns.clone(), Some(node.index)));
            }
        }
        self.pod(name)
            .map(|(node, pod)| (Kind::Pod, pod.netns.clone(), Some(node.index)))
    }

    /// All targets of `lab exec`, for messages.
    pub fn target_names(&self) -> Vec<String> {
        let mut names = Vec::new();
        for node in &self.nodes {
            names.push(node.name.clone());
            names.push(node.proxy_name.clone());
            names.extend(node.pods.iter().map(|pod| pod.name.clone()));
        }
        names.push("out".to_owned());
        names
    }

    /// Names of all network namespaces of the lab.
    pub fn netns_names(&self) -> Vec<String> {
        let targets = self.target_names();
        targets
            .iter()
            .map(|name| netns_name(&self.lab, name))
            .collect()
    }
}

/// What the names of all network namespaces of a lab begin with.
pub fn netns_prefix(lab: &str) -> String {
    format!("adx-{lab}-")
}

/// Directory of a lab: its state, logs, sockets, CA.
pub fn lab_dir(lab: &str) -> PathBuf {
    PathBuf::from(LABS_DIR).join(lab)
}

fn netns_name(lab: &str, target: &str) -> String {
    format!("{}{target}", netns_prefix(lab))
}

fn node(spec: &LabSpec, index: u8, pods: u8, generations: &BTreeMap<String, u32>) -> Node {
    let lab = spec.name.as_str();
    let mut pods: Vec<Pod> = (1..=pods)
        .map(|number| captured_pod(spec, index, number))
        .collect();
    pods.push(plain_pod(lab, index));
    for pod in &mut pods {
        let generation = generations.get(&pod.name).copied().unwrap_or(0);
        pod.uid = uid(&format!(
            "{lab}/{}/{}/{generation}",
            pod.namespace, pod.name
        ));
        pod.container_id = container_id(&pod.uid);
    }
    Node {
        index,
        name: format!("node{index}"),
        netns: netns_name(lab, &format!("node{index}")),
        address: Ipv4Addr::new(172, 30, 0, index),
        pod_gateway: Ipv4Addr::new(10, 244, index, 1),
        cni: spec.cni,
        families: spec.families,
        pod_cidr: format!("10.244.{index}.0/24"),
        outside_address: Ipv4Addr::new(172, 31, index, 1),
        outside_gateway: Ipv4Addr::new(172, 31, index, 2),
        proxy_name: format!("proxy{index}"),
        proxy_netns: netns_name(lab, &format!("proxy{index}")),
        proxy_ip: Ipv4Addr::new(10, 244, index, 2),
        proxy_veth: "vethproxy".to_owned(),
        pods,
    }
}

/// Odd pods are in `alpha`, even ones in `beta`. The first two of each node have four different identities in the
/// whole lab; further ones share the identity of the pod before the last, so that there are several per identity.
fn captured_pod(spec: &LabSpec, node: u8, number: u8) -> Pod {
    let odd = number % 2 == 1;
    let name = format!("pod{node}-{number}");
    Pod {
        namespace: if odd { "alpha" } else { "beta" }.to_owned(),
        service_account: if odd == (node == 1) {
            "client"
        } else {
            "server"
        }
        .to_owned(),
        netns: netns_name(&spec.name, &name),
        ip: Ipv4Addr::new(10, 244, node, last_octet(number)),
        veth: format!("vethp{number}"),
        capture: spec.mode.of_pod(&name),
        name,
        uid: String::new(),
        container_id: String::new(),
    }
}

/// Addresses of pods follow each other, around the one of the plain pod.
fn last_octet(number: u8) -> u8 {
    let octet = 9_u8.saturating_add(number);
    octet.saturating_add(u8::from(octet >= PLAIN_OCTET))
}

fn plain_pod(lab: &str, node: u8) -> Pod {
    let name = format!("plain{node}");
    Pod {
        namespace: "alpha".to_owned(),
        service_account: "default".to_owned(),
        netns: netns_name(lab, &name),
        ip: Ipv4Addr::new(10, 244, node, PLAIN_OCTET),
        veth: "vethplain".to_owned(),
        capture: None,
        name,
        uid: String::new(),
        container_id: String::new(),
    }
}

/// 128 bits that depend on nothing but the text, on every machine and in every version: two FNV-1a hashes.
fn digest(text: &str) -> u128 {
    const PRIME: u64 = 0x0000_0100_0000_01b3;
    let hash = |seed: u64| {
        text.bytes().fold(seed, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(PRIME)
        })
    };
    (u128::from(hash(0xcbf2_9ce4_8422_2325)) << 64) | u128::from(hash(0x6c62_272e_07bb_0142))
}

/// A UUID of version 8 (RFC 9562: contents up to the maker).
fn uid(text: &str) -> String {
    let bits = digest(text);
    let fixed = (bits & !(0xf000_u128 << 64) & !(0xc000_u128 << 48))
        | (0x8000_u128 << 64)
        | (0x8000_u128 << 48);
    let hex = format!("{fixed:032x}");
    let (a, b, c, d, e) = (
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..],
    );
    format!("{a}-{b}-{c}-{d}-{e}")
}

fn container_id(uid: &str) -> String {
    format!(
        "{:032x}{:032x}",
        digest(uid),
        digest(&format!("{uid}/sandbox"))
    )
}

#[cfg(test)]
mod tests;
