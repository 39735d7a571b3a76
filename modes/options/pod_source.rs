//! Flags that say who tells the agent which pods there are and which of them are captured.

use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::{Args, ValueEnum};

use crate::agent::kubernetes::Settings;

/// Where the node's `/proc` is in a container that has it beside its own.
const MOUNTED_PROC: &str = "/host/proc";

/// Who knows the pods.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PodSource {
    /// The runtime: every pod that it adds through the plugin is captured
    Cni,
    /// The Kubernetes API: labels say which pods are captured, also those that run already
    Kubernetes,
}

/// Flags of the agent.
#[derive(Debug, Clone, Args)]
pub struct PodSourceArgs {
    /// Who says which pods are captured
    #[arg(long, env = "AMBIDEX_SOURCE", value_enum, default_value_t = PodSource::Cni)]
    source: PodSource,
    /// File that names running pods to capture (YAML, read again when it changes), beside those that the source names
    #[arg(long, env = "AMBIDEX_PODS_FILE", value_name = "PATH")]
    pods_file: Option<PathBuf>,
    /// Name of this node in Kubernetes
    #[arg(long, env = "NODE_NAME", default_value = "")]
    node_name: String,
    /// File that says where the API server is (default: the service account of this pod)
    #[arg(long, env = "KUBECONFIG", value_name = "PATH")]
    kubeconfig: Option<PathBuf>,
    /// Namespaces whose pods are never captured
    #[arg(
        long,
        env = "EXCLUDE_NAMESPACES",
        value_delimiter = ',',
        default_value = "kube-system",
        value_name = "NAMESPACE,…"
    )]
    exclude_namespaces: Vec<String>,
    /// Namespace of the agent's and the proxy's own pods, which are never captured
    #[arg(
        long,
        env = "POD_NAMESPACE",
        default_value = "",
        value_name = "NAMESPACE"
    )]
    own_namespace: String,
    /// Name of the agent's own pod, for events (default: the node's name)
    #[arg(long, env = "POD_NAME", default_value = "", value_name = "NAME")]
    own_pod: String,
    /// The node's /proc, in which pods' processes are looked for (default: /host/proc if there is one, else /proc)
    #[arg(long, env = "AMBIDEX_HOST_PROC", value_name = "DIRECTORY")]
    host_proc: Option<PathBuf>,
}

impl PodSourceArgs {
    /// The file that names pods, if there is one.
    pub fn file(&self) -> Option<PathBuf> {
        let path = self.pods_file.clone()?;
        (!path.as_os_str().is_empty()).then_some(path)
    }

    /// What the Kubernetes source is started with, if it is the one.
    ///
    /// # Errors
    /// When the node has no name.
    pub fn settings(self) -> anyhow::Result<Option<Settings>> {
        if self.source == PodSource::Cni {
            return Ok(None);
        }
        let named = (!self.node_name.is_empty()).then_some(self.node_name);
        let node_name = named.context(
            "--source kubernetes: which node is this? Give --node-name (NODE_NAME, from spec.nodeName)",
        )?;
        let mounted = || {
            Path::new(MOUNTED_PROC)
                .is_dir()
                .then_some(MOUNTED_PROC.into())
        };
        Ok(Some(Settings {
            kubeconfig: self.kubeconfig.filter(|path| !path.as_os_str().is_empty()),
            exclude_namespaces: self
                .exclude_namespaces
                .into_iter()
                .filter(|name| !name.is_empty())
                .collect(),
            own_namespace: self.own_namespace,
            own_pod: Some(self.own_pod)
                .filter(|name| !name.is_empty())
                .unwrap_or_else(|| node_name.clone()),
            host_proc: self
                .host_proc
                .or_else(mounted)
                .unwrap_or_else(|| "/proc".into()),
            node_name,
        }))
    }
}
