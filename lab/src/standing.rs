//! Labs that stand on this machine: built from a [`LabSpec`], used by name, removed without a trace.
//!
//! A lab outlives the process that built it. What it consists of is found again by name: network namespaces by their
//! prefix, everything else through `lab.json` in the lab's directory. [`down`] needs neither to be complete, so a lab
//! whose builder was killed at any moment can be removed, too.

mod build;
mod cgroup;
mod cni;
pub mod congestion;
mod control;
mod crowd;
mod daemons;
mod demolish;
mod lock;
mod process;
mod record;
mod run;
mod status;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;

use crate::topology::{InpodRules, LABS_DIR, LabSpec, Mode, Topology, lab_dir, netns_prefix, spec};

pub use demolish::down;
pub use process::{Captured, Process};
pub use run::{Background, exec};
pub use status::{DaemonStatus, LabStatus, NodeStatus, PodStatus};

use lock::Lock;
use record::Record;

/// Told what is being done, one line each. For a terminal: `&|line| eprintln!("{line}")`.
pub type Progress<'a> = &'a dyn Fn(&str);

/// With this environment variable set to anything but the empty string, a lab that could not be built stays for
/// inspection.
pub const KEEP_ENV: &str = "AMBIDEX_LAB_KEEP";

/// Names the lab to programs that run in it, and to `ambidex lab` where the command line does not.
pub const LAB_ENV: &str = "AMBIDEX_LAB";

/// A lab that stands. Dropping the value leaves it standing.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Debug)]
struct Inner {
    record: Record,
    topology: Arc<Topology>,
}

/// One of the two daemons of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Daemon {
    /// `ambidex agent`, in the node's namespace.
    Agent,
    /// `ambidex proxy`, in the proxy's namespace.
    Proxy,
}

/// Builds a lab, or returns the one that stands if it is what `spec` wants.
///
/// # Errors
/// When the specification is not possible, a lab of this name stands that is another one or broken, or building fails.
/// A lab that could not be built is removed, unless [`KEEP_ENV`] is set; the error carries the end of its logs.
pub fn up(spec: &LabSpec, progress: Progress<'_>) -> Result<Lab> {
    spec.validate()?;
    check_programs(spec)?;
    let _lock = Lock::take(&spec.name)?;
    if let Some(standing) = Lab::find(&spec.name)? {
        return standing.if_it_is(spec);
    }
    if demolish::remains(&spec.name)? {
        progress(&format!(
            "lab {}: removing what an unfinished one left",
            spec.name
        ));
        demolish::demolish(&spec.name)?;
    }
    let built = Lab::create(spec).and_then(|lab| lab.build(progress).map(|()| lab));
    built.map_err(|error| {
        let name = &spec.name;
        if std::env::var_os(KEEP_ENV).is_some_and(|value| !value.is_empty()) {
            return error.context(format!(
                "lab {name} could not be built and is kept as it is"
            ));
        }
        let error = error.context(format!(
            "lab {name} could not be built ({KEEP_ENV}=1 would keep it)"
        ));
        match demolish::demolish(name) {
            Ok(()) => error,
            Err(rest) => error.context(format!("and could not be removed: {rest:#}")),
        }
    })
}

/// State of a lab.
///
/// # Errors
/// When no lab of this name stands.
pub fn status(name: &str) -> Result<LabStatus> {
    Ok(Lab::open(name)?.status())
}

/// Names of all labs on this machine, also of those that are not complete.
///
/// # Errors
/// When the directories that hold them cannot be read.
pub fn list() -> Result<Vec<String>> {
    let mut names: Vec<String> = Vec::new();
    for netns in Netns::list_named().context("list network namespaces")? {
        let name = netns
            .strip_prefix("adx-")
            .and_then(|rest| rest.split_once('-'));
        names.extend(name.map(|(lab, _)| lab.to_owned()));
    }
    match std::fs::read_dir(LABS_DIR) {
        Ok(entries) => names.extend(
            entries
                .flatten()
                .filter_map(|entry| entry.file_name().into_string().ok()),
        ),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).context(LABS_DIR),
    }
    names.retain(|name| spec::validate_name(name).is_ok());
    names.sort();
    names.dedup();
    Ok(names)
}

