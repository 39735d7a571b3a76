//! The captures that the flows are tried in.

use clap::ValueEnum;
use lab::topology::{Cni, Families, InpodRules, LabSpec, Mode, NodeFlow};
use serde::Serialize;

use crate::harness;

/// How pods are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Captured {
    /// By the node.
    Node(NodeFlow),
    /// In the pod.
    Inpod(InpodRules),
}

/// A capture and how pods are wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Column {
    /// How pods are captured.
    pub captured: Captured,
    /// How pods are wired.
    pub cni: Cni,
    /// Whether flows are of IPv6, in a lab of both families.
    pub v6: bool,
}

/// A column in words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Named {
    /// `node hybrid`, `in-pod redirect`.
    pub capture: String,
    /// `routed`, `bridge`.
    pub cni: String,
    /// `IPv4`, `IPv6`.
    pub family: &'static str,
}

impl Column {
    /// All of them: whatever rules and wirings the lab knows.
    pub fn all() -> Vec<Self> {
        let mut captured: Vec<Captured> = NodeFlow::value_variants()
            .iter()
            .map(|flow| Captured::Node(*flow))
            .collect();
        captured.extend(
            InpodRules::value_variants()
                .iter()
                .map(|rules| Captured::Inpod(*rules)),
        );
        let of = |cni: &Cni| {
            let cni = *cni;
            let column = move |captured| {
                let v4 = Column {
                    captured,
                    cni,
                    v6: false,
                };
                [v4, Column { v6: true, ..v4 }]
            };
            captured
                .iter()
                .copied()
                .flat_map(column)
                .collect::<Vec<_>>()
        };
        Cni::value_variants().iter().flat_map(of).collect()
    }

    /// Whether the node captures.
    pub fn is_node(&self) -> bool {
        matches!(self.captured, Captured::Node(_))
    }

    /// A lab for it.
    pub fn spec(&self) -> LabSpec {
        let mut spec = match self.captured {
            Captured::Node(flow) => LabSpec {
                node_flow: flow,
                ..harness::spec(Mode::Node)
            },
            Captured::Inpod(rules) => LabSpec {
                inpod_rules: rules,
                ..harness::spec(Mode::Inpod)
            },
        };
        spec.cni = self.cni;
        if self.v6 {
            spec.families = Families::Dual;
        }
        spec
    }

    /// In words.
    pub fn named(&self) -> Named {
        let capture = match self.captured {
            Captured::Node(flow) => format!("node {flow}"),
            Captured::Inpod(rules) => format!("in-pod {rules}"),
        };
        Named {
            capture,
            cni: self.cni.to_string(),
            family: if self.v6 { "IPv6" } else { "IPv4" },
        }
    }
}
