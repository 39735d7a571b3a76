//! Changes of a mesh, object by object: what a control plane sends.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use super::policy::PolicyScope;
use super::snapshot::Holders;
use super::{NamespacedHostname, Policy, Service, Snapshot, SnapshotError, Workload};

/// One object that comes, changes or goes.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// A workload as it is from here on; the one with its uid, if there is one, is replaced.
    Workload(Arc<Workload>),
    /// A service as it is from here on; the one with its key, if there is one, is replaced.
    Service(Arc<Service>),
    /// A policy as it is from here on; the one with its key, if there is one, is replaced.
    Policy(Arc<Policy>),
    /// The workload with this uid is gone.
    RemoveWorkload(Arc<str>),
    /// The service with this key is gone.
    RemoveService(NamespacedHostname),
    /// The policy `namespace/name` is gone.
    RemovePolicy(Arc<str>),
}

/// How the endpoints of services change, collected so that the list of a service is gone through once per batch, however
/// many of its endpoints the batch is about.
#[derive(Default)]
pub(super) struct EndpointChanges {
    /// Service, then uid: the endpoint as it is after the batch, none if it is none any more.
    services: HashMap<NamespacedHostname, BTreeMap<Arc<str>, Option<Arc<Workload>>>>,
}

impl EndpointChanges {
    fn note(&mut self, service: &NamespacedHostname, uid: &Arc<str>, to: Option<&Arc<Workload>>) {
        let of_service = match self.services.get_mut(service) {
            Some(of_service) => of_service,
            None => self.services.entry(service.clone()).or_default(),
        };
        of_service.insert(Arc::clone(uid), to.cloned());
    }
}

impl Snapshot {
    /// This mesh after some changes, made in their order. Unchanged parts are shared: the cost is that of the changes, not
    /// of the mesh.
    ///
    /// Unlike [`Snapshot::new`] it accepts objects that contradict each other, because a control plane that moves an
    /// address from one object to another may tell of the new holder first. Of several holders of an address the one that
    /// came last is found by it, and when that one goes, another.
    pub fn updated(&self, changes: impl IntoIterator<Item = Change>) -> Self {
        let mut next = self.clone();
        let mut endpoints = EndpointChanges::default();
        for change in changes {
            next.make(change, &mut endpoints);
        }
        next.settle(endpoints);
        next
    }

    /// The same, as strict as [`Snapshot::new`]: for whoever knows all objects and takes out what changes before putting it
    /// in again.
    ///
    /// # Errors
    /// An object comes whose key or, hosts' addresses apart, whose address another one has at that point.
    pub fn updated_strictly(
        &self,
        changes: impl IntoIterator<Item = Change>,
    ) -> Result<Self, SnapshotError> {
        let mut next = self.clone();
        let mut endpoints = EndpointChanges::default();
        for change in changes {
            match &change {
                Change::Workload(workload) => next.check_workload(workload)?,
                Change::Service(service) => next.check_service(service)?,
                Change::Policy(policy) => next.check_policy(policy)?,
                _ => {}
            }
            next.make(change, &mut endpoints);
        }
        next.settle(endpoints);
        Ok(next)
    }

    fn make(&mut self, change: Change, endpoints: &mut EndpointChanges) {
        match change {
            Change::Workload(workload) => self.put_workload(workload, endpoints),
            Change::Service(service) => self.put_service(service),
            Change::Policy(policy) => self.put_policy(policy),
            Change::RemoveWorkload(uid) => {
                if let Some(workload) = self.workloads.remove(&uid) {
                    self.withdraw_workload(&workload, endpoints);
                }
            }
            Change::RemoveService(key) => {
                if let Some(service) = self.services.remove(&key) {
                    self.withdraw_service(&service);
                }
            }
            Change::RemovePolicy(key) => {
                if let Some(policy) = self.policies.remove(&key) {
                    self.withdraw_policy(&policy);
                }
            }
        }
    }

    pub(super) fn put_workload(
        &mut self,
        workload: Arc<Workload>,
        endpoints: &mut EndpointChanges,
    ) {
        if let Some(previous) = self.workloads.get(&workload.uid) {
            if *previous == workload {
                return;
            }
            let previous = Arc::clone(previous);
            self.withdraw_workload(&previous, endpoints);
        }
        for address in workload.network_addresses() {
            Holders::add(&mut self.by_address, address, &workload);
        }
        if let Some(name) = index_of(&workload.hostname) {
            Holders::add(&mut self.workloads_by_name, name, &workload);
        }
        for service in workload.services.keys() {
            endpoints.note(service, &workload.uid, Some(&workload));
        }
        self.workloads.insert(Arc::clone(&workload.uid), workload);
    }

