//! What the API server said last of the pods of this node and of all namespaces. It is kept while nobody answers, and
//! replaced as a whole when it was listed again: what is not in a new list is gone.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use inpod_redirect::extent::{BYPASS_INBOUND, Extent, VIRTUAL_INTERFACES};

use crate::cni::{DNS_CAPTURE, truth};

use super::eligibility::{APP, CAPTURE_MODE, Candidate, DATAPLANE_MODE, SIDECAR_STATUS, Words};
use super::tell::{CONDITION, REDIRECTION, Told};

/// Namespace and name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Key {
    pub(super) namespace: String,
    pub(super) name: String,
}

impl Key {
    pub(super) fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// What counts of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct KubernetesPod {
    pub(super) key: Key,
    /// Of the object.
    pub(super) uid: String,
    /// By which the runtime knows it: another one for a static pod, whose object is only a mirror.
    pub(super) runtime_uid: String,
    pub(super) labels: Words,
    pub(super) annotations: Words,
    pub(super) service_account: String,
    pub(super) host_network: bool,
    pub(super) ended: bool,
    pub(super) addresses: Vec<IpAddr>,
    /// What an agent has told of it.
    pub(super) told: Told,
}

/// On a mirror: the UID that the kubelet and the runtime use.
const MIRROR: &str = "kubernetes.io/config.mirror";

impl KubernetesPod {
    /// None for an object without a name, which no server sends.
    pub(super) fn of(pod: &k8s_openapi::api::core::v1::Pod) -> Option<Self> {
        let only = |words: &Option<Words>, wanted: &[&str]| {
            let words = words.iter().flatten();
            let wanted = words.filter(|(key, _)| wanted.contains(&key.as_str()));
            wanted.map(|(k, v)| (k.clone(), v.clone())).collect()
        };
        let metadata = &pod.metadata;
        let spec = pod.spec.as_ref();
        let status = pod.status.as_ref();
        let uid = metadata.uid.clone()?;
        let annotation = |key: &str| metadata.annotations.as_ref()?.get(key).cloned();
        let listed = status.and_then(|status| status.pod_ips.as_ref());
        let listed = listed.into_iter().flatten().map(|ip| ip.ip.as_str());
        let first = status.and_then(|status| status.pod_ip.as_deref());
        let mut addresses: Vec<IpAddr> = first
            .into_iter()
            .chain(listed)
            .filter_map(|ip| ip.parse().ok())
            .collect();
        let mut seen = std::collections::BTreeSet::new();
        addresses.retain(|address| seen.insert(*address));
        let conditions = status.and_then(|status| status.conditions.as_ref());
        let condition = conditions
            .into_iter()
            .flatten()
            .find(|c| c.type_ == CONDITION);
        Some(Self {
            key: Key::new(metadata.namespace.as_deref()?, metadata.name.as_deref()?),
            runtime_uid: annotation(MIRROR).unwrap_or_else(|| uid.clone()),
            uid,
            labels: only(
                &metadata.labels,
                &[DATAPLANE_MODE, CAPTURE_MODE, APP[0], APP[1]],
            ),
            annotations: only(
                &metadata.annotations,
                &[
                    SIDECAR_STATUS,
                    DNS_CAPTURE,
                    BYPASS_INBOUND,
                    VIRTUAL_INTERFACES,
                ],
            ),
            service_account: spec
                .and_then(|spec| spec.service_account_name.clone())
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| "default".to_owned()),
            host_network: spec.and_then(|spec| spec.host_network).unwrap_or(false),
            ended: status
                .and_then(|status| status.phase.as_deref())
                .is_some_and(|phase| ["Succeeded", "Failed"].contains(&phase)),
            addresses,
            told: Told {
                redirection: annotation(REDIRECTION),
                condition: condition.map(|condition| {
                    let text = |text: &Option<String>| text.clone().unwrap_or_default();
                    (
                        condition.status == "True",
                        text(&condition.reason),
                        text(&condition.message),
                    )
                }),
            },
        })
    }

    /// What it says of its DNS queries, if it says a truth value.
    pub(super) fn dns_capture(&self) -> Option<bool> {
        truth(self.annotations.get(DNS_CAPTURE)?)
    }

    /// What it says of how far its capture reaches; a truth value that is none says nothing.
    pub(super) fn extent(&self) -> Extent {
        let said = |key| self.annotations.get(key).map(String::as_str);
        let bypass_inbound = said(BYPASS_INBOUND).and_then(truth);
        Extent::of(bypass_inbound, said(VIRTUAL_INTERFACES))
    }

    /// What is judged of it.
    pub(super) fn candidate<'a>(&'a self, namespace_labels: &'a Words) -> Candidate<'a> {
        Candidate {
            namespace: &self.key.namespace,
            name: &self.key.name,
            namespace_labels,
            labels: &self.labels,
            annotations: &self.annotations,
            host_network: self.host_network,
            ended: self.ended,
        }
    }

    /// Whether somebody else changed something, and not only an agent what it had told.
    fn differs_from(&self, other: &Self) -> bool {
        let mut other = other.clone();
        other.told = self.told.clone();
        *self != other
    }
}

