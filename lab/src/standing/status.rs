//! State of a lab, for people and programs.

use std::fmt;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use host_net::netns::Netns;
use serde::Serialize;

use super::build::pause_name;
use super::{Daemon, Lab};
use crate::topology::{Capture, LabSpec, Mode, Node, Pod};

/// A lab.
#[derive(Debug, Clone, Serialize)]
pub struct LabStatus {
    /// What it was built from.
    pub spec: LabSpec,
    /// Its directory.
    pub dir: PathBuf,
    /// Its nodes.
    pub nodes: Vec<NodeStatus>,
}

/// A node.
#[derive(Debug, Clone, Serialize)]
pub struct NodeStatus {
    /// Name of the node.
    pub name: String,
    /// Its agent; none in a lab without capture.
    pub agent: Option<DaemonStatus>,
    /// Its proxy; none in a lab without capture.
    pub proxy: Option<DaemonStatus>,
    /// Whether its agent says that node and proxy are ready.
    pub ready: bool,
    /// Its pods.
    pub pods: Vec<PodStatus>,
}

/// A daemon.
#[derive(Debug, Clone, Serialize)]
pub struct DaemonStatus {
    /// `agent1`.
    pub name: String,
    /// Its pid, if it runs.
    pub pid: Option<i32>,
    /// Its log.
    pub log: PathBuf,
}

/// A pod.
#[derive(Debug, Clone, Serialize)]
pub struct PodStatus {
    /// Name of the pod.
    pub name: String,
    /// Kubernetes namespace.
    pub namespace: String,
    /// Kubernetes service account.
    pub service_account: String,
    /// Its address.
    pub ip: Ipv4Addr,
    /// UID of the pod object.
    pub uid: String,
    /// How it is to be captured.
    pub capture: Option<Capture>,
    /// Whether its namespace and its process exist.
    pub exists: bool,
}

impl Lab {
    /// State of the lab.
    pub fn status(&self) -> LabStatus {
        let topology = self.topology();
        LabStatus {
            spec: self.spec(),
            dir: self.dir().to_path_buf(),
            nodes: topology
                .nodes
                .iter()
                .map(|node| self.node_status(node))
                .collect(),
        }
    }

    fn node_status(&self, node: &Node) -> NodeStatus {
        let captures = self.spec().mode != Mode::None;
        let daemon = |daemon: Daemon| {
            captures.then(|| DaemonStatus {
                name: daemon.name(node.index),
                pid: self.process(node.index, daemon).map(|process| process.pid),
                log: self.log_path(node.index, daemon),
            })
        };
        NodeStatus {
            name: node.name.clone(),
            agent: daemon(Daemon::Agent),
            proxy: daemon(Daemon::Proxy),
            ready: !captures || self.is_ready(node.index),
            pods: node.pods.iter().map(|pod| self.pod_status(pod)).collect(),
        }
    }

    fn pod_status(&self, pod: &Pod) -> PodStatus {
        let pause = self.lock().record.processes.get(&pause_name(pod)).copied();
        PodStatus {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.service_account.clone(),
            ip: pod.ip,
            uid: pod.uid.clone(),
            capture: pod.capture,
            exists: Netns::path_of(&pod.netns).exists()
                && pause.is_some_and(super::Process::is_alive),
        }
    }
}

impl LabStatus {
    /// The first thing that is not as it should be, as the end of a sentence.
    pub fn first_broken(&self) -> Option<String> {
        for node in &self.nodes {
            for daemon in [&node.agent, &node.proxy].into_iter().flatten() {
                if daemon.pid.is_none() {
                    return Some(format!("{} does not run", daemon.name));
                }
            }
            if !node.ready {
                return Some(format!("{} is not ready", node.name));
            }
            if let Some(pod) = node.pods.iter().find(|pod| !pod.exists) {
                return Some(format!("{} does not exist", pod.name));
            }
        }
        None
    }
}

impl fmt::Display for LabStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "lab {}  mode {}  {}",
            self.spec.name,
            self.spec.mode,
            self.dir.display()
        )?;
        for node in &self.nodes {
            write!(f, "{}", node.name)?;
            for daemon in [&node.agent, &node.proxy].into_iter().flatten() {
                match daemon.pid {
                    Some(pid) => write!(f, "  {} pid {pid}", daemon.name)?,
                    None => write!(f, "  {} DOES NOT RUN", daemon.name)?,
                }
            }
            writeln!(f, "  {}", if node.ready { "ready" } else { "NOT READY" })?;
            for pod in &node.pods {
                let capture = pod
                    .capture
                    .map_or_else(|| "none".to_owned(), |capture| capture.to_string());
                let identity = format!("{}/{}", pod.namespace, pod.service_account);
                let gone = if pod.exists { "" } else { "  GONE" };
                writeln!(
                    f,
                    "  {:<9} {:<13} {capture:<6} {identity:<15} {}{gone}",
                    pod.name, pod.ip, pod.uid
                )?;
            }
        }
        Ok(())
    }
}
