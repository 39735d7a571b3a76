//! Puts the plugin where a container runtime finds it: the binary into the directories of plugins, and an element for it
//! into a network configuration, behind the plugin that makes the pods' network.
//!
//! Everything is written beside its place and renamed into it, so that a runtime reads either what was or what is to be, and
//! a binary that is being executed is replaced all the same.

mod files;
mod list;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use files::{read, remove_if_there, write_atomically};
use list::{Kind, List};

use super::POD_ANNOTATIONS;

/// Name of the plugin's binary, and so the `type` of its element.
pub const PLUGIN_TYPE: &str = "ambidex-cni";
/// Names that a list of our own may have: the first that is sorted before the primary one's.
const OWN_LISTS: [&str; 2] = ["02-ambidex.conflist", "00-ambidex.conflist"];
/// Name of the configuration without a chain, sorted behind every other: for those that refer to it by name.
const STANDALONE: &str = "YYY-ambidex.conf";
/// What is appended to the name of a configuration that a list took the place of.
const SET_ASIDE: &str = ".ambidex-original";

/// Where the element of the plugin goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// Into the configuration that the runtime uses.
    Chained,
    /// Into a copy of it that the runtime prefers: the original is left alone, and what its owner does to it does not
    /// take the plugin out.
    Owned,
    /// Alone, in a file that the runtime does not use by itself.
    Standalone,
}

/// Why something could not be installed or removed.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A file or directory.
    #[error("{0}: {1}")]
    Io(PathBuf, #[source] io::Error),
    /// There is no network to be chained into.
    #[error(
        "{0}: no valid network configuration (.conf, .conflist) yet: install the cluster's CNI plugin, or wait for it with --watch"
    )]
    NoNetwork(PathBuf),
    /// The named configuration cannot be used.
    #[error("{0}: {1}")]
    Unusable(PathBuf, String),
}

/// What is installed, and where to.
#[derive(Debug, Clone)]
pub struct Installation {
    /// The binary that is copied.
    pub plugin: PathBuf,
    /// Directories of plugins.
    pub bin_dirs: Vec<PathBuf>,
    /// Directory of network configurations.
    pub conf_dir: PathBuf,
    /// The configuration to be used, if not the first valid one.
    pub conf_name: Option<String>,
    /// Where the element goes.
    pub form: Form,
    /// The element: what the plugin reads, without its `type`.
    pub settings: Value,
}

impl Installation {
    /// Brings everything in place that is not, and says what that was: nothing, if all was there.
    ///
    /// # Errors
    /// Names the file. What was done before it stays, and the next call goes on.
    pub fn ensure(&self) -> Result<Vec<String>, InstallError> {
        let mut done = Vec::new();
        // The binary first: a configuration that names a missing plugin keeps every pod from starting.
        let binary = read(&self.plugin)?;
        for dir in &self.bin_dirs {
            files::remove_stale(dir)?;
            let path = dir.join(PLUGIN_TYPE);
            if fs::read(&path).is_ok_and(|there| there == binary) && files::is_executable(&path) {
                continue;
            }
            write_atomically(&path, &binary, 0o755)?;
            done.push(format!("installed {}", path.display()));
        }
        files::remove_stale(&self.conf_dir)?;
        match self.form {
            Form::Chained => self.ensure_chained(&mut done)?,
            Form::Owned => self.ensure_owned(&mut done)?,
            Form::Standalone => {
                let mut conf = json!({"cniVersion": "0.3.1", "name": "ambidex"});
                merge(&mut conf, &self.element());
                let path = self.conf_dir.join(STANDALONE);
                self.put(&path, &conf, &mut done)?;
            }
        }
        Ok(done)
    }

    fn ensure_chained(&self, done: &mut Vec<String>) -> Result<(), InstallError> {
        // Left from an installation in the other form, and preferred by the runtime.
        for own in OWN_LISTS {
            let path = self.conf_dir.join(own);
            if remove_if_there(&path)? {
                done.push(format!("removed {}", path.display()));
            }
        }
        let primary = self.primary()?;
        let chained = primary.with_element(&self.element());
        let path = primary.list_path();
        self.put(&path, &chained, done)?;
        if primary.kind == Kind::Single {
            let aside = set_aside(&primary.path);
            fs::rename(&primary.path, &aside)
                .map_err(|e| InstallError::Io(primary.path.clone(), e))?;
            done.push(format!(
                "{} took the place of {}",
                path.display(),
                primary.path.display()
            ));
        }
        Ok(())
    }