    fn withdraw_workload(&mut self, workload: &Arc<Workload>, endpoints: &mut EndpointChanges) {
        for address in workload.network_addresses() {
            Holders::remove(&mut self.by_address, &address, workload);
        }
        if let Some(name) = index_of(&workload.hostname) {
            Holders::remove(&mut self.workloads_by_name, &name, workload);
        }
        for service in workload.services.keys() {
            endpoints.note(service, &workload.uid, None);
        }
    }

    pub(super) fn put_service(&mut self, service: Arc<Service>) {
        let key = service.key();
        if let Some(previous) = self.services.get(&key) {
            if *previous == service {
                return;
            }
            let previous = Arc::clone(previous);
            self.withdraw_service(&previous);
        }
        for vip in &service.vips {
            Holders::add(&mut self.by_vip, vip.clone(), &service);
        }
        for range in &service.cidr_vips {
            self.by_range.add(range, &service);
        }
        if let Some(name) = index_of(&service.hostname) {
            Holders::add(&mut self.services_by_name, name, &service);
        }
        self.services.insert(key, service);
    }

    fn withdraw_service(&mut self, service: &Arc<Service>) {
        for vip in &service.vips {
            Holders::remove(&mut self.by_vip, vip, service);
        }
        for range in &service.cidr_vips {
            self.by_range.remove(range, service);
        }
        if let Some(name) = index_of(&service.hostname) {
            Holders::remove(&mut self.services_by_name, &name, service);
        }
    }

    pub(super) fn put_policy(&mut self, policy: Arc<Policy>) {
        let key: Arc<str> = policy.key().into();
        if let Some(previous) = self.policies.get(&key) {
            if *previous == policy {
                return;
            }
            let previous = Arc::clone(previous);
            self.withdraw_policy(&previous);
        }
        if let Some(namespace) = reach(&policy) {
            let mut list = self
                .by_namespace
                .get(&namespace)
                .cloned()
                .unwrap_or_default();
            Arc::make_mut(&mut list).push(Arc::clone(&policy));
            self.by_namespace.insert(namespace, list);
        }
        self.policies.insert(key, policy);
    }

    fn withdraw_policy(&mut self, policy: &Arc<Policy>) {
        let Some(namespace) = reach(policy) else {
            return;
        };
        let Some(mut list) = self.by_namespace.remove(&namespace) else {
            return;
        };
        Arc::make_mut(&mut list).retain(|other| !Arc::ptr_eq(other, policy));
        if !list.is_empty() {
            self.by_namespace.insert(namespace, list);
        }
    }

    /// Puts the collected changes of endpoints in force. An endpoint that changes keeps its place in the list.
    pub(super) fn settle(&mut self, endpoints: EndpointChanges) {
        for (service, mut changed) in endpoints.services {
            let mut list = self.endpoints.remove(&service).unwrap_or_default();
            let endpoints = Arc::make_mut(&mut list);
            endpoints.retain_mut(|endpoint| match changed.remove(&endpoint.uid) {
                Some(Some(workload)) => {
                    *endpoint = workload;
                    true
                }
                Some(None) => false,
                None => true,
            });
            endpoints.extend(changed.into_values().flatten());
            if !list.is_empty() {
                self.endpoints.insert(service, list);
            }
        }
    }
}

/// The namespace under which a policy is found without being named; that of policies for all is the empty one.
fn reach(policy: &Policy) -> Option<Arc<str>> {
    match policy.scope {
        PolicyScope::Global => Some("".into()),
        PolicyScope::Namespace => Some(Arc::clone(&policy.namespace)),
        PolicyScope::WorkloadSelector => None,
    }
}

/// The key of a hostname. Most have it already.
fn index_of(hostname: &Arc<str>) -> Option<Arc<str>> {
    if hostname.is_empty() {
        None
    } else if hostname.bytes().any(|byte| byte.is_ascii_uppercase()) {
        Some(hostname.to_ascii_lowercase().into())
    } else {
        Some(Arc::clone(hostname))
    }
}

#[cfg(test)]
mod tests;
