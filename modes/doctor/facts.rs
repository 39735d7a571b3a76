//! What is known of a machine: everything that the checks look at, as data, so that a recorded machine can be looked at
//! elsewhere.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use host_net::iptables::TableInUse;
use host_net::plan::{Family, MarkMatch, OverlayKind};
use ipnet::IpNet;
use node_redirect::facts::{OVERLAY_PORT, TUNNEL_IN};
use serde::{Deserialize, Serialize};

use crate::options::InpodRules;

/// A machine as seen from one network namespace. What is absent is not known, and nothing is concluded from it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Facts {
    /// Release of the kernel.
    pub kernel: String,
    /// What was tried in a namespace of its own: nothing when it worked, else what the kernel or the tool said.
    pub features: BTreeMap<Feature, Option<String>>,
    /// The operator's choice of an iptables implementation (`AMBIDEX_IPTABLES`).
    pub iptables_choice: Option<String>,
    /// Tables of iptables that hold something, of both implementations.
    pub tables: Vec<FilledTable>,
    /// Rules and chains of iptables and nftables, in the form of `ambidex dump`.
    pub filters: Vec<String>,
    /// Sysctls by their path below `/proc/sys`.
    pub sysctls: BTreeMap<String, String>,
    /// Devices.
    pub devices: Vec<Device>,
    /// Addresses with the prefixes of their networks.
    pub addresses: Vec<Assigned>,
    /// Policy routing rules in the kernel's order.
    pub rules: Vec<PolicyRule>,
    /// Routes of all tables but the kernel's own.
    pub routes: Vec<KnownRoute>,
    /// ipsets.
    pub sets: Vec<KnownSet>,
    /// TCP addresses that are listened on here.
    pub listeners: BTreeSet<SocketAddr>,
    /// UDP ports that are bound here.
    pub udp_ports: BTreeSet<u16>,
    /// Other network namespaces that have a name: pods, on most nodes.
    pub namespaces: Vec<Namespace>,
    /// Virtual services of the kernel's load balancer.
    pub ipvs_services: usize,
    /// Network configurations of the container runtime, in the order in which it reads them.
    pub cni: Vec<CniFile>,
    /// Files and sockets that other meshes and network plugins leave on a node, where they exist.
    pub traces: BTreeSet<String>,
    /// Sandboxed runtimes that are installed or running.
    pub sandboxes: BTreeSet<String>,
    /// The asking process; agent and proxy run with the same or less.
    pub process: Option<Process>,
    /// The clock, seconds since 1970.
    pub clock: Option<u64>,
    /// The state directory.
    pub state: Option<StateDir>,
    /// The agent of this node.
    pub agent: Option<Daemon>,
    /// Its proxies, by the name of their sockets.
    pub proxies: BTreeMap<String, Daemon>,
    /// Sysctls of the proxy's own namespace, where it could be found.
    pub proxy_sysctls: BTreeMap<String, String>,
    /// The UDP port that the tunnels are to have (`--geneve-port`), if not that of those that stand, or else the usual one.
    pub overlay_port: Option<u16>,
    /// How rules in pods are to be written (`--inpod-rules`), if not in the usual way.
    pub inpod_rules: Option<InpodRules>,
    /// What could not be looked at, and why.
    pub unreadable: BTreeMap<String, String>,
}

/// What a capture may need of a kernel, each tried for real.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Feature {
    /// A network namespace can be made and entered.
    Netns,
    /// Devices of kind geneve.
    Geneve,
    /// Devices of kind vxlan.
    Vxlan,
    /// Rules of iptables at all.
    Iptables,
    /// Rules of ip6tables.
    Ip6tables,
    /// IPv6 itself.
    Ipv6,
    /// Target TPROXY.
    Tproxy,
    /// Target REDIRECT.
    Redirect,
    /// Targets SNAT and DNAT.
    Nat,
    /// Match and target mark.
    Mark,
    /// Match and target connmark.
    Connmark,
    /// Match conntrack.
    Conntrack,
    /// Match set.
    SetMatch,
    /// Match owner.
    Owner,
    /// Match comment.
    Comment,
    /// The program nft, and tables of its own that redirect.
    Nftables,
    /// Sets of kind hash:ip, with comments.
    IpsetHashIp,
    /// Policy routing by mark.
    FwmarkRule,
}

/// A table of iptables with something in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilledTable {
    /// `ip` or `ip6`.
    pub family: Family,
    /// Implementation and name.
    #[serde(flatten)]
    pub table: TableInUse,
}

/// A device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Device {
    /// Name.
    pub name: String,
    /// Driver.
    pub kind: Option<String>,
    /// Tunnel parameters.
    pub overlay: Option<Tunnel>,
    /// Name of the bridge that it is a port of.
    pub master: Option<String>,
    /// Programs can be hung into its packet path: it has a `clsact` or `ingress` queueing discipline.
    pub classifier: bool,
}

/// Parameters of a tunnel device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tunnel {
    /// geneve or vxlan.
    pub kind: OverlayKind,
    /// Virtual network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Whether packets carry the parameters.
    #[serde(default)]
    pub external: bool,
}

/// An address of a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Assigned {
    /// Device.
    pub dev: String,
    /// Address with its prefix.
    pub addr: IpNet,
}

