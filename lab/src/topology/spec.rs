//! What a user chooses about a lab.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicU32, Ordering};

use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use super::MOST_PODS;

/// A lab as a user orders it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabSpec {
    /// Name: 1 to 6 of `a-z0-9`.
    pub name: String,
    /// How pods are captured.
    pub mode: Mode,
    /// Node capture: how much goes through the overlay.
    pub node_flow: NodeFlow,
    /// In-pod capture: which rules.
    pub inpod_rules: InpodRules,
    /// Node capture: which overlay device.
    pub overlay: Overlay,
    /// Node capture: connections between two pods of a node.
    pub same_node: SameNode,
    /// How pods are connected to their node.
    pub cni: Cni,
    /// Which addresses pods have. Nodes and proxies have IPv4 in any case.
    #[serde(default)]
    pub families: Families,
    /// Pods per node that are captured; one more that never is comes on top. 2 to 240.
    pub pods_per_node: u8,
    /// Agent and proxy each in a mount and a pid namespace of their own, as on a cluster.
    pub isolate: bool,
    /// The outside host runs a control plane, which the proxies get their mesh and their certificates from; otherwise both
    /// come from files.
    #[serde(default)]
    pub control_plane: bool,
    /// Agents look at the captures of their pods every few seconds and put back what is missing. Off where captures are
    /// damaged on purpose, or where nothing but the load may run.
    #[serde(default)]
    pub mends: bool,
    /// The runtime adds no pod: they run uncaptured until somebody else has them enrolled.
    #[serde(default)]
    pub leaves_pods: bool,
    /// The programs that the lab runs.
    pub programs: Programs,
    /// Program and arguments of another proxy that speaks ZDS, in place of `ambidex proxy`. It runs where that would, with
    /// its environment.
    pub proxy_command: Option<Vec<String>>,
    /// Additional environment of agents and proxies.
    pub daemon_env: BTreeMap<String, String>,
    /// Additional environment of proxies, over that of [`LabSpec::daemon_env`].
    #[serde(default)]
    pub proxy_env: BTreeMap<String, String>,
    /// Additional arguments of agents.
    pub agent_args: Vec<String>,
    /// Additional arguments of proxies.
    pub proxy_args: Vec<String>,
}

/// Executables that the lab runs. Mode `none` runs neither.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Programs {
    /// The program with the subcommands `agent`, `proxy` and `lab traffic`.
    pub ambidex: PathBuf,
    /// The chained CNI plugin.
    pub ambidex_cni: PathBuf,
}

impl Programs {
    /// The program that is running, and the plugin in the same directory.
    ///
    /// # Errors
    /// When the operating system cannot tell the path of the running program.
    pub fn of_this_process() -> std::io::Result<Self> {
        Ok(Self::beside(&std::env::current_exe()?))
    }

    /// `ambidex` at this path, and the plugin in the same directory.
    pub fn beside(ambidex: &Path) -> Self {
        Self {
            ambidex: ambidex.to_path_buf(),
            ambidex_cni: ambidex.with_file_name("ambidex-cni"),
        }
    }
}

/// A specification that no lab can be built from.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The name cannot be part of the names of namespaces.
    #[error("lab name {0:?}: want 1 to 6 of a-z and 0-9")]
    Name(String),
    /// Too few pods for the service, or too many for the node's prefix.
    #[error("{0} pods per node: want 2 to {MOST_PODS}")]
    PodsPerNode(u8),
    /// There is no program to run as proxy.
    #[error("the command of the proxy is empty: want a program and its arguments")]
    ProxyCommand,
    /// Not one of the words that a setting has.
    #[error("{setting} {word:?}: want one of {words}")]
    Word {
        /// What the word was for.
        setting: &'static str,
        /// The word.
        word: String,
        /// The words that it has.
        words: String,
    },
}

impl LabSpec {
    /// A lab with defaults in everything but its name, mode and programs.
    pub fn new(name: impl Into<String>, mode: Mode, programs: Programs) -> Self {
        Self {
            name: name.into(),
            mode,
            node_flow: NodeFlow::Hybrid,
            inpod_rules: InpodRules::Redirect,
            overlay: Overlay::Auto,
            same_node: SameNode::Hbone,
            cni: Cni::Routed,
            families: Families::V4,
            pods_per_node: 2,
            isolate: true,
            control_plane: false,
            mends: false,
            leaves_pods: false,
            programs,
            proxy_command: None,
            daemon_env: BTreeMap::new(),
            proxy_env: BTreeMap::new(),
            agent_args: Vec::new(),
            proxy_args: Vec::new(),
        }
    }

    /// Checks what the type does not.
    ///
    /// # Errors
    /// Names the first setting that no lab can have.
    pub fn validate(&self) -> Result<(), SpecError> {
        validate_name(&self.name)?;
        if !(2..=MOST_PODS).contains(&self.pods_per_node) {
            return Err(SpecError::PodsPerNode(self.pods_per_node));
        }
        if self.proxy_command.as_ref().is_some_and(Vec::is_empty) {
            return Err(SpecError::ProxyCommand);
        }
        Ok(())
    }

    /// A name that no other lab of this process and no lab of another living process has, if that process also names
    /// its labs so: the process id and a counter, both in base 36.
    pub fn unique_name() -> String {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        let count = COUNTER.fetch_add(1, Ordering::Relaxed) % 36;
        format!("{}{}", base36(std::process::id()), base36(count))
    }
}

