//! Finding the network namespace of a pod that runs already: through a process of one of its containers, whose control
//! group's path carries the pod's UID.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use host_net::netns::NetnsId;

/// What stands between a pod's slice and the container's id in `SLICE:RUNTIME:ID`, the name that a runtime gives a group
/// when it does not know that systemd manages them.
const RUNTIMES: [&str; 3] = ["cri-containerd", "crio", "docker"];

/// A process of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resident {
    /// Path of its network namespace, good while it lives.
    pub netns: PathBuf,
    /// Identity of that namespace.
    pub id: NetnsId,
    /// Identifier of its container; the oldest process of a pod is its sandbox's.
    pub container_id: String,
    /// When it started, in clock ticks since boot.
    started: u64,
}

/// Processes of pods by UID, the oldest first; `proc` is the node's `/proc`. Those in the network namespace `host`, the
/// node's own, are left out.
///
/// # Errors
/// When `proc` cannot be listed. A process that ends meanwhile, or that may not be looked at, is passed over.
pub fn residents(proc: &Path, host: NetnsId) -> io::Result<BTreeMap<String, Vec<Resident>>> {
    let mut found: BTreeMap<String, Vec<Resident>> = BTreeMap::new();
    for entry in fs::read_dir(proc)? {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name();
        if !name
            .to_str()
            .is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
        {
            continue;
        }
        if let Some((uid, resident)) = resident(&entry.path(), host) {
            found.entry(uid).or_default().push(resident);
        }
    }
    for residents in found.values_mut() {
        residents.sort_by_key(|resident| resident.started);
    }
    Ok(found)
}

fn resident(process: &Path, host: NetnsId) -> Option<(String, Resident)> {
    let netns = process.join("ns/net");
    let metadata = fs::metadata(&netns).ok()?;
    let id = NetnsId {
        dev: metadata.dev(),
        ino: metadata.ino(),
    };
    if id == host {
        return None;
    }
    let groups = fs::read_to_string(process.join("cgroup")).ok()?;
    let (uid, container_id) = groups.lines().find_map(pod_of_group)?;
    let started = started(&fs::read_to_string(process.join("stat")).ok()?)?;
    Some((
        uid,
        Resident {
            netns,
            id,
            container_id,
            started,
        },
    ))
}

/// Field 22 of `/proc/PID/stat`. The second one is the program's name in parentheses, which may contain anything.
fn started(stat: &str) -> Option<u64> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(19)?.parse().ok()
}

/// UID of the pod and container id in a line of `/proc/PID/cgroup`: an element `pod<UID>`, as a directory or a slice of
/// systemd (with `_` for `-`), followed by one that has the container's id. The last pair counts: a node may itself run in a
/// pod of another cluster.
fn pod_of_group(line: &str) -> Option<(String, String)> {
    let path = line.splitn(3, ':').nth(2)?;
    let elements = path.split(['/', ':']);
    let elements: Vec<&str> = elements.filter(|e| !RUNTIMES.contains(e)).collect();
    let mut pairs = elements.windows(2).rev();
    pairs.find_map(|pair| Some((pod_uid(pair[0])?, container(pair[1])?)))
}

fn pod_uid(element: &str) -> Option<String> {
    let element = element.strip_suffix(".slice").unwrap_or(element);
    let (before, uid) = element.rsplit_once("pod")?;
    let uid = uid.replace('_', "-");
    let is_uid = (uid.len() == 36 || uid.len() == 32)
        && uid.bytes().all(|b| b.is_ascii_hexdigit() || b == b'-');
    ((before.is_empty() || before.ends_with('-')) && is_uid).then_some(uid)
}

