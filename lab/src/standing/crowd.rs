//! Many pods at once: made in a standing lab as cheaply as real ones can be.

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use nix::sys::signal::Signal;

use super::build::{GONE_WITHIN, attachment, ip_batch, pause_name};
use super::{Lab, cgroup, congestion, process};
use crate::topology::{MOST_PODS, Pod};

impl Lab {
    /// Makes `count` more pods on a node and returns their names. Each has its namespace, veth, address, route, process
    /// and control group, as the pods that the lab was built with, and the proxies know it as a workload. None is
    /// captured before [`Lab::add_pod`], which several threads may call at once. The file of [`Lab::write_state`] is
    /// written anew, for all pods and without policies.
    ///
    /// # Errors
    /// When the node's prefix has no room for them, or something cannot be made; what was made goes with the lab.
    pub fn create_pods(&self, node: u8, count: u8) -> Result<Vec<String>> {
        let before = self.topology();
        let standing = before
            .node(node)
            .with_context(|| format!("no node {node}"))?;
        // The pod that is never captured is not numbered.
        let last = standing.pods.len().saturating_sub(1);
        if last + usize::from(count) > usize::from(MOST_PODS) {
            bail!(
                "{count} pods more on node{node}, which has {last}: want at most {MOST_PODS} in all"
            );
        }
        // First on the record, so that what is made halfway is found when the lab is removed.
        self.change_record(|record| *record.created.entry(node).or_default() += count)?;
        let topology = self.topology();
        let node = topology
            .node(node)
            .with_context(|| format!("no node {node}"))?;
        let made: Vec<&Pod> = node.pods.iter().skip(last).take(count.into()).collect();

        let mut links = String::new();
        for pod in &made {
            congestion::create_netns(&pod.netns)?;
            links.push_str(&attachment(node, pod).node_side());
        }
        ip_batch(&node.netns, &links)?;
        let mut pauses = Vec::new();
        for pod in &made {
            ip_batch(&pod.netns, &attachment(node, pod).pod_side())?;
            self.write_sysctl(&pod.name, "net/ipv4/ip_forward", "0")?;
            let pause = self.spawn_pause(pod)?;
            pauses.push((pause_name(pod), pause));
            cgroup::enter(&topology.lab, pod, pause)?;
        }
        // Once for all of them: the record is a file.
        self.change_record(|record| record.processes.extend(pauses))?;
        self.write_state(&topology.local_xds().to_yaml()?)?;
        Ok(made.iter().map(|pod| pod.name.clone()).collect())
    }

    /// Removes all pods that [`Lab::create_pods`] made on a node, and the proxies forget them. They have to be let go
    /// first ([`Lab::del_pod`]). The kernel takes the namespaces themselves down at leisure.
    ///
    /// # Errors
    /// At the first step that fails; what is left goes with the lab.
    pub fn remove_created_pods(&self, node: u8) -> Result<()> {
        let created = self.lock().record.created.get(&node).copied();
        let created = usize::from(created.unwrap_or_default());
        if created == 0 {
            return Ok(());
        }
        let topology = self.topology();
        let standing = topology
            .node(node)
            .with_context(|| format!("no node {node}"))?;
        // The pod that is never captured is the last one, after those.
        let built = standing.pods.len().saturating_sub(created + 1);
        let pods: Vec<&Pod> = standing.pods.iter().skip(built).take(created).collect();
        let mut ids = Vec::new();
        let mut links = String::new();
        for pod in &pods {
            ids.push(Netns::open(Netns::path_of(&pod.netns))?.id());
            links.push_str(&format!("link delete {}\n", pod.veth));
        }
        let processes = process::in_namespaces(&ids);
        for process in &processes {
            process.signal(Signal::SIGKILL)?;
        }
        for process in processes {
            process.wait_gone(GONE_WITHIN);
        }
        ip_batch(&standing.netns, &links)?;
        for pod in &pods {
            Netns::delete_named(&pod.netns).context("delete network namespace")?;
            cgroup::remove_pod(&topology.lab, pod)?;
        }
        self.change_record(|record| {
            record.created.remove(&node);
            for pod in &pods {
                record.processes.remove(&pause_name(pod));
                // A pod of this name that comes later is another one.
                *record.generations.entry(pod.name.clone()).or_default() += 1;
            }
        })?;
        self.write_state(&self.topology().local_xds().to_yaml()?)
    }
}
