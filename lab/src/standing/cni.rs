//! Pods added and deleted as a container runtime does it: by executing the chained plugin in the node's namespace.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::Lab;
use super::process::{self, Captured};
use crate::topology::network::BRIDGE;
use crate::topology::{Cni, Node, Pod};

/// The version of the CNI specification that the lab's runtime speaks.
const CNI_VERSION: &str = "1.0.0";
/// Bound of one call of the plugin, far over its own timeout of 5 s towards the agent.
const PLUGIN_LIMIT: Duration = Duration::from_secs(30);

impl Lab {
    /// Calls the plugin's ADD for a pod: it is captured when this returns.
    ///
    /// # Errors
    /// When the plugin fails or does not pass on the result of the plugin before it; with everything it wrote.
    pub fn add_pod(&self, pod: &str) -> Result<()> {
        let topology = self.topology();
        let (node, pod) = topology
            .pod(pod)
            .with_context(|| format!("no pod {pod:?}"))?;
        let result = previous_result(node, pod);
        let answer = self.call_plugin("ADD", node, pod, Some(&result))?;
        let passed_on: Value = serde_json::from_str(&answer.stdout).with_context(|| {
            format!(
                "ambidex-cni ADD {}: its answer {:?}",
                pod.name, answer.stdout
            )
        })?;
        if passed_on != result {
            bail!(
                "ambidex-cni ADD {}: it changed the result of the plugin before it: {passed_on}",
                pod.name
            );
        }
        Ok(())
    }

    /// Calls the plugin's DEL for a pod: it is not captured any more when this returns. The pod stays.
    ///
    /// # Errors
    /// When the plugin fails; with everything it wrote.
    pub fn del_pod(&self, pod: &str) -> Result<()> {
        let topology = self.topology();
        let (node, pod) = topology
            .pod(pod)
            .with_context(|| format!("no pod {pod:?}"))?;
        let result = previous_result(node, pod);
        self.call_plugin("DEL", node, pod, Some(&result)).map(drop)
    }

    fn call_plugin(
        &self,
        verb: &str,
        node: &Node,
        pod: &Pod,
        result: Option<&Value>,
    ) -> Result<Captured> {
        let program = self.spec().programs.ambidex_cni;
        let config = json!({
            "cniVersion": CNI_VERSION,
            "name": format!("ambidex-lab-{}", self.name()),
            "type": "ambidex-cni",
            "cni_agent_run_dir": self.run_dir(node.index),
            "ambient_enabled": true,
            "prevResult": result,
        });
        let arguments = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID={};K8S_POD_UID={};\
             AMBIDEX_SERVICE_ACCOUNT={}",
            pod.namespace, pod.name, pod.container_id, pod.uid, pod.service_account
        );
        let mut command = Command::new(&program);
        command
            .env("CNI_COMMAND", verb)
            .env("CNI_CONTAINERID", &pod.container_id)
            .env("CNI_NETNS", netns_path(pod))
            .env("CNI_IFNAME", "eth0")
            .env("CNI_ARGS", arguments)
            .env("CNI_PATH", program.parent().unwrap_or(&program));
        let done = process::run_captured(
            &self.netns(&node.name)?,
            &mut command,
            &config.to_string(),
            PLUGIN_LIMIT,
        )?;
        done.success(&format!(
            "ambidex-cni {verb} {}/{}",
            pod.namespace, pod.name
        ))
    }
}

fn netns_path(pod: &Pod) -> String {
    host_net::netns::Netns::path_of(&pod.netns)
        .display()
        .to_string()
}

/// What the plugin that made the veth would have printed.
fn previous_result(node: &Node, pod: &Pod) -> Value {
    let mut interfaces = vec![
        json!({"name": pod.veth}),
        json!({"name": "eth0", "sandbox": netns_path(pod)}),
    ];
    let mut prefix = 32;
    if node.cni == Cni::Bridge {
        interfaces.insert(0, json!({"name": BRIDGE}));
        prefix = 24;
    }
    let gateways = node.families.addresses(node.pod_gateway);
    let addresses = node.families.addresses(pod.ip).into_iter().zip(gateways);
    let (ips, routes): (Vec<_>, Vec<_>) = addresses
        .map(|(address, gateway)| {
            let (prefix, anywhere) = match (address.is_ipv4(), prefix) {
                (true, prefix) => (prefix, "0.0.0.0/0"),
                (false, 32) => (128, "::/0"),
                (false, _) => (64, "::/0"),
            };
            let ip = json!({
                "interface": interfaces.len() - 1,
                "address": format!("{address}/{prefix}"),
                "gateway": gateway,
            });
            (ip, json!({"dst": anywhere}))
        })
        .unzip();
    json!({
        "cniVersion": CNI_VERSION,
        "interfaces": interfaces,
        "ips": ips,
        "routes": routes,
        "dns": {},
    })
}
