//! The pods that this node's agent is responsible for, kept on disk so that a restarted agent knows them: one file per
//! pod, so that many pods at once do not wait for each other.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock};

use host_net::journal::{boot_id, forget_incomplete};
use host_net::netns::{Netns, NetnsId};
use inpod_redirect::extent::Extent;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::options::Capture;

/// Suffix of a pod's file.
const SUFFIX: &str = ".json";

/// How far a pod's enrolment has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    /// Being enrolled. After a restart: its enrolment was never confirmed, so its sandbox does not start.
    Pending,
    /// Listeners stand and the redirect is in place.
    Captured,
    /// Captures nothing any more; what was captured before goes on for a time.
    Draining,
    /// Being unenrolled, or something could not be taken away yet.
    Leaving,
}

impl std::fmt::Display for PodState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            PodState::Pending => "pending",
            PodState::Captured => "captured",
            PodState::Draining => "draining",
            PodState::Leaving => "leaving",
        })
    }
}

/// One pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pod {
    /// Kubernetes UID, or the container id where there is none.
    pub uid: String,
    /// Name.
    pub name: String,
    /// Namespace.
    pub namespace: String,
    /// Service account.
    pub service_account: String,
    /// Addresses.
    pub addresses: Vec<IpAddr>,
    /// Path of its network namespace, as the runtime gave it.
    pub netns: PathBuf,
    /// Identity of that namespace at enrolment.
    pub netns_id: NetnsId,
    /// Sandbox id of the CNI attachment.
    pub container_id: String,
    /// Network of the CNI attachment; empty where the plugin does not say.
    #[serde(default)]
    pub network: String,
    /// Interface of the CNI attachment; empty where the plugin does not say.
    #[serde(default)]
    pub if_name: String,
    /// Whether its DNS queries are captured, where it says so itself; else as the agent has it for all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dns_capture: Option<bool>,
    /// How far its capture reaches.
    #[serde(flatten)]
    pub extent: Extent,
    /// How it is captured.
    pub mode: Capture,
    /// How far.
    pub state: PodState,
    /// Whether it was running when it was enrolled: then it has connections that go on uncaptured.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub live: bool,
    /// Whether those connections have ended since.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub settled: bool,
    /// While it drains: when that ends, in seconds since 1970.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drains_until: Option<u64>,
    /// The capture that it had before, while that still carries connections; and while it changes, the one that it may have
    /// got some by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub leaving: Option<Leaving>,
    /// Whether it is captured because a file names it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub from_file: bool,
}

/// A capture that takes nothing new of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leaving {
    /// Which.
    pub capture: Capture,
    /// When its last connections are cut, in seconds since 1970.
    pub until: u64,
}

impl Pod {
    /// Every capture that has objects of this pod.
    pub fn captures(&self) -> impl Iterator<Item = Capture> + '_ {
        let leaving = self.leaving.iter().map(|leaving| leaving.capture);
        std::iter::once(self.mode).chain(leaving)
    }

    /// `namespace/name`.
    pub fn qualified_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    /// Its IPv4 addresses: what both captures redirect.
    pub fn ipv4(&self) -> impl Iterator<Item = Ipv4Addr> + '_ {
        self.addresses.iter().filter_map(|address| match address {
            IpAddr::V4(address) => Some(*address),
            IpAddr::V6(_) => None,
        })
    }

    /// Opens its namespace; an error if the path names another one than at enrolment.
    pub fn open_netns(&self) -> io::Result<Netns> {
        let netns = Netns::open(&self.netns)?;
        if netns.id() == self.netns_id {
            Ok(netns)
        } else {
            Err(io::Error::other(format!(
                "{} is {} now, but pod {} was enrolled with {}",
                self.netns.display(),
                netns.id(),
                self.qualified_name(),
                self.netns_id
            )))
        }
    }
}

/// A pod as its file has it.
#[derive(Serialize, Deserialize)]
struct Stored {
    /// The kernel's boot identifier: no namespace survives a reboot, but its path and number may come again.
    boot_id: String,
    pod: Pod,
}