/// How much a change is to the pod that it is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing that counts.
    None,
    /// What an agent told of it, or a repetition.
    Echo,
    /// Anything else.
    Real,
}

#[derive(Debug, Default)]
struct State {
    pods: BTreeMap<Key, KubernetesPod>,
    namespaces: BTreeMap<String, Words>,
    /// Lists that are being received.
    new_pods: BTreeMap<Key, KubernetesPod>,
    new_namespaces: BTreeMap<String, Words>,
    pods_listed: bool,
    namespaces_listed: bool,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct Known(Mutex<State>);

impl Known {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether both lists were received once.
    pub(super) fn is_synced(&self) -> bool {
        let state = self.lock();
        state.pods_listed && state.namespaces_listed
    }

    pub(super) fn pod(&self, key: &Key) -> Option<KubernetesPod> {
        self.lock().pods.get(key).cloned()
    }

    pub(super) fn namespace(&self, name: &str) -> Option<Words> {
        self.lock().namespaces.get(name).cloned()
    }

    pub(super) fn keys(&self) -> Vec<Key> {
        self.lock().pods.keys().cloned().collect()
    }

    pub(super) fn keys_in(&self, namespace: &str) -> Vec<Key> {
        let state = self.lock();
        let keys = state.pods.keys();
        keys.filter(|key| key.namespace == namespace)
            .cloned()
            .collect()
    }

    pub(super) fn put_pod(&self, pod: KubernetesPod) -> Change {
        let mut state = self.lock();
        let key = pod.key.clone();
        let before = state.pods.insert(key, pod.clone());
        match before {
            Some(before) if before == pod => Change::None,
            Some(before) if !pod.differs_from(&before) => Change::Echo,
            _ => Change::Real,
        }
    }

    /// Remembers what was told of a pod, before the server says so.
    pub(super) fn note_told(&self, key: &Key, uid: &str, told: Told) {
        let mut state = self.lock();
        if let Some(pod) = state.pods.get_mut(key).filter(|pod| pod.uid == uid) {
            pod.told = told;
        }
    }

    /// Forgets a pod, unless another one has its name already.
    pub(super) fn drop_pod(&self, key: &Key, uid: &str) {
        let mut state = self.lock();
        if state.pods.get(key).is_some_and(|pod| pod.uid == uid) {
            state.pods.remove(key);
        }
    }

    /// Returns whether it is something else than before.
    pub(super) fn put_namespace(&self, name: &str, labels: Words) -> bool {
        let mut state = self.lock();
        let before = state.namespaces.insert(name.to_owned(), labels.clone());
        before.as_ref() != Some(&labels)
    }

    pub(super) fn drop_namespace(&self, name: &str) {
        self.lock().namespaces.remove(name);
    }

    pub(super) fn begin_pods(&self) {
        self.lock().new_pods.clear();
    }

    pub(super) fn list_pod(&self, pod: KubernetesPod) {
        self.lock().new_pods.insert(pod.key.clone(), pod);
    }

