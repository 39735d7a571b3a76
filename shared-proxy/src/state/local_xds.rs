//! The mesh from a YAML file in the field's LOCAL_XDS form.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_saphyr::{Budget, DuplicateKeyPolicy};

use super::{Policy, Service, Snapshot, SnapshotError, Workload};

mod watch;

pub use watch::{POLL_INTERVAL, watch_file};

/// The file's content.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Document {
    // A key with nothing behind it is an empty list.
    workloads: Option<Vec<Workload>>,
    services: Option<Vec<Service>>,
    policies: Option<Vec<Policy>>,
}

/// Why a text or a file is not a mesh.
#[derive(Debug, thiserror::Error)]
pub enum LocalXdsError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Not YAML, or not of the form. The message names line and column.
    #[error("{0}")]
    Yaml(String),
    /// A workload's namespace, service account or trust domain cannot be part of an identity.
    #[error("workload {0}: {1}")]
    Identity(String, #[source] crate::identity::InvalidIdentity),
    /// Each object is well-formed, but together they are not a mesh.
    #[error(transparent)]
    Objects(#[from] SnapshotError),
    /// A file with one of the errors above.
    #[error("{path}: {error}")]
    InFile {
        /// The file.
        path: PathBuf,
        /// The error.
        error: Box<LocalXdsError>,
    },
}

/// Reads a mesh from YAML. Unknown and repeated keys are errors. An empty text is an empty mesh.
pub fn parse(text: &str) -> Result<Snapshot, LocalXdsError> {
    let document: Option<Document> = serde_saphyr::from_str_with_options(text, options(text.len()))
        .map_err(|e| LocalXdsError::Yaml(in_one_line(&e, text)))?;
    let document = document.unwrap_or_default();
    let workloads = document.workloads.unwrap_or_default();
    let services = document.services.unwrap_or_default();
    let policies = document.policies.unwrap_or_default();
    for workload in &workloads {
        workload
            .identity()
            .map_err(|e| LocalXdsError::Identity(workload.display_name(), e))?;
    }
    Ok(Snapshot::new(workloads, services, policies)?)
}

/// The parser's message, which names line and column, with the line it is about: a log has room for one line.
fn in_one_line(error: &serde_saphyr::Error, text: &str) -> String {
    let message = error.without_snippet().to_string().replace('\n', " ");
    let line = error
        .location()
        .and_then(|location| usize::try_from(location.line()).ok())
        .and_then(|line| text.lines().nth(line.saturating_sub(1)))
        .map(|line| line.trim().chars().take(100).collect::<String>());
    match line {
        Some(line) => format!("{message}: `{line}`"),
        None => message,
    }
}

/// The parser's limits are for small configurations; a mesh may be large, but never has more nodes than its text has
/// characters. What aliases may multiply stays limited.
fn options(length: usize) -> serde_saphyr::Options {
    let usual = Budget::default();
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_nodes: usual.max_nodes.max(length),
            max_events: usual.max_events.max(length.saturating_mul(2)),
            max_total_scalar_bytes: usual.max_total_scalar_bytes.max(length),
        },
        duplicate_keys: DuplicateKeyPolicy::Error,
    }
}

/// Reads a mesh from a file.
pub fn load(path: &Path) -> Result<Snapshot, LocalXdsError> {
    let text = std::fs::read_to_string(path).map_err(|source| LocalXdsError::File {
        path: path.to_owned(),
        source,
    })?;
    parse(&text).map_err(|error| LocalXdsError::InFile {
        path: path.to_owned(),
        error: Box::new(error),
    })
}

#[cfg(test)]
mod tests;
