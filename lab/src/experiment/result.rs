//! Results: result.json with everything that an experiment found.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::access;
use super::engine::Kind;
use super::file::Experiment;
use super::judge::Judged;
use super::steps::Done;
use super::timeline::Second;
use super::wire::{Flow, Place};
use crate::traffic::Saw;

/// Name of the results file.
pub const RESULT: &str = "result.json";
/// Name of its short form.
pub const REPORT: &str = "report.md";
/// Format of the results file; raised when a key changes its meaning.
pub const FORMAT: u32 = 1;

/// All that an experiment found. Times are seconds of load where nothing else is said.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Outcome {
    /// [`FORMAT`].
    pub format: u32,
    /// What was to be done.
    pub experiment: Experiment,
    /// Version, profile and features of ambidex.
    pub build: String,
    /// The commit that the working directory is at, if it is a repository.
    pub commit: Option<String>,
    /// Digest of the program.
    pub program: String,
    /// When the load began: microseconds since 1970.
    pub begun_us: u64,
    /// How long all took.
    pub seconds_taken: f64,
    /// Kernel, processors, tools.
    pub environment: serde_json::Value,
    /// Whether everything that had to be so was so.
    pub holds: bool,
    /// What was measured, with what had to be so.
    pub assertions: Vec<Judged>,
    /// The steps.
    pub steps: Vec<Done>,
    /// The connections in numbers.
    pub load: LoadSeen,
    /// Latency and errors over time.
    pub timeline: Vec<Second>,
    /// Connections on which something went wrong, the first ones.
    pub errors: Vec<ErrorSeen>,
    /// Connections that were opened while one of their pods was outside the mesh.
    pub outside_the_mesh: Vec<OutsideSeen>,
    /// What the access logs say.
    pub access: access::Verdict,
    /// What was heard on each device.
    pub devices: Vec<DeviceSeen>,
    /// Connections with packets in the clear, the first ones of each device.
    pub clear: Vec<ClearSeen>,
}

/// The connections in numbers.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct LoadSeen {
    /// Long-lived connections that talked all the time.
    pub busy: u64,
    /// Those that talked at the beginning and at the end.
    pub idle: u64,
    /// New connections that were made.
    pub new: u64,
    /// Those that were due, and that the load came too late for.
    pub new_late: u64,
    /// Messages that were answered, every byte of which was compared in both directions.
    pub messages: u64,
    /// Median of the time of a new connection, in milliseconds.
    pub new_p50_ms: Option<f64>,
    /// 99th percentile.
    pub new_p99_ms: Option<f64>,
    /// 99.9th percentile.
    pub new_p999_ms: Option<f64>,
    /// The longest.
    pub new_max_ms: Option<f64>,
    /// The longest time to an answer on a long-lived connection, in milliseconds.
    pub stall_max_ms: f64,
}

/// Something that went wrong on a connection.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ErrorSeen {
    /// When.
    pub at_seconds: f64,
    /// When the connection had begun.
    pub begun_seconds: Option<f64>,
    /// What kind of connection.
    pub kind: Option<Kind>,
    /// Its number.
    pub id: u64,
    /// Client and server, with the client's port.
    pub connection: String,
    /// Which end says so.
    pub by: String,
    /// In a word.
    pub saw: Saw,
    /// In a sentence.
    pub what: String,
}

/// A connection that was opened while one of its pods was outside the mesh.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct OutsideSeen {
    /// When.
    pub begun_seconds: f64,
    /// Client and server, with the client's port.
    pub connection: String,
    /// Whether it was opened while the pod left or came back, so that it may as well be inside.
    pub on_the_way: bool,
}

/// What was heard on a device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceSeen {
    /// Where.
    pub device: String,
    /// What it is to the load.
    pub place: Place,
    /// Segments that were heard.
    pub packets: u64,
    /// Segments of tunnels.
    pub tunnel: u64,
    /// Segments in the clear of connections inside the mesh.
    pub clear: u64,
    /// Segments in the clear of connections outside the mesh.
    pub outside: u64,
    /// Segments that were not heard.
    pub missed: u64,
}

/// A connection with packets in the clear.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClearSeen {
    /// On which device.
    pub device: String,
    /// Both ends.
    #[serde(flatten)]
    pub flow: Flow,
    /// Segments.
    pub packets: u64,
    /// When the first one passed.
    pub first_seconds: f64,
    /// When the last one passed.
    pub last_seconds: f64,
    /// Whether the connection was outside the mesh because a step said so.
    pub outside: bool,
}

impl Outcome {
    /// Writes result.json and report.md.
    ///
    /// # Errors
    /// When one cannot be written.
    pub fn store(&self, directory: &Path) -> Result<()> {
        let json = serde_json::to_vec_pretty(self)?;
        for (name, text) in [
            (RESULT, json),
            (REPORT, super::report::markdown(self).into_bytes()),
        ] {
            let path = directory.join(name);
            std::fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        }
        Ok(())
    }
}
