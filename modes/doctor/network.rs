//! The network plugin and other datapaths.

use std::collections::BTreeSet;

use super::catalogue::{BOTH, Check, Found, INPOD, NODE};
use super::facts::{Device, Facts};

/// Bridges whose ports are no pods.
const NOT_OF_PODS: [&str; 4] = ["docker0", "virbr", "lxdbr", "br-"];

pub(super) static CHECKS: [Check; 9] = [
    Check {
        id: "node/pod-routes",
        title: "each pod has a route of its own",
        modes: NODE,
        why: "packets between the ports of a bridge never reach the node's rules",
        fix: "use a network plugin with a route for each pod (ptp, Calico, kindnet, cloud providers' own) instead of OBJECT, or --mode inpod",
        look: pod_routes,
    },
    Check {
        id: "node/default-route",
        title: "the node has a default route",
        modes: NODE,
        why: "addresses of services pass the check of reverse paths by it, and the node's own address is found by it",
        fix: "ip route add default via GATEWAY",
        look: |facts| {
            if facts.routes.is_empty() || facts.has_default_route() {
                return Vec::new();
            }
            vec![Found::warn("table main", "has no default route")]
        },
    },
    Check {
        id: "node/openvswitch",
        title: "pods are not wired to Open vSwitch",
        modes: NODE,
        why: "its packets go from port to port without the node's rules and routes",
        fix: "--mode inpod",
        look: |facts| {
            let vswitch = |device: &&Device| {
                device.kind.as_deref() == Some("openvswitch")
                    || ["ovs-system", "br-int", "ovn-k8s-mp0"].contains(&device.name.as_str())
            };
            let device = facts.devices.iter().find(vswitch);
            device
                .map(|device| Found::fail(&device.name, "is of Open vSwitch"))
                .into_iter()
                .collect()
        },
    },
    Check {
        id: "node/ipvs",
        title: "services are not balanced by IPVS",
        modes: NODE,
        why: "addresses of services are local to the node then, and a local address is delivered before any rule of the capture",
        fix: "kube-proxy --proxy-mode=nftables (or iptables), or --mode inpod",
        look: |facts| {
            if let Some(device) = facts.device("kube-ipvs0") {
                return vec![Found::fail(&device.name, "holds the addresses of services")];
            }
            match facts.ipvs_services {
                0 => Vec::new(),
                n => vec![Found::fail("IPVS", format!("has {n} services"))],
            }
        },
    },
    Check {
        id: "node/cilium",
        title: "pods are not wired by Cilium",
        modes: NODE,
        why: "its programs lead packets past the node's rules and routes",
        fix: "--mode inpod",
        look: |facts| {
            let device = facts
                .devices
                .iter()
                .find(|device| device.name.starts_with("cilium_"));
            device
                .map(|device| Found::fail(&device.name, "is of Cilium"))
                .into_iter()
                .collect()
        },
    },
    Check {
        id: "inpod/cilium",
        title: "Cilium leaves room for a chained plugin",
        modes: INPOD,
        why: "with cni.exclusive Cilium takes our plugin out of the configuration, and with bpf.masquerade probes of captured pods fail",
        fix: "helm upgrade cilium --reuse-values --set cni.exclusive=false --set bpf.masquerade=false",
        look: |facts| {
            let backup = facts
                .traces
                .iter()
                .find(|path| path.ends_with(".cilium_bak"));
            if let Some(path) = backup {
                return vec![Found::fail(
                    path,
                    "is a configuration that Cilium put aside",
                )];
            }
            let device = facts
                .devices
                .iter()
                .find(|device| device.name.starts_with("cilium_"));
            device
                .map(|device| Found::warn(&device.name, "is of Cilium"))
                .into_iter()
                .collect()
        },
    },
    Check {
        id: "host/calico-ebpf",
        title: "Calico's eBPF datapath is not in use",
        modes: BOTH,
        why: "its programs lead packets past the node's rules, and its balancing at connect hides services from the proxy in the pod",
        fix: "FelixConfiguration bpfEnabled: false for --mode node; bpfConnectTimeLoadBalancing: Disabled for --mode inpod",
        look: |facts| {
            let known =
                |device: &&Device| ["bpfin.cali", "bpfout.cali"].contains(&device.name.as_str());
            let Some(device) = facts.devices.iter().find(known) else {
                return Vec::new();
            };
            vec![
                Found::fail(&device.name, "is of Calico's eBPF datapath").only(NODE),
                Found::warn(&device.name, "is of Calico's eBPF datapath").only(INPOD),
            ]
        },
    },
    Check {
        id: "node/classifiers",
        title: "no programs stand before the node's rules on pods' devices",
        modes: NODE,
        why: "a program of somebody else on a device can lead packets past the node's rules and routes",
        fix: "tc filter show dev OBJECT ingress says whose it is; if it redirects packets: --mode inpod",
        look: |facts| {
            let hung: Vec<&str> = facts
                .devices
                .iter()
                .filter(|device| device.classifier && device.kind.as_deref() == Some("veth"))
                .map(|device| device.name.as_str())
                .collect();
            match hung[..] {
                [] => Vec::new(),
                [first, ..] => vec![Found::warn(
                    first,
                    format!(
                        "and {} more can have programs in their packet path",
                        hung.len() - 1
                    ),
                )],
            }
        },
    },
    Check {
        id: "inpod/sandboxes",
        title: "no runtime keeps pods' packets from their namespaces",
        modes: INPOD,
        why: "gVisor has a network stack of its own and Kata a kernel of its own, so rules in the pod's namespace see nothing of such pods",
        fix: "leave pods of OBJECT out of the mesh, or capture them with --mode node",
        look: |facts| {
            facts
                .sandboxes
                .iter()
                .map(|name| Found::warn(name, "is installed"))
                .collect()
        },
    },
];

fn pod_routes(facts: &Facts) -> Vec<Found> {
    let ports = facts
        .devices
        .iter()
        .filter(|device| device.kind.as_deref() == Some("veth"));
    let bridges: BTreeSet<&str> = ports
        .filter_map(|device| device.master.as_deref())
        .filter(|bridge| !NOT_OF_PODS.iter().any(|start| bridge.starts_with(start)))
        .filter(|bridge| {
            facts
                .device(bridge)
                .is_some_and(|device| device.kind.as_deref() == Some("bridge"))
        })
        .collect();
    let routed = facts.pod_routes().next().is_some();
    let found = |bridge: &str| {
        if routed {
            Found::warn(bridge, "has pods as ports; others of this node have routes")
        } else {
            Found::fail(bridge, "has pods as ports")
        }
    };
    bridges.into_iter().map(found).collect()
}
