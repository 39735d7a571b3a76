//! Control groups of the pods' processes. They limit nothing; their paths carry the pod's UID, which is how an agent
//! recognises whose process it looks at.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use super::process::{Process, wait_until};
use crate::topology::Pod;

/// Version 1 hierarchies that a process may be in without consequences.
const HARMLESS_V1: [&str; 2] = ["pids", "freezer"];

/// Puts a pod's process into a group of its own: `…/ambidex-<lab>/pod<uid>/<container id>`. Returns false where no
/// hierarchy can be written.
pub fn enter(lab: &str, pod: &Pod, process: Process) -> Result<bool> {
    for hierarchy in hierarchies() {
        let group = hierarchy
            .join(lab_group(lab))
            .join(format!("pod{}", pod.uid))
            .join(&pod.container_id);
        if fs::create_dir_all(&group).is_err() {
            continue;
        }
        let procs = group.join("cgroup.procs");
        fs::write(&procs, process.pid.to_string()).with_context(|| procs.display().to_string())?;
        return Ok(true);
    }
    Ok(false)
}

/// All processes in a lab's groups.
pub fn processes(lab: &str) -> Vec<Process> {
    let mut pids = Vec::new();
    for root in lab_roots(lab) {
        visit(&root, &mut |group| {
            let procs = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            pids.extend(procs.lines().filter_map(|pid| pid.parse::<i32>().ok()));
        });
    }
    pids.into_iter().filter_map(Process::of_pid).collect()
}

/// Removes a pod's group.
pub fn remove_pod(lab: &str, pod: &Pod) -> Result<()> {
    let roots = lab_roots(lab);
    roots
        .iter()
        .try_for_each(|root| remove_tree(&root.join(format!("pod{}", pod.uid))))
}

/// Removes all groups of a lab.
pub fn remove_lab(lab: &str) -> Result<()> {
    lab_roots(lab).iter().try_for_each(|root| remove_tree(root))
}

/// Whether a lab has groups.
pub fn exist(lab: &str) -> bool {
    !lab_roots(lab).is_empty()
}

fn lab_group(lab: &str) -> String {
    format!("ambidex-{lab}")
}

fn lab_roots(lab: &str) -> Vec<PathBuf> {
    let roots = hierarchies()
        .into_iter()
        .map(|hierarchy| hierarchy.join(lab_group(lab)));
    roots.filter(|root| root.is_dir()).collect()
}

/// Mount points of hierarchies in the order in which they are tried.
fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mut found: Vec<(usize, PathBuf)> = mounts.lines().filter_map(hierarchy).collect();
    found.sort();
    found.into_iter().map(|(_, path)| path).collect()
}

/// A line of `/proc/self/mounts` as (rank, mount point) if it is a hierarchy to use.
fn hierarchy(line: &str) -> Option<(usize, PathBuf)> {
    let mut fields = line.split(' ');
    let (_, path, kind, options) = (
        fields.next()?,
        fields.next()?,
        fields.next()?,
        fields.next()?,
    );
    let rank = match kind {
        "cgroup" => HARMLESS_V1
            .iter()
            .position(|name| options.split(',').any(|option| option == *name))?,
        "cgroup2" => HARMLESS_V1.len(),
        _ => return None,
    };
    Some((rank, PathBuf::from(path)))
}

/// Groups are removed from the leaves up. A group whose process was just killed is busy for a moment.
fn remove_tree(root: &Path) -> Result<()> {
    let mut groups = Vec::new();
    visit(root, &mut |group| groups.push(group.to_path_buf()));
    for group in groups {
        let mut last = Ok(());
        let gone = wait_until(Duration::from_secs(3), || {
            last = fs::remove_dir(&group);
            last.is_ok() || !group.exists()
        });
        if !gone {
            last.with_context(|| format!("remove control group {}", group.display()))?;
        }
    }
    Ok(())
}

/// Calls `see` for a group and all below it, the deepest first.
fn visit(group: &Path, see: &mut impl FnMut(&Path)) {
    if !group.is_dir() {
        return;
    }
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            visit(&entry.path(), see);
        }
    }
    see(group);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn harmless_hierarchies_come_in_order() {
        let rank = |line| hierarchy(line).map(|(rank, _)| rank);
        assert_eq!(
            rank("cgroup /sys/fs/cgroup/pids cgroup rw,relatime,pids 0 0"),
            Some(0)
        );
        assert_eq!(
            rank("cgroup /sys/fs/cgroup/freezer cgroup rw,relatime,freezer 0 0"),
            Some(1)
        );
        assert_eq!(
            rank("cgroup2 /sys/fs/cgroup cgroup2 rw,nosuid 0 0"),
            Some(2)
        );
        assert_eq!(
            rank("cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0"),
            None
        );
        assert_eq!(rank("tmpfs /sys/fs/cgroup tmpfs rw 0 0"), None);
    }
}
