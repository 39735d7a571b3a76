//! A network configuration of somebody else.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::{InstallError, PLUGIN_TYPE, files};

/// What a configuration is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A list of plugins.
    List,
    /// One plugin.
    Single,
}

/// A valid configuration.
#[derive(Debug, Clone)]
pub(super) struct List {
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    conf: Map<String, Value>,
}

/// A configuration as text.
pub(super) fn text(conf: &Value) -> Vec<u8> {
    format!("{conf:#}\n").into_bytes()
}

fn is_ours(element: &Value) -> bool {
    element["type"] == PLUGIN_TYPE
}

impl List {
    /// Reads a file; the inner error says why it is no configuration.
    pub(super) fn read(path: &Path) -> Result<Result<Self, String>, InstallError> {
        let bytes = files::read(path)?;
        let conf: Map<String, Value> = match serde_json::from_slice(&bytes) {
            Ok(conf) => conf,
            Err(error) => return Ok(Err(format!("not a JSON object: {error}"))),
        };
        let typed = |element: &Value| element["type"].as_str().is_some_and(|t| !t.is_empty());
        let kind = match conf.get("plugins") {
            Some(Value::Array(plugins)) if plugins.is_empty() => {
                return Ok(Err("its list of plugins is empty".to_owned()));
            }
            Some(Value::Array(plugins)) if plugins.iter().all(typed) => Kind::List,
            Some(_) => return Ok(Err("plugins is not a list of plugins".to_owned())),
            None if conf.get("type").is_some_and(Value::is_string) => Kind::Single,
            None => return Ok(Err("it has neither plugins nor a type".to_owned())),
        };
        if kind == Kind::List && !conf.get("name").is_some_and(Value::is_string) {
            return Ok(Err("it has no name".to_owned()));
        }
        Ok(Ok(Self {
            path: path.to_owned(),
            kind,
            conf,
        }))
    }

    /// Name of the file.
    pub(super) fn name(&self) -> &str {
        let name = self.path.file_name().and_then(|name| name.to_str());
        name.unwrap_or_default()
    }

    /// Where the list is that has our element: the file itself, or one beside a single plugin's.
    pub(super) fn list_path(&self) -> PathBuf {
        match self.kind {
            Kind::List => self.path.clone(),
            Kind::Single => self.path.with_extension("conflist"),
        }
    }

    /// The list with our element as the last, once.
    pub(super) fn with_element(&self, element: &Value) -> Value {
        let mut conf = self.conf.clone();
        if self.kind == Kind::Single {
            // Name and version belong to the list then, as libcni has it.
            let single = Value::Object(self.conf.clone());
            conf = Map::from_iter([
                (
                    "cniVersion".to_owned(),
                    single.get("cniVersion").cloned().unwrap_or(json!("0.3.1")),
                ),
                (
                    "name".to_owned(),
                    single
                        .get("name")
                        .cloned()
                        .unwrap_or(json!("k8s-pod-network")),
                ),
                ("plugins".to_owned(), json!([single])),
            ]);
        }
        if let Some(Value::Array(plugins)) = conf.get_mut("plugins") {
            plugins.retain(|plugin| !is_ours(plugin));
            plugins.push(element.clone());
        }
        Value::Object(conf)
    }

    /// The list without our element, if it has one.
    pub(super) fn without_element(&self) -> Option<Value> {
        let mut conf = self.conf.clone();
        let Some(Value::Array(plugins)) = conf.get_mut("plugins") else {
            return None;
        };
        let before = plugins.len();
        plugins.retain(|plugin| !is_ours(plugin));
        (plugins.len() != before).then_some(Value::Object(conf))
    }
}
