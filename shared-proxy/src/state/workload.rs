//! Workloads: pods, and whatever else has an address in the mesh.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize};

use super::{NamespacedHostname, NetworkAddress};
use crate::capture::HBONE_PORT;
use crate::identity::{DEFAULT_TRUST_DOMAIN, Identity, InvalidIdentity};

/// Service account of a workload that names none.
const DEFAULT_SERVICE_ACCOUNT: &str = "default";
/// Cluster of a workload that names none.
const DEFAULT_CLUSTER: &str = "Kubernetes";

/// Service port to target port. Target 0 means: named, each endpoint knows its own.
pub type PortMap = BTreeMap<u16, u16>;

/// A pod, or another thing with an address. Serialized in the field's LOCAL_XDS form.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Workload {
    /// Unique and stable: `cluster/group/kind/namespace/name`. Made of cluster, namespace and name when left out.
    #[serde(default)]
    pub uid: Arc<str>,
    /// Name.
    #[serde(default)]
    pub name: Arc<str>,
    /// Kubernetes namespace.
    pub namespace: Arc<str>,
    /// Kubernetes service account.
    #[serde(
        default = "default_service_account",
        deserialize_with = "service_account"
    )]
    pub service_account: Arc<str>,
    /// Who vouches for its identity.
    #[serde(default = "default_trust_domain", deserialize_with = "trust_domain")]
    pub trust_domain: Arc<str>,
    /// Its addresses, in order of preference. None: reachable by hostname or through a gateway only.
    #[serde(rename = "workloadIps", deserialize_with = "addresses")]
    pub addresses: Vec<IpAddr>,
    /// The network that its addresses belong to.
    #[serde(default)]
    pub network: Arc<str>,
    /// How it is reached.
    #[serde(default)]
    pub protocol: Protocol,
    /// Whether it has a network of its own.
    #[serde(default)]
    pub network_mode: NetworkMode,
    /// The node it runs on.
    #[serde(default)]
    pub node: Arc<str>,
    /// The cluster it runs in.
    #[serde(default = "default_cluster", deserialize_with = "cluster")]
    pub cluster_id: Arc<str>,
    /// Hostname, for a workload without a fixed address.
    #[serde(default)]
    pub hostname: Arc<str>,
    /// Canonical name, for telemetry.
    #[serde(default)]
    pub canonical_name: Arc<str>,
    /// Canonical revision, for telemetry.
    #[serde(default)]
    pub canonical_revision: Arc<str>,
    /// Name of what controls it (deployment, job, ...).
    #[serde(default)]
    pub workload_name: Arc<str>,
    /// Kind of what controls it: `deployment`, `cronjob`, `pod` or `job`.
    #[serde(default)]
    pub workload_type: Arc<str>,
    /// It terminates HBONE itself.
    #[serde(default)]
    pub native_tunnel: bool,
    /// The layer 7 proxy in front of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waypoint: Option<GatewayAddress>,
    /// The way into its network from another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_gateway: Option<GatewayAddress>,
    /// A tunnel to the application itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// The services that it is an endpoint of, with the ports on which it serves them.
    pub services: BTreeMap<NamespacedHostname, PortMap>,
    /// Policies that select it: `namespace/name`.
    #[serde(default)]
    pub authorization_policies: Vec<Arc<str>>,
    /// Whether it is ready.
    #[serde(default)]
    pub status: Health,
    /// Its weight among a service's endpoints.
    #[serde(default = "default_capacity")]
    pub capacity: u32,
    /// Where it runs.
    #[serde(default)]
    pub locality: Locality,
}

impl Workload {
    /// Its SPIFFE identity. Fails if its parts do not form one; a workload that came out of a [`Snapshot`] made by
    /// [`local_xds`](super::local_xds) always has one.
    ///
    /// [`Snapshot`]: super::Snapshot
    pub fn identity(&self) -> Result<Identity, InvalidIdentity> {
        Identity::new(
            Arc::clone(&self.trust_domain),
            Arc::clone(&self.namespace),
            Arc::clone(&self.service_account),
        )
    }

    /// The uid of a workload that was given none.
    pub(super) fn made_up_uid(&self) -> Arc<str> {
        let Self {
            cluster_id,
            namespace,
            name,
            ..
        } = self;
        format!("{cluster_id}//Pod/{namespace}/{name}").into()
    }

