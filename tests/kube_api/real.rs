//! A real API server, where its programs are: `kube-apiserver` and `etcd`, both in the directory `KUBEBUILDER_ASSETS`, or on
//! the search path.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Read;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use host_net::netns::Netns;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

/// Where etcd listens, in the namespace that the server is in.
const ETCD: [&str; 2] = ["http://127.0.0.1:2379", "http://127.0.0.1:2380"];
/// Who has this token may do everything; the server goes with the test.
const TOKEN: &str = "of-this-test";

/// Both programs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Programs {
    pub apiserver: PathBuf,
    pub etcd: PathBuf,
}

impl Programs {
    /// Those of this machine, if there are both.
    pub fn of_this_machine() -> Option<Self> {
        let (assets, path) = ["KUBEBUILDER_ASSETS", "PATH"].map(std::env::var_os).into();
        Self::find(assets.as_deref(), path.as_deref())
    }

    /// Both in `assets`, else on `path`. One of them alone is of no use.
    pub fn find(assets: Option<&OsStr>, path: Option<&OsStr>) -> Option<Self> {
        let assets = assets.map(PathBuf::from).into_iter();
        let on_path = path.map(|path| std::env::split_paths(path).collect::<Vec<_>>());
        let both = |dirs: &[PathBuf]| {
            let find = |name: &str| {
                let mut found = dirs.iter().map(|dir| dir.join(name));
                found.find(|program| program.is_file())
            };
            Some(Self {
                apiserver: find("kube-apiserver")?,
                etcd: find("etcd")?,
            })
        };
        both(&assets.collect::<Vec<_>>()).or_else(|| both(&on_path.unwrap_or_default()))
    }
}

/// Writes the file that leads to a server at this address; agents want it before there is one.
pub fn kubeconfig_of_real(dir: &Path, at: SocketAddr) -> PathBuf {
    let path = dir.join("kubeconfig");
    let config = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "test",
        "clusters": [{"name": "test",
            "cluster": {"server": format!("https://{at}"), "insecure-skip-tls-verify": true}}],
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "users": [{"name": "test", "user": {"token": TOKEN}}],
    });
    fs::write(&path, config.to_string()).unwrap();
    path
}

/// A running server with its store. Both end when this is dropped.
#[derive(Debug)]
pub struct RealServer {
    children: Vec<Child>,
    dir: PathBuf,
}

impl RealServer {
    /// Starts both in a network namespace; certificates, keys, data and logs are in `dir`. It need not be ready yet.
    pub fn start(netns: &Netns, programs: &Programs, at: SocketAddr, dir: &Path) -> Self {
        let file = |name: &str| dir.join(name).display().to_string();
        let key = file("service-accounts.pem");
        let made = Command::new("openssl")
            .args(["genrsa", "-out", &key, "2048"])
            .stderr(Stdio::null())
            .status();
        assert!(made.unwrap().success(), "openssl genrsa");
        fs::write(
            dir.join("tokens"),
            format!("{TOKEN},test,test,system:masters\n"),
        )
        .unwrap();
        let mut server = Self {
            children: Vec::new(),
            dir: dir.to_path_buf(),
        };
        let [clients, peers] = ETCD;
        server.spawn(
            netns,
            &programs.etcd,
            "etcd",
            &[
                ("data-dir", &file("etcd")),
                ("listen-client-urls", clients),
                ("advertise-client-urls", clients),
                ("listen-peer-urls", peers),
                ("initial-advertise-peer-urls", peers),
                ("initial-cluster", &format!("default={peers}")),
            ],
        );
        server.spawn(
            netns,
            &programs.apiserver,
            "kube-apiserver",
            &[
                ("etcd-servers", clients),
                ("bind-address", &at.ip().to_string()),
                ("secure-port", &at.port().to_string()),
                ("cert-dir", &file("certificates")),
                ("token-auth-file", &file("tokens")),
                ("anonymous-auth", "false"),
                ("authorization-mode", "AlwaysAllow"),
                ("disable-admission-plugins", "ServiceAccount"),
                ("service-cluster-ip-range", "10.96.0.0/16"),
                ("service-account-issuer", "https://kubernetes.default.svc"),
                ("service-account-key-file", &key),
                ("service-account-signing-key-file", &key),
            ],
        );
        server
    }

    fn spawn(&mut self, netns: &Netns, program: &Path, name: &str, flags: &[(&str, &str)]) {
        let log = File::create(self.log(name)).unwrap();
        let mut command = Command::new(program);
        command
            .args(
                flags
                    .iter()
                    .map(|(flag, value)| format!("--{flag}={value}")),
            )
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        self.children
            .push(netns.run(|| command.spawn()).unwrap().unwrap());
    }

    fn log(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.log"))
    }

    /// Waits until `ready` says so.
    ///
    /// # Errors
    /// When one of the two ends before that, or it takes too long: with the ends of their logs.
    pub fn wait(&mut self, limit: Duration, ready: impl Fn() -> bool) -> Result<(), String> {
        let deadline = Instant::now() + limit;
        while !ready() {
            let ended = self
                .children
                .iter_mut()
                .find_map(|child| child.try_wait().unwrap());
            if ended.is_some() || Instant::now() > deadline {
                let what = match ended {
                    Some(status) => format!("ended with {status}"),
                    None => format!("not ready within {limit:?}"),
                };
                let logs = ["etcd", "kube-apiserver"].map(|name| self.end_of(name));
                return Err(format!("the API server: {what}\n{}", logs.join("\n")));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn end_of(&self, name: &str) -> String {
        let mut bytes = Vec::new();
        let _ = File::open(self.log(name)).and_then(|mut log| log.read_to_end(&mut bytes));
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let lines: Vec<&str> = text.lines().rev().take(10).collect();
        let lines: Vec<&str> = lines.into_iter().rev().collect();
        format!("{name}: {}", lines.join("\n"))
    }
}

impl Drop for RealServer {
    fn drop(&mut self) {
        // The server before its store.
        for child in self.children.iter_mut().rev() {
            let pid = Pid::from_raw(i32::try_from(child.id()).unwrap());
            let _ = kill(pid, Signal::SIGKILL);
            let _ = child.wait();
        }
    }
}
