//! The file that describes an experiment.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::topology::{Cni, LabSpec, Mode, Programs, SpecError, Topology};

/// The version that this program reads.
pub const API_VERSION: &str = "ambidex.io/v1alpha1";
/// The kind of these files.
pub const KIND: &str = "Experiment";

/// Why a file describes no experiment.
#[derive(Debug, PartialEq, thiserror::Error)]
pub enum FileError {
    /// Another version or kind.
    #[error("{0}: this program reads apiVersion {API_VERSION}, kind {KIND}")]
    Kind(String),
    /// No lab can be like this.
    #[error("lab: {0}")]
    Lab(#[from] SpecError),
    /// A pod that the lab does not have.
    #[error("{place}: the lab has no pod {pod:?}: it has {known}")]
    Pod {
        /// Where it is named.
        place: String,
        /// The pod.
        pod: String,
        /// The pods that there are.
        known: String,
    },
    /// A pair of a pod with itself.
    #[error("load.pairs: {0} with itself")]
    Itself(String),
    /// A step that is none, or several.
    #[error("step {0}: want exactly one of switch, kill, restart, exec, corrupt, waitSeconds")]
    Step(usize),
    /// A number that makes no sense.
    #[error("{0}")]
    Number(String),
    /// Steps whose times go back.
    #[error("step {0}: its atSeconds is before that of a step before it")]
    Order(usize),
}

/// An experiment.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Experiment {
    /// [`API_VERSION`].
    pub api_version: String,
    /// [`KIND`].
    pub kind: String,
    /// What it is called.
    pub metadata: Metadata,
    /// Where.
    pub lab: LabPart,
    /// Under which load.
    pub load: Load,
    /// What is done meanwhile, one after the other.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// What has to be so.
    #[serde(default)]
    pub assertions: Assertions,
}

/// What an experiment is called.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Metadata {
    /// Name.
    pub name: String,
    /// What it is for, in a sentence.
    #[serde(default)]
    pub description: String,
}

/// Two nodes whose pods with an odd number the node captures, those with an even one are captured in their namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LabPart {
    /// Captured pods of each node; one more that never is comes on top.
    pub pods_per_node: u8,
    /// How pods are connected to their node.
    #[serde(default = "routed")]
    pub cni: Cni,
    /// Whether agents put back what is missing of a capture.
    #[serde(default)]
    pub mends: bool,
}

/// The load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Load {
    /// How long it goes on once all long-lived connections stand, at least; always until the last step is done.
    pub for_seconds: f64,
    /// Whoever hears nothing for so long has lost his connection.
    #[serde(default = "patience")]
    pub patience_seconds: f64,
    /// Connections that stand all the time.
    pub long_lived: LongLived,
    /// Connections that come and go.
    #[serde(default)]
    pub new: New,
    /// Who talks with whom; connections of both kinds are dealt out evenly.
    pub pairs: Vec<Pair>,
}

/// Connections that stand all the time.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LongLived {
    /// How many.
    pub connections: u32,
    /// Share of those that say something at the beginning and at the end only.
    #[serde(default)]
    pub idle_share: f64,
    /// Bytes of a message, which is answered by as many others.
    #[serde(default = "message")]
    pub message_bytes: u32,
    /// Time between the messages of one that is not idle.
    #[serde(default = "every")]
    pub every_seconds: f64,
}

/// Connections that come and go: each with a message there and one back.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct New {
    /// How many in a second, all pairs together.
    pub per_second: f64,
    /// Bytes of a message.
    #[serde(default = "message")]
    pub message_bytes: u32,
}

/// Who talks with whom.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pair {
    /// The pod whose connections they are.
    pub from: String,
    /// The pod that they lead to.
    pub to: String,
}

/// Something that is done. Exactly one of the things.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Step {
    /// Not before so many seconds of load; without it, when the step before is done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at_seconds: Option<f64>,
    /// Pods get another capture, one after the other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub switch: Option<Switch>,
    /// A daemon is killed, and started again at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kill: Option<DaemonOf>,
    /// A daemon is asked to end, and started again when it has ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restart: Option<DaemonOf>,
    /// A command runs in a place of the lab: to take a rule away, to make a wire slow.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exec: Option<Exec>,
    /// The application of this pod answers a connection once with a wrong byte: for seeing that it is noticed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrupt: Option<String>,
    /// Nothing happens for so long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wait_seconds: Option<f64>,
}

/// Pods get another capture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Switch {
    /// Which pods.
    pub pods: Vec<String>,
    /// Which capture.
    pub to: To,
}

/// A capture that a pod can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum To {
    /// By the node.
    Node,
    /// In the pod's namespace.
    Inpod,
    /// None: what begins from here on is outside the mesh.
    None,
}