    pub(super) fn end_pods(&self) {
        let mut state = self.lock();
        state.pods = std::mem::take(&mut state.new_pods);
        state.pods_listed = true;
    }

    pub(super) fn begin_namespaces(&self) {
        self.lock().new_namespaces.clear();
    }

    pub(super) fn list_namespace(&self, name: &str, labels: Words) {
        self.lock().new_namespaces.insert(name.to_owned(), labels);
    }

    pub(super) fn end_namespaces(&self) {
        let mut state = self.lock();
        state.namespaces = std::mem::take(&mut state.new_namespaces);
        state.namespaces_listed = true;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use serde_json::{Value, json};

    use super::*;

    fn pod(value: Value) -> KubernetesPod {
        let pod = serde_json::from_value(value).unwrap();
        KubernetesPod::of(&pod).unwrap()
    }

    fn object() -> Value {
        json!({
            "metadata": {"name": "till", "namespace": "shop", "uid": "u1", "labels": {"app": "till", "x": "y"}},
            "spec": {"containers": [], "serviceAccountName": "till"},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
        })
    }

    #[test]
    fn what_counts_of_a_pod_is_read() {
        let plain = pod(object());
        assert_eq!(
            plain.addresses,
            ["10.0.0.1", "fd00::1"].map(|a| a.parse::<IpAddr>().unwrap())
        );
        assert_eq!((plain.runtime_uid.as_str(), plain.ended), ("u1", false));
        assert_eq!(plain.labels.len(), 1, "{:?}", plain.labels);
        let mut mirror = object();
        mirror["metadata"]["annotations"] = json!({MIRROR: "hash", REDIRECTION: "enabled"});
        mirror["status"] = json!({"phase": "Failed", "conditions": [
            {"type": CONDITION, "status": "True", "reason": "Proven"}]});
        let mirror = pod(mirror);
        assert_eq!(
            (
                mirror.uid.as_str(),
                mirror.runtime_uid.as_str(),
                mirror.ended
            ),
            ("u1", "hash", true)
        );
        assert_eq!(mirror.told.redirection.as_deref(), Some("enabled"));
        assert_eq!(
            mirror.told.condition,
            Some((true, "Proven".to_owned(), String::new()))
        );
    }

    #[test]
    fn how_far_a_capture_reaches_is_read() {
        assert!(pod(object()).extent().is_usual());
        let mut annotated = object();
        annotated["metadata"]["annotations"] =
            json!({BYPASS_INBOUND: "true", VIRTUAL_INTERFACES: "br0, br1", "other": "x"});
        let annotated = pod(annotated);
        assert_eq!(annotated.extent(), Extent::of(Some(true), Some("br0,br1")));
        assert_eq!(annotated.annotations.len(), 2, "the rest does not count");
        let mut wrong = object();
        wrong["metadata"]["annotations"] = json!({BYPASS_INBOUND: "perhaps"});
        assert!(pod(wrong).extent().is_usual());
    }

    #[test]
    fn an_agents_own_words_are_an_echo() {
        let known = Known::default();
        assert_eq!(known.put_pod(pod(object())), Change::Real);
        assert_eq!(known.put_pod(pod(object())), Change::None);
        let mut told = object();
        told["metadata"]["annotations"] = json!({REDIRECTION: "enabled"});
        assert_eq!(known.put_pod(pod(told.clone())), Change::Echo);
        told["metadata"]["labels"] = json!({DATAPLANE_MODE: "none"});
        assert_eq!(known.put_pod(pod(told)), Change::Real);
    }

    #[test]
    fn a_new_list_replaces_all_and_a_late_deletion_spares_the_successor() {
        let known = Known::default();
        known.begin_pods();
        known.list_pod(pod(object()));
        assert!(known.keys().is_empty(), "half a list is none");
        known.end_pods();
        assert!(!known.is_synced());
        known.begin_namespaces();
        known.end_namespaces();
        assert!(known.is_synced());
        let key = Key::new("shop", "till");
        known.drop_pod(&key, "u0");
        assert!(known.pod(&key).is_some());
        known.begin_pods();
        known.end_pods();
        assert!(known.pod(&key).is_none());
    }
}
