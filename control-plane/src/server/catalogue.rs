//! A mesh as resources: encoded once, with versions.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use bytes::Bytes;
use shared_proxy::state::{NamespacedHostname, NetworkAddress, Snapshot};

use crate::convert::Object;
use crate::messages::discovery::Resource;
use crate::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE, Any};

/// All resources of a mesh.
#[derive(Debug, Default)]
pub struct Catalogue {
    mesh: Snapshot,
    addresses: Resources,
    policies: Resources,
}

/// Resources of one type, by name.
pub(super) type Resources = BTreeMap<Arc<str>, Encoded>;

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
        let encode = |object: Object| {
            let name: Arc<str> = object.resource_name().into();
            (name, Encoded::new(object.encode()))
        };
        let workloads = mesh.workloads().cloned().map(Object::Workload);
        let services = mesh.services().cloned().map(Object::Service);
        let addresses = workloads.chain(services).map(encode).collect();
        let policies = mesh.policies().cloned().map(Object::Policy);
        let policies = policies.map(encode).collect();
        Self {
            mesh,
            addresses,
            policies,
        }
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

    /// Names of the resources that a client means by a name. For workloads and services that is a uid, `network/ip` or
    /// `namespace/hostname`; a service comes with its endpoints, without which it is of no use.
    pub(super) fn resolve(&self, type_url: &str, name: &str) -> Vec<Arc<str>> {
        if type_url != ADDRESS_TYPE {
            let found = self.policies.get_key_value(name);
            return found
                .into_iter()
                .map(|(name, _)| Arc::clone(name))
                .collect();
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