impl To {
    /// As the command line has it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Node => "node",
            Self::Inpod => "inpod",
            Self::None => "none",
        }
    }
}

/// A daemon of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DaemonOf {
    /// Which one.
    pub daemon: Which,
    /// Index of the node: 1 or 2.
    pub node: u8,
}

/// One of a node's daemons.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Which {
    /// The agent.
    Agent,
    /// The proxy.
    Proxy,
}

/// A command in a place of the lab.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// `node1`, `proxy1`, `pod1-2`, `plain1` or `out`.
    pub target: String,
    /// Program and arguments.
    pub command: Vec<String>,
}

/// What has to be so. Each number is the most that there may be; what is not named is measured and not judged.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Assertions {
    /// Long-lived connections that broke, by whatever.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resets: Option<u64>,
    /// Connections on which either end heard a byte that the other one did not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wrong_bytes: Option<u64>,
    /// New connections that failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_new: Option<u64>,
    /// New connections that failed and began in the last seconds of the load.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed_at_end: Option<FailedAtEnd>,
    /// Entries in the proxies' access logs beyond one for each connection and end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub double_captures: Option<u64>,
    /// Connections inside the mesh that a proxy's access log has no entry of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncaptured: Option<u64>,
    /// Streams of tunnels that ended before a byte had passed, and were made again in another one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repeated: Option<u64>,
    /// Packets of connections inside the mesh that passed a device in the clear.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clear_packets: Option<u64>,
    /// New connections that took long.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub delayed: Option<Delayed>,
    /// Median over all switches of the time for which what began had to wait, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_median_ms: Option<f64>,
}

/// New connections that failed and began in the last seconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct FailedAtEnd {
    /// How long the end is.
    pub seconds: f64,
    /// How many may fail in it.
    pub at_most: u64,
}

/// New connections that took long, from the first packet to the last byte of the answer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Delayed {
    /// What is long.
    pub over_ms: f64,
    /// Share of all new connections that may be so.
    pub share: f64,
}

fn routed() -> Cni {
    Cni::Routed
}

fn patience() -> f64 {
    40.0
}

fn message() -> u32 {
    512
}

fn every() -> f64 {
    1.0
}

impl Experiment {
    /// Reads a file's text, and checks it.
    ///
    /// # Errors
    /// When it is not YAML, has an unknown key, or describes what cannot be.
    pub fn parse(text: &str) -> Result<Self> {
        let experiment: Self = serde_saphyr::from_str(text)?;
        experiment.validate()?;
        Ok(experiment)
    }

    /// Reads a file.
    ///
    /// # Errors
    /// As [`Experiment::parse`], and when it cannot be read.
    pub fn load(file: &Path) -> Result<Self> {
        let shown = file.display();
        let text = std::fs::read_to_string(file).with_context(|| format!("read {shown}"))?;
        Self::parse(&text).with_context(|| format!("{shown}"))
    }

    /// The lab that it wants, under a name of its own.
    pub fn lab_spec(&self, programs: Programs) -> LabSpec {
        let mut spec = LabSpec {
            pods_per_node: self.lab.pods_per_node,
            cni: self.lab.cni,
            mends: self.lab.mends,
            ..LabSpec::new(LabSpec::unique_name(), Mode::Mixed, programs)
        };
        // The judge of the access logs reads them line by line.
        spec.daemon_env
            .insert("LOG_FORMAT".to_owned(), "json".to_owned());
        spec
    }

    /// The pods that take part in the load.
    pub fn talkers(&self) -> BTreeSet<&str> {
        let pairs = self.load.pairs.iter();
        pairs
            .flat_map(|pair| [pair.from.as_str(), pair.to.as_str()])
            .collect()
    }

    /// Checks what the types do not.
    ///
    /// # Errors
    /// The first thing that cannot be.
    pub fn validate(&self) -> Result<(), FileError> {
        if self.api_version != API_VERSION || self.kind != KIND {
            let given = format!("apiVersion {}, kind {}", self.api_version, self.kind);
            return Err(FileError::Kind(given));
        }
        let spec = self.lab_spec(Programs::beside(Path::new("ambidex")));
        spec.validate()?;
        let topology = Topology::new(&spec, &Default::default());
        self.validate_load(&topology)?;
        self.validate_steps(&topology)
    }

