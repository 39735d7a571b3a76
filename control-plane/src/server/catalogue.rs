//! A mesh as resources: each encoded once, with versions.
//!
//! A change makes another catalogue, which shares with the one before it what did not change and knows what did: neither
//! encoding nor telling clients costs what the mesh costs.

use std::collections::{BTreeSet, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use shared_proxy::state::persistent_map::PersistentMap;
use shared_proxy::state::{Change, NamespacedHostname, NetworkAddress, Snapshot};

use crate::convert::Object;
use crate::messages::discovery::Resource;
use crate::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Any};

/// So many names of changed resources are remembered. Whoever missed more goes through all resources.
const REMEMBERED: usize = 65_536;

/// All resources of a mesh.
#[derive(Debug, Clone, Default)]
pub struct Catalogue {
    mesh: Snapshot,
    addresses: Resources,
    policies: Resources,
    /// Counts the catalogues that led here.
    revision: u64,
    /// What the last ones changed, the latest at the end.
    recent: VecDeque<Arc<Revision>>,
}

/// Resources of one type, by name.
pub(super) type Resources = PersistentMap<Arc<str>, Encoded>;

/// The resources that a catalogue has in another form than the one before it.
#[derive(Debug, Default)]
struct Revision {
    addresses: BTreeSet<Arc<str>>,
    policies: BTreeSet<Arc<str>>,
}

impl Revision {
    fn len(&self) -> usize {
        self.addresses.len() + self.policies.len()
    }
}

/// A resource, ready to be sent.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Encoded {
    /// Made of the content: the same after a restart, so that clients that come back are sent only what differs.
    pub(super) version: Arc<str>,
    content: Bytes,
}

impl Encoded {
    pub(super) fn new(content: Vec<u8>) -> Self {
        let mut hasher = DefaultHasher::new();
        content.hash(&mut hasher);
        Self {
            version: format!("{:016x}", hasher.finish()).into(),
            content: content.into(),
        }
    }

    pub(super) fn message(&self, name: &str, type_url: &str) -> Resource {
        Resource {
            version: self.version.to_string(),
            resource: Some(Any {
                type_url: type_url.to_owned(),
                value: self.content.clone(),
            }),
            name: name.to_owned(),
            aliases: Vec::new(),
        }
    }
}

impl Catalogue {
    /// Encodes a mesh.
    pub fn new(mesh: Snapshot) -> Self {
        Self::default().replaced(mesh)
    }

    /// The catalogue of another mesh. What is the same object in both is not encoded again.
    pub fn replaced(&self, mesh: Snapshot) -> Self {
        let mut changes = Vec::new();
        for workload in self.mesh.workloads() {
            if mesh.workload_by_uid(&workload.uid).is_none() {
                changes.push(Change::RemoveWorkload(Arc::clone(&workload.uid)));
            }
        }
        for service in self.mesh.services() {
            if mesh.service(&service.key()).is_none() {
                changes.push(Change::RemoveService(service.key()));
            }
        }
        let kept: BTreeSet<String> = mesh.policies().map(|policy| policy.key()).collect();
        let held = self.mesh.policies().map(|policy| policy.key());
        changes.extend(
            held.filter(|key| !kept.contains(key))
                .map(|key| Change::RemovePolicy(key.into())),
        );
        let workloads = mesh.workloads().filter(|workload| {
            let held = self.mesh.workload_by_uid(&workload.uid);
            held.is_none_or(|held| !Arc::ptr_eq(&held, workload))
        });
        changes.extend(workloads.cloned().map(Change::Workload));
        let services = mesh.services().filter(|service| {
            let held = self.mesh.service(&service.key());
            held.is_none_or(|held| !Arc::ptr_eq(&held, service))
        });
        changes.extend(services.cloned().map(Change::Service));
        changes.extend(mesh.policies().cloned().map(Change::Policy));
        self.updated(mesh, &changes)
    }

