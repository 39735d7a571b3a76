//! The image, built from the programs under test, in a podman of its own.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::Value;

use crate::manifests::{self, list};

/// Longest that one call of podman may take, in seconds. Far over what it needs.
const CALL_LIMIT: u32 = 240;

/// A program's end.
#[derive(Debug)]
pub struct Done {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Where images and containers of one test are. A process that waits at the other end of a pipe removes them, also when
/// the test program is killed.
pub struct Store {
    dir: PathBuf,
    guardian: Option<Child>,
    /// Name of the image, with its tag.
    pub image: String,
}

impl Store {
    /// Builds the image.
    pub fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("ambidex-image-{}-{count}", std::process::id());
        let dir = Path::new("/run").join(&name);
        fs::create_dir(&dir).unwrap();
        let shown = dir.display().to_string();
        let settings = format!(
            "[containers]\nlog_driver = \"k8s-file\"\ndefault_sysctls = []\n\
             [engine]\ncgroup_manager = \"cgroupfs\"\nevents_logger = \"none\"\nlock_type = \"file\"\nruntime = \"runc\"\n\
             tmp_dir = \"{shown}/tmp\"\nstatic_dir = \"{shown}/static\"\nvolume_path = \"{shown}/volumes\"\n"
        );
        fs::write(dir.join("containers.conf"), settings).unwrap();
        let script = "read -r _; \"$dir/podman\" rm --all --force --time 0; \"$dir/podman\" rmi --all --force\n\
            cat /sys/fs/cgroup/*/$group/cgroup.procs /sys/fs/cgroup/*/$group/*/cgroup.procs | sort -u | xargs -r kill -9\n\
            for tries in 1 2 3 4 5; do\n\
              rm -rf \"$dir\"\n\
              for group in /sys/fs/cgroup/*/$group; do\n\
                [ -d \"$group\" ] && find \"$group\" -depth -type d -exec rmdir {} \\;\n\
              done\n\
              [ -e \"$dir\" ] || ls -d /sys/fs/cgroup/*/$group >/dev/null 2>&1 || exit 0\n\
              sleep 0.2\n\
            done";
        let program = format!(
            "#!/bin/sh\nCONTAINERS_CONF={shown}/containers.conf TMPDIR={shown} exec podman --root {shown}/root --runroot {shown}/runroot \
             --tmpdir {shown}/tmp --storage-driver vfs --cgroup-manager cgroupfs --runtime runc \"$@\"\n"
        );
        let podman = dir.join("podman");
        fs::write(&podman, program).unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&podman, fs::Permissions::from_mode(0o755)).unwrap();
        let guardian = Command::new("setsid")
            .args(["sh", "-c", script])
            .env("dir", &dir)
            .env("group", &name)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut store = Self {
            dir,
            guardian: Some(guardian),
            image: String::new(),
        };
        store.image = store.build();
        store
    }

    fn build(&self) -> String {
        let archive = self.path("image.tar");
        let binaries = Path::new(env!("CARGO_BIN_EXE_ambidex")).parent().unwrap();
        let mut command = Command::new(manifests::root().join("deploy/image/build"));
        command
            .arg("--binaries")
            .arg(binaries)
            .arg("--out")
            .arg(&archive)
            // The tests' programs are the dynamic ones; what compresses well or badly is no matter here.
            .args(["--no-compression", "--dynamic-plugin"]);
        ended(&mut command).with_code(0);
        let loaded = self
            .call(&["load", "--quiet", "--input", archive.to_str().unwrap()])
            .with_code(0);
        fs::remove_file(&archive).unwrap();
        let (_, image) = loaded.trim().rsplit_once(' ').expect("the image's name");
        image.to_owned()
    }

    /// A path in the store's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Calls podman.
    pub fn call(&self, arguments: &[&str]) -> Done {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=10", &CALL_LIMIT.to_string()])
            .arg(self.path("podman"))
            .args(arguments);
        ended(&mut command)
    }

    /// A call of `podman run` with what a container of the manifests may do.
    pub fn run<'a>(&'a self, container: &Value) -> Run<'a> {
        let security = &container["securityContext"];
        let mut options: Vec<String> = [
            "run",
            "--ulimit=nofile=16384:16384",
            "--ulimit=nproc=1024:1024",
        ]
        .map(str::to_owned)
        .into();
        let group = self.dir.file_name().unwrap().to_str().unwrap();
        options.push(format!("--cgroup-parent=/{group}"));
        assert_eq!(security["capabilities"]["drop"][0], "ALL");
        options.push("--cap-drop=ALL".to_owned());
        for capability in list(&security["capabilities"], "add") {
            options.push(format!("--cap-add={}", capability.as_str().unwrap()));
        }
        if security["readOnlyRootFilesystem"] == true {
            // Kubernetes gives no writable directories of its own accord.
            options.extend(["--read-only", "--read-only-tmpfs=false"].map(str::to_owned));
        }
        options.push(format!("--user={}", security["runAsUser"]));
        if security["allowPrivilegeEscalation"] == false {
            options.push("--security-opt=no-new-privileges".to_owned());
        }
        let arguments = list(container, "args").iter();
        Run {
            store: self,
            options,
            arguments: arguments.map(|a| a.as_str().unwrap().to_owned()).collect(),
        }
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if let Some(mut guardian) = self.guardian.take() {
            drop(guardian.stdin.take());
            let _ = guardian.wait();
        }
    }
}

/// A call of `podman run` that is being put together.
pub struct Run<'a> {
    store: &'a Store,
    options: Vec<String>,
    /// Arguments of the program.
    pub arguments: Vec<String>,
}

impl Run<'_> {
    /// Adds an option.
    pub fn with(mut self, option: impl Into<String>) -> Self {
        self.options.push(option.into());
        self
    }

    /// Takes a capability away.
    pub fn without(mut self, capability: &str) -> Self {
        let before = self.options.len();
        self.options
            .retain(|option| *option != format!("--cap-add={capability}"));
        assert!(self.options.len() < before, "{capability} was not there");
        self
    }

    /// Runs it.
    pub fn call(self) -> Done {
        let mut line: Vec<&str> = self.options.iter().map(String::as_str).collect();
        line.push(&self.store.image);
        line.extend(self.arguments.iter().map(String::as_str));
        self.store.call(&line)
    }
}

fn ended(command: &mut Command) -> Done {
    let output = command.stdin(Stdio::null()).output().unwrap();
    Done {
        code: output.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Done {
    /// Standard output, if the exit code is `code`.
    #[track_caller]
    pub fn with_code(self, code: i32) -> String {
        assert_eq!(self.code, code, "{}{}", self.stdout, self.stderr);
        self.stdout
    }
}
