//! What a round found.

use std::collections::{BTreeMap, BTreeSet};

use host_net::engine::Finding;

use crate::agent::removal;

/// What is wrong, and of whom.
#[derive(Default)]
pub(super) struct Found {
    /// Of the node itself.
    pub(super) node: Vec<String>,
    /// Objects of the node's own plans.
    pub(super) node_objects: Vec<String>,
    /// Of pods, by UID; not their objects.
    pub(super) pods: BTreeMap<String, Vec<String>>,
    /// Objects of pods' plans, by UID.
    pub(super) pod_objects: BTreeMap<String, Vec<String>>,
    /// Pods of which something is missing that could not be put back.
    pub(super) unmended: BTreeSet<String>,
    /// Pods whose connections nobody takes although the proxy serves them: they may pass beside it.
    pub(super) passed_by: BTreeSet<String>,
    /// Pods whose probe came through.
    pub(super) proven: BTreeSet<String>,
    /// Whether a pod's namespace is gone or another one.
    pub(super) leftovers: bool,
}

impl Found {
    pub(super) fn add(&mut self, uid: &str, findings: Vec<String>) {
        if !findings.is_empty() {
            self.pods
                .entry(uid.to_owned())
                .or_default()
                .extend(findings);
        }
    }

    pub(super) fn add_object(&mut self, record: &str, finding: &Finding) {
        let text = finding.to_string();
        match removal::pod_of_record(record) {
            Some(uid) => self
                .pod_objects
                .entry(uid.to_owned())
                .or_default()
                .push(text),
            None => self.node_objects.push(text),
        }
    }

    /// Whether nothing is known to be wrong with a pod.
    pub(super) fn is_well(&self, uid: &str) -> bool {
        !self.pods.contains_key(uid) && !self.pod_objects.contains_key(uid)
    }
}
