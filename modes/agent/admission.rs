//! From the plugin's event to a pod that may be enrolled. Everything that makes no sense is refused here, before
//! anything is changed: what passes is safe as a file name, in log lines and in comments of kernel objects.

use std::net::IpAddr;
use std::path::PathBuf;

use host_net::netlink::{Netlink, NetlinkError};
use host_net::netns::Netns;

use super::datapath::Unfit;
use super::kubernetes::Wanted;
use super::{Agent, EnrolError, Pod, PodState};
use crate::cni::PodEvent;
use crate::options::Capture;

/// Longest UID or container id: the kernel's comment of a set member has room for 255 bytes.
const UID_LIMIT: usize = 128;
/// Longest name, as Kubernetes has it (DNS subdomain).
const NAME_LIMIT: usize = 253;
/// More addresses than any pod has; a packet to the proxy has room for all of them.
const ADDRESS_LIMIT: usize = 16;

fn invalid(text: impl Into<String>) -> EnrolError {
    EnrolError::Invalid(text.into())
}

/// Letters, digits, `-`, `_` and `.`, the first one a letter or digit.
fn well_formed(what: &str, value: &str, limit: usize) -> Result<(), EnrolError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let first = value.chars().next();
    if first.is_some_and(|c| c.is_ascii_alphanumeric())
        && value.len() <= limit
        && value.chars().all(allowed)
    {
        return Ok(());
    }
    if value.is_empty() {
        return Err(invalid(format!("the event has no {what}")));
    }
    let shown: String = value.chars().take(40).collect();
    Err(invalid(format!(
        "{what} {shown:?}: want up to {limit} letters, digits, '-', '_' and '.', beginning with a letter or digit"
    )))
}

/// Only an address that a pod can have alone.
fn unicast(address: IpAddr) -> Result<(), EnrolError> {
    let ordinary = match address {
        IpAddr::V4(ip) => {
            !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast() || ip.is_broadcast())
        }
        IpAddr::V6(ip) => !(ip.is_loopback() || ip.is_unspecified() || ip.is_multicast()),
    };
    if ordinary {
        Ok(())
    } else {
        Err(invalid(format!("{address} cannot be a pod's address")))
    }
}

/// The pod to be enrolled, or none if this node does not capture it.
pub(super) async fn pod_of(agent: &Agent, event: &PodEvent) -> Result<Option<Pod>, EnrolError> {
    well_formed("PodName", &event.pod_name, NAME_LIMIT)?;
    well_formed("PodNamespace", &event.pod_namespace, NAME_LIMIT)?;
    if event.netns.is_empty() {
        return Err(invalid("the event has no Netns"));
    }
    match agent.wanted(event).await? {
        Some(wanted) => admit(agent, event, wanted).await.map(Some),
        None => Ok(None),
    }
}

