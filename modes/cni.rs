//! `ambidex-cni`: the chained CNI plugin. It tells the agent about a pod before the pod's first process runs, and fails
//! the sandbox when the agent cannot capture it.
//!
//! The contract is CNI 1.1.0 (versions 0.3.1 to 1.1.0 accepted); configuration keys are the field's, plus one object
//! `ambidex` of ours.

mod config;
mod event;
#[cfg(test)]
mod fuzz;
pub mod install;
mod run;

pub use config::{Captured, CniArgs, DNS_CAPTURE, NetConf, POD_ANNOTATIONS, truth};
pub use event::{Attachment, PodEvent, PodIp, ValidAttachments};
pub use run::main;

use serde::Serialize;

/// CNI versions that this plugin accepts.
pub const SUPPORTED_VERSIONS: [&str; 5] = ["0.3.1", "0.4.0", "1.0.0", "1.0.1", "1.1.0"];

/// An error in the form of the CNI specification: printed as JSON on standard output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{msg}: {details}")]
pub struct CniError {
    /// Code of the specification.
    pub code: u32,
    /// One sentence.
    pub msg: &'static str,
    /// What happened, to which object, and what to do.
    pub details: String,
}

impl CniError {
    /// Code 1: the configuration's version is not supported.
    pub fn incompatible_version(details: impl Into<String>) -> Self {
        Self {
            code: 1,
            msg: "incompatible CNI version",
            details: details.into(),
        }
    }

    /// Code 4: an environment variable is missing or wrong.
    pub fn invalid_environment(details: impl Into<String>) -> Self {
        Self {
            code: 4,
            msg: "invalid environment variable",
            details: details.into(),
        }
    }

    /// Code 5: reading or writing failed.
    pub fn io(details: impl Into<String>) -> Self {
        Self {
            code: 5,
            msg: "I/O failure",
            details: details.into(),
        }
    }

    /// Code 6: JSON cannot be decoded.
    pub fn decode(details: impl Into<String>) -> Self {
        Self {
            code: 6,
            msg: "failed to decode content",
            details: details.into(),
        }
    }

    /// Code 7: the network configuration makes no sense.
    pub fn invalid_config(details: impl Into<String>) -> Self {
        Self {
            code: 7,
            msg: "invalid network config",
            details: details.into(),
        }
    }

    /// Code 11: the runtime should try again later.
    pub fn try_again(details: impl Into<String>) -> Self {
        Self {
            code: 11,
            msg: "try again later",
            details: details.into(),
        }
    }

    /// Code 50: the plugin cannot take an ADD.
    pub fn unavailable(details: impl Into<String>) -> Self {
        Self {
            code: 50,
            msg: "plugin not available",
            details: details.into(),
        }
    }

    /// Code 51: the plugin cannot take an ADD, and the containers that are there may not reach anybody.
    pub fn limited(details: impl Into<String>) -> Self {
        Self {
            code: 51,
            msg: "plugin not available, existing containers may have limited connectivity",
            details: details.into(),
        }
    }

    /// Code 999: anything else.
    pub fn internal(details: impl Into<String>) -> Self {
        Self {
            code: 999,
            msg: "pod not enrolled",
            details: details.into(),
        }
    }
}

/// The error as it goes to standard output.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ErrorOutput<'a> {
    cni_version: &'a str,
    code: u32,
    msg: &'a str,
    details: &'a str,
}
