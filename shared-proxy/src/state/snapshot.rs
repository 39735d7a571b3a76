//! One consistent, immutable view of the mesh.

use std::hash::Hash;
use std::net::IpAddr;
use std::sync::Arc;

use rand::Rng;

use super::balancing::Wanted;
use super::persistent_map::PersistentMap;
use super::policy::{Policy, PolicyScope};
use super::ranges::Ranges;
use super::update::EndpointChanges;
use super::workload::NetworkMode;
use super::{NamespacedHostname, NetworkAddress, Service, Workload, balancing};

/// Workloads, services and policies with the indexes that connections need. Never changed: [`Snapshot::updated`] makes
/// another one, which shares with it what did not change.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The network that bare addresses belong to.
    network: Arc<str>,
    pub(super) workloads: PersistentMap<Arc<str>, Arc<Workload>>,
    pub(super) services: PersistentMap<NamespacedHostname, Arc<Service>>,
    pub(super) policies: PersistentMap<Arc<str>, Arc<Policy>>,
    pub(super) by_address: PersistentMap<NetworkAddress, Holders<Workload>>,
    pub(super) by_vip: PersistentMap<NetworkAddress, Holders<Service>>,
    pub(super) by_range: Ranges,
    pub(super) endpoints: PersistentMap<NamespacedHostname, Arc<Vec<Arc<Workload>>>>,
    /// By hostname in lower case.
    pub(super) services_by_name: PersistentMap<Arc<str>, Holders<Service>>,
    /// By hostname in lower case.
    pub(super) workloads_by_name: PersistentMap<Arc<str>, Holders<Workload>>,
    /// Policies that apply to a namespace; those that apply to all are under the empty one.
    pub(super) by_namespace: PersistentMap<Arc<str>, Arc<Vec<Arc<Policy>>>>,
}

/// The objects that have an address or a hostname, the one that came last at the end. Nearly always there is one.
#[derive(Debug)]
pub(super) enum Holders<T> {
    /// One.
    One(Arc<T>),
    /// Several.
    Several(Arc<Vec<Arc<T>>>),
}

impl<T> Clone for Holders<T> {
    fn clone(&self) -> Self {
        match self {
            Self::One(one) => Self::One(Arc::clone(one)),
            Self::Several(several) => Self::Several(Arc::clone(several)),
        }
    }
}

impl<T> Holders<T> {
    fn as_slice(&self) -> &[Arc<T>] {
        match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        }
    }

    /// The one that came last.
    pub(super) fn latest(&self) -> Option<&Arc<T>> {
        self.as_slice().last()
    }

    pub(super) fn add<K: Hash + Eq + Clone>(
        index: &mut PersistentMap<K, Self>,
        address: K,
        object: &Arc<T>,
    ) {
        // Taken out, so that a list that nobody shares grows in place.
        let holders = match index.remove(&address) {
            None => Self::One(Arc::clone(object)),
            // An object may list an address twice.
            Some(holders)
                if holders
                    .as_slice()
                    .last()
                    .is_some_and(|last| Arc::ptr_eq(last, object)) =>
            {
                holders
            }
            Some(Self::One(other)) => Self::Several(Arc::new(vec![other, Arc::clone(object)])),
            Some(Self::Several(mut several)) => {
                Arc::make_mut(&mut several).push(Arc::clone(object));
                Self::Several(several)
            }
        };
        index.insert(address, holders);
    }

    pub(super) fn remove<K: Hash + Eq + Clone>(
        index: &mut PersistentMap<K, Self>,
        address: &K,
        object: &Arc<T>,
    ) {
        let Some(Self::Several(mut several)) = index.remove(address) else {
            return;
        };
        Arc::make_mut(&mut several).retain(|other| !Arc::ptr_eq(other, object));
        let left = match &several[..] {
            [one] => Self::One(Arc::clone(one)),
            _ => Self::Several(several),
        };
        index.insert(address.clone(), left);
    }
}