    /// `namespace/name`, for messages.
    pub fn display_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its addresses with their network.
    pub fn network_addresses(&self) -> impl Iterator<Item = NetworkAddress> + '_ {
        self.addresses
            .iter()
            .map(|ip| NetworkAddress::new(Arc::clone(&self.network), *ip))
    }
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            uid: Arc::default(),
            name: Arc::default(),
            namespace: "default".into(),
            service_account: default_service_account(),
            trust_domain: default_trust_domain(),
            addresses: Vec::new(),
            network: Arc::default(),
            protocol: Protocol::default(),
            network_mode: NetworkMode::default(),
            node: Arc::default(),
            cluster_id: default_cluster(),
            hostname: Arc::default(),
            canonical_name: Arc::default(),
            canonical_revision: Arc::default(),
            workload_name: Arc::default(),
            workload_type: Arc::default(),
            native_tunnel: false,
            waypoint: None,
            network_gateway: None,
            application_tunnel: None,
            services: BTreeMap::new(),
            authorization_policies: Vec::new(),
            status: Health::default(),
            capacity: default_capacity(),
            locality: Locality::default(),
        }
    }
}

fn default_capacity() -> u32 {
    1
}

fn default_service_account() -> Arc<str> {
    DEFAULT_SERVICE_ACCOUNT.into()
}

fn default_trust_domain() -> Arc<str> {
    DEFAULT_TRUST_DOMAIN.into()
}

fn default_cluster() -> Arc<str> {
    DEFAULT_CLUSTER.into()
}

/// An empty text stands for the default, as in the wire form.
fn or_default<'de, D: Deserializer<'de>>(d: D, default: &str) -> Result<Arc<str>, D::Error> {
    let text = Cow::<str>::deserialize(d)?;
    Ok(if text.is_empty() {
        default.into()
    } else {
        text.into()
    })
}

fn service_account<'de, D: Deserializer<'de>>(d: D) -> Result<Arc<str>, D::Error> {
    or_default(d, DEFAULT_SERVICE_ACCOUNT)
}

fn trust_domain<'de, D: Deserializer<'de>>(d: D) -> Result<Arc<str>, D::Error> {
    or_default(d, DEFAULT_TRUST_DOMAIN)
}

fn cluster<'de, D: Deserializer<'de>>(d: D) -> Result<Arc<str>, D::Error> {
    or_default(d, DEFAULT_CLUSTER)
}

/// IPv4-mapped IPv6 addresses become IPv4, which is what captured sockets report.
fn addresses<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<IpAddr>, D::Error> {
    let addresses = Vec::<IpAddr>::deserialize(d)?;
    Ok(addresses.into_iter().map(|ip| ip.to_canonical()).collect())
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Protocol {
    /// Plain TCP.
    #[default]
    Tcp,
    /// HTTP/2 CONNECT over mutual TLS, port 15008.
    Hbone,
}

/// Whether a workload has a network of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum NetworkMode {
    /// Its own addresses.
    #[default]
    Standard,
    /// The node's addresses, which others share.
    HostNetwork,
}

/// Whether a workload is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub enum Health {
    /// Ready.
    #[default]
    Healthy,
    /// Not ready: chosen only by services that want all endpoints.
    Unhealthy,
}

/// Where a workload runs.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Locality {
    /// Region.
    pub region: Arc<str>,
    /// Zone of the region.
    pub zone: Arc<str>,
    /// Part of the zone.
    pub subzone: Arc<str>,
}

/// A proxy to go through: a waypoint or a network gateway.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct GatewayAddress {
    /// Who it is.
    pub destination: GatewayDestination,
    /// Its HBONE port.
    #[serde(default = "default_hbone_port")]
    pub hbone_mtls_port: u16,
}

fn default_hbone_port() -> u16 {
    HBONE_PORT
}

/// How a gateway is named: `network/ip` or `namespace/hostname`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum GatewayDestination {
    /// By address.
    Address(NetworkAddress),
    /// By the name of its service.
    Hostname(NamespacedHostname),
}

impl fmt::Display for GatewayDestination {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => address.fmt(f),
            Self::Hostname(name) => name.fmt(f),
        }
    }
}

impl Serialize for GatewayDestination {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GatewayDestination {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        if let Ok(address) = text.parse() {
            return Ok(Self::Address(address));
        }
        text.parse().map(Self::Hostname).map_err(|_| {
            serde::de::Error::custom(format!(
                "`{text}` is neither of the form network/ip nor namespace/hostname"
            ))
        })
    }
}

/// A tunnel from the proxy to the application.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct ApplicationTunnel {
    /// What it speaks.
    pub protocol: ApplicationProtocol,
    /// The port that takes the place of the original one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// What an application tunnel speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum ApplicationProtocol {
    /// Nothing: no tunnel.
    None,
    /// PROXY protocol, version 2.
    Proxy,
}
