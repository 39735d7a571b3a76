//! The running pods of a node that are captured because a file names them: where no Kubernetes says who is.
//!
//! ```yaml
//! pods:
//! - namespace: default
//!   name: web
//!   netns: /run/netns/web
//!   serviceAccount: web   # default: `default`
//!   capture: inpod        # node, inpod or none; default: as the agent has it for all
//!   dnsCapture: false     # default: as the agent has it for all
//!   bypassInboundCapture: true   # what comes in is not captured
//!   virtualInterfaces: [br0]     # with guests behind them
//! ```
//!
//! The file is read again when it changes. A pod that it names is captured as one that runs already; with another `capture`
//! its capture is changed; a pod that it named and does not name any more is let go. Open connections go on each time. A
//! file that cannot be read, or is wrong, changes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use host_net::netns::Netns;
use inpod_redirect::extent::Extent;
use serde::Deserialize;

use super::kubernetes::Wanted;
use super::{Agent, Pod, PodState};
use crate::cni::PodEvent;
use crate::options::Capture;
use crate::unix_http::Caller;

/// Time between two looks at the file, and at pods that could not be captured.
const LOOKS_EVERY: Duration = Duration::from_secs(1);

/// The file.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    #[serde(default)]
    pods: Vec<Entry>,
}

/// How the file wants a pod to be captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum How {
    Node,
    Inpod,
    None,
}

/// One pod of the file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Entry {
    namespace: String,
    name: String,
    netns: PathBuf,
    #[serde(default)]
    uid: String,
    #[serde(default)]
    service_account: String,
    capture: Option<How>,
    dns_capture: Option<bool>,
    #[serde(default)]
    bypass_inbound_capture: bool,
    #[serde(default)]
    virtual_interfaces: Vec<String>,
}

impl Entry {
    fn qualified_name(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }
}

/// Reads a file's text.
fn parse(text: &str) -> anyhow::Result<Named> {
    // An empty file has no document, and an empty list names nobody.
    let named: Option<Named> = serde_saphyr::from_str(text)?;
    let named = named.unwrap_or_default();
    let mut names = BTreeSet::new();
    for entry in &named.pods {
        let name = entry.qualified_name();
        ensure!(names.insert(name.clone()), "pod {name} is there twice");
    }
    Ok(named)
}

/// What was last said, so that nothing is said twice.
#[derive(Default)]
struct Said {
    file: Option<String>,
    pods: BTreeMap<String, String>,
}

impl Agent {
    /// Does what the file says, for ever.
    pub(super) async fn follow_pod_file(&self, path: PathBuf) {
        let mut named = None;
        let mut said = Said::default();
        loop {
            match read(&path) {
                Ok(read) => {
                    said.file = None;
                    named = Some(read);
                }
                Err(error) => {
                    let error = format!("{error:#}");
                    if said.file.as_ref() != Some(&error) {
                        tracing::error!(path = %path.display(), error, "the file of pods changes nothing");
                        said.file = Some(error);
                    }
                }
            }
            if let Some(named) = &named
                && self.ready().is_ok()
            {
                self.follow_named(named, &mut said).await;
            }
            tokio::time::sleep(LOOKS_EVERY).await;
        }
    }

    async fn follow_named(&self, named: &Named, said: &mut Said) {
        for entry in &named.pods {
            let name = entry.qualified_name();
            match self.follow_entry(entry).await {
                Ok(()) => drop(said.pods.remove(&name)),
                Err(error) => {
                    let error = format!("{error:#}");
                    if said.pods.get(&name) != Some(&error) {
                        tracing::error!(
                            pod = name,
                            error,
                            "a pod is not captured as the file says"
                        );
                        said.pods.insert(name, error);
                    }
                }
            }
        }
        let wanted = |pod: &Pod| {
            let mut entries = named.pods.iter();
            entries.any(|entry| {
                entry.qualified_name() == pod.qualified_name() && entry.capture != Some(How::None)
            })
        };
        let gone = |pod: &Pod| pod.from_file && pod.state == PodState::Captured && !wanted(pod);
        for pod in self.pods.all().into_iter().filter(gone) {
            tracing::info!(
                pod = pod.qualified_name(),
                "the file does not name this pod any more"
            );
            if let Err(error) = self.let_go(&pod.uid, self.config.drain).await {
                tracing::error!(
                    pod = pod.qualified_name(),
                    error = format!("{error:#}"),
                    "a pod is not let go"
                );
            }
        }
    }