impl Lab {
    /// The lab of this name.
    ///
    /// # Errors
    /// When none stands, or what stands is not complete.
    pub fn open(name: &str) -> Result<Self> {
        spec::validate_name(name)?;
        if let Some(lab) = Self::find(name)? {
            return Ok(lab);
        }
        if demolish::remains(name)? {
            bail!("lab {name} is not complete: remove it with `ambidex lab down {name}`");
        }
        bail!("there is no lab {name}: build one with `ambidex lab up --name {name} --mode MODE`")
    }

    /// The lab of this name if it is complete.
    fn find(name: &str) -> Result<Option<Self>> {
        let dir = lab_dir(name);
        let record = Record::load(&dir)?.filter(|record| record.complete);
        Ok(record.map(|record| Self::with(dir, record)))
    }

    fn create(spec: &LabSpec) -> Result<Self> {
        let dir = lab_dir(&spec.name);
        for part in [
            "log",
            "ca",
            "mesh",
            "node1/run",
            "node1/state",
            "node2/run",
            "node2/state",
        ] {
            let path = dir.join(part);
            std::fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        }
        let mut spec = spec.clone();
        spec.isolate = spec.isolate && process::can_isolate();
        let record = Record {
            spec,
            complete: false,
            generations: BTreeMap::new(),
            created: BTreeMap::new(),
            processes: BTreeMap::new(),
        };
        record.store(&dir)?;
        Ok(Self::with(dir, record))
    }

    fn with(dir: PathBuf, record: Record) -> Self {
        let topology = Arc::new(record.topology());
        Self {
            dir,
            inner: Mutex::new(Inner { record, topology }),
        }
    }

    /// Accepts a standing lab in place of a wanted one.
    fn if_it_is(self, wanted: &LabSpec) -> Result<Self> {
        let name = &wanted.name;
        let mut standing = self.spec();
        // Isolation falls back where the kernel has none, so it is no difference.
        standing.isolate = wanted.isolate;
        if standing != *wanted {
            bail!(
                "lab {name} stands with other settings: remove it first with `ambidex lab down --name {name}`"
            );
        }
        let status = self.status();
        if let Some(broken) = status.first_broken() {
            bail!(
                "lab {name} stands, but {broken}: remove it first with `ambidex lab down --name {name}`"
            );
        }
        Ok(self)
    }

    /// Removes the lab.
    ///
    /// # Errors
    /// As [`down`].
    pub fn down(self) -> Result<()> {
        down(&self.name())
    }

    /// Removes the lab when the returned value is dropped, also while panicking.
    pub fn scoped(self) -> ScopedLab {
        ScopedLab(self)
    }

    /// Name of the lab.
    pub fn name(&self) -> String {
        self.lock().record.spec.name.clone()
    }

    /// What the lab was built from.
    pub fn spec(&self) -> LabSpec {
        self.lock().record.spec.clone()
    }

    /// Has agents that are started from here on capture inside pods by other rules.
    ///
    /// # Errors
    /// When the lab's record cannot be written.
    pub fn choose_inpod_rules(&self, rules: InpodRules) -> Result<()> {
        let mut inner = self.lock();
        inner.record.spec.inpod_rules = rules;
        inner.record.store(&self.dir)
    }

    /// What the lab consists of. Pods that are created anew later get other UIDs than these.
    pub fn topology(&self) -> Arc<Topology> {
        Arc::clone(&self.lock().topology)
    }

    /// Directory of the lab.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Directory of the sockets of a node's agent: `AMBIDEX_RUN_DIR` there.
    pub fn run_dir(&self, node: u8) -> PathBuf {
        self.dir.join(format!("node{node}/run"))
    }