impl Holders<Workload> {
    /// The workload that an address stands for. Workloads on the host network share the node's address: it tells which one
    /// is meant only if there is one.
    fn workload(&self) -> Option<&Arc<Workload>> {
        let own = |workload: &&Arc<Workload>| workload.network_mode != NetworkMode::HostNetwork;
        match self.as_slice() {
            [one] => Some(one),
            several => several.iter().rev().find(own),
        }
    }
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
    ///
    /// # Errors
    /// Two objects have one key or, hosts' addresses apart, one address.
    pub fn new(
        workloads: Vec<Workload>,
        services: Vec<Service>,
        policies: Vec<Policy>,
    ) -> Result<Self, SnapshotError> {
        let mut snapshot = Self::default();
        for service in services {
            snapshot.check_service(&service)?;
            snapshot.put_service(Arc::new(service));
        }
        for policy in policies {
            snapshot.check_policy(&policy)?;
            snapshot.put_policy(Arc::new(policy));
        }
        let mut endpoints = EndpointChanges::default();
        for mut workload in workloads {
            if workload.uid.is_empty() {
                workload.uid = workload.made_up_uid();
            }
            snapshot.check_workload(&workload)?;
            snapshot.put_workload(Arc::new(workload), &mut endpoints);
        }
        snapshot.settle(endpoints);
        Ok(snapshot)
    }

    /// The same with another network for bare addresses.
    pub fn in_network(mut self, network: impl Into<Arc<str>>) -> Self {
        self.network = network.into();
        self
    }

    pub(super) fn check_service(&self, service: &Service) -> Result<(), SnapshotError> {
        let key = service.key();
        for vip in &service.vips {
            if let Some(other) = self.by_vip.get(vip).and_then(Holders::latest)
                && other.key() != key
            {
                return Err(SnapshotError::SharedVip {
                    first: other.key(),
                    second: key,
                    address: vip.clone(),
                });
            }
        }
        if self.services.contains_key(&key) {
            return Err(SnapshotError::Twice {
                kind: "service",
                key: key.to_string(),
            });
        }
        Ok(())
    }

    pub(super) fn check_policy(&self, policy: &Policy) -> Result<(), SnapshotError> {
        let key = policy.key();
        if self.policies.contains_key(&*key) {
            return Err(SnapshotError::Twice {
                kind: "policy",
                key,
            });
        }
        Ok(())
    }

    pub(super) fn check_workload(&self, workload: &Workload) -> Result<(), SnapshotError> {
        let alone = workload.network_mode != NetworkMode::HostNetwork;
        for address in workload.network_addresses().filter(|_| alone) {
            if let Some(other) = self.workload_by_address(&address)
                && other.network_mode != NetworkMode::HostNetwork
                && other.uid != workload.uid
            {
                return Err(SnapshotError::SharedAddress {
                    first: Arc::clone(&other.uid),
                    second: Arc::clone(&workload.uid),
                    address,
                });
            }
        }
        for policy in &workload.authorization_policies {
            if !self.policies.contains_key(policy) {
                tracing::warn!(workload = %workload.uid, %policy, "the workload names a policy that does not exist");
            }
        }
        if self.workloads.contains_key(&workload.uid) {
            return Err(SnapshotError::Twice {
                kind: "workload",
                key: workload.uid.to_string(),
            });
        }
        Ok(())
    }

    /// All workloads, ordered by uid.
    pub fn workloads(&self) -> impl ExactSizeIterator<Item = &Arc<Workload>> {
        sorted(&self.workloads)
    }

    /// How many workloads there are.
    pub fn workload_count(&self) -> usize {
        self.workloads.len()
    }

    /// All services, ordered by namespace and hostname.
    pub fn services(&self) -> impl ExactSizeIterator<Item = &Arc<Service>> {
        sorted(&self.services)
    }

    /// How many services there are.
    pub fn service_count(&self) -> usize {
        self.services.len()
    }

    /// All policies, ordered by `namespace/name`.
    pub fn policies(&self) -> impl ExactSizeIterator<Item = &Arc<Policy>> {
        sorted(&self.policies)
    }

    /// How many policies there are.
    pub fn policy_count(&self) -> usize {
        self.policies.len()
    }

