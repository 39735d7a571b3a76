//! Package `istio.workload`: workloads and services.

use std::collections::BTreeMap;

use bytes::Bytes;
use prost::{Enumeration, Message, Oneof};

/// A workload or a service: both have addresses, so both can be asked for by address.
#[derive(Clone, PartialEq, Message)]
pub struct Address {
    /// Which.
    #[prost(oneof = "AddressType", tags = "1, 2")]
    pub kind: Option<AddressType>,
}

/// What an [`Address`] can be.
#[derive(Clone, PartialEq, Oneof)]
pub enum AddressType {
    /// A workload.
    #[prost(message, tag = "1")]
    Workload(Box<Workload>),
    /// A service.
    #[prost(message, tag = "2")]
    Service(Box<Service>),
}

/// A workload.
#[derive(Clone, PartialEq, Message)]
pub struct Workload {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Kubernetes namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// 4 or 16 bytes each.
    #[prost(bytes = "bytes", repeated, tag = "3")]
    pub addresses: Vec<Bytes>,
    /// Network of the addresses.
    #[prost(string, tag = "4")]
    pub network: String,
    /// How it is reached.
    #[prost(enumeration = "TunnelProtocol", tag = "5")]
    pub tunnel_protocol: i32,
    /// Empty: `cluster.local`.
    #[prost(string, tag = "6")]
    pub trust_domain: String,
    /// Empty: `default`.
    #[prost(string, tag = "7")]
    pub service_account: String,
    /// The layer 7 proxy in front of it.
    #[prost(message, optional, tag = "8")]
    pub waypoint: Option<GatewayAddress>,
    /// Node that it runs on.
    #[prost(string, tag = "9")]
    pub node: String,
    /// For telemetry.
    #[prost(string, tag = "10")]
    pub canonical_name: String,
    /// For telemetry.
    #[prost(string, tag = "11")]
    pub canonical_revision: String,
    /// Kind of what controls it.
    #[prost(enumeration = "WorkloadType", tag = "12")]
    pub workload_type: i32,
    /// Name of what controls it.
    #[prost(string, tag = "13")]
    pub workload_name: String,
    /// It terminates HBONE itself.
    #[prost(bool, tag = "14")]
    pub native_tunnel: bool,
    /// Policies that select it.
    #[prost(string, repeated, tag = "16")]
    pub authorization_policies: Vec<String>,
    /// Whether it is ready.
    #[prost(enumeration = "WorkloadStatus", tag = "17")]
    pub status: i32,
    /// Cluster that it runs in.
    #[prost(string, tag = "18")]
    pub cluster_id: String,
    /// The way into its network.
    #[prost(message, optional, tag = "19")]
    pub network_gateway: Option<GatewayAddress>,
    /// Unique.
    #[prost(string, tag = "20")]
    pub uid: String,
    /// For a workload without a fixed address.
    #[prost(string, tag = "21")]
    pub hostname: String,
    /// By `namespace/hostname`: the services that it is an endpoint of.
    #[prost(btree_map = "string, message", tag = "22")]
    pub services: BTreeMap<String, PortList>,
    /// A tunnel to the application.
    #[prost(message, optional, tag = "23")]
    pub application_tunnel: Option<ApplicationTunnel>,
    /// Where it runs.
    #[prost(message, optional, tag = "24")]
    pub locality: Option<Locality>,
    /// Whether it has a network of its own.
    #[prost(enumeration = "NetworkMode", tag = "25")]
    pub network_mode: i32,
    /// Its weight (a `google.protobuf.UInt32Value`); absent: 1.
    #[prost(message, optional, tag = "27")]
    pub capacity: Option<u32>,
}

/// A service.
#[derive(Clone, PartialEq, Message)]
pub struct Service {
    /// Name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// Kubernetes namespace.
    #[prost(string, tag = "2")]
    pub namespace: String,
    /// Hostname.
    #[prost(string, tag = "3")]
    pub hostname: String,
    /// Virtual addresses.
    #[prost(message, repeated, tag = "4")]
    pub addresses: Vec<NetworkAddress>,
    /// Its ports.
    #[prost(message, repeated, tag = "5")]
    pub ports: Vec<Port>,
    /// Further identities that may answer for it.
    #[prost(string, repeated, tag = "6")]
    pub subject_alt_names: Vec<String>,
    /// The layer 7 proxy in front of it.
    #[prost(message, optional, tag = "7")]
    pub waypoint: Option<GatewayAddress>,
    /// How its endpoints are chosen.
    #[prost(message, optional, tag = "8")]
    pub load_balancing: Option<LoadBalancing>,
    /// Address families.
    #[prost(enumeration = "IpFamilies", tag = "9")]
    pub ip_families: i32,
    /// Preferred among services of one hostname.
    #[prost(bool, tag = "11")]
    pub canonical: bool,
    /// Gateways go through the waypoint too.
    #[prost(bool, tag = "12")]
    pub ingress_use_waypoint: bool,
    /// Several waypoints.
    #[prost(message, repeated, tag = "13")]
    pub weighted_waypoints: Vec<WeightedWaypoint>,
    /// Who may find it.
    #[prost(enumeration = "Visibility", tag = "14")]
    pub visibility: i32,
}