    fn validate_load(&self, topology: &Topology) -> Result<(), FileError> {
        let load = &self.load;
        if load.pairs.is_empty() {
            return Err(FileError::Number(
                "load.pairs: want at least one".to_owned(),
            ));
        }
        for pair in &load.pairs {
            has_pod(topology, "load.pairs", &pair.from)?;
            has_pod(topology, "load.pairs", &pair.to)?;
            if pair.from == pair.to {
                return Err(FileError::Itself(pair.from.clone()));
            }
        }
        let sane = [
            ("load.forSeconds", load.for_seconds, 0.0, 86_400.0),
            ("load.patienceSeconds", load.patience_seconds, 0.1, 3600.0),
            (
                "load.longLived.idleShare",
                load.long_lived.idle_share,
                0.0,
                1.0,
            ),
            (
                "load.longLived.everySeconds",
                load.long_lived.every_seconds,
                0.001,
                3600.0,
            ),
            ("load.new.perSecond", load.new.per_second, 0.0, 10_000.0),
        ];
        let bytes = |bytes: u32| f64::from(bytes);
        let sizes = [
            (
                "load.longLived.messageBytes",
                bytes(load.long_lived.message_bytes),
                1.0,
                1e6,
            ),
            (
                "load.new.messageBytes",
                bytes(load.new.message_bytes.max(1)),
                1.0,
                1e6,
            ),
            (
                "load.longLived.connections",
                f64::from(load.long_lived.connections),
                0.0,
                1e5,
            ),
        ];
        for (name, value, least, most) in sane.into_iter().chain(sizes) {
            if !(least..=most).contains(&value) {
                return Err(FileError::Number(format!(
                    "{name}: {value}: want {least} to {most}"
                )));
            }
        }
        Ok(())
    }

    fn validate_steps(&self, topology: &Topology) -> Result<(), FileError> {
        let mut latest = 0.0;
        for (number, step) in (1..).zip(&self.steps) {
            if step.things() != 1 {
                return Err(FileError::Step(number));
            }
            let place = format!("step {number}");
            let switched = step.switch.iter().flat_map(|switch| &switch.pods);
            for pod in switched.chain(&step.corrupt) {
                has_pod(topology, &place, pod)?;
            }
            if let Some(pod) = &step.corrupt
                && !self.talkers().contains(pod.as_str())
            {
                return Err(FileError::Number(format!(
                    "{place}: {pod} takes no part in the load"
                )));
            }
            if let Some(exec) = &step.exec
                && (topology.target(&exec.target).is_none() || exec.command.is_empty())
            {
                let known = topology.target_names().join(", ");
                return Err(FileError::Number(format!(
                    "{place}: want a command and a target of {known}"
                )));
            }
            for daemon in step.kill.iter().chain(&step.restart) {
                if topology.node(daemon.node).is_none() {
                    return Err(FileError::Number(format!(
                        "{place}: there is no node {}",
                        daemon.node
                    )));
                }
            }
            let times = [step.at_seconds, step.wait_seconds];
            if times
                .into_iter()
                .flatten()
                .any(|time| !(0.0..=86_400.0).contains(&time))
            {
                return Err(FileError::Number(format!(
                    "{place}: want 0 to 86400 seconds"
                )));
            }
            if let Some(at) = step.at_seconds {
                if at < latest {
                    return Err(FileError::Order(number));
                }
                latest = at;
            }
        }
        Ok(())
    }
}

impl Step {
    fn things(&self) -> usize {
        usize::from(self.switch.is_some())
            + usize::from(self.kill.is_some())
            + usize::from(self.restart.is_some())
            + usize::from(self.exec.is_some())
            + usize::from(self.corrupt.is_some())
            + usize::from(self.wait_seconds.is_some())
    }

    /// In a few words.
    pub fn describe(&self) -> String {
        let daemon = |what: &str, of: &DaemonOf| {
            let which = match of.daemon {
                Which::Agent => "agent",
                Which::Proxy => "proxy",
            };
            format!("{what} {which}{}", of.node)
        };
        if let Some(switch) = &self.switch {
            format!("switch {} to {}", switch.pods.join(", "), switch.to.word())
        } else if let Some(of) = &self.kill {
            daemon("kill", of)
        } else if let Some(of) = &self.restart {
            daemon("restart", of)
        } else if let Some(exec) = &self.exec {
            format!("in {}: {}", exec.target, exec.command.join(" "))
        } else if let Some(pod) = &self.corrupt {
            format!("{pod} answers with a wrong byte")
        } else {
            format!("wait {} s", self.wait_seconds.unwrap_or_default())
        }
    }
}

fn has_pod(topology: &Topology, place: &str, pod: &str) -> Result<(), FileError> {
    if topology.pods().any(|(_, known)| known.name == pod) {
        return Ok(());
    }
    let known: Vec<&str> = topology.pods().map(|(_, pod)| pod.name.as_str()).collect();
    Err(FileError::Pod {
        place: place.to_owned(),
        pod: pod.to_owned(),
        known: known.join(", "),
    })
}

#[cfg(test)]
mod tests;