    /// The workload that has an address of the local network. Several workloads on the host network share one address
    /// and are not found by it.
    pub fn workload_by_ip(&self, ip: IpAddr) -> Option<Arc<Workload>> {
        self.workload_by_address(&self.local(ip))
    }

    /// The workload that has an address.
    pub fn workload_by_address(&self, address: &NetworkAddress) -> Option<Arc<Workload>> {
        self.by_address.get(address)?.workload().cloned()
    }

    /// The workload with a uid.
    pub fn workload_by_uid(&self, uid: &str) -> Option<Arc<Workload>> {
        self.workloads.get(uid).cloned()
    }

    /// The service that has a virtual address of the local network.
    pub fn service_by_vip(&self, ip: IpAddr) -> Option<Arc<Service>> {
        self.service_by_address(&self.local(ip))
    }

    /// The service that has a virtual address; or else, if no workload has the address, the service with the longest range
    /// of virtual addresses that it is in.
    pub fn service_by_address(&self, address: &NetworkAddress) -> Option<Arc<Service>> {
        if let Some(holders) = self.by_vip.get(address) {
            return holders.latest().cloned();
        }
        if self.by_range.is_empty() || self.by_address.get(address).is_some() {
            return None;
        }
        self.by_range.longest(address)?.latest().cloned()
    }

    /// Whether some service or workload has exactly this address, not only a range that it is in.
    pub(super) fn has_address(&self, address: &NetworkAddress) -> bool {
        self.by_vip.get(address).is_some() || self.by_address.get(address).is_some()
    }

    /// The service with a key.
    pub fn service(&self, key: &NamespacedHostname) -> Option<Arc<Service>> {
        self.services.get(key).cloned()
    }

    /// The services of a hostname, at most one of each namespace. The name is in lower case.
    pub fn services_named(&self, hostname: &str) -> &[Arc<Service>] {
        self.services_by_name
            .get(hostname)
            .map_or(&[], Holders::as_slice)
    }

    /// The workload that has a hostname. The name is in lower case.
    pub fn workload_named(&self, hostname: &str) -> Option<Arc<Workload>> {
        self.workloads_by_name.get(hostname)?.latest().cloned()
    }

    /// The workloads that say they are endpoints of a service, healthy or not.
    pub fn endpoints(&self, service: &Service) -> &[Arc<Workload>] {
        self.endpoints
            .get(&service.key())
            .map_or(&[], |list| list.as_slice())
    }

    /// The endpoint for a connection from `source` to what is `wanted` of a service, with the port it serves that on.
    /// None: no endpoint is healthy, serves the port and is as near as the service wants; or the service is
    /// [passed through](Service::is_passthrough), which the caller asks first.
    pub fn choose_endpoint<R: Rng + ?Sized>(
        &self,
        service: &Service,
        source: &Workload,
        wanted: Wanted,
        rng: &mut R,
    ) -> Option<(Arc<Workload>, u16)> {
        let endpoints = self.endpoints(service).iter();
        balancing::choose(service, endpoints, source, wanted, rng)
    }

    /// The policies that apply to a workload: those for all, those of its namespace, those it names. Each once.
    pub fn policies_for<'a>(
        &'a self,
        workload: &'a Workload,
    ) -> impl Iterator<Item = &'a Arc<Policy>> {
        let of_namespace = |namespace: &str| {
            let list = self.by_namespace.get(namespace);
            list.into_iter().flat_map(|list| list.iter())
        };
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

    pub(super) fn local(&self, ip: IpAddr) -> NetworkAddress {
        NetworkAddress::new(Arc::clone(&self.network), ip)
    }
}

/// The values of an index in the order of their keys: for people who read lists.
fn sorted<K: Ord + Hash + Clone, V: Clone>(
    index: &PersistentMap<K, V>,
) -> impl ExactSizeIterator<Item = &V> {
    let mut entries: Vec<_> = index.iter().collect();
    entries.sort_unstable_by_key(|(key, _)| *key);
    entries.into_iter().map(|(_, value)| value)
}

#[cfg(test)]
mod tests;
