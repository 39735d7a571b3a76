//! Kernel objects: how many there are in a namespace, and how many a captured pod has more than a bare one.

use anyhow::{Context, Result};
use host_net::netns::Netns;
use serde::{Deserialize, Serialize};

/// Objects in one network namespace.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Objects {
    /// iptables and ip6tables rules.
    pub iptables_rules: f64,
    /// Policy routing rules.
    pub policy_rules: f64,
    /// Routes in all tables.
    pub routes: f64,
    /// Members of ipsets.
    pub set_members: f64,
    /// Devices.
    pub devices: f64,
    /// Entries of connection tracking.
    pub conntrack_entries: f64,
    /// Sockets that listen.
    pub listening_sockets: f64,
}

impl Objects {
    /// What is in a namespace.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn of(netns: &Netns) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let dump = runtime.block_on(host_net::dump::dump(netns))?;
        let (conntrack, listening) = netns.run(|| {
            let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
            let conntrack = read("/proc/sys/net/netfilter/nf_conntrack_count");
            let tables =
                ["tcp", "tcp6"].map(|table| read(&format!("/proc/thread-self/net/{table}")));
            (conntrack, listening(&tables.concat()))
        })?;
        let count = |lines: &[String], of: &str| {
            lines.iter().filter(|line| line.contains(of)).count() as f64
        };
        Ok(Self {
            iptables_rules: count(&dump.iptables, "-A "),
            policy_rules: dump.rules.len() as f64,
            routes: dump.routes.len() as f64,
            set_members: count(&dump.ipsets, " member "),
            devices: dump.links.len() as f64,
            // No file: no connection was ever tracked here.
            conntrack_entries: conntrack.trim().parse().unwrap_or(0.0),
            listening_sockets: listening,
        })
    }

    /// What is here and was not in `earlier`, divided by `count`.
    pub fn more_per(self, earlier: Self, count: usize) -> Self {
        let per = |now: f64, then: f64| (now - then) / count.max(1) as f64;
        Self {
            iptables_rules: per(self.iptables_rules, earlier.iptables_rules),
            policy_rules: per(self.policy_rules, earlier.policy_rules),
            routes: per(self.routes, earlier.routes),
            set_members: per(self.set_members, earlier.set_members),
            devices: per(self.devices, earlier.devices),
            conntrack_entries: per(self.conntrack_entries, earlier.conntrack_entries),
            listening_sockets: per(self.listening_sockets, earlier.listening_sockets),
        }
    }
}

/// Lines of /proc/net/tcp whose state is 0A.
fn listening(table: &str) -> f64 {
    let states = table
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().nth(3));
    states.filter(|state| *state == "0A").count() as f64
}

/// Network namespaces with a name on this machine that belong to a lab.
///
/// # Errors
/// When they cannot be listed.
pub fn namespaces(lab: &str) -> Result<usize> {
    let prefix = crate::topology::netns_prefix(lab);
    let names = Netns::list_named().context("list network namespaces")?;
    Ok(names
        .iter()
        .filter(|name| name.starts_with(&prefix))
        .count())
}