    /// Directory of the journal of a node's agent: `AMBIDEX_STATE_DIR` there.
    pub fn state_dir(&self, node: u8) -> PathBuf {
        self.dir.join(format!("node{node}/state"))
    }

    /// A daemon's log.
    pub fn log_path(&self, node: u8, daemon: Daemon) -> PathBuf {
        self.dir
            .join("log")
            .join(format!("{}.log", daemon.name(node)))
    }

    /// The file that all proxies of the lab, or its control plane, read workloads, services and policies from.
    pub fn workloads_path(&self) -> PathBuf {
        // A control plane serves a whole directory.
        self.dir.join("mesh/workloads.yaml")
    }

    /// Replaces that file at once, so that no proxy ever reads half of it.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write_state(&self, yaml: &str) -> Result<()> {
        record::replace_file(&self.workloads_path(), yaml.as_bytes())
    }

    /// Network namespace of a target: `node1`, `proxy1`, `pod1-2`, `plain1`, `out`.
    ///
    /// # Errors
    /// When there is no such target, or its namespace is gone.
    pub fn netns(&self, target: &str) -> Result<Netns> {
        let topology = self.topology();
        let Some((_, netns, _)) = topology.target(target) else {
            bail!(
                "lab {} has no {target:?}: want one of {}",
                topology.lab,
                topology.target_names().join(", ")
            );
        };
        Ok(Netns::open(Netns::path_of(&netns))?)
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the record, on disk first. What another process changed meanwhile is kept.
    fn change_record(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut inner = self.lock();
        let mut record = Record::load(&self.dir)?.unwrap_or_else(|| inner.record.clone());
        change(&mut record);
        record.store(&self.dir)?;
        inner.topology = Arc::new(record.topology());
        inner.record = record;
        Ok(())
    }
}

impl Daemon {
    /// `agent1`, `proxy2`: name of the daemon of a node in logs and records.
    pub fn name(self, node: u8) -> String {
        match self {
            Daemon::Agent => format!("agent{node}"),
            Daemon::Proxy => format!("proxy{node}"),
        }
    }
}

/// A lab that is removed when this is dropped. For tests and measurements.
#[derive(Debug)]
pub struct ScopedLab(Lab);

impl Deref for ScopedLab {
    type Target = Lab;
    fn deref(&self) -> &Lab {
        &self.0
    }
}

impl ScopedLab {
    /// Removes the lab with a result, unlike dropping.
    ///
    /// # Errors
    /// As [`down`].
    pub fn down(self) -> Result<()> {
        down(&self.name())
    }
}

impl Drop for ScopedLab {
    fn drop(&mut self) {
        if let Err(error) = down(&self.name()) {
            eprintln!("{error:#}");
        }
    }
}

/// A missing program is said at once and not by a process that ends in the middle of building.
fn check_programs(spec: &LabSpec) -> Result<()> {
    if spec.mode == Mode::None {
        return Ok(());
    }
    let programs = [&spec.programs.ambidex, &spec.programs.ambidex_cni].map(PathBuf::as_path);
    // A bare name is looked for in PATH when it is started.
    let proxy = spec.proxy_command.iter().flatten().next().map(Path::new);
    let proxy = proxy.filter(|program| program.components().count() > 1);
    for program in programs.into_iter().chain(proxy) {
        program
            .metadata()
            .with_context(|| format!("{}, which the lab runs", program.display()))?;
    }
    Ok(())
}

/// Names of the network namespaces of a lab that exist, known to its record or not.
fn existing_netns(lab: &str) -> Result<Vec<String>> {
    let prefix = netns_prefix(lab);
    let mut names = Netns::list_named().context("list network namespaces")?;
    names.retain(|name| name.starts_with(&prefix));
    Ok(names)
}

#[cfg(test)]
mod tests;
