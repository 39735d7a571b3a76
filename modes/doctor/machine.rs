//! The process that captures, and what it stands on.

use super::catalogue::{BOTH, Check, Found, INPOD};
use super::facts::Facts;

/// Numbers of linux/capability.h.
const NEEDED: [(u32, &str); 3] = [
    (12, "CAP_NET_ADMIN"),
    (13, "CAP_NET_RAW"),
    (21, "CAP_SYS_ADMIN"),
];
const PTRACE: u32 = 19;
/// What 250 pods and 5 000 connections take; the proxy warns below it.
const DESCRIPTORS: u64 = 16_384;
/// Records of 1 000 pods take a tenth of it.
const STATE_BYTES: u64 = 64 << 20;
const STATE_FILES: u64 = 4_096;
/// 2024-01-01: no machine that runs this is older.
const EARLIEST: u64 = 1_704_067_200;
/// Seconds that a file may be ahead of the clock.
const AHEAD: u64 = 60;

pub(super) static CHECKS: [Check; 9] = [
    Check {
        id: "host/root",
        title: "the user is root",
        modes: BOTH,
        why: "agent, proxy and plugin talk only to root, and only root may change the network",
        fix: "run it with sudo; in a pod: securityContext.runAsUser: 0",
        look: |facts| match &facts.process {
            Some(process) if process.uid != 0 => {
                vec![Found::fail("user", format!("is {}", process.uid))]
            }
            _ => Vec::new(),
        },
    },
    Check {
        id: "host/capabilities",
        title: "the capabilities are there",
        modes: BOTH,
        why: "network namespaces need CAP_SYS_ADMIN, rules and routes CAP_NET_ADMIN, sockets with foreign addresses CAP_NET_RAW",
        fix: "securityContext.capabilities.add: [NET_ADMIN, NET_RAW, SYS_ADMIN]",
        look: capabilities,
    },
    Check {
        id: "host/seccomp",
        title: "no filter of system calls stands in the way",
        modes: BOTH,
        why: "the default filters of container runtimes forbid setns and unshare, which both captures need",
        fix: "securityContext.seccompProfile.type: Unconfined",
        look: |facts| {
            // A filter that lets namespaces be made is one that was made for this.
            let refused = facts.lacks(super::facts::Feature::Netns).is_some();
            match &facts.process {
                Some(process) if process.seccomp != 0 && refused => {
                    vec![Found::fail(
                        "process",
                        "has a filter of system calls, and no namespace could be made",
                    )]
                }
                _ => Vec::new(),
            }
        },
    },
    Check {
        id: "host/descriptors",
        title: "enough files can be open",
        modes: BOTH,
        why: "a captured pod takes 8 descriptors and a connection 2 or 3, and connections beyond the limit wait",
        fix: "ulimit -Hn 1048576; systemd: LimitNOFILE=1048576",
        look: |facts| match &facts.process {
            Some(process) if (1..DESCRIPTORS).contains(&process.descriptors) => vec![Found::warn(
                "hard limit of descriptors",
                format!("is {}, below {DESCRIPTORS}", process.descriptors),
            )],
            _ => Vec::new(),
        },
    },
    Check {
        id: "inpod/hidepid",
        title: "processes of pods can be seen",
        modes: INPOD,
        why: "the namespace of a pod that runs already is found through its processes",
        fix: "mount -o remount,hidepid=0 /proc, or CAP_SYS_PTRACE for the agent",
        look: |facts| {
            let Some(process) = &facts.process else {
                return Vec::new();
            };
            match &process.hidepid {
                Some(option) if process.capabilities & (1 << PTRACE) == 0 => {
                    vec![Found::fail(
                        "/proc",
                        format!("is mounted with hidepid={option}"),
                    )]
                }
                _ => Vec::new(),
            }
        },
    },
    Check {
        id: "host/cgroups",
        title: "processes can be told apart by cgroup",
        modes: BOTH,
        why: "whose pod a process belongs to stands in the name of its cgroup",
        fix: "mount -t cgroup2 none /sys/fs/cgroup",
        look: |facts| match &facts.process {
            Some(process) if !process.cgroups => {
                vec![Found::warn("/proc/self/cgroup", "names no cgroup")]
            }
            _ => Vec::new(),
        },
    },
    Check {
        id: "host/clock",
        title: "the clock is right",
        modes: BOTH,
        why: "certificates are valid from a moment on and to a moment, and peers refuse what is not valid by their clock",
        fix: "timedatectl set-ntp true",
        look: clock,
    },
    Check {
        id: "host/state-disk",
        title: "the state directory can be written",
        modes: BOTH,
        why: "what is made is written down first, and what cannot be written down is not made",
        fix: "make room on the file system of OBJECT, or set AMBIDEX_STATE_DIR",
        look: state,
    },
    Check {
        id: "host/unreadable",
        title: "everything could be looked at",
        modes: BOTH,
        why: "what could not be looked at may be wrong all the same",
        fix: "run as root on the node, with the packages iptables, ipset and nftables",
        look: |facts| {
            facts
                .unreadable
                .iter()
                .map(|(what, error)| Found::warn(what, error))
                .collect()
        },
    },
];

fn capabilities(facts: &Facts) -> Vec<Found> {
    let Some(process) = &facts.process else {
        return Vec::new();
    };
    let missing = NEEDED
        .iter()
        .filter(|(bit, _)| process.capabilities & (1 << bit) == 0);
    missing
        .map(|(_, name)| Found::fail(*name, "is missing"))
        .collect()
}

fn clock(facts: &Facts) -> Vec<Found> {
    let Some(clock) = facts.clock else {
        return Vec::new();
    };
    if clock < EARLIEST {
        return vec![Found::fail(
            "clock",
            format!("says {clock} s since 1970, before 2024"),
        )];
    }
    let changed = facts.state.as_ref().and_then(|state| state.changed);
    match changed {
        Some(changed) if changed > clock + AHEAD => vec![Found::warn(
            "clock",
            format!("is {} s behind what the agent wrote last", changed - clock),
        )],
        _ => Vec::new(),
    }
}

fn state(facts: &Facts) -> Vec<Found> {
    let Some(state) = &facts.state else {
        return Vec::new();
    };
    let path = state.path.as_str();
    if state.read_only {
        return vec![Found::fail(path, "is on a file system that is read-only")];
    }
    match (state.free_bytes, state.free_files) {
        (0, _) => vec![Found::fail(path, "is full")],
        (_, Some(0)) => vec![Found::fail(path, "can hold no more files")],
        (bytes, _) if bytes < STATE_BYTES => {
            vec![Found::warn(path, format!("has {} MiB left", bytes >> 20))]
        }
        (_, Some(files)) if files < STATE_FILES => {
            vec![Found::warn(path, format!("can hold {files} more files"))]
        }
        _ => Vec::new(),
    }
}