/// 64 hexadecimal digits, behind the runtime's prefix and before systemd's suffix.
fn container(element: &str) -> Option<String> {
    let element = element.strip_suffix(".scope").unwrap_or(element);
    let id = element.rsplit('-').next()?;
    (id.len() == 64 && id.bytes().all(|b| b.is_ascii_hexdigit())).then(|| id.to_owned())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::process::Command;

    use rstest::rstest;

    use super::*;

    const UID: &str = "49d27d1b-6a04-4ad1-a3b5-0d6ac1f58e19";
    const ID: &str = "0f5b1d4f9a7e4b6c8d2e3f405162738495a6b7c8d9eafb0c1d2e3f4051627384";

    #[rstest]
    #[case::cgroupfs("4:pids:/kubepods/burstable/pod{uid}/{id}")]
    #[case::guaranteed("0::/kubepods/pod{uid}/{id}")]
    #[case::systemd(
        "0::/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{_uid}.slice/cri-containerd-{id}.scope"
    )]
    #[case::crio("0::/kubepods.slice/kubepods-pod{_uid}.slice/crio-{id}.scope")]
    #[case::docker("9:memory:/kubepods/besteffort/pod{uid}/docker-{id}.scope")]
    #[case::inside_the_container("0::/kubepods/pod{uid}/{id}/init")]
    #[case::kind(
        "0::/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{_uid}.slice/cri-containerd-{id}.scope"
    )]
    #[case::a_node_in_a_pod(
        "0::/kubepods/podffffffff-ffff-ffff-ffff-ffffffffffff/{id}/kubelet/kubepods/pod{uid}/{id}"
    )]
    #[case::containerd_cri(
        "0::/system.slice/containerd.service/kubepods-pod{_uid}.slice:cri-containerd:{id}"
    )]
    fn groups_of_runtimes(#[case] line: &str) {
        let line = line
            .replace("{uid}", UID)
            .replace("{_uid}", &UID.replace('-', "_"))
            .replace("{id}", ID);
        assert_eq!(
            pod_of_group(&line),
            Some((UID.to_owned(), ID.to_owned())),
            "{line}"
        );
    }

    #[rstest]
    #[case("0::/")]
    #[case("0::/user.slice/user-0.slice/session-1.scope")]
    #[case("0::/kubepods/pod49d27d1b/{id}")]
    #[case("0::/kubepods/pod{uid}")]
    #[case("0::/kubepods/pod{uid}/sidecar")]
    #[case("0::/kubepods/tripod{uid}/{id}")]
    #[case("")]
    #[case("::")]
    fn groups_of_others(#[case] line: &str) {
        let line = line.replace("{uid}", UID).replace("{id}", ID);
        assert_eq!(pod_of_group(&line), None, "{line}");
    }

    #[test]
    fn a_programs_name_does_not_shift_the_fields() {
        let fields: Vec<String> = (3..=52).map(|field| field.to_string()).collect();
        let stat = format!("7 (a ) b) {}", fields.join(" "));
        assert_eq!(started(&stat), Some(22));
        assert_eq!(started("7 (a"), None);
    }

    /// A made-up `/proc`, with links to namespaces that exist.
    #[test]
    fn the_oldest_process_comes_first_and_the_nodes_own_namespace_does_not_count() {
        let proc = tempfile::tempdir().unwrap();
        let mut child = Command::new("unshare")
            .args(["--net", "sleep", "60"])
            .spawn()
            .unwrap();
        let theirs = PathBuf::from(format!("/proc/{}/ns/net", child.id()));
        let ours = PathBuf::from("/proc/self/ns/net");
        let id = |path: &Path| fs::metadata(path).map(|m| m.ino()).unwrap_or_default();
        // The namespace is another one once `unshare` has come that far.
        for _ in 0..1000 {
            if id(&theirs) != id(&ours) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        for (pid, started, netns) in [(30, 500, &theirs), (20, 900, &theirs), (10, 100, &ours)] {
            let process = proc.path().join(pid.to_string());
            fs::create_dir_all(process.join("ns")).unwrap();
            std::os::unix::fs::symlink(netns, process.join("ns/net")).unwrap();
            fs::write(
                process.join("cgroup"),
                format!("0::/kubepods/pod{UID}/{ID}\n"),
            )
            .unwrap();
            let zeros = "0 ".repeat(18);
            fs::write(
                process.join("stat"),
                format!("{pid} (x) S {zeros}{started} 0"),
            )
            .unwrap();
        }
        fs::create_dir(proc.path().join("sys")).unwrap();
        let host = fs::metadata(&ours).unwrap();
        let host = NetnsId {
            dev: host.dev(),
            ino: host.ino(),
        };
        let found = residents(proc.path(), host).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let starts: Vec<u64> = found[UID].iter().map(|resident| resident.started).collect();
        assert_eq!((found.len(), starts), (1, vec![500, 900]));
        assert!(found[UID][0].netns.ends_with("30/ns/net"));
    }
}
