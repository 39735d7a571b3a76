//! What is compared.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::external::ExternalProxy;
use crate::topology::{LabSpec, Mode, NodeFlow, Overlay, Programs, SameNode};

/// One way of treating the same traffic. In JSON its word.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", from = "String")]
pub enum Variant {
    /// No mesh.
    None,
    /// In-pod capture by two relays that splice, without encryption: the bound of any relay.
    Relay,
    /// Node capture, only first packets through the overlay.
    NodeHybrid,
    /// Node capture, everything through the overlay.
    NodeTunnel,
    /// Node capture as hybrid, but pods of one node are connected inside the proxy's process.
    NodeDirect,
    /// In-pod capture.
    Inpod,
    /// In-pod capture with somebody else's proxy.
    External(Arc<ExternalProxy>),
}

impl Variant {
    /// All of this project, in the order in which they are printed.
    pub const ALL: [Self; 6] = [
        Self::None,
        Self::Relay,
        Self::NodeHybrid,
        Self::NodeTunnel,
        Self::NodeDirect,
        Self::Inpod,
    ];

    /// What is compared when nothing is said: no mesh and the captures. The rest is measured on demand.
    pub const DEFAULT: [Self; 4] = [Self::None, Self::NodeHybrid, Self::NodeTunnel, Self::Inpod];

    /// The word for it.
    pub fn as_str(&self) -> &str {
        match self {
            Self::None => "none",
            Self::Relay => "relay",
            Self::NodeHybrid => "node-hybrid",
            Self::NodeTunnel => "node-tunnel",
            Self::NodeDirect => "node-direct",
            Self::Inpod => "inpod",
            Self::External(proxy) => &proxy.name,
        }
    }

    /// Whether the node captures.
    pub fn is_node(&self) -> bool {
        matches!(self, Self::NodeHybrid | Self::NodeTunnel | Self::NodeDirect)
    }

    /// The lab in which it is measured. They differ in nothing but the capture and the proxy.
    pub fn lab(&self, name: String, overlay: Overlay, programs: Programs) -> LabSpec {
        let (mode, flow) = match self {
            Self::None => (Mode::None, NodeFlow::Hybrid),
            Self::NodeHybrid | Self::NodeDirect => (Mode::Node, NodeFlow::Hybrid),
            Self::NodeTunnel => (Mode::Node, NodeFlow::Tunnel),
            Self::Inpod | Self::Relay | Self::External(_) => (Mode::Inpod, NodeFlow::Hybrid),
        };
        let proxy_command = match self {
            Self::Relay => {
                let program = programs.ambidex.display().to_string();
                Some(vec![program, "lab".to_owned(), "relay".to_owned()])
            }
            Self::External(proxy) => Some(proxy.command()),
            _ => None,
        };
        let spec = LabSpec::new(name, mode, programs);
        LabSpec {
            node_flow: flow,
            overlay,
            same_node: match self {
                Self::NodeDirect => SameNode::Direct,
                _ => spec.same_node,
            },
            proxy_command,
            proxy_env: match self {
                Self::External(proxy) => proxy.full_environment(),
                _ => spec.proxy_env,
            },
            ..spec
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
                let known = Self::ALL.map(|variant| variant.to_string());
                format!("{word:?} is not a variant: {}", known.join(", "))
            })
    }
}

impl From<Variant> for String {
    fn from(variant: Variant) -> Self {
        variant.as_str().to_owned()
    }
}

impl From<String> for Variant {
    /// A word that is none of this project's is somebody else's proxy, of which nothing but the name is known.
    fn from(word: String) -> Self {
        word.parse()
            .unwrap_or_else(|_| Self::External(Arc::new(ExternalProxy::named(word))))
    }
}