    fn ensure_owned(&self, done: &mut Vec<String>) -> Result<(), InstallError> {
        let primary = self.primary()?;
        let name = primary.name();
        let Some(own) = OWN_LISTS.into_iter().find(|own| *own < name) else {
            return Err(InstallError::Unusable(
                primary.path.clone(),
                format!(
                    "no list of ours would be sorted before it: rename it, so that {} is",
                    OWN_LISTS[1]
                ),
            ));
        };
        let owned = primary.with_element(&self.element());
        self.put(&self.conf_dir.join(own), &owned, done)
    }

    /// Takes away what [`Installation::ensure`] of any form made, whoever called it, and says what that was.
    ///
    /// # Errors
    /// Names the file.
    pub fn remove(&self) -> Result<Vec<String>, InstallError> {
        let mut done = Vec::new();
        let mut removed = |path: &Path| -> Result<(), InstallError> {
            if remove_if_there(path)? {
                done.push(format!("removed {}", path.display()));
            }
            Ok(())
        };
        files::remove_stale(&self.conf_dir)?;
        for own in OWN_LISTS.into_iter().chain([STANDALONE]) {
            removed(&self.conf_dir.join(own))?;
        }
        for name in files::names(&self.conf_dir)? {
            let Some(original) = name.strip_suffix(SET_ASIDE) else {
                continue;
            };
            let original = self.conf_dir.join(original);
            // Its owner may have written it again meanwhile: that is the newer one.
            if !original.exists() {
                fs::rename(self.conf_dir.join(&name), &original)
                    .map_err(|e| InstallError::Io(original.clone(), e))?;
            }
            remove_if_there(&self.conf_dir.join(&name))?;
            removed(&original.with_extension("conflist"))?;
        }
        for list in self.valid_lists()? {
            let Some(without) = list.without_element() else {
                continue;
            };
            let mode = files::mode(&list.path)?;
            write_atomically(&list.path, &list::text(&without), mode)?;
            done.push(format!("taken out of {}", list.path.display()));
        }
        // The binary last, for the reason that it is the first to come.
        for dir in &self.bin_dirs {
            if !dir.exists() {
                continue;
            }
            files::remove_stale(dir)?;
            let path = dir.join(PLUGIN_TYPE);
            if remove_if_there(&path)? {
                done.push(format!("removed {}", path.display()));
            }
        }
        Ok(done)
    }

    /// The element in `plugins`. A runtime that does not know the capability leaves it out; none refuses it.
    fn element(&self) -> Value {
        let mut element = json!({"type": PLUGIN_TYPE, "capabilities": {POD_ANNOTATIONS: true}});
        merge(&mut element, &self.settings);
        element
    }

    /// Writes a configuration unless it is there already.
    fn put(&self, path: &Path, conf: &Value, done: &mut Vec<String>) -> Result<(), InstallError> {
        let there = fs::read(path).ok();
        let there: Option<Value> = there.and_then(|text| serde_json::from_slice(&text).ok());
        if there.as_ref() == Some(conf) {
            return Ok(());
        }
        // Of a configuration that exists, its owner chose the mode.
        let mode = files::mode(path).unwrap_or(0o600);
        write_atomically(path, &list::text(conf), mode)?;
        done.push(format!("wrote {}", path.display()));
        Ok(())
    }

    /// The configuration that the runtime uses, ours apart: the named one, else the first valid one by name.
    fn primary(&self) -> Result<List, InstallError> {
        let Some(name) = &self.conf_name else {
            return self
                .valid_lists()?
                .into_iter()
                .next()
                .ok_or_else(|| InstallError::NoNetwork(self.conf_dir.clone()));
        };
        let path = self.conf_dir.join(name);
        // A single configuration that was made a list before.
        let wrapped = path.with_extension("conflist");
        let path = if !path.exists() && wrapped.exists() {
            wrapped
        } else {
            path
        };
        if !path.exists() {
            return Err(InstallError::NoNetwork(path));
        }
        List::read(&path)?.map_err(|why| InstallError::Unusable(path, why))
    }

    fn valid_lists(&self) -> Result<Vec<List>, InstallError> {
        let mut lists = Vec::new();
        for name in files::names(&self.conf_dir)? {
            let ours = OWN_LISTS.contains(&name.as_str()) || name == STANDALONE;
            let extension = Path::new(&name).extension().and_then(|e| e.to_str());
            if ours || name.starts_with('.') || !matches!(extension, Some("conf" | "conflist")) {
                continue;
            }
            match List::read(&self.conf_dir.join(&name))? {
                Ok(list) => lists.push(list),
                Err(why) => tracing::debug!(file = name, why, "not a network configuration"),
            }
        }
        Ok(lists)
    }
}

fn set_aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SET_ASIDE);
    PathBuf::from(name)
}

fn merge(into: &mut Value, from: &Value) {
    if let (Some(into), Some(from)) = (into.as_object_mut(), from.as_object()) {
        into.extend(from.iter().map(|(k, v)| (k.clone(), v.clone())));
    }
}
