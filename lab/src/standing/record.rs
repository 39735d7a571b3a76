//! `lab.json`: what must be known of a lab to use and remove it from another process.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::process::Process;
use crate::topology::{LabSpec, Topology};

const FILE: &str = "lab.json";

/// The record of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    /// What it was built from.
    pub spec: LabSpec,
    /// Whether building came to its end.
    pub complete: bool,
    /// How often each pod was created anew.
    pub generations: BTreeMap<String, u32>,
    /// How many pods came to each node after the lab was built, by the node's index.
    #[serde(default)]
    pub created: BTreeMap<u8, u8>,
    /// Processes that belong to the lab by name: `agent1`, `proxy1`, `pause pod1-1`.
    pub processes: BTreeMap<String, Process>,
}

impl Record {
    /// What the lab consists of.
    pub fn topology(&self) -> Topology {
        Topology::grown(&self.spec, &self.generations, &self.created)
    }

    /// Reads the record in a lab's directory; `None` if there is none, or one that another version wrote.
    pub fn load(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        match fs::read(&path) {
            Ok(text) => Ok(serde_json::from_slice(&text).ok()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| path.display().to_string()),
        }
    }

    /// Writes the record into a lab's directory.
    pub fn store(&self, dir: &Path) -> Result<()> {
        replace_file(&dir.join(FILE), &serde_json::to_vec_pretty(self)?)
    }
}

/// Replaces a file by rename: a reader sees the one or the other.
pub fn replace_file(path: &Path, contents: &[u8]) -> Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&name)?;
        file.write_all(contents)?;
        fs::rename(&name, path)
    };
    write().with_context(|| format!("write {}", path.display()))
}
