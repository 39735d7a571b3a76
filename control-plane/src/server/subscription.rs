//! What one client follows of one type, and what it has been sent. No I/O.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use super::catalogue::{Catalogue, Encoded, Resources};
use crate::ads::WILDCARD;
use crate::messages::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource};

/// One type on one stream.
#[derive(Debug)]
pub(super) struct Subscription {
    type_url: String,
    begun: bool,
    /// Whether all resources are followed.
    wildcard: bool,
    /// Those that are followed by name.
    names: BTreeSet<String>,
    /// Names that must be answered, whether or not there is anything to say.
    asked: BTreeSet<String>,
    /// The first answer to a wildcard is awaited even if it is empty.
    first_due: bool,
    /// What the client holds: names and versions.
    held: HashMap<Arc<str>, Arc<str>>,
    /// Nonce of the response whose answer is awaited. Until then nothing is sent: what changes meanwhile goes together.
    outstanding: Option<String>,
    /// The catalogue's revision with which `held` agrees. None: the client asked for something since.
    seen: Option<u64>,
}

/// What a client said about the last response.
#[derive(Debug, PartialEq)]
pub(super) enum Reply {
    /// Nothing, or about an older response.
    None,
    /// It took it.
    Ack,
    /// It refused some or all of it.
    Nack(String),
}

impl Subscription {
    pub(super) fn new(type_url: &str) -> Self {
        Self {
            type_url: type_url.to_owned(),
            begun: false,
            wildcard: false,
            names: BTreeSet::new(),
            asked: BTreeSet::new(),
            first_due: false,
            held: HashMap::new(),
            outstanding: None,
            seen: None,
        }
    }

    /// Takes in a request of this type.
    pub(super) fn request(&mut self, request: DeltaDiscoveryRequest) -> Reply {
        let first = !std::mem::replace(&mut self.begun, true);
        let nothing = request.resource_names_subscribe.is_empty()
            && request.resource_names_unsubscribe.is_empty();
        if first || !nothing {
            self.seen = None;
        }
        if first {
            let held = request.initial_resource_versions.into_iter();
            self.held = held
                .map(|(name, version)| (name.into(), version.into()))
                .collect();
        }
        if first && nothing {
            self.wildcard = true;
        }
        for name in request.resource_names_subscribe {
            if name == WILDCARD {
                self.wildcard = true;
            } else {
                self.asked.insert(name.clone());
                self.names.insert(name);
            }
        }
        for name in request.resource_names_unsubscribe {
            if name == WILDCARD {
                self.wildcard = false;
            } else {
                self.asked.remove(&name);
                self.names.remove(&name);
            }
        }
        self.first_due |= first && self.wildcard;
        if request.response_nonce.is_empty()
            || self.outstanding.as_ref() != Some(&request.response_nonce)
        {
            return Reply::None;
        }
        self.outstanding = None;
        match request.error_detail {
            None => Reply::Ack,
            Some(status) => Reply::Nack(status.message),
        }
    }

    /// The next response, if there is something to say and the last one has been answered.
    pub(super) fn next(
        &mut self,
        catalogue: &Catalogue,
        nonce: impl FnOnce() -> String,
    ) -> Option<DeltaDiscoveryResponse> {
        let resources = catalogue.resources(&self.type_url)?;
        if self.outstanding.is_some() || !self.begun {
            return None;
        }
        let changed = self.seen.and_then(|seen| {
            let changed = catalogue.changed_since(seen, &self.type_url);
            // Which names a name stands for may change with any resource.
            changed.filter(|changed| self.names.is_empty() || changed.is_empty())
        });
        let (changed, removed) = match changed {
            Some(changed) => self.among(resources, &changed),
            None => self.among_all(catalogue, resources),
        };
        self.seen = Some(catalogue.revision());
        let due = std::mem::take(&mut self.first_due);
        if changed.is_empty() && removed.is_empty() && !due {
            return None;
        }
        let nonce = nonce();
        self.outstanding = Some(nonce.clone());
        Some(DeltaDiscoveryResponse {
            system_version_info: String::new(),
            resources: changed,
            type_url: self.type_url.clone(),
            nonce,
            removed_resources: removed.into_iter().collect(),
        })
    }

    /// What to send and what to remove, if nothing but these resources changed since the last look.
    fn among(
        &mut self,
        resources: &Resources,
        changed: &BTreeSet<Arc<str>>,
    ) -> (Vec<Resource>, BTreeSet<String>) {
        let mut sent = Vec::new();
        let mut removed = BTreeSet::new();
        for name in changed {
            match resources.get(name) {
                Some(resource) if self.wildcard => {
                    if self.held.get(name) != Some(&resource.version) {
                        sent.push(resource.message(name, &self.type_url));
                        self.hold(name, resource);
                    }
                }
                Some(_) => {}
                None => {
                    if self.held.remove(name).is_some() {
                        removed.insert(name.to_string());
                    }
                }
            }
        }
        (sent, removed)
    }

    /// The same by comparing all that the client follows with all that it holds.
    fn among_all(
        &mut self,
        catalogue: &Catalogue,
        resources: &Resources,
    ) -> (Vec<Resource>, BTreeSet<String>) {
        let mut removed: BTreeSet<String> = BTreeSet::new();
        let mut again: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut wanted: BTreeSet<Arc<str>> = BTreeSet::new();
        if self.wildcard {
            wanted.extend(resources.iter().map(|(name, _)| Arc::clone(name)));
        }
        for name in &self.names {
            let found = catalogue.resolve(&self.type_url, name);
            if self.asked.contains(name) {
                if found.is_empty() {
                    removed.insert(name.clone());
                }
                again.extend(found.iter().cloned());
            }
            wanted.extend(found);
        }
        let mut sent = Vec::new();
        for name in &wanted {
            let Some(resource) = resources.get(name) else {
                continue;
            };
            if again.contains(name) || self.held.get(name) != Some(&resource.version) {
                sent.push(resource.message(name, &self.type_url));
                self.hold(name, resource);
            }
        }
        self.held.retain(|name, _| {
            if wanted.contains(name) {
                return true;
            }
            // What still exists is only not followed any more.
            if !resources.contains_key(name) {
                removed.insert(name.to_string());
            }
            false
        });
        self.asked.clear();
        (sent, removed)
    }

    fn hold(&mut self, name: &Arc<str>, resource: &Encoded) {
        let version = Arc::clone(&resource.version);
        self.held.insert(Arc::clone(name), version);
    }
}

#[cfg(test)]
mod tests;