    /// Makes one pod what the file says, if it is not.
    async fn follow_entry(&self, entry: &Entry) -> anyhow::Result<()> {
        let to = match entry.capture {
            Some(How::None) => return Ok(()),
            Some(How::Node) => Capture::Node,
            Some(How::Inpod) => Capture::Inpod,
            None => match self.mode_of(&entry.name) {
                Some(mode) => mode,
                None => bail!("this agent captures nobody"),
            },
        };
        let possible = match to {
            Capture::Node => self.config.mode.uses_node(),
            Capture::Inpod => self.config.mode.uses_inpod(),
        };
        ensure!(
            possible,
            "its capture is to be {to}, and this agent has --mode {}",
            self.config.mode
        );
        let netns = Netns::open(&entry.netns)?;
        let known = self.pods.all().into_iter().find(|pod| {
            pod.qualified_name() == entry.qualified_name() && pod.netns_id == netns.id()
        });
        match known {
            Some(pod) if pod.state == PodState::Captured && pod.mode == to => Ok(()),
            Some(pod) if pod.state == PodState::Captured => {
                let switched = self.switch_capture(&pod.uid, to, self.config.drain);
                switched.await.map(drop)
            }
            _ => self.capture_entry(entry, to, &netns).await,
        }
    }

    async fn capture_entry(&self, entry: &Entry, to: Capture, netns: &Netns) -> anyhow::Result<()> {
        let mut event = PodEvent {
            netns: entry.netns.display().to_string(),
            pod_name: entry.name.clone(),
            pod_namespace: entry.namespace.clone(),
            ips: Vec::new(),
            pod_uid: entry.uid.clone(),
            service_account: entry.service_account.clone(),
            container_id: String::new(),
            network: String::new(),
            if_name: String::new(),
            dns_capture: entry.dns_capture,
            extent: Extent {
                bypass_inbound: entry.bypass_inbound_capture,
                virtual_interfaces: entry.virtual_interfaces.clone(),
            },
        };
        self.complete(&mut event, netns).await?;
        let wanted = Wanted {
            mode: to,
            identity: None,
        };
        let pod = super::admission::admit(self, &event, wanted).await?;
        let pod = Pod {
            from_file: true,
            ..pod
        };
        self.enrol_live(pod, &Caller::own()).await?;
        Ok(())
    }
}

fn read(path: &Path) -> anyhow::Result<Named> {
    let text = std::fs::read_to_string(path).context("cannot be read")?;
    parse(&text).map_err(|error| {
        // The parser shows the lines around; a log has room for one.
        let error = error.to_string();
        anyhow!("{}", error.lines().next().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_names_pods_or_nobody() {
        let text = "pods:\n- {namespace: a, name: b, netns: /n, capture: node}\n- {namespace: a, name: c, netns: /m}\n";
        let named = parse(text).unwrap();
        assert_eq!(named.pods[0].capture, Some(How::Node));
        assert_eq!(named.pods[1].qualified_name(), "a/c");
        for empty in ["", "# nobody\n", "pods: []\n"] {
            assert_eq!(parse(empty).unwrap(), Named::default(), "{empty:?}");
        }
    }

    #[test]
    fn what_is_not_meant_is_refused() {
        for (text, word) in [
            ("pods:\n- {namespace: a, name: b}\n", "netns"),
            (
                "pods:\n- {namespace: a, name: b, netns: /n, mode: node}\n",
                "mode",
            ),
            (
                "pods:\n- {namespace: a, name: b, netns: /n, capture: both}\n",
                "both",
            ),
            ("pod: []\n", "pod"),
            (
                "pods:\n- {namespace: a, name: b, netns: /n}\n- {namespace: a, name: b, netns: /m}\n",
                "twice",
            ),
            ("[", ""),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
