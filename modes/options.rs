//! The words that `lab up`, `bench` and `agent` share: one vocabulary for the variants of both captures.

pub mod duration;
pub mod field;
pub mod pod_source;
pub mod tls;

use clap::Args;
use host_net::netlink::NetlinkError;
use host_net::plan::OverlayKind;

pub use lab::topology::{Capture, Cni, InpodRules, Mode, NodeFlow, Overlay, SameNode};

/// Flags that say how pods are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub struct CaptureArgs {
    /// How pods are captured.
    #[arg(long, value_enum)]
    pub mode: Mode,
    /// Flags of the variants.
    #[command(flatten)]
    pub variant: VariantArgs,
}

/// Flags that choose between variants of the captures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Args)]
pub struct VariantArgs {
    /// Node capture: what goes through the overlay.
    #[arg(long, value_enum, default_value_t = NodeFlow::Hybrid)]
    pub node_flow: NodeFlow,
    /// In-pod capture: which rules.
    #[arg(long, value_enum, default_value_t = InpodRules::Redirect)]
    pub inpod_rules: InpodRules,
    /// Node capture: overlay device.
    #[arg(long, value_enum, default_value_t = Overlay::Auto)]
    pub overlay: Overlay,
    /// Node capture: connections between two pods of one node.
    #[arg(long, value_enum, default_value_t = SameNode::Hbone)]
    pub same_node: SameNode,
    /// How pods are connected to their node.
    #[arg(long, value_enum, default_value_t = Cni::Routed)]
    pub cni: Cni,
}

/// Fails if a capture needs the overlay that was asked for by name and this kernel has no driver for it.
///
/// # Errors
/// Names the ways out.
pub async fn require_overlay(mode: Mode, overlay: Overlay) -> Result<(), NetlinkError> {
    let kind = match overlay {
        Overlay::Auto => return Ok(()),
        Overlay::Geneve => OverlayKind::Geneve,
        Overlay::Vxlan => OverlayKind::Vxlan,
    };
    let needed = matches!(mode, Mode::Node | Mode::Mixed);
    if needed && !host_net::netlink::overlay_supported(kind).await {
        return Err(NetlinkError::NoOverlay(kind));
    }
    Ok(())
}

/// The overlay device to use on this kernel.
pub async fn resolve_overlay(overlay: Overlay) -> OverlayKind {
    match overlay {
        Overlay::Geneve => OverlayKind::Geneve,
        Overlay::Vxlan => OverlayKind::Vxlan,
        Overlay::Auto if host_net::netlink::overlay_supported(OverlayKind::Geneve).await => {
            OverlayKind::Geneve
        }
        Overlay::Auto => OverlayKind::Vxlan,
    }
}