/// The pod of an event that is to be captured.
pub(super) async fn admit(
    agent: &Agent,
    event: &PodEvent,
    wanted: Wanted,
) -> Result<Pod, EnrolError> {
    let identity = wanted.identity.as_ref();
    let uid = match identity {
        Some(identity) => &identity.uid,
        None if event.pod_uid.is_empty() => &event.container_id,
        None => &event.pod_uid,
    };
    well_formed("PodUID", uid, UID_LIMIT)?;
    if !event.container_id.is_empty() {
        well_formed("ContainerID", &event.container_id, UID_LIMIT)?;
    }
    for (what, value) in [("Network", &event.network), ("IfName", &event.if_name)] {
        if !value.is_empty() {
            well_formed(what, value, NAME_LIMIT)?;
        }
    }
    let service_account = match identity {
        Some(identity) => &identity.service_account,
        None if event.service_account.is_empty() => "default",
        None => &event.service_account,
    };
    well_formed("ServiceAccount", service_account, NAME_LIMIT)?;
    let addresses: Vec<IpAddr> = event.ips.iter().map(|ip| ip.address.addr()).collect();
    if addresses.is_empty() {
        return Err(invalid("the pod has no address"));
    }
    if addresses.len() > ADDRESS_LIMIT {
        return Err(invalid(format!(
            "{} addresses: want at most {ADDRESS_LIMIT}",
            addresses.len()
        )));
    }
    addresses.iter().try_for_each(|address| unicast(*address))?;
    let extent = identity.map_or(&event.extent, |identity| &identity.extent);
    extent.check().map_err(|error| invalid(error.to_string()))?;
    if extent.bypass_inbound && wanted.mode == Capture::Node {
        return Err(invalid(Unfit::OneDirection.to_string()));
    }
    let path = PathBuf::from(&event.netns);
    if !path.is_absolute() {
        return Err(invalid(format!(
            "Netns {:?} is not an absolute path",
            event.netns
        )));
    }
    let netns = Netns::open(&path).map_err(|e| invalid(e.to_string()))?;
    let pod = Pod {
        uid: uid.clone(),
        name: event.pod_name.clone(),
        namespace: event.pod_namespace.clone(),
        service_account: service_account.to_owned(),
        addresses,
        netns: path,
        netns_id: netns.id(),
        container_id: event.container_id.clone(),
        network: event.network.clone(),
        if_name: event.if_name.clone(),
        dns_capture: match identity {
            Some(identity) => identity.dns_capture,
            None => event.dns_capture,
        },
        extent: extent.clone(),
        mode: wanted.mode,
        state: PodState::Pending,
        live: false,
        settled: false,
        drains_until: None,
        leaving: None,
        from_file: false,
    };
    refuse_second_attachment(agent, &pod)?;
    refuse_wrong_place(agent, &pod, &netns).await?;
    Ok(pod)
}

/// One attachment of a sandbox is captured: rules, listeners and identity are the sandbox's, so the end of a second
/// attachment would end the capture of the first.
fn refuse_second_attachment(agent: &Agent, pod: &Pod) -> Result<(), EnrolError> {
    let Some(known) = agent.pods.get(&pod.uid) else {
        return Ok(());
    };
    let same_sandbox = known.container_id == pod.container_id && known.netns_id == pod.netns_id;
    let said = ![&known.network, &pod.network].contains(&&String::new());
    if same_sandbox && said && (&known.network, &known.if_name) != (&pod.network, &pod.if_name) {
        return Err(invalid(format!(
            "pod {} is captured on {} of network {} and cannot be on {} of network {} too: put this plugin in the chain \
             of one of them only",
            pod.qualified_name(),
            known.if_name,
            known.network,
            pod.if_name,
            pod.network
        )));
    }
    Ok(())
}

/// A pod is captured in a namespace of its own that has its addresses.
async fn refuse_wrong_place(agent: &Agent, pod: &Pod, netns: &Netns) -> Result<(), EnrolError> {
    if netns.id() == agent.host.id() {
        return Err(invalid(format!(
            "pod {} is in the node's own network namespace (hostNetwork): it cannot be captured",
            pod.qualified_name()
        )));
    }
    if agent
        .node_setup()
        .is_some_and(|setup| setup.proxy.id() == netns.id())
    {
        return Err(invalid(format!(
            "{} is the proxy's own network namespace",
            pod.netns.display()
        )));
    }
    let failed = |error: NetlinkError| EnrolError::Failed {
        pod: pod.qualified_name(),
        error: error.into(),
    };
    for address in pod.addresses.iter().copied() {
        if has_address(&agent.host, address).await.map_err(failed)? {
            return Err(invalid(format!(
                "{address} is an address of the node itself"
            )));
        }
        if !has_address(netns, address).await.map_err(failed)? {
            return Err(invalid(format!(
                "{address} is not an address of the network namespace {}",
                pod.netns.display()
            )));
        }
    }
    Ok(())
}

/// Whether an interface of the namespace has this address.
pub(super) async fn has_address(netns: &Netns, address: IpAddr) -> Result<bool, NetlinkError> {
    Netlink::connect(netns).await?.has_ip(address).await
}
