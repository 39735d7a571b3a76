//! The words that `lab up`, `bench` and `agent` share: one vocabulary for the variants of both captures.

use std::fmt;

use clap::{Args, ValueEnum};
use host_net::plan::OverlayKind;
use serde::{Deserialize, Serialize};

/// How pods of a node are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Not at all.
    None,
    /// By the node: ipset, marks, policy routing, overlay, TPROXY.
    Node,
    /// Inside each pod's network namespace.
    Inpod,
    /// Both on one node: pods whose name ends in an odd number by the node, even ones in the pod.
    Mixed,
}

/// How one pod is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PodMode {
    /// Captured by the node.
    Node,
    /// Captured inside its network namespace.
    Inpod,
}

impl fmt::Display for PodMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            PodMode::Node => "node",
            PodMode::Inpod => "inpod",
        })
    }
}

impl Mode {
    /// The capture of a pod with this name, or none.
    ///
    /// [`Mode::Mixed`] goes by the number at the end of the name; a name without one is captured in the pod.
    pub fn of_pod(self, pod_name: &str) -> Option<PodMode> {
        match self {
            Mode::None => None,
            Mode::Node => Some(PodMode::Node),
            Mode::Inpod => Some(PodMode::Inpod),
            Mode::Mixed => {
                let odd = pod_name.as_bytes().last().is_some_and(|last| last.is_ascii_digit() && (last - b'0') % 2 == 1);
                Some(if odd { PodMode::Node } else { PodMode::Inpod })
            }
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

/// How much of a connection the node capture sends through the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum NodeFlow {
    /// Only its first packets; the rest returns by connection mark (Istio 1.18 to 1.20).
    #[default]
    Hybrid,
    /// All of it, both ways (Istio 1.15).
    Tunnel,
}

/// Which rules capture inside a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum InpodRules {
    /// nat REDIRECT in both directions.
    #[default]
    Redirect,
}

/// Which overlay device the node capture uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Overlay {
    /// geneve where the kernel has it, else vxlan.
    #[default]
    Auto,
    /// geneve, or an error.
    Geneve,
    /// vxlan with geneve's VNIs, port and MTU.
    Vxlan,
}

/// How the node capture connects two pods of one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum SameNode {
    /// By HBONE over the proxy's loopback: mutual TLS as between nodes.
    #[default]
    Hbone,
    /// Inside the proxy process, without TLS, as upstream did.
    Direct,
}

/// How pods are connected to their node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, ValueEnum, Serialize, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum Cni {
    /// One veth and one /32 host route per pod.
    #[default]
    Routed,
}

/// Flags that say how pods are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args, Serialize, Deserialize)]
pub struct CaptureArgs {
    /// How pods are captured.
    #[arg(long, value_enum)]
    pub mode: Mode,
    /// Flags of the variants.
    #[command(flatten)]
    #[serde(flatten)]
    pub variant: VariantArgs,
}

/// Flags that choose between variants of the captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args, Serialize, Deserialize, Default)]
pub struct VariantArgs {
    /// Node capture: what goes through the overlay.
    #[arg(long, value_enum, default_value_t)]
    pub node_flow: NodeFlow,
    /// In-pod capture: which rules.
    #[arg(long, value_enum, default_value_t)]
    pub inpod_rules: InpodRules,
    /// Node capture: overlay device.
    #[arg(long, value_enum, default_value_t)]
    pub overlay: Overlay,
    /// Node capture: connections between two pods of one node.
    #[arg(long, value_enum, default_value_t)]
    pub same_node: SameNode,
    /// How pods are connected to their node.
    #[arg(long, value_enum, default_value_t)]
    pub cni: Cni,
}

/// Writes a clap value as the word it is typed as.
macro_rules! display_as_typed {
    ($($type:ty),+) => {$(
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.to_possible_value() {
                    Some(value) => f.write_str(value.get_name()),
                    None => Ok(()),
                }
            }
        }
    )+};
}
display_as_typed!(Mode, NodeFlow, InpodRules, Overlay, SameNode, Cni);

impl Overlay {
    /// The device kind to use on this kernel.
    pub async fn resolve(self) -> OverlayKind {
        match self {
            Overlay::Geneve => OverlayKind::Geneve,
            Overlay::Vxlan => OverlayKind::Vxlan,
            Overlay::Auto if host_net::netlink::overlay_supported(OverlayKind::Geneve).await => OverlayKind::Geneve,
            Overlay::Auto => OverlayKind::Vxlan,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mixed_goes_by_the_last_digit_of_the_name() {
        assert_eq!(Mode::Mixed.of_pod("pod1-1"), Some(PodMode::Node));
        assert_eq!(Mode::Mixed.of_pod("pod1-2"), Some(PodMode::Inpod));
        assert_eq!(Mode::Mixed.of_pod("pod1-13"), Some(PodMode::Node));
        assert_eq!(Mode::Mixed.of_pod("web"), Some(PodMode::Inpod));
        assert_eq!(Mode::Mixed.of_pod(""), Some(PodMode::Inpod));
    }
}
