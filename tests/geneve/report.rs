//! What the machine tells whoever booted it: one file, rewritten after every test.

use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// The report of a run. Without an exit code the run did not come to its end.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Tests that came to an end, in order.
    pub tests: Vec<TestReport>,
    /// The suite's exit code.
    pub exit_code: Option<u8>,
}

/// One test.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TestReport {
    /// Its name.
    pub name: String,
    /// Time taken, on the machine's clock.
    pub seconds: f64,
    /// Why it failed.
    pub error: Option<String>,
}

impl Report {
    /// The report in a file, if there is one. The machine may be writing it, so half a report is none.
    pub fn load(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    /// Writes the report.
    pub fn store(&self, path: &Path) -> Result<()> {
        std::fs::write(path, serde_json::to_vec_pretty(self)?)
            .with_context(|| format!("write {}", path.display()))
    }
}
