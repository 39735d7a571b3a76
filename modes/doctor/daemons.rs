//! Agent, proxies, and the configuration of the container runtime.

use super::catalogue::{BOTH, Check, Found};
use super::facts::Daemon;
use crate::cni::install::PLUGIN_TYPE;

pub(super) static CHECKS: [Check; 4] = [
    Check {
        id: "host/agent",
        title: "the agent answers, or there is none",
        modes: BOTH,
        why: "an agent that hangs enrols no pod, and its plugin lets none start",
        fix: "read the agent's log, end it and start it again: what it made stays",
        look: |facts| match &facts.agent {
            Some(Daemon::Silent(error)) => vec![Found::fail("agent", error)],
            Some(Daemon::NotReady(why)) => vec![Found::warn("agent", why)],
            Some(Daemon::Answers | Daemon::Absent) | None => Vec::new(),
        },
    },
    Check {
        id: "host/proxy",
        title: "the proxies answer, or there are none",
        modes: BOTH,
        why: "connections of captured pods wait for a proxy that hangs",
        fix: "read the proxy's log, start another one, then end it",
        look: |facts| {
            let proxies = facts.proxies.iter();
            proxies
                .filter_map(|(name, proxy)| match proxy {
                    Daemon::Silent(error) => Some(Found::fail(name, error)),
                    Daemon::NotReady(why) => Some(Found::warn(name, why)),
                    Daemon::Answers | Daemon::Absent => None,
                })
                .collect()
        },
    },
    Check {
        id: "host/captured-without-proxy",
        title: "captured pods have a proxy",
        modes: BOTH,
        why: "redirects stay when agent and proxy end, so that nothing passes in the clear, and until there is a proxy nothing passes at all",
        fix: "start ambidex agent and ambidex proxy, or take the capture away: ambidex undo --node",
        look: |facts| {
            let answers = |proxy: &Daemon| *proxy == Daemon::Answers;
            let pods = facts.state.iter().flat_map(|state| &state.plans);
            let pods = pods.filter(|plan| plan.starts_with("host-pod-")).count();
            let alone = facts.agent.is_some() && !facts.proxies.values().any(answers);
            if alone && pods > 0 {
                vec![Found::fail(
                    "proxy",
                    format!("none answers, and {pods} pods are captured"),
                )]
            } else {
                Vec::new()
            }
        },
    },
    Check {
        id: "host/cni-plugin",
        title: "the runtime calls the plugin",
        modes: BOTH,
        why: "only the first configuration counts, and pods that start without the plugin are captured late or not at all",
        fix: "ambidex cni install --watch; for OBJECT in front of it: --conf-name or --owned",
        look: |facts| {
            if facts.agent != Some(Daemon::Answers) {
                return Vec::new();
            }
            let Some(first) = facts.cni.iter().find(|file| !file.plugins.is_empty()) else {
                return Vec::new();
            };
            match first.plugins.iter().any(|plugin| plugin == PLUGIN_TYPE) {
                true => Vec::new(),
                false => vec![Found::warn(
                    &first.path,
                    format!("calls {}", first.plugins.join(", ")),
                )],
            }
        },
    },
];
