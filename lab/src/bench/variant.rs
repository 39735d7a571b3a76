//! What is compared.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::topology::{LabSpec, Mode, NodeFlow, Overlay, Programs};

/// One way of treating the same traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Variant {
    /// No mesh.
    None,
    /// In-pod capture by two relays that splice, without encryption: the bound of any relay.
    Relay,
    /// Node capture, only first packets through the overlay.
    NodeHybrid,
    /// Node capture, everything through the overlay.
    NodeTunnel,
    /// In-pod capture.
    Inpod,
}

impl Variant {
    /// All, in the order in which they are printed.
    pub const ALL: [Self; 5] = [
        Self::None,
        Self::Relay,
        Self::NodeHybrid,
        Self::NodeTunnel,
        Self::Inpod,
    ];

    /// What is compared when nothing is said: no mesh and the captures. The bound is measured on demand.
    pub const DEFAULT: [Self; 4] = [Self::None, Self::NodeHybrid, Self::NodeTunnel, Self::Inpod];

    /// The word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Relay => "relay",
            Self::NodeHybrid => "node-hybrid",
            Self::NodeTunnel => "node-tunnel",
            Self::Inpod => "inpod",
        }
    }

    /// Whether the node captures.
    pub fn is_node(self) -> bool {
        matches!(self, Self::NodeHybrid | Self::NodeTunnel)
    }

    /// The lab in which it is measured. They differ in nothing but the capture.
    pub fn lab(self, name: String, overlay: Overlay, programs: Programs) -> LabSpec {
        let (mode, flow) = match self {
            Self::None => (Mode::None, NodeFlow::Hybrid),
            Self::NodeHybrid => (Mode::Node, NodeFlow::Hybrid),
            Self::NodeTunnel => (Mode::Node, NodeFlow::Tunnel),
            Self::Inpod | Self::Relay => (Mode::Inpod, NodeFlow::Hybrid),
        };
        let relay = || {
            let program = programs.ambidex.display().to_string();
            vec![program, "lab".to_owned(), "relay".to_owned()]
        };
        LabSpec {
            node_flow: flow,
            overlay,
            proxy_command: (self == Self::Relay).then(relay),
            ..LabSpec::new(name, mode, programs)
        }
    }
}

impl fmt::Display for Variant {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Variant {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|variant| variant.as_str() == word)
            .ok_or_else(|| {
                format!(
                    "{word:?} is not a variant: {}",
                    Self::ALL.map(Self::as_str).join(", ")
                )
            })
    }
}
