//! The namespaces in which there are objects of ours.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use host_net::iptables::{Variant, choose};
use host_net::netns::Netns;
use host_net::plan::Family;
use host_net::sockets::Listeners;
use host_net::watch::Watch;
use tokio::sync::Notify;
use tokio::task::AbortHandle;
use tokio::time::{Instant, sleep};

use super::SETTLE;
use crate::agent::{Pod, verify};

/// How often rules are looked at of whose changes the kernel tells: it may have lost a message.
pub(super) const TOLD_EVERY: Duration = Duration::from_secs(900);
/// How often those of whose changes it does not.
const UNTOLD_EVERY: Duration = Duration::from_secs(5);

/// One namespace in which there are objects of ours.
pub(super) struct Kept {
    pub(super) netns: Netns,
    dirty: Arc<AtomicBool>,
    /// Hears of changes; none where the kernel does not tell.
    ear: Option<AbortHandle>,
    /// When its rules were last looked at.
    pub(super) looked: Option<Instant>,
    pub(super) every: Duration,
    listeners: Option<Listeners>,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if let Some(ear) = &self.ear {
            ear.abort();
        }
    }
}

impl Kept {
    pub(super) fn new(netns: Netns, heard: &Arc<Notify>) -> Self {
        let dirty = Arc::new(AtomicBool::new(false));
        let told = matches!(choose(&netns, Family::V4), Ok(Variant::Nft));
        let ear = match Watch::new(&netns) {
            Ok(mut watch) => {
                let (dirty, heard) = (Arc::clone(&dirty), Arc::clone(heard));
                let task = tokio::spawn(async move {
                    while watch.changed().await.is_ok() {
                        dirty.store(true, Ordering::Release);
                        heard.notify_one();
                        // A namespace in which something changes all the time is looked at now and then.
                        sleep(SETTLE * 5).await;
                    }
                });
                Some(task.abort_handle())
            }
            Err(error) => {
                tracing::warn!(netns = %netns.id(), %error, "changes in a namespace cannot be listened for; it is looked at more often");
                None
            }
        };
        Self {
            every: if told && ear.is_some() {
                TOLD_EVERY
            } else {
                UNTOLD_EVERY
            },
            netns,
            dirty,
            ear,
            looked: None,
            listeners: None,
        }
    }

    /// Whether something has changed since the last question.
    pub(super) fn take_dirty(&self) -> bool {
        self.dirty.swap(false, Ordering::AcqRel)
    }

    /// Has it looked at in the next round.
    pub(super) fn soil(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether its rules should be looked at although nothing is known to have changed.
    pub(super) fn is_due(&self) -> bool {
        self.looked
            .is_none_or(|looked| looked.elapsed() >= self.every)
    }

    pub(super) fn lacking_listeners(&mut self, wanted: &[u16], families: &[Family]) -> Vec<String> {
        if self.listeners.is_none() {
            self.listeners = Listeners::of(&self.netns).ok();
        }
        match self.listeners.as_ref().map(Listeners::now) {
            Some(Ok(listening)) => verify::lacking(&listening, wanted, families, verify::POD_PLACE),
            Some(Err(error)) => {
                self.listeners = None;
                vec![error.to_string()]
            }
            None => vec!["the kernel cannot be asked who listens".to_owned()],
        }
    }
}

/// Pods' namespaces, held open: opening one costs far more than asking whether its path still leads to it.
#[derive(Default)]
pub(super) struct Namespaces(BTreeMap<String, Netns>);

impl Namespaces {
    /// A pod's namespace, or what is wrong with it.
    pub(super) fn of(&mut self, pod: &Pod) -> io::Result<Netns> {
        let leads_to = std::fs::metadata(&pod.netns).map(|meta| (meta.dev(), meta.ino()));
        if let Some(netns) = self.0.get(&pod.uid)
            && netns.id() == pod.netns_id
            && leads_to.is_ok_and(|found| found == (pod.netns_id.dev, pod.netns_id.ino))
        {
            return Ok(netns.clone());
        }
        self.0.remove(&pod.uid);
        let netns = pod.open_netns()?;
        self.0.insert(pod.uid.clone(), netns.clone());
        Ok(netns)
    }

    /// Closes those of pods that are gone.
    pub(super) fn retain(&mut self, pods: &[Pod]) {
        self.0
            .retain(|uid, _| pods.iter().any(|pod| pod.uid == *uid));
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::agent::PodState;
    use crate::options::Capture;

    #[test]
    fn a_path_that_leads_elsewhere_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        std::os::unix::fs::symlink("/proc/self/ns/net", &first).unwrap();
        let netns = Netns::open(&first).unwrap();
        let pod = Pod {
            uid: "u".to_owned(),
            name: "p".to_owned(),
            namespace: "n".to_owned(),
            service_account: "s".to_owned(),
            addresses: Vec::new(),
            netns: first.clone(),
            netns_id: netns.id(),
            container_id: String::new(),
            network: String::new(),
            if_name: String::new(),
            dns_capture: None,
            extent: inpod_redirect::extent::Extent::default(),
            mode: Capture::Inpod,
            state: PodState::Captured,
            live: false,
            settled: false,
            drains_until: None,
            leaving: None,
            from_file: false,
        };
        let mut namespaces = Namespaces::default();
        assert_eq!(namespaces.of(&pod).unwrap().id(), netns.id());
        assert_eq!(namespaces.of(&pod).unwrap().id(), netns.id());
        std::os::unix::fs::symlink("/proc/self/ns/mnt", &second).unwrap();
        std::fs::rename(&second, &first).unwrap();
        assert!(namespaces.of(&pod).is_err());
        std::fs::remove_file(&first).unwrap();
        assert!(namespaces.of(&pod).is_err());
    }
}
