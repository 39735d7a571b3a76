//! One consistent, immutable view of the mesh.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use rand::Rng;

use super::policy::{Policy, PolicyScope};
use super::workload::NetworkMode;
use super::{NamespacedHostname, NetworkAddress, Service, Workload, balancing};

/// Workloads, services and policies with the indexes that connections need. Made once, never changed.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The network that bare addresses belong to.
    network: Arc<str>,
    workloads: BTreeMap<Arc<str>, Arc<Workload>>,
    services: BTreeMap<NamespacedHostname, Arc<Service>>,
    policies: BTreeMap<Arc<str>, Arc<Policy>>,
    by_address: HashMap<NetworkAddress, Arc<Workload>>,
    by_vip: HashMap<NetworkAddress, Arc<Service>>,
    endpoints: HashMap<NamespacedHostname, Vec<Arc<Workload>>>,
    /// Policies that apply to a namespace; those that apply to all are under the empty one.
    by_namespace: HashMap<Arc<str>, Vec<Arc<Policy>>>,
}

/// Why objects do not make a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Two objects with one key.
    #[error("{kind} {key} is there twice: give each a key of its own")]
    Twice {
        /// `workload`, `service` or `policy`.
        kind: &'static str,
        /// The key.
        key: String,
    },
    /// Two workloads, neither on the host network, with one address.
    #[error("workloads {first} and {second} both have address {address}")]
    SharedAddress {
        /// Uid of one.
        first: Arc<str>,
        /// Uid of the other.
        second: Arc<str>,
        /// `network/ip`.
        address: NetworkAddress,
    },
    /// Two services with one virtual address.
    #[error("services {first} and {second} both have virtual address {address}")]
    SharedVip {
        /// Key of one.
        first: NamespacedHostname,
        /// Key of the other.
        second: NamespacedHostname,
        /// `network/ip`.
        address: NetworkAddress,
    },
}

impl Snapshot {
    /// Indexes the objects. A workload without a uid gets one made of its cluster, namespace and name.
    ///
    /// Policies that a workload names and that do not exist are logged here and otherwise ignored: a missing policy does
    /// not deny.
    pub fn new(
        workloads: Vec<Workload>,
        services: Vec<Service>,
        policies: Vec<Policy>,
    ) -> Result<Self, SnapshotError> {
        let mut snapshot = Self::default();
        for service in services {
            snapshot.add_service(Arc::new(service))?;
        }
        for policy in policies {
            snapshot.add_policy(Arc::new(policy))?;
        }
        let mut shared = HashMap::new();
        for workload in workloads {
            snapshot.add_workload(workload, &mut shared)?;
        }
        for (address, workloads) in shared {
            // Workloads on the host network share the node's address: it tells which one is meant only if there is one.
            if let [workload] = &workloads[..] {
                snapshot
                    .by_address
                    .entry(address)
                    .or_insert_with(|| Arc::clone(workload));
            }
        }
        Ok(snapshot)
    }

    /// The same with another network for bare addresses.
    pub fn in_network(mut self, network: impl Into<Arc<str>>) -> Self {
        self.network = network.into();
        self
    }

    fn add_service(&mut self, service: Arc<Service>) -> Result<(), SnapshotError> {
        let key = service.key();
        for vip in &service.vips {
            if let Some(other) = self.by_vip.insert(vip.clone(), Arc::clone(&service))
                && other.key() != key
            {
                return Err(SnapshotError::SharedVip {
                    first: other.key(),
                    second: key,
                    address: vip.clone(),
                });
            }
        }
        match self.services.insert(key.clone(), service) {
            None => Ok(()),
            Some(_) => Err(SnapshotError::Twice {
                kind: "service",
                key: key.to_string(),
            }),
        }
    }

    fn add_policy(&mut self, policy: Arc<Policy>) -> Result<(), SnapshotError> {
        let everywhere: Arc<str> = "".into();
        let namespace = match policy.scope {
            PolicyScope::Global => Some(everywhere),
            PolicyScope::Namespace => Some(Arc::clone(&policy.namespace)),
            PolicyScope::WorkloadSelector => None,
        };
        if let Some(namespace) = namespace {
            let list = self.by_namespace.entry(namespace).or_default();
            list.push(Arc::clone(&policy));
        }
        let key: Arc<str> = policy.key().into();
        match self.policies.insert(Arc::clone(&key), policy) {
            None => Ok(()),
            Some(_) => Err(SnapshotError::Twice {
                kind: "policy",
                key: key.to_string(),
            }),
        }
    }