/// Why an operator's word names no pod.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotFound {
    /// None has it.
    #[error("no pod {0:?} is enrolled on this node: `ambidex get pods` lists those that are")]
    Unknown(String),
    /// Several have it.
    #[error("{0:?} names several pods: {1}: give the UID")]
    Ambiguous(String, String),
}

/// All pods, by UID.
#[derive(Debug)]
pub struct Pods {
    dir: PathBuf,
    pods: Mutex<BTreeMap<String, Pod>>,
    follower: OnceLock<mpsc::UnboundedSender<Pod>>,
}

impl Pods {
    /// Reads what an earlier agent left in `state_dir`. Pods of an earlier boot are forgotten.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join("pods");
        let at = |path: &Path, error: &dyn std::fmt::Display| {
            io::Error::other(format!("{}: {error}", path.display()))
        };
        fs::create_dir_all(&dir).map_err(|e| at(&dir, &e))?;
        forget_incomplete(&dir, SUFFIX)?;
        let (mut pods, boot) = (BTreeMap::new(), boot_id());
        for entry in fs::read_dir(&dir).map_err(|e| at(&dir, &e))? {
            let path = entry.map_err(|e| at(&dir, &e))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if !name.is_some_and(|name| name.ends_with(SUFFIX) && !name.starts_with('.')) {
                continue;
            }
            let text = fs::read(&path).map_err(|e| at(&path, &e))?;
            let stored: Stored = serde_json::from_slice(&text).map_err(|e| {
                at(
                    &path,
                    &format!("{e}: remove it to take this pod's capture away and start without it"),
                )
            })?;
            if stored.boot_id == boot {
                pods.insert(stored.pod.uid.clone(), stored.pod);
            } else {
                fs::remove_file(&path).map_err(|e| at(&path, &e))?;
            }
        }
        Ok(Self {
            dir,
            pods: Mutex::new(pods),
            follower: OnceLock::new(),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Pod>> {
        self.pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Every pod, sorted by namespace and name.
    pub fn all(&self) -> Vec<Pod> {
        let mut pods: Vec<Pod> = self.lock().values().cloned().collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name, &a.uid).cmp(&(&b.namespace, &b.name, &b.uid)));
        pods
    }

    /// The pod with this UID.
    pub fn get(&self, uid: &str) -> Option<Pod> {
        self.lock().get(uid).cloned()
    }

    /// The pod that an operator means: by UID, else `namespace/name`, else a name that is unique on this node.
    pub fn find(&self, wanted: &str) -> Result<Pod, NotFound> {
        if let Some(pod) = self.get(wanted) {
            return Ok(pod);
        }
        let pods = self.all();
        let matches: Vec<&Pod> = pods
            .iter()
            .filter(|pod| pod.qualified_name() == wanted || pod.name == wanted)
            .collect();
        match matches[..] {
            [] => Err(NotFound::Unknown(wanted.to_owned())),
            [pod] => Ok(pod.clone()),
            _ => {
                let all: Vec<String> = matches
                    .iter()
                    .map(|pod| format!("{} ({})", pod.qualified_name(), pod.uid))
                    .collect();
                Err(NotFound::Ambiguous(wanted.to_owned(), all.join(", ")))
            }
        }
    }

    /// Adds or replaces a pod, on disk first.
    pub fn put(&self, pod: Pod) -> io::Result<()> {
        let path = self.path(&pod.uid);
        let aside = self.dir.join(format!(".{}.tmp", pod.uid));
        let stored = Stored {
            boot_id: boot_id(),
            pod,
        };
        let text = serde_json::to_vec_pretty(&stored)?;
        // Not waited for on the disk: see `host_net::journal`.
        fs::write(&aside, &text)
            .and_then(|()| fs::rename(&aside, &path))
            .map_err(|error| io::Error::other(format!("{}: {error}", path.display())))?;
        self.announce(&stored.pod);
        self.lock().insert(stored.pod.uid.clone(), stored.pod);
        Ok(())
    }

    /// Removes a pod, on disk first.
    pub fn remove(&self, uid: &str) -> io::Result<()> {
        let path = self.path(uid);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io::Error::other(format!("{}: {error}", path.display())));
            }
            _ => {}
        }
        let removed = self.lock().remove(uid);
        removed.iter().for_each(|pod| self.announce(pod));
        Ok(())
    }

    /// Has every pod sent that is put or removed from here on. There is one follower; a second one hears nothing.
    #[cfg(feature = "kubernetes")]
    pub(super) fn follow(&self) -> mpsc::UnboundedReceiver<Pod> {
        let (follower, changes) = mpsc::unbounded_channel();
        let _ = self.follower.set(follower);
        changes
    }

    fn announce(&self, pod: &Pod) {
        if let Some(follower) = self.follower.get() {
            // Whoever follows ends with the agent.
            let _ = follower.send(pod.clone());
        }
    }

    fn path(&self, uid: &str) -> PathBuf {
        self.dir.join(format!("{uid}{SUFFIX}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(uid: &str, namespace: &str, name: &str) -> Pod {
        Pod {
            uid: uid.to_owned(),
            name: name.to_owned(),
            namespace: namespace.to_owned(),
            service_account: "default".to_owned(),
            addresses: vec!["10.244.1.10".parse().unwrap(), "fd00::1".parse().unwrap()],
            netns: PathBuf::from("/proc/self/ns/net"),
            netns_id: NetnsId { dev: 0, ino: 0 },
            container_id: String::new(),
            network: String::new(),
            if_name: String::new(),
            dns_capture: None,
            extent: Extent::default(),
            mode: Capture::Inpod,
            state: PodState::Pending,
            live: false,
            settled: false,
            drains_until: None,
            leaving: None,
            from_file: false,
        }
    }

    #[test]
    fn pods_survive_a_restart_and_are_found_by_every_name() {
        let directory = tempfile::tempdir().unwrap();
        let pods = Pods::open(directory.path()).unwrap();
        pods.put(pod("u2", "b", "x")).unwrap();
        pods.put(pod("u1", "a", "x")).unwrap();
        let again = Pods::open(directory.path()).unwrap();
        assert_eq!(again.all(), [pod("u1", "a", "x"), pod("u2", "b", "x")]);
        assert_eq!(again.find("b/x").unwrap().uid, "u2");
        assert_eq!(again.find("u1").unwrap().namespace, "a");
        let ambiguous = again.find("x").unwrap_err().to_string();
        assert!(ambiguous.contains("a/x (u1), b/x (u2)"), "{ambiguous}");
        again.remove("u1").unwrap();
        again.remove("u1").unwrap();
        let rest = Pods::open(directory.path()).unwrap();
        assert_eq!(rest.find("x").unwrap().uid, "u2");
        assert_eq!(rest.find("u1"), Err(NotFound::Unknown("u1".to_owned())));
    }

    #[test]
    fn pods_of_an_earlier_boot_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        Pods::open(directory.path())
            .unwrap()
            .put(pod("u1", "a", "x"))
            .unwrap();
        let file = directory.path().join("pods/u1.json");
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replace(&boot_id(), "another")).unwrap();
        assert!(Pods::open(directory.path()).unwrap().all().is_empty());
        assert!(!file.exists());
    }

    #[test]
    fn a_damaged_file_is_reported_with_its_name_and_a_way_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("pods")).unwrap();
        fs::write(directory.path().join("pods/u7.json"), "{").unwrap();
        let error = Pods::open(directory.path()).unwrap_err().to_string();
        assert!(
            error.contains("pods/u7.json") && error.contains("remove it"),
            "{error}"
        );
    }

    #[test]
    fn a_namespace_that_was_replaced_is_not_entered() {
        assert!(
            pod("u", "a", "x")
                .open_netns()
                .unwrap_err()
                .to_string()
                .contains("was enrolled with")
        );
    }
}