/// How endpoints are chosen.
#[derive(Clone, PartialEq, Message)]
pub struct LoadBalancing {
    /// What client and endpoint should have in common.
    #[prost(enumeration = "Scope", repeated, tag = "1")]
    pub routing_preference: Vec<i32>,
    /// What the preferences do.
    #[prost(enumeration = "Mode", tag = "2")]
    pub mode: i32,
    /// Which endpoints count.
    #[prost(enumeration = "HealthPolicy", tag = "3")]
    pub health_policy: i32,
}

/// A port of a service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct Port {
    /// The service's.
    #[prost(uint32, tag = "1")]
    pub service_port: u32,
    /// The endpoint's; 0: named, each endpoint knows its own.
    #[prost(uint32, tag = "2")]
    pub target_port: u32,
}

/// Ports.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct PortList {
    /// The ports.
    #[prost(message, repeated, tag = "1")]
    pub ports: Vec<Port>,
}

/// An address within a network.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct NetworkAddress {
    /// The network.
    #[prost(string, tag = "1")]
    pub network: String,
    /// 4 or 16 bytes.
    #[prost(bytes = "bytes", tag = "2")]
    pub address: Bytes,
    /// Length of a prefix, if it is a whole network.
    #[prost(uint32, optional, tag = "3")]
    pub length: Option<u32>,
}

/// A service's key.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct NamespacedHostname {
    /// Kubernetes namespace.
    #[prost(string, tag = "1")]
    pub namespace: String,
    /// Hostname.
    #[prost(string, tag = "2")]
    pub hostname: String,
}

/// A proxy to go through.
#[derive(Clone, PartialEq, Message)]
pub struct GatewayAddress {
    /// Who it is.
    #[prost(oneof = "Destination", tags = "1, 2")]
    pub destination: Option<Destination>,
    /// Its HBONE port; 0: 15008.
    #[prost(uint32, tag = "3")]
    pub hbone_mtls_port: u32,
}

/// How a gateway is named.
#[derive(Clone, PartialEq, Eq, Hash, Oneof)]
pub enum Destination {
    /// By its service.
    #[prost(message, tag = "1")]
    Hostname(NamespacedHostname),
    /// By address.
    #[prost(message, tag = "2")]
    Address(NetworkAddress),
}

/// One of several waypoints.
#[derive(Clone, PartialEq, Message)]
pub struct WeightedWaypoint {
    /// The waypoint.
    #[prost(message, optional, tag = "1")]
    pub destination: Option<GatewayAddress>,
    /// Its share.
    #[prost(uint32, tag = "2")]
    pub weight: u32,
}

/// A tunnel from the proxy to the application.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Message)]
pub struct ApplicationTunnel {
    /// What it speaks.
    #[prost(enumeration = "ApplicationProtocol", tag = "1")]
    pub protocol: i32,
    /// The port that takes the place of the original one; 0: none does.
    #[prost(uint32, tag = "2")]
    pub port: u32,
}

/// Where a workload runs.
#[derive(Clone, PartialEq, Eq, Hash, Message)]
pub struct Locality {
    /// Region.
    #[prost(string, tag = "1")]
    pub region: String,
    /// Zone of the region.
    #[prost(string, tag = "2")]
    pub zone: String,
    /// Part of the zone.
    #[prost(string, tag = "3")]
    pub subzone: String,
}

/// Enumerations whose numbers matter and whose meaning is told where they are converted to.
macro_rules! enumeration {
    ($(#[doc = $doc:literal] $name:ident { $($variant:ident = $number:literal,)* })*) => {$(
        #[doc = $doc]
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Enumeration)]
        #[repr(i32)]
        #[allow(missing_docs, reason = "the names say all there is")]
        pub enum $name { $($variant = $number,)* }
    )*};
}

enumeration! {
    /// How a workload is reached.
    TunnelProtocol {
        None = 0,
        Hbone = 1,
        LegacyIstioMtls = 2,
    }
    /// Whether a workload is ready.
    WorkloadStatus {
        Healthy = 0,
        Unhealthy = 1,
    }
    /// Kind of what controls a workload.
    WorkloadType {
        Deployment = 0,
        Cronjob = 1,
        Pod = 2,
        Job = 3,
    }
    /// Whether a workload has a network of its own.
    NetworkMode {
        Standard = 0,
        HostNetwork = 1,
    }
    /// What a tunnel to an application speaks.
    ApplicationProtocol {
        None = 0,
        Proxy = 1,
    }
    /// What client and endpoint may have in common.
    Scope {
        Unspecified = 0,
        Region = 1,
        Zone = 2,
        Subzone = 3,
        Node = 4,
        Cluster = 5,
        Network = 6,
    }
    /// What routing preferences do.
    Mode {
        Unspecified = 0,
        Strict = 1,
        Failover = 2,
        Passthrough = 3,
    }
    /// Which endpoints count.
    HealthPolicy {
        OnlyHealthy = 0,
        AllowAll = 1,
    }
    /// Address families of a service.
    IpFamilies {
        Automatic = 0,
        Ipv4Only = 1,
        Ipv6Only = 2,
        Dual = 3,
    }
    /// Who may find a service.
    Visibility {
        Public = 0,
        Namespace = 1,
    }
}
