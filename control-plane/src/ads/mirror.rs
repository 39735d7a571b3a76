//! What the client holds of the control plane's resources, and what a response changes.

use std::collections::HashMap;
use std::sync::Arc;

use shared_proxy::state::{Change, NamespacedHostname, NetworkRange};

use crate::convert::{self, Object, Texts, Unusable};
use crate::messages::discovery::{DeltaDiscoveryResponse, Resource};
use crate::messages::{ADDRESS_TYPE, AUTHORIZATION_TYPE};

/// The resources held, by type and name. The objects themselves are in the store.
#[derive(Debug, Default)]
pub(super) struct Mirror {
    addresses: HashMap<Arc<str>, Held>,
    policies: HashMap<Arc<str>, Held>,
    texts: Texts,
    /// Whether somebody waits for single resources, so that [`Outcome::answered`] is wanted.
    on_demand: bool,
}

#[derive(Debug)]
struct Held {
    version: Arc<str>,
    key: Key,
}

/// The object in the store that a resource is.
#[derive(Debug, Clone, PartialEq)]
enum Key {
    Workload(Arc<str>),
    Service(NamespacedHostname),
    Policy(Arc<str>),
}

impl Key {
    fn of(object: &Object) -> Self {
        match object {
            Object::Workload(workload) => Self::Workload(Arc::clone(&workload.uid)),
            Object::Service(service) => Self::Service(service.key()),
            Object::Policy(policy) => Self::Policy(policy.key().into()),
        }
    }

    fn removal(self) -> Change {
        match self {
            Self::Workload(uid) => Change::RemoveWorkload(uid),
            Self::Service(key) => Change::RemoveService(key),
            Self::Policy(key) => Change::RemovePolicy(key),
        }
    }
}

/// What a response comes to.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// To be made in the store, in this order.
    pub(super) changes: Vec<Change>,
    /// Names of resources that are not usable, and why.
    pub(super) refused: Vec<(String, String)>,
    /// Names under which somebody may have asked for what this response is about.
    pub(super) answered: Vec<String>,
    /// Ranges of addresses of which somebody may have asked for one.
    pub(super) ranges: Vec<NetworkRange>,
    /// Names of what does not exist.
    pub(super) absent: Vec<String>,
}

impl Mirror {
    pub(super) fn new(on_demand: bool) -> Self {
        Self {
            on_demand,
            ..Self::default()
        }
    }

    /// Takes in a response. None: it is of a type that was not asked for.
    ///
    /// A resource that is not usable leaves what was held under its name as it was.
    pub(super) fn take(&mut self, response: DeltaDiscoveryResponse) -> Option<Outcome> {
        let (held, convert): (_, fn(_, &mut Texts) -> _) = match response.type_url.as_str() {
            ADDRESS_TYPE => (&mut self.addresses, convert::address),
            AUTHORIZATION_TYPE => (&mut self.policies, convert::policy),
            _ => return None,
        };
        let mut outcome = Outcome::default();
        for resource in response.resources {
            let Resource {
                version,
                resource,
                name,
                ..
            } = resource;
            let object = match resource {
                None => Err(Unusable::Missing("resource")),
                Some(any) if any.type_url != response.type_url => Err(Unusable::Type(any.type_url)),
                Some(any) => convert(any.value, &mut self.texts),
            };
            let object = match object {
                Ok(object) => object,
                Err(error) => {
                    outcome.refused.push((name, error.to_string()));
                    continue;
                }
            };
            let key = Key::of(&object);
            // One copy of what is nearly always the same text.
            let name: Arc<str> = match &key {
                Key::Workload(uid) if **uid == *name => Arc::clone(uid),
                Key::Policy(key) if **key == *name => Arc::clone(key),
                _ => name.into(),
            };
            if self.on_demand {
                outcome.answered.push(name.to_string());
                outcome.answered.extend(names_of(&object));
                if let Object::Service(service) = &object {
                    outcome.ranges.extend(service.cidr_vips.iter().cloned());
                }
            }
            let version = version.into();
            let previous = held.insert(
                name,
                Held {
                    version,
                    key: key.clone(),
                },
            );
            // The name stands for another object from here on.
            if let Some(previous) = previous.filter(|previous| previous.key != key) {
                outcome.changes.push(previous.key.removal());
            }
            outcome.changes.push(match object {
                Object::Workload(workload) => Change::Workload(workload),
                Object::Service(service) => Change::Service(service),
                Object::Policy(policy) => Change::Policy(policy),
            });
        }
        for name in response.removed_resources {
            if let Some(previous) = held.remove(&*name) {
                outcome.changes.push(previous.key.removal());
            }
            if self.on_demand {
                outcome.absent.push(name);
            }
        }
        Some(outcome)
    }

    /// Versions of what is held of a type, by name.
    pub(super) fn versions(&self, type_url: &str) -> HashMap<String, String> {
        let held = match type_url {
            ADDRESS_TYPE => &self.addresses,
            AUTHORIZATION_TYPE => &self.policies,
            _ => return HashMap::new(),
        };
        held.iter()
            .map(|(name, held)| (name.to_string(), held.version.to_string()))
            .collect()
    }
}

/// The addresses under which an object can be asked for.
fn names_of(object: &Object) -> Vec<String> {
    match object {
        Object::Workload(workload) => workload
            .network_addresses()
            .map(|address| address.to_string())
            .collect(),
        Object::Service(service) => service.vips.iter().map(ToString::to_string).collect(),
        Object::Policy(_) => Vec::new(),
    }
}
