//! The pods that this node's agent is responsible for, kept on disk so that a restarted agent knows them.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use host_net::netns::{Netns, NetnsId};
use serde::{Deserialize, Serialize};

use crate::options::Capture;

/// How far a pod's enrolment has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    /// Being enrolled, or its proxy has not acknowledged it.
    Pending,
    /// Listeners stand and the redirect is in place.
    Captured,
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
    /// How it is captured.
    pub mode: Capture,
    /// How far.
    pub state: PodState,
}

impl Pod {
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

/// All pods, by UID.
#[derive(Debug)]
pub struct Pods {
    file: PathBuf,
    pods: Mutex<BTreeMap<String, Pod>>,
}

impl Pods {
    /// Reads what an earlier agent left in `state_dir`; a missing file is no pods.
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        std::fs::create_dir_all(state_dir)?;
        let file = state_dir.join("pods.json");
        let pods = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).map_err(|e| {
                io::Error::other(format!(
                    "{}: {e}: remove it to start without pods",
                    file.display()
                ))
            })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(io::Error::other(format!("{}: {error}", file.display()))),
        };
        Ok(Self {
            file,
            pods: Mutex::new(pods),
        })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<String, Pod>> {
        self.pods
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Every pod.
    pub fn all(&self) -> Vec<Pod> {
        self.lock().values().cloned().collect()
    }

    /// The pod with this UID.
    pub fn get(&self, uid: &str) -> Option<Pod> {
        self.lock().get(uid).cloned()
    }

    /// The pod that an operator means: `namespace/name`, a name that is unique on this node, or a UID.
    pub fn find(&self, wanted: &str) -> Option<Pod> {
        let pods = self.lock();
        let mut matches = pods.values().filter(|pod| {
            pod.uid == wanted || pod.qualified_name() == wanted || pod.name == wanted
        });
        let found = matches.next().cloned();
        if matches.next().is_some() {
            None
        } else {
            found
        }
    }

    /// Adds or replaces a pod, on disk too.
    pub fn put(&self, pod: Pod) -> io::Result<()> {
        let mut pods = self.lock();
        pods.insert(pod.uid.clone(), pod);
        self.save(&pods)
    }

    /// Removes a pod, on disk too.
    pub fn remove(&self, uid: &str) -> io::Result<()> {
        let mut pods = self.lock();
        if pods.remove(uid).is_some() {
            self.save(&pods)
        } else {
            Ok(())
        }
    }

    fn save(&self, pods: &BTreeMap<String, Pod>) -> io::Result<()> {
        let temporary = self.file.with_extension("json.tmp");
        std::fs::write(&temporary, serde_json::to_vec_pretty(pods)?)
            .and_then(|()| std::fs::rename(&temporary, &self.file))
            .map_err(|error| io::Error::other(format!("{}: {error}", self.file.display())))
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
            mode: Capture::Inpod,
            state: PodState::Pending,
        }
    }

    #[test]
    fn pods_survive_a_restart_and_are_found_by_every_name() {
        let directory = tempfile::tempdir().unwrap();
        let pods = Pods::open(directory.path()).unwrap();
        pods.put(pod("u1", "a", "x")).unwrap();
        pods.put(pod("u2", "b", "x")).unwrap();
        let again = Pods::open(directory.path()).unwrap();
        assert_eq!(again.all().len(), 2);
        assert_eq!(again.find("b/x").unwrap().uid, "u2");
        assert_eq!(again.find("u1").unwrap().namespace, "a");
        assert!(again.find("x").is_none(), "an ambiguous name is nobody's");
        again.remove("u1").unwrap();
        assert_eq!(
            Pods::open(directory.path()).unwrap().find("x").unwrap().uid,
            "u2"
        );
    }

    #[test]
    fn a_damaged_file_is_reported_with_its_name() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("pods.json"), "{").unwrap();
        assert!(
            Pods::open(directory.path())
                .unwrap_err()
                .to_string()
                .contains("pods.json")
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
