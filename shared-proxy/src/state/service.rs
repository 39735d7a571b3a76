//! Services: names and virtual addresses for sets of workloads.

use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::workload::{GatewayAddress, PortMap};
use super::{NamespacedHostname, NetworkAddress, NetworkRange};

/// A service. Serialized in the field's LOCAL_XDS form.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Service {
    /// Name.
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Hostname; with the namespace, its key.
    pub hostname: Arc<str>,
    /// Virtual addresses.
    pub vips: Vec<NetworkAddress>,
    /// Ranges of virtual addresses. An address in several of them is that of the longest; one that is a virtual address
    /// or a workload's own is that one's.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cidr_vips: Vec<NetworkRange>,
    /// Its ports.
    pub ports: PortMap,
    /// Identities that may answer for it besides those of its endpoints: SPIFFE IDs.
    #[serde(default)]
    pub subject_alt_names: Vec<Arc<str>>,
    /// The layer 7 proxy in front of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// Several layer 7 proxies that share its connections; if there are any, they take the place of
    /// [`waypoint`](Self::waypoint).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Gateways at the edge of the mesh go through the waypoint too. Theirs to read: a node proxy always does.
    #[serde(default)]
    pub ingress_use_waypoint: bool,
    /// How its endpoints are chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub load_balancer: Option<LoadBalancer>,
    /// Address families that it serves; absent means whatever its addresses are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip_families: Option<IpFamilies>,
    /// Preferred among services of the same hostname in several namespaces.
    #[serde(default)]
    pub canonical: bool,
    /// Who may find it by its name.
    #[serde(default)]
    pub visibility: Visibility,
}

/// One of several waypoints.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct WeightedWaypoint {
    /// The waypoint.
    pub destination: GatewayAddress,
    /// Its share of the connections is this, of the sum of all weights. Zero: none.
    pub weight: u32,
}

/// Who may find a service by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Visibility {
    /// Everybody.
    #[default]
    Public,
    /// Clients in its own namespace.
    Namespace,
}

impl Service {
    /// Its key.
    pub fn key(&self) -> NamespacedHostname {
        NamespacedHostname {
            namespace: Arc::clone(&self.namespace),
            hostname: Arc::clone(&self.hostname),
        }
    }

    /// Whether connections to it go to their original destination, no endpoint chosen.
    pub fn is_passthrough(&self) -> bool {
        self.load_balancer
            .as_ref()
            .is_some_and(|lb| lb.mode == LoadBalancerMode::Passthrough)
    }

    /// Whether an endpoint may be reached at an address of this family.
    pub fn serves_family_of(&self, address: IpAddr) -> bool {
        match self.ip_families {
            Some(IpFamilies::IPv4) => address.is_ipv4(),
            Some(IpFamilies::IPv6) => address.is_ipv6(),
            Some(IpFamilies::Dual) | None => true,
        }
    }
}

/// How endpoints are chosen.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LoadBalancer {
    /// What an endpoint should have in common with the client, the most important first.
    pub routing_preferences: Vec<Scope>,
    /// What the preferences do.
    pub mode: LoadBalancerMode,
    /// Which endpoints count.
    pub health_policy: HealthPolicy,
}

/// Something that client and endpoint may have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Scope {
    /// The region.
    Region,
    /// The zone (of the region).
    Zone,
    /// The part of the zone.
    Subzone,
    /// The node.
    Node,
    /// The cluster.
    Cluster,
    /// The network.
    Network,
}

/// What routing preferences do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum LoadBalancerMode {
    /// Nothing: all endpoints are equal.
    #[default]
    Standard,
    /// Only endpoints that have all of them.
    Strict,
    /// The endpoints that have the most of them.
    Failover,
    /// No endpoint is chosen: the original destination is dialled.
    Passthrough,
}

/// Which endpoints count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum HealthPolicy {
    /// Those that are ready.
    #[default]
    OnlyHealthy,
    /// All.
    AllowAll,
}

/// Address families of a service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum IpFamilies {
    /// Both.
    Dual,
    /// IPv4 only.
    IPv4,
    /// IPv6 only.
    IPv6,
}
