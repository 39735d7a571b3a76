//! The manifests of `deploy/` as objects: those that are written down, and what helm and kustomize make.
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// Namespace that the written manifests are for.
pub const NAMESPACE: &str = "ambidex-system";

/// Objects by kind and name.
pub type Objects = BTreeMap<(String, String), Value>;

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A program that `make deps` fetches, or that is installed. None: this machine does not have it.
pub fn tool(name: &str) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_BIN_EXE_ambidex"))
        .ancestors()
        .nth(2)?;
    let fetched = target.join("kube-tools").join(name);
    if fetched.exists() {
        return Some(fetched);
    }
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {name}")])
        .output()
        .unwrap();
    // An installed kubectl may be one that knows no components.
    (name == "helm" && found.status.success()).then(|| PathBuf::from(name))
}

/// Objects of a YAML text.
pub fn objects(text: &str) -> Objects {
    let mut objects = Objects::new();
    for document in text.split("\n---\n") {
        let object: Value = serde_saphyr::from_str(document.trim_start_matches("---\n"))
            .unwrap_or_else(|error| panic!("{error}: {document}"));
        if object.is_null() {
            continue;
        }
        let name = |value: &Value| value.as_str().expect("a name").to_owned();
        let key = (name(&object["kind"]), name(&object["metadata"]["name"]));
        assert!(objects.insert(key.clone(), object).is_none(), "{key:?}");
    }
    objects
}

/// Objects of a file in `deploy/`.
pub fn written(file: &str) -> Objects {
    let path = root().join("deploy").join(file);
    objects(&std::fs::read_to_string(path).unwrap())
}

/// What helm says: standard output, or why it refuses.
pub fn helm(helm: &Path, verb: &str, settings: &[&str]) -> Result<String, String> {
    let mut command = Command::new(helm);
    command.arg(verb);
    if verb == "template" {
        command.args(["ambidex", "--namespace", NAMESPACE]);
    }
    for setting in settings {
        command.args(["--set", setting]);
    }
    let directory = tempfile::tempdir().unwrap();
    let output = command
        .arg(root().join("deploy/helm/ambidex"))
        // Nothing of the user's own.
        .env("HOME", directory.path())
        .env_remove("KUBECONFIG")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() {
        Ok(text(output.stdout))
    } else {
        Err(text(output.stderr) + &text(output.stdout))
    }
}

/// What the chart makes of settings.
#[track_caller]
pub fn rendered(program: &Path, settings: &[&str]) -> Objects {
    objects(&helm(program, "template", settings).unwrap())
}

/// What kustomize makes of a directory in `deploy/kustomize`.
#[track_caller]
pub fn kustomized(kubectl: &Path, directory: &str) -> Objects {
    let directory = root().join("deploy/kustomize").join(directory);
    let output = Command::new(kubectl)
        .arg("kustomize")
        .arg(&directory)
        .output()
        .unwrap();
    assert!(output.status.success(), "{directory:?}: {output:?}");
    objects(&String::from_utf8(output.stdout).unwrap())
}

/// A DaemonSet's pod.
pub fn pod<'a>(objects: &'a Objects, name: &str) -> &'a Value {
    &objects[&("DaemonSet".to_owned(), name.to_owned())]["spec"]["template"]["spec"]
}

/// A list in an object, empty if there is none.
pub fn list<'a>(object: &'a Value, key: &str) -> &'a [Value] {
    object[key].as_array().map_or(&[], Vec::as_slice)
}

/// All containers of a pod.
pub fn containers(pod: &Value) -> impl Iterator<Item = &Value> {
    list(pod, "initContainers")
        .iter()
        .chain(list(pod, "containers"))
}

/// A container of a pod.
#[track_caller]
pub fn container<'a>(pod: &'a Value, name: &str) -> &'a Value {
    let mut named = containers(pod).filter(|container| container["name"] == name);
    named.next().unwrap_or_else(|| panic!("no {name} in {pod}"))
}

/// Texts of a list.
pub fn texts(values: &[Value]) -> Vec<&str> {
    values.iter().map(|v| v.as_str().expect("a text")).collect()
}
