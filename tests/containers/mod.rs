//! Real container runtimes on the nodes of a lab: podman, and containerd with its `ctr`, both with the CNI plugins of the
//! distribution and ours chained behind them.
//!
//! Each has directories, a cgroup and a configuration of its own. What it made is removed by a process that waits at the
//! other end of a pipe: the pipe closes when the runtime is dropped, and also when the test program is killed.
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod containerd;
mod podman;

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use lab::standing::Lab;
use serde_json::{Value, json};

use crate::runtime::Done;

pub use containerd::Containerd;
pub use podman::Podman;

/// Where the distribution has its CNI plugins.
const PLUGINS: &str = "/usr/lib/cni";
/// Longest that one call of a runtime may take, in seconds. Far over what it needs.
const CALL_LIMIT: u32 = 120;
/// Name of the image, with busybox and nothing else.
pub const IMAGE: &str = "localhost/busybox:test";
/// Namespace and service account of all captured containers.
pub const IDENTITY: (&str, &str) = ("boxes", "till");

/// Directory of a runtime on one node.
struct Place {
    node: String,
    dir: PathBuf,
    guardian: Option<Child>,
}

impl Place {
    /// An empty directory, and whoever runs `cleanup` in it in the end. In that script `$dir` is the directory and
    /// `$group` the path of the runtime's cgroup in each hierarchy.
    fn new(lab: &Lab, node: u8, runtime: &str, cleanup: &str) -> Self {
        let name = format!("ambidex-{runtime}-{}-{node}", lab.name());
        let dir = PathBuf::from("/run").join(&name);
        fs::create_dir(&dir).unwrap();
        let script = format!(
            "read -r _; {cleanup}\n\
             for tries in 1 2 3 4 5; do\n\
               rm -rf \"$dir\"\n\
               for group in /sys/fs/cgroup/*/$group; do\n\
                 [ -d \"$group\" ] && find \"$group\" -depth -type d -exec rmdir {{}} \\;\n\
               done\n\
               [ -e \"$dir\" ] || ls -d /sys/fs/cgroup/*/$group >/dev/null 2>&1 || exit 0\n\
               sleep 0.2\n\
             done"
        );
        let node = format!("node{node}");
        let mut command = Command::new("setsid");
        command
            .args(["sh", "-c", &script])
            .env("dir", &dir)
            .env("group", &name)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // It holds the node's namespace, in which the runtime has to be called, also when the lab is gone.
        let guardian = lab.netns(&node).unwrap().run(|| command.spawn());
        Self {
            node,
            dir,
            guardian: Some(guardian.unwrap().unwrap()),
        }
    }

    /// Path of the runtime's cgroup in each hierarchy.
    fn cgroup(&self) -> String {
        format!("/{}", self.dir.file_name().unwrap().to_str().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Writes a program into the directory.
    fn program(&self, name: &str, script: &str) {
        let path = self.path(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// Calls a program of the directory in the node's namespace.
    fn call(&self, lab: &Lab, program: &str, arguments: &[&str]) -> Done {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=10", &CALL_LIMIT.to_string()])
            .arg(self.path(program))
            .args(arguments);
        let node = lab.netns(&self.node).unwrap();
        node.run(|| Done::of(&mut command, b"")).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(mut guardian) = self.guardian.take() {
            drop(guardian.stdin.take());
            let _ = guardian.wait();
        }
    }
}

/// Copies the CNI plugins that are needed into one directory.
fn plugins_in(directory: &Path) {
    fs::create_dir_all(directory).unwrap();
    for plugin in ["ptp", "bridge", "host-local"] {
        fs::copy(Path::new(PLUGINS).join(plugin), directory.join(plugin))
            .expect("the CNI plugins of the distribution (containernetworking-plugins)");
    }
}

/// Puts our plugin into the directory `plugins` and behind the others in a network configuration of `net.d`.
fn install(lab: &Lab, place: &Place, node: u8, conf: &str) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ambidex"));
    command
        .args(["cni", "install", "--conf-name", conf, "--bin-dir"])
        .arg(place.path("plugins"))
        .arg("--conf-dir")
        .arg(place.path("net.d"))
        .args(["--capture", "always", "--namespace", IDENTITY.0])
        .args(["--service-account", IDENTITY.1])
        .env("AMBIDEX_RUN_DIR", lab.run_dir(node));
    Done::of(&mut command, b"").with_code(0);
}

/// What a container runs to get a page: the static busybox has a `wget` that dies in name resolution.
fn fetch(from: Ipv4Addr, path: &str) -> String {
    format!("printf 'GET {path} HTTP/1.0\\r\\n\\r\\n' | nc -w 20 {from} 8080")
}

/// How containers are wired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wiring {
    /// A veth and a host route each.
    Ptp,
    /// A bridge.
    Bridge,
}

/// A network configuration list without our plugin, for containers that are to be captured or not.
fn network(lab: &Lab, dir: &Path, node: u8, wiring: Wiring, captured: bool) -> Value {
    // Addresses are given out by network and not by prefix.
    let first = if captured { 220 } else { 240 };
    let addresses = |subnet: String| {
        json!({
            "type": "host-local",
            "dataDir": dir.join("addresses"),
            "ranges": [[{"subnet": format!("{subnet}.0/24"), "rangeStart": format!("{subnet}.{first}"), "gateway": format!("{subnet}.1")}]],
            "routes": [{"dst": "0.0.0.0/0"}],
        })
    };
    let wire = match wiring {
        Wiring::Ptp => json!({"type": "ptp", "ipam": addresses(format!("10.244.{node}"))}),
        Wiring::Bridge => json!({
            "type": "bridge", "bridge": BRIDGE, "isGateway": true,
            "ipam": addresses(format!("10.245.{node}")),
        }),
    };
    json!({
        "cniVersion": "0.4.0",
        "name": network_name(lab, wiring, captured),
        "plugins": [wire],
    })
}

/// Device of the bridge network.
pub const BRIDGE: &str = "br-containers";

fn network_name(lab: &Lab, wiring: Wiring, captured: bool) -> String {
    let wiring = match wiring {
        Wiring::Ptp => "ptp",
        Wiring::Bridge => "bridge",
    };
    let kind = if captured { "mesh" } else { "plain" };
    format!("{}-{wiring}-{kind}", lab.name())
}
