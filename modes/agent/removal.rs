//! Taking away what was made, from the journal: for one pod, or for the whole node. The same with an agent and without
//! one.

use futures_util::StreamExt;
use futures_util::stream;
use host_net::engine;
use host_net::journal::Journal;
use host_net::netns::Netns;

use super::api::Undone;
use super::{Pod, Pods};

/// Records that are undone at the same time. Those of one namespace take turns anyway.
const AT_ONCE: usize = 8;

/// Where a record stands in the order of removal: redirects before what they lead to, so that no connection is led to
/// nobody.
fn rank(name: &str) -> u8 {
    if name.starts_with("pod-") {
        0
    } else if pod_of_record(name).is_some() {
        1
    } else if name.starts_with("host-") {
        2
    } else {
        3
    }
}

/// Names of the records that a pod may have, in the order of removal.
fn records_of(uid: &str) -> [String; 5] {
    [
        format!("pod-{uid}"),
        format!("host-pod-{uid}"),
        format!("proxy-pod-{uid}"),
        // What stops its traffic goes last.
        closing_in_pod(uid),
        closing_on_node(uid),
    ]
}

/// Prefixes of the records of what closes a pod, in its namespace and on the node.
const CLOSING: [&str; 2] = ["closed-", "host-closed-"];

/// Name of the record of what closes a pod in its namespace.
pub(super) fn closing_in_pod(uid: &str) -> String {
    format!("{}{uid}", CLOSING[0])
}

/// Name of the record of what closes a pod on the node.
pub(super) fn closing_on_node(uid: &str) -> String {
    format!("{}{uid}", CLOSING[1])
}

/// The pod that is closed by what this record is about.
pub(super) fn pod_that_is_closed_by(name: &str) -> Option<&str> {
    CLOSING.iter().find_map(|prefix| name.strip_prefix(prefix))
}

/// Whether a record belongs to a pod, and to which.
pub(super) fn pod_of_record(name: &str) -> Option<&str> {
    name.strip_prefix("host-pod-")
        .or_else(|| name.strip_prefix("proxy-pod-"))
        .or_else(|| name.strip_prefix("pod-"))
        .or_else(|| pod_that_is_closed_by(name))
}

/// Undoes one record; `open` are namespaces that the caller holds open and that may be its.
async fn record(name: &str, open: &[Netns], journal: &Journal) -> Undone {
    let netns = match journal.load(name) {
        Ok(None) => return Undone::default(),
        Ok(Some(record)) => open.iter().find(|netns| netns.id() == record.netns),
        // Reported by the undo.
        Err(_) => None,
    };
    let errors = engine::undo(name, netns, journal).await;
    Undone {
        plans: vec![name.to_owned()],
        errors: errors.iter().map(ToString::to_string).collect(),
    }
}

/// Takes a pod's redirect away: in its namespace first, then on the node.
pub(super) async fn of_pod(pod: &Pod, host: Option<&Netns>, journal: &Journal) -> Undone {
    let open: Vec<Netns> = host
        .cloned()
        .into_iter()
        .chain(pod.open_netns().ok())
        .collect();
    let mut undone = Undone::default();
    for name in records_of(&pod.uid) {
        undone = undone.and(record(&name, &open, journal).await);
    }
    undone
}

/// Takes away everything in the journal that `wanted` names.
pub(super) async fn of_records(
    journal: &Journal,
    open: &[Netns],
    wanted: impl Fn(&str) -> bool,
) -> Undone {
    let mut undone = Undone::default();
    let mut names = match journal.list() {
        Ok(names) => names,
        Err(error) => {
            undone.errors.push(error.to_string());
            return undone;
        }
    };
    names.retain(|name| wanted(name));
    names.sort_by_key(|name| rank(name));
    for group in names.chunk_by(|a, b| rank(a) == rank(b)) {
        undone = stream::iter(group.to_vec())
            .map(|name| async move { record(&name, open, journal).await })
            .buffered(AT_ONCE)
            .fold(undone, |all, one| async { all.and(one) })
            .await;
    }
    undone
}

/// Everything on this node, without an agent: what a killed one left. The caller holds the state directory's lock.
pub async fn node_without_agent(journal: &Journal, pods: &Pods) -> Undone {
    let mut undone = of_records(journal, &[], |_| true).await;
    if undone.errors.is_empty() {
        for pod in pods.all() {
            if let Err(error) = pods.remove(&pod.uid) {
                undone.errors.push(error.to_string());
            }
        }
    }
    undone
}

/// One pod, without an agent. The caller holds the state directory's lock.
pub async fn pod_without_agent(pod: &Pod, journal: &Journal, pods: &Pods) -> Undone {
    let mut undone = of_pod(pod, None, journal).await;
    if undone.errors.is_empty()
        && let Err(error) = pods.remove(&pod.uid)
    {
        undone.errors.push(error.to_string());
    }
    undone
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn redirects_go_before_what_they_lead_to() {
        let mut names = [
            "host-inpod",
            "proxy-node",
            "host-node",
            "host-pod-a",
            "host-closed-a",
            "pod-a",
        ];
        names.sort_by_key(|name| rank(name));
        assert_eq!(
            names,
            [
                "pod-a",
                "host-pod-a",
                "host-closed-a",
                "host-inpod",
                "host-node",
                "proxy-node"
            ]
        );
        assert_eq!(pod_of_record("host-pod-a"), Some("a"));
        assert_eq!(pod_of_record("pod-pod-a"), Some("pod-a"));
        assert_eq!(pod_of_record("host-node"), None);
    }
}
