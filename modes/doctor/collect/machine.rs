//! This process, the disk, the runtimes, the daemons.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use host_net::netns::Netns;
use http::{Method, StatusCode};
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::{FsFlags, statvfs};
use serde_json::Value;
use tokio::net::UnixStream;

use super::super::facts::{CniFile, Daemon, Facts, Process, StateDir};
use super::super::filters::MESH_TRACES;
use super::{Sources, network, note};
use crate::proxy::local_pages;
use crate::run_dir::RunDir;
use crate::unix_http::{self, RequestError};

/// How long a daemon may take to say anything.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);

/// Programs of runtimes whose pods have no network stack in their namespace.
const SANDBOXES: [(&str, &str); 5] = [
    ("runsc", "gVisor"),
    ("containerd-shim-runsc-v1", "gVisor"),
    ("kata-runtime", "Kata Containers"),
    ("containerd-shim-kata-v2", "Kata Containers"),
    ("kata-agent", "Kata Containers"),
];
/// Where they are beside the search path.
const SANDBOX_DIRS: [&str; 4] = [
    "/usr/local/bin",
    "/usr/bin",
    "/opt/kata/bin",
    "/opt/gvisor/bin",
];

/// Release of the kernel.
pub(super) fn kernel() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

/// All but the daemons.
pub(super) fn look(sources: &Sources, facts: &mut Facts) {
    match process() {
        Ok(process) => facts.process = Some(process),
        Err(error) => note(facts, "process", error),
    }
    facts.clock = seconds(SystemTime::now());
    match state(&sources.state_dir) {
        Ok(state) => facts.state = Some(state),
        Err(error) => note(facts, sources.state_dir.display().to_string(), error),
    }
    cni(&sources.cni_conf_dir, facts);
    let traces = MESH_TRACES.iter().map(|(path, _)| *path);
    let traces = traces.filter(|path| Path::new(path).exists());
    facts.traces.extend(traces.map(str::to_owned));
    facts.sandboxes = sandboxes();
}

fn seconds(time: SystemTime) -> Option<u64> {
    time.duration_since(UNIX_EPOCH)
        .ok()
        .map(|since| since.as_secs())
}

fn process() -> io::Result<Process> {
    let status = fs::read_to_string("/proc/self/status")?;
    let field = |name: &str| {
        status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .map(str::trim)
    };
    let capabilities = field("CapEff:").and_then(|hex| u64::from_str_radix(hex, 16).ok());
    let (_, descriptors) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    Ok(Process {
        uid: nix::unistd::geteuid().as_raw(),
        capabilities: capabilities.unwrap_or_default(),
        seccomp: field("Seccomp:")
            .and_then(|mode| mode.parse().ok())
            .unwrap_or_default(),
        descriptors,
        hidepid: hidepid(&mounts),
        cgroups: fs::read_to_string("/proc/self/cgroup").is_ok_and(|text| !text.trim().is_empty()),
    })
}

/// The option of the uppermost /proc; none when everybody sees all.
fn hidepid(mounts: &str) -> Option<String> {
    let proc = mounts
        .lines()
        .rfind(|line| line.split(' ').nth(1) == Some("/proc"))?;
    let options = proc.split(' ').nth(3)?.split(',');
    let value = options
        .filter_map(|option| option.strip_prefix("hidepid="))
        .next_back()?;
    (!matches!(value, "0" | "off")).then(|| value.to_owned())
}

fn state(dir: &Path) -> io::Result<StateDir> {
    let mut existing = dir;
    while !existing.exists() {
        existing = existing.parent().unwrap_or(Path::new("/"));
    }
    let disk = statvfs(existing)?;
    let mut state = StateDir {
        path: existing.display().to_string(),
        free_bytes: disk.blocks_free().saturating_mul(disk.fragment_size()),
        free_files: (disk.files() > 0).then(|| disk.files_free()),
        read_only: disk.flags().contains(FsFlags::ST_RDONLY),
        changed: None,
        plans: BTreeSet::new(),
    };
    for directory in [dir.to_owned(), dir.join("journal")] {
        let Ok(entries) = fs::read_dir(&directory) else {
            continue;
        };
        for path in entries.filter_map(|entry| Some(entry.ok()?.path())) {
            let changed = fs::metadata(&path)
                .ok()
                .and_then(|file| u64::try_from(file.mtime()).ok());
            state.changed = state.changed.max(changed);
            let name = path
                .file_name()
                .and_then(|name| name.to_str()?.strip_suffix(".json"));
            if directory != dir {
                state.plans.extend(name.map(str::to_owned));
            }
        }
    }
    Ok(state)
}

