//! Looking at this machine. Nothing is changed on it, and what cannot be looked at is noted instead.

mod machine;
mod network;
mod trial;

use std::fmt::Display;
use std::path::PathBuf;

use host_net::netns::Netns;

use super::facts::Facts;
use crate::options::InpodRules;
use crate::run_dir::{RunDir, state_dir};

/// Where to look.
#[derive(Debug, Clone)]
pub struct Sources {
    /// Sockets of agent and proxies.
    pub run_dir: RunDir,
    /// The journal, and its disk.
    pub state_dir: PathBuf,
    /// Network configurations of the container runtime.
    pub cni_conf_dir: PathBuf,
    /// UDP port of the node capture's tunnels.
    pub overlay_port: Option<u16>,
    /// How rules in pods are to be written.
    pub inpod_rules: Option<InpodRules>,
}

impl Sources {
    /// As the environment says, with this directory of network configurations.
    pub fn from_env(cni_conf_dir: PathBuf) -> Self {
        Self {
            run_dir: RunDir::from_env(),
            state_dir: state_dir(),
            cni_conf_dir,
            overlay_port: None,
            inpod_rules: None,
        }
    }
}

/// Looks at this machine from the network namespace that this process is in. Needs a runtime.
pub async fn collect(sources: &Sources) -> Facts {
    let mut facts = Facts {
        kernel: machine::kernel(),
        overlay_port: sources.overlay_port,
        inpod_rules: sources.inpod_rules,
        iptables_choice: std::env::var(host_net::iptables::VARIANT_VARIABLE).ok(),
        ..Facts::default()
    };
    match Netns::current() {
        Ok(here) => {
            network::look(&here, &mut facts).await;
            network::look_at_others(&here, &mut facts).await;
            trial::run(&here, &mut facts).await;
        }
        Err(error) => note(&mut facts, "network namespace", error),
    }
    machine::look(sources, &mut facts);
    machine::ask_daemons(sources, &mut facts).await;
    facts
}

/// Notes what could not be looked at.
fn note(facts: &mut Facts, what: impl Into<String>, error: impl Display) {
    facts.unreadable.insert(what.into(), error.to_string());
}