/// Checks that `name` can be a lab's name.
///
/// # Errors
/// When it cannot.
pub fn validate_name(name: &str) -> Result<(), SpecError> {
    let fits = (1..=6).contains(&name.len());
    if fits
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit())
    {
        Ok(())
    } else {
        Err(SpecError::Name(name.to_owned()))
    }
}

fn base36(mut number: u32) -> String {
    const DIGITS: &[u8; 36] = b"0123456789abcdefghijklmnopqrstuvwxyz";
    let mut digits = Vec::new();
    loop {
        digits.push(char::from(DIGITS[(number % 36) as usize]));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

/// Settings that are written as one of a few words: on the command line, in files, in results.
macro_rules! words {
    ($($(#[$doc:meta])* $setting:literal $type:ident { $($(#[$variant_doc:meta])* $variant:ident = $word:literal,)+ })+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ValueEnum)]
        pub enum $type {
            $($(#[$variant_doc])* #[serde(rename = $word)] #[value(name = $word)] $variant,)+
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(match self { $(Self::$variant => $word,)+ })
            }
        }
        impl FromStr for $type {
            type Err = SpecError;
            fn from_str(word: &str) -> Result<Self, SpecError> {
                match word {
                    $($word => Ok(Self::$variant),)+
                    _ => Err(SpecError::Word {
                        setting: $setting,
                        word: word.to_owned(),
                        words: [$($word),+].join(", "),
                    }),
                }
            }
        }
    )+};
}

words! {
    /// How the pods of a lab are captured.
    "mode" Mode {
        /// Not at all: no agent, no proxy, no plugin.
        None = "none",
        /// By the node.
        Node = "node",
        /// In the pods.
        Inpod = "inpod",
        /// Pods with an odd number by the node, with an even one in the pod, by one proxy.
        Mixed = "mixed",
    }
    /// How one pod is captured.
    "capture" Capture {
        /// By the node.
        Node = "node",
        /// In the pod.
        Inpod = "inpod",
    }
    /// How much of a connection the node capture sends through the overlay.
    "node flow" NodeFlow {
        /// The first packets.
        Hybrid = "hybrid",
        /// All.
        Tunnel = "tunnel",
    }
    /// Which rules capture inside a pod.
    "in-pod rules" InpodRules {
        /// iptables: nat REDIRECT.
        Redirect = "redirect",
        /// iptables: TPROXY inbound, nat REDIRECT outbound.
        Tproxy = "tproxy",
        /// nftables: redirect in both directions.
        Nftables = "nftables",
    }
    /// The overlay device of the node capture.
    "overlay" Overlay {
        /// geneve where the kernel has it, else vxlan.
        Auto = "auto",
        /// geneve or nothing.
        Geneve = "geneve",
        /// vxlan in geneve's shape.
        Vxlan = "vxlan",
    }
    /// How the node capture connects two pods of a node.
    "same-node path" SameNode {
        /// Through HBONE.
        Hbone = "hbone",
        /// Inside the proxy's process.
        Direct = "direct",
    }
    /// How pods are connected to their node.
    "CNI" Cni {
        /// A veth and a /32 host route each.
        Routed = "routed",
        /// A port each of one bridge.
        Bridge = "bridge",
    }
    /// Which addresses pods have.
    "IP families" Families {
        /// IPv4.
        V4 = "v4",
        /// IPv4 and IPv6.
        Dual = "dual",
        /// IPv6.
        V6 = "v6",
    }
}

#[allow(
    clippy::derivable_impls,
    reason = "the macro derives the same for all settings"
)]
impl Default for Families {
    fn default() -> Self {
        Self::V4
    }
}

impl Families {
    /// Whether there are IPv6 addresses.
    pub fn have_v6(self) -> bool {
        self != Self::V4
    }

    /// Whether pods have IPv4 addresses.
    pub fn have_v4(self) -> bool {
        self != Self::V6
    }

    /// The addresses of whoever has this one in a lab of these families, IPv4 first.
    pub fn addresses(self, ip: std::net::Ipv4Addr) -> Vec<std::net::IpAddr> {
        let v4 = self.have_v4().then(|| ip.into());
        let v6 = self.have_v6().then(|| super::ipv6::twin(ip).into());
        v4.into_iter().chain(v6).collect()
    }
}

impl Mode {
    /// How a pod with this name is captured.
    pub fn of_pod(self, name: &str) -> Option<Capture> {
        let odd = name
            .bytes()
            .last()
            .is_some_and(|last| last.is_ascii_digit() && (last - b'0') % 2 == 1);
        match self {
            Mode::None => None,
            Mode::Node => Some(Capture::Node),
            Mode::Inpod => Some(Capture::Inpod),
            Mode::Mixed if odd => Some(Capture::Node),
            Mode::Mixed => Some(Capture::Inpod),
        }
    }

    /// Whether some pod may be captured by the node.
    pub fn uses_node(self) -> bool {
        matches!(self, Mode::Node | Mode::Mixed)
    }

    /// Whether some pod may be captured inside its namespace.
    pub fn uses_inpod(self) -> bool {
        matches!(self, Mode::Inpod | Mode::Mixed)
    }
}