/// Configurations as the runtime reads them: in the order of their names, only files with these endings.
fn cni(dir: &Path, facts: &mut Facts) {
    let mut paths: Vec<PathBuf> = match fs::read_dir(dir) {
        Ok(entries) => entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return,
        Err(error) => return note(facts, dir.display().to_string(), error),
    };
    paths.sort();
    for path in paths {
        let shown = path.display().to_string();
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("conf" | "conflist" | "json") => {
                let conf = fs::read(&path)
                    .ok()
                    .and_then(|text| serde_json::from_slice(&text).ok());
                facts.cni.push(CniFile {
                    path: shown,
                    plugins: conf.map_or_else(Vec::new, |conf: Value| plugins(&conf)),
                });
            }
            Some("cilium_bak") => {
                facts.traces.insert(shown);
            }
            _ => {}
        }
    }
}

fn plugins(conf: &Value) -> Vec<String> {
    let kind = |plugin: &Value| plugin["type"].as_str().map(str::to_owned);
    match conf["plugins"].as_array() {
        Some(plugins) => plugins.iter().filter_map(kind).collect(),
        None => kind(conf).into_iter().collect(),
    }
}

fn sandboxes() -> BTreeSet<String> {
    let there = |program: &str| {
        SANDBOX_DIRS
            .iter()
            .any(|dir| Path::new(dir).join(program).exists())
    };
    let installed = SANDBOXES.iter().filter(|(program, _)| there(program));
    installed.map(|(_, name)| (*name).to_owned()).collect()
}

/// Agent and proxies, and the namespace that a proxy is in.
pub(super) async fn ask_daemons(sources: &Sources, facts: &mut Facts) {
    facts.agent = Some(ask(&sources.run_dir.agent(), "/healthz").await);
    let directory = RunDir::proxies(&sources.run_dir.zds("INPOD_UDS"));
    let sockets = match local_pages::sockets(&directory) {
        Ok(sockets) => sockets,
        Err(error) => return note(facts, directory.display().to_string(), error),
    };
    for socket in sockets {
        let name = socket
            .file_stem()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let answer = ask(&socket, "/").await;
        if answer == Daemon::Answers
            && let Some(netns) = netns_of_peer(&socket).await
        {
            facts.proxy_sysctls = network::proxy_settings(&netns);
        }
        facts.proxies.insert(name, answer);
    }
}

async fn ask(socket: &Path, page: &str) -> Daemon {
    let asked = unix_http::request(socket, Method::GET, page, Vec::new(), ANSWERS_WITHIN).await;
    match asked {
        Ok((StatusCode::OK, _)) => Daemon::Answers,
        Ok((_, body)) => Daemon::NotReady(String::from_utf8_lossy(&body).trim().to_owned()),
        Err(error) if error.is_nobody() => Daemon::Absent,
        // Root's socket, asked by somebody else: nothing is known of who has it.
        Err(RequestError::Connect(_, error)) if error.kind() == io::ErrorKind::PermissionDenied => {
            Daemon::NotReady(format!("cannot be asked: {error}"))
        }
        Err(error) => Daemon::Silent(error.to_string()),
    }
}

/// The network namespace of whoever listens on a socket, where this process sees it.
pub(crate) async fn netns_of_peer(socket: &Path) -> Option<Netns> {
    let connected = tokio::time::timeout(ANSWERS_WITHIN, UnixStream::connect(socket)).await;
    let pid = connected.ok()?.ok()?.peer_cred().ok()?.pid()?;
    (pid > 0).then(|| Netns::open(format!("/proc/{pid}/ns/net")).ok())?
}

#[cfg(test)]
mod tests {
    use super::hidepid;

    #[test]
    fn hidden_processes_are_read_from_the_mounts() {
        let mounts =
            |options: &str| format!("proc /proc proc {options} 0 0\ntmpfs /tmp tmpfs rw 0 0\n");
        assert_eq!(
            hidepid(&mounts("rw,nosuid,hidepid=invisible")).as_deref(),
            Some("invisible")
        );
        assert_eq!(hidepid(&mounts("rw,hidepid=2,gid=5")).as_deref(), Some("2"));
        assert_eq!(hidepid(&mounts("rw,hidepid=off")), None);
        assert_eq!(hidepid(&mounts("rw,nosuid")), None);
    }
}