/// A policy routing rule.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyRule {
    /// `ip` or `ip6`.
    pub family: Family,
    /// Preference.
    pub priority: u32,
    /// Mark that it selects.
    #[serde(default)]
    pub mark: Option<MarkMatch>,
    /// Made by this program, by its protocol number.
    #[serde(default)]
    pub ours: bool,
    /// As `ip rule` prints it.
    pub text: String,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownRoute {
    /// Routing table.
    pub table: u32,
    /// Destination.
    pub dst: IpNet,
    /// Device, where it has one.
    #[serde(default)]
    pub dev: Option<String>,
    /// Next hop, where it has one.
    #[serde(default)]
    pub via: Option<IpAddr>,
    /// Made by this program, by its protocol number.
    #[serde(default)]
    pub ours: bool,
    /// As `ip route` prints it.
    pub text: String,
}

/// An ipset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownSet {
    /// Name.
    pub name: String,
    /// Kind and options.
    pub definition: String,
    /// Whether it is a set of IPv4 addresses without limits of its own.
    pub plain: bool,
    /// Whether its entries have comments.
    #[serde(default)]
    pub comments: bool,
    /// IPv4 members of the sets that captures use.
    #[serde(default)]
    pub members: BTreeSet<Ipv4Addr>,
}

/// A named namespace.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Name.
    pub name: String,
    /// Whether it has the rule by which the in-pod capture leads answers back.
    #[serde(default)]
    pub captured: bool,
    /// TCP ports that are listened on.
    #[serde(default)]
    pub ports: BTreeSet<u16>,
    /// Chains of other meshes.
    #[serde(default)]
    pub chains: BTreeSet<String>,
}

/// A network configuration.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniFile {
    /// Path.
    pub path: String,
    /// Types of the plugins in their order; empty when it is none that can be read.
    pub plugins: Vec<String>,
}

/// What a process may do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Process {
    /// Effective user.
    pub uid: u32,
    /// Effective capabilities as in `CapEff`, lowest bit first.
    pub capabilities: u64,
    /// 0 no filter of system calls, 1 strict, 2 a filter.
    pub seccomp: u8,
    /// Hard limit of file descriptors.
    pub descriptors: u64,
    /// Option `hidepid` of /proc, where it is set.
    pub hidepid: Option<String>,
    /// Whether /proc says in which cgroup a process is.
    pub cgroups: bool,
}

/// Where the journal is.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct StateDir {
    /// The directory, or what there is of the way to it.
    pub path: String,
    /// Bytes free for root.
    pub free_bytes: u64,
    /// Files that can still be made; none where the file system does not count them.
    pub free_files: Option<u64>,
    /// Mounted read-only.
    pub read_only: bool,
    /// Latest change of a file in it, seconds since 1970.
    pub changed: Option<u64>,
    /// Names of the plans that were made here.
    pub plans: BTreeSet<String>,
}

/// Whether a daemon answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Daemon {
    /// Yes.
    Answers,
    /// It answers that it is not ready, and why.
    NotReady(String),
    /// Nobody has its socket.
    Absent,
    /// Somebody has it and does not answer.
    Silent(String),
}

impl Facts {
    /// A sysctl.
    pub(super) fn sysctl(&self, key: &str) -> Option<&str> {
        self.sysctls.get(key).map(String::as_str)
    }

    /// A sysctl that is a number.
    pub(super) fn number(&self, key: &str) -> Option<u64> {
        self.sysctl(key)?.trim().parse().ok()
    }

    /// A device by name.
    pub(super) fn device(&self, name: &str) -> Option<&Device> {
        self.devices.iter().find(|device| device.name == name)
    }

    /// Whether the node capture, which begins with IPv4, may capture this family here: IPv6 where it is forwarded.
    pub(super) fn may_capture(&self, family: Family) -> bool {
        let forwards = |on: u64| on != 0;
        family.is_v4() || self.number(FORWARDS_IPV6).is_some_and(forwards)
    }

    /// Why a feature does not work, if it was tried and does not.
    pub(super) fn lacks(&self, feature: Feature) -> Option<&str> {
        self.features.get(&feature)?.as_deref()
    }

    /// Whether the journal has a plan of this name.
    pub(super) fn made(&self, plan: &str) -> bool {
        let made = |state: &StateDir| state.plans.contains(plan);
        self.state.as_ref().is_some_and(made)
    }

    /// The UDP port that the tunnels have or are to have.
    pub(super) fn overlay_port(&self) -> u16 {
        let standing = || {
            let device = self.device(TUNNEL_IN.host)?;
            let ours = self.made(NODE_PLAN);
            Some(device.overlay.as_ref().filter(|_| ours)?.port)
        };
        self.overlay_port.or_else(standing).unwrap_or(OVERLAY_PORT)
    }

    /// Whether the main table leads anywhere at all.
    pub(super) fn has_default_route(&self) -> bool {
        let main = self.routes.iter().filter(|route| route.table == MAIN);
        main.into_iter()
            .any(|route| route.dst.prefix_len() == 0 && route.dst.addr().is_ipv4())
    }

    /// Device of each IPv4 host route of the main table that leads straight to a pod.
    pub(super) fn pod_routes(&self) -> impl Iterator<Item = (&KnownRoute, &str)> {
        let hosts = self.routes.iter().filter(|route| {
            route.table == MAIN
                && route.via.is_none()
                && route.dst.addr().is_ipv4()
                && route.dst.prefix_len() == 32
        });
        hosts.filter_map(|route| {
            let dev = route.dev.as_deref()?;
            let kind = self.device(dev)?.kind.as_deref()?;
            matches!(kind, "veth" | "netkit" | "ipvlan").then_some((route, dev))
        })
    }
}

/// Whether the node forwards IPv6, without which it captures none.
pub(super) const FORWARDS_IPV6: &str = "net/ipv6/conf/all/forwarding";
/// Under this name the journal has the node capture's objects on the node.
pub(super) const NODE_PLAN: &str = "host-node";
/// The main routing table.
pub(super) const MAIN: u32 = 254;