    /// The catalogue of a mesh that differs from this one's by `changes`, and by nothing else.
    pub fn updated(&self, mesh: Snapshot, changes: &[Change]) -> Self {
        let mut next = self.clone();
        next.mesh = mesh;
        next.revision += 1;
        let mut revision = Revision::default();
        for change in changes {
            let addresses = matches!(
                change,
                Change::Workload(_)
                    | Change::RemoveWorkload(_)
                    | Change::Service(_)
                    | Change::RemoveService(_)
            );
            let (name, object) = next.after(change);
            let (resources, changed) = if addresses {
                (&mut next.addresses, &mut revision.addresses)
            } else {
                (&mut next.policies, &mut revision.policies)
            };
            let encoded = object.map(|object| Encoded::new(object.encode()));
            if resources.get(&name) == encoded.as_ref() {
                continue;
            }
            match encoded {
                Some(encoded) => resources.insert(Arc::clone(&name), encoded),
                None => resources.remove(&name),
            };
            changed.insert(name);
        }
        next.recent.push_back(Arc::new(revision));
        let mut remembered: usize = next.recent.iter().map(|revision| revision.len()).sum();
        // Revisions without a change cost little, but are not for ever either.
        while remembered > REMEMBERED || next.recent.len() > REMEMBERED / 64 {
            match next.recent.pop_front() {
                Some(oldest) => remembered -= oldest.len(),
                None => break,
            }
        }
        next
    }

    /// The name of the resource that a change is about, and the object that has it after the change.
    fn after(&self, change: &Change) -> (Arc<str>, Option<Object>) {
        match change {
            Change::Workload(workload) => self.address(&workload.uid, workload.uid.parse().ok()),
            Change::RemoveWorkload(uid) => self.address(uid, uid.parse().ok()),
            Change::Service(service) => {
                let key = service.key();
                self.address(&key.to_string().into(), Some(key))
            }
            Change::RemoveService(key) => self.address(&key.to_string().into(), Some(key.clone())),
            Change::Policy(policy) => {
                let object = Object::Policy(Arc::clone(policy));
                (policy.key().into(), Some(object))
            }
            Change::RemovePolicy(key) => (Arc::clone(key), None),
        }
    }

    /// Nothing keeps a workload's uid from being the name of a service: then the service has it, whichever came first.
    fn address(
        &self,
        name: &Arc<str>,
        key: Option<NamespacedHostname>,
    ) -> (Arc<str>, Option<Object>) {
        let service = key.and_then(|key| self.mesh.service(&key));
        let object = service.map(Object::Service).or_else(|| {
            let workload = self.mesh.workload_by_uid(name);
            workload.map(Object::Workload)
        });
        (Arc::clone(name), object)
    }

    /// The mesh that this was made of.
    pub fn mesh(&self) -> &Snapshot {
        &self.mesh
    }

    /// The resources of a type; none if there is no such type.
    pub(super) fn resources(&self, type_url: &str) -> Option<&Resources> {
        match type_url {
            ADDRESS_TYPE => Some(&self.addresses),
            AUTHORIZATION_TYPE => Some(&self.policies),
            _ => None,
        }
    }

    /// Which one this is, counted from the first.
    pub(super) fn revision(&self) -> u64 {
        self.revision
    }

    /// Names of the resources of a type that changed since a revision. None: that is too long ago.
    pub(super) fn changed_since(
        &self,
        revision: u64,
        type_url: &str,
    ) -> Option<BTreeSet<Arc<str>>> {
        let missed = usize::try_from(self.revision.checked_sub(revision)?).ok()?;
        let first = self.recent.len().checked_sub(missed)?;
        let mut names = BTreeSet::new();
        for revision in self.recent.range(first..) {
            names.extend(match type_url {
                ADDRESS_TYPE => revision.addresses.iter().cloned(),
                _ => revision.policies.iter().cloned(),
            });
        }
        Some(names)
    }

    /// Names of the resources that a client means by a name. For workloads and services that is a uid, `network/ip` or
    /// `namespace/hostname`; a service comes with its endpoints, without which it is of no use.
    pub(super) fn resolve(&self, type_url: &str, name: &str) -> Vec<Arc<str>> {
        if type_url != ADDRESS_TYPE {
            let found = self.policies.get(name);
            return found.into_iter().map(|_| name.into()).collect();
        }
        if let Some(workload) = self.mesh.workload_by_uid(name) {
            return vec![Arc::clone(&workload.uid)];
        }
        let address = name.parse::<NetworkAddress>().ok();
        if let Some(address) = &address
            && let Some(workload) = self.mesh.workload_by_address(address)
        {
            return vec![Arc::clone(&workload.uid)];
        }
        let by_name = || {
            let key: NamespacedHostname = name.parse().ok()?;
            self.mesh.service(&key)
        };
        let service = address
            .and_then(|address| self.mesh.service_by_address(&address))
            .or_else(by_name);
        let Some(service) = service else {
            return Vec::new();
        };
        let endpoints = self.mesh.endpoints(&service).iter();
        std::iter::once(service.key().to_string().into())
            .chain(endpoints.map(|workload| Arc::clone(&workload.uid)))
            .collect()
    }
}