    fn add_workload(
        &mut self,
        mut workload: Workload,
        shared: &mut HashMap<NetworkAddress, Vec<Arc<Workload>>>,
    ) -> Result<(), SnapshotError> {
        if workload.uid.is_empty() {
            let Workload {
                cluster_id,
                namespace,
                name,
                ..
            } = &workload;
            workload.uid = format!("{cluster_id}//Pod/{namespace}/{name}").into();
        }
        let workload = Arc::new(workload);
        for address in workload.network_addresses() {
            if workload.network_mode == NetworkMode::HostNetwork {
                let list = shared.entry(address).or_default();
                list.push(Arc::clone(&workload));
            } else if let Some(other) = self
                .by_address
                .insert(address.clone(), Arc::clone(&workload))
                && other.uid != workload.uid
            {
                return Err(SnapshotError::SharedAddress {
                    first: Arc::clone(&other.uid),
                    second: Arc::clone(&workload.uid),
                    address,
                });
            }
        }
        for service in workload.services.keys() {
            let list = self.endpoints.entry(service.clone()).or_default();
            list.push(Arc::clone(&workload));
        }
        for policy in &workload.authorization_policies {
            if !self.policies.contains_key(policy) {
                tracing::warn!(workload = %workload.uid, %policy, "the workload names a policy that does not exist");
            }
        }
        match self
            .workloads
            .insert(Arc::clone(&workload.uid), Arc::clone(&workload))
        {
            None => Ok(()),
            Some(_) => Err(SnapshotError::Twice {
                kind: "workload",
                key: workload.uid.to_string(),
            }),
        }
    }

    /// All workloads, ordered by uid.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        self.workloads.values()
    }

    /// All services, ordered by namespace and hostname.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        self.services.values()
    }

    /// All policies, ordered by `namespace/name`.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Policy>> {
        self.policies.values()
    }

    /// The workload that has an address of the local network. Several workloads on the host network share one address
    /// and are not found by it.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        self.workload_by_address(&self.local(ip))
    }

    /// The workload that has an address.
    pub fn workload_by_address(&self, address: &NetworkAddress) -> Option<Arc<Workload>> {
        self.by_address.get(address).cloned()
    }

    /// The workload with a uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        self.workloads.get(uid).cloned()
    }

    /// The service that has a virtual address of the local network.
    pub fn service_by_vip(&self, ip: IpAddr) -> Option<Arc<Service>> {
        self.by_vip.get(&self.local(ip)).cloned()
    }

    /// The service with a key.
    pub fn service(&self, key: &NamespacedHostname) -> Option<Arc<Service>> {
        self.services.get(key).cloned()
    }

    /// The workloads that say they are endpoints of a service, healthy or not.
    pub fn endpoints(&self, service: &Service) -> &[Arc<Workload>] {
        self.endpoints
            .get(&service.key())
            .map_or(&[], Vec::as_slice)
    }

    /// The endpoint for a connection from `source` to `port` of a service, with the port it serves that on. None: no
    /// endpoint is healthy, serves the port and is as near as the service wants; or the service is
    /// [passed through](Service::is_passthrough), which the caller asks first.
    pub fn choose_endpoint<R: Rng + ?Sized>(
        &self,
        service: &Service,
        source: &Workload,
        port: u16,
        rng: &mut R,
    ) -> Option<(Arc<Workload>, u16)> {
        balancing::choose(service, self.endpoints(service), source, port, rng)
    }

    /// The policies that apply to a workload: those for all, those of its namespace, those it names. Each once.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a Arc<Policy>> {
        let of_namespace = |namespace: &str| self.by_namespace.get(namespace).into_iter().flatten();
        let general = move |policy: &Policy| match policy.scope {
            PolicyScope::Global => true,
            PolicyScope::Namespace => policy.namespace == workload.namespace,
            PolicyScope::WorkloadSelector => false,
        };
        let named = workload
            .authorization_policies
            .iter()
            .filter_map(|name| self.policies.get(name))
            .filter(move |policy| !general(policy));
        let namespaced = (!workload.namespace.is_empty())
            .then(|| of_namespace(&workload.namespace))
            .into_iter()
            .flatten();
        of_namespace("").chain(namespaced).chain(named)
    }

    fn local(&self, ip: IpAddr) -> NetworkAddress {
        NetworkAddress::new(Arc::clone(&self.network), ip)
    }
}

#[cfg(test)]
mod tests;
