//! What is measured of each variant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::variant::Variant;

/// Where client and server are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Path {
    /// On two nodes.
    CrossNode,
    /// On one node.
    SameNode,
}

impl Path {
    /// The server's pod. The client is always `pod1-1`.
    pub fn server(self) -> &'static str {
        match self {
            Self::CrossNode => "pod2-1",
            Self::SameNode => "pod1-2",
        }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::CrossNode => "cross-node",
            Self::SameNode => "same-node",
        })
    }
}

/// Idle connections of the largest case: two descriptors for each fit under a hard limit of 20,480.
const MOST_IDLE: u32 = 10_000;

/// Pods of the largest case.
const MOST_PODS: u8 = 200;

/// The client's pod.
pub const CLIENT: &str = "pod1-1";

/// Which way the bytes of a bulk stream go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Way {
    /// From client to server.
    Up,
    /// From server to client.
    Down,
}

/// How pods come that are to be captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pace {
    /// Each when the one before it is captured.
    OneByOne,
    /// All at the same moment.
    AtOnce,
    /// So many in each second, whatever becomes of those before them: an open loop.
    PerSecond(u8),
}

impl fmt::Display for Pace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OneByOne => Ok(()),
            Self::AtOnce => f.write_str("-at-once"),
            Self::PerSecond(pods) => write!(f, "-{pods}ps"),
        }
    }
}

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Load {
    /// TCP streams (iperf3): `bulk1`, `bulk8-down`.
    Bulk {
        /// How many at once.
        streams: u8,
        /// Which way.
        way: Way,
    },
    /// Requests one after the other on standing connections (wrk against nginx): `rr1`, `rr64`.
    RequestResponse {
        /// How many at once.
        connections: u8,
    },
    /// A connection for each request, 16 at a time (wrk against nginx, `Connection: close`): `newconn`.
    NewConnections,
    /// Connections one after the other, timed to the first byte of the answer: `first-byte`.
    FirstByte,
    /// The same, each through a tunnel of its own that has to be opened first: `cold`.
    Cold,
    /// Connections that stand and do nothing: `idle1000`.
    Idle {
        /// How many.
        connections: u32,
    },
    /// Pods that are captured: `enrol50`, `enrol200-at-once`, `enrol200-20ps`.
    Enrol {
        /// How many.
        pods: u8,
        /// How they come.
        pace: Pace,
    },
    /// A proxy that ends and is started again under load: `restart`, `crash`.
    Restart {
        /// Whether it is killed, or asked to end and given time for what stands.
        killed: bool,
    },
}

/// How long a sample of a load is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Amount {
    /// As many seconds as were ordered.
    Seconds,
    /// This many operations, however long they take.
    Count(u32),
}

impl Load {
    /// All, in the order in which they are measured.
    pub const ALL: [Self; 21] = [
        Self::bulk(1, Way::Up),
        Self::bulk(1, Way::Down),
        Self::bulk(8, Way::Up),
        Self::bulk(8, Way::Down),
        Self::RequestResponse { connections: 1 },
        Self::RequestResponse { connections: 64 },
        Self::NewConnections,
        Self::FirstByte,
        Self::Cold,
        Self::Idle { connections: 1000 },
        Self::Idle { connections: 2000 },
        Self::Idle {
            connections: MOST_IDLE,
        },
        Self::enrol(1, Pace::OneByOne),
        Self::enrol(50, Pace::OneByOne),
        Self::enrol(50, Pace::AtOnce),
        Self::enrol(50, Pace::PerSecond(20)),
        Self::enrol(200, Pace::OneByOne),
        Self::enrol(200, Pace::AtOnce),
        Self::enrol(200, Pace::PerSecond(20)),
        Self::Restart { killed: false },
        Self::Restart { killed: true },
    ];

    const fn enrol(pods: u8, pace: Pace) -> Self {
        Self::Enrol { pods, pace }
    }

    /// `enrolN`, `enrolN-at-once` and `enrolN-Mps` with any numbers that are not nothing, up to those of the largest case.
    fn enrolment(word: &str) -> Option<Self> {
        let (pods, pace) = match word.strip_prefix("enrol")?.split_once('-') {
            None => (word.strip_prefix("enrol")?, Pace::OneByOne),
            Some((pods, "at-once")) => (pods, Pace::AtOnce),
            Some((pods, each)) => {
                let per_second = each.strip_suffix("ps")?.parse().ok()?;
                (pods, Pace::PerSecond(per_second))
            }
        };
        let pods = pods.parse().ok()?;
        let most = (1..=MOST_PODS).contains(&pods) && pace != Pace::PerSecond(0);
        most.then_some(Self::enrol(pods, pace))
    }

    const fn bulk(streams: u8, way: Way) -> Self {
        Self::Bulk { streams, way }
    }

    /// Unit of the main result.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "Gbit/s",
            Self::RequestResponse { .. } => "req/s",
            Self::NewConnections => "conn/s",
            Self::FirstByte | Self::Cold => "us",
            Self::Idle { .. } => "KiB/conn",
            Self::Enrol { .. } => "ms/pod",
            Self::Restart { .. } => "ms",
        }
    }

    /// Whether more of the main result is better.
    pub fn higher_is_better(self) -> bool {
        matches!(
            self,
            Self::Bulk { .. } | Self::RequestResponse { .. } | Self::NewConnections
        )
    }

    /// How long a sample is.
    pub fn amount(self) -> Amount {
        match self {
            Self::Enrol { pods, .. } => Amount::Count(pods.into()),
            Self::Restart { .. } => Amount::Count(1),
            _ => Amount::Seconds,
        }
    }

    /// What CPU time is divided by.
    pub fn work_unit(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "GB",
            Self::RequestResponse { .. } => "1,000 req",
            Self::NewConnections | Self::FirstByte | Self::Cold | Self::Idle { .. } => "1,000 conn",
            Self::Enrol { .. } => "pod",
            Self::Restart { .. } => "restart",
        }
    }

    /// How many bytes or operations that is.
    pub fn work_unit_size(self) -> f64 {
        match self {
            Self::Bulk { .. } => 1e9,
            Self::Enrol { .. } | Self::Restart { .. } => 1.0,
            _ => 1e3,
        }
    }

    /// A result with as many digits as mean something.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Bulk { .. } | Self::Enrol { .. } => format!("{value:.2}"),
            Self::Idle { .. } => format!("{value:.1}"),
            _ => format!("{value:.0}"),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match self {
            Self::Bulk { streams, way } => {
                format!(
                    "bulk{streams}{}",
                    if *way == Way::Down { "-down" } else { "" }
                )
            }
            Self::RequestResponse { connections } => format!("rr{connections}"),
            Self::NewConnections => "newconn".to_owned(),
            Self::FirstByte => "first-byte".to_owned(),
            Self::Cold => "cold".to_owned(),
            Self::Idle { connections } => format!("idle{connections}"),
            Self::Enrol { pods, pace } => format!("enrol{pods}{pace}"),
            Self::Restart { killed: false } => "restart".to_owned(),
            Self::Restart { killed: true } => "crash".to_owned(),
        })
    }
}

/// A load on a path. In JSON the same word as on the command line: `cross-node/bulk1`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Case {
    /// Where.
    pub path: Path,
    /// What.
    pub load: Load,
}

impl Case {
    /// All cases.
    pub fn all() -> Vec<Self> {
        [Path::CrossNode, Path::SameNode]
            .into_iter()
            .flat_map(|path| Load::ALL.map(|load| Self { path, load }))
            .filter(|case| match case.load {
                // A proxy that has both sides of each connection would need more descriptors than the usual hard limit.
                Load::Idle { connections } => {
                    connections < MOST_IDLE || case.path == Path::CrossNode
                }
                // All of it happens on one node.
                Load::Enrol { .. } => case.path == Path::SameNode,
                _ => true,
            })
            .collect()
    }

    /// The cases of the quick run: a stream, requests and connections across nodes, and the stream on one node.
    pub fn quick() -> Vec<Self> {
        let stream = Load::bulk(1, Way::Up);
        let case = |path, load| Self { path, load };
        vec![
            case(Path::CrossNode, stream),
            case(Path::CrossNode, Load::RequestResponse { connections: 64 }),
            case(Path::CrossNode, Load::NewConnections),
            case(Path::SameNode, stream),
        ]
    }

    /// The cases of the full run: what the quick run has, on both paths.
    pub fn full() -> Vec<Self> {
        let quick: Vec<Load> = Self::quick().iter().map(|case| case.load).collect();
        let mut cases = Self::all();
        cases.retain(|case| quick.contains(&case.load));
        cases
    }

    /// Whether there is anything to measure: a variant that does not have what the case is about has no samples of it.
    pub fn applies_to(self, variant: &Variant) -> bool {
        match self.load {
            // Without a mesh there is nothing to weigh, to be captured by, or to be restarted.
            Load::Idle { .. } | Load::Enrol { .. } | Load::Restart { .. }
                if *variant == Variant::None =>
            {
                false
            }
            // A relay that splices has pipes besides its sockets: more descriptors than the usual hard limit.
            Load::Idle { connections } => *variant != Variant::Relay || connections < MOST_IDLE,
            // Inside the proxy there are no tunnels.
            Load::Cold => *variant != Variant::NodeDirect || self.path == Path::CrossNode,
            _ => true,
        }
    }

    /// Whether a first sample would differ from later ones for want of warmth. Where daemons or pods are new in each
    /// sample, it would not.
    pub fn wants_warm_up(self) -> bool {
        !matches!(
            self.load,
            Load::Idle { .. } | Load::Enrol { .. } | Load::Restart { .. }
        )
    }

    /// Unit of the main result.
    pub fn unit(self) -> &'static str {
        self.load.unit()
    }

    /// Whether more of the main result is better.
    pub fn higher_is_better(self) -> bool {
        self.load.higher_is_better()
    }

    /// What CPU time is divided by.
    pub fn work_unit(self) -> &'static str {
        self.load.work_unit()
    }

    /// How long a sample is.
    pub fn amount(self) -> Amount {
        self.load.amount()
    }

    /// A result with as many digits as mean something.
    pub fn show(self, value: f64) -> String {
        self.load.show(value)
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.path, self.load))
    }
}

impl From<Case> for String {
    fn from(case: Case) -> Self {
        case.to_string()
    }
}

impl TryFrom<String> for Case {
    type Error = String;

    fn try_from(word: String) -> Result<Self, String> {
        word.parse()
    }
}

impl FromStr for Case {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let other_number = || {
            let load = Load::enrolment(word.strip_prefix("same-node/")?)?;
            let path = Path::SameNode;
            Some(Self { path, load }).filter(|case| case.to_string() == word)
        };
        Self::all()
            .into_iter()
            .find(|case| case.to_string() == word)
            .or_else(other_number)
            .ok_or_else(|| {
                let known: Vec<String> = Self::all().iter().map(Self::to_string).collect();
                format!("{word:?} is not a case: {}", known.join(", "))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_case_has_its_word_and_is_found_by_it() {
        let all = Case::all();
        for case in &all {
            assert_eq!(case.to_string().parse(), Ok(*case));
        }
        let words: Vec<String> = all.iter().map(Case::to_string).collect();
        for word in [
            "cross-node/bulk1",
            "same-node/bulk8-down",
            "cross-node/rr64",
            "cross-node/idle10000",
            "same-node/enrol200-at-once",
            "same-node/enrol200-20ps",
        ] {
            assert!(words.iter().any(|known| known == word), "{word}");
        }
        for other in ["enrol3", "enrol7-at-once", "enrol4-2ps"] {
            let word = format!("same-node/{other}");
            assert_eq!(word.parse::<Case>().unwrap().to_string(), word);
        }
        for none in [
            "same-node/idle10000",
            "same-node/enrol0",
            "same-node/enrol201",
            "same-node/enrol03",
            "same-node/enrol5-0ps",
            "same-node/enrol5-soon",
            "cross-node/enrol1",
            "bulk1",
        ] {
            assert!(none.parse::<Case>().is_err(), "{none}");
        }
        for part in [Case::quick(), Case::full()] {
            assert!(part.iter().all(|case| all.contains(case)));
        }
    }

    #[test]
    fn a_case_is_not_measured_where_there_is_nothing_to_measure() {
        let applies = |word: &str, variant| word.parse::<Case>().unwrap().applies_to(&variant);
        assert!(!applies("cross-node/idle1000", Variant::None));
        assert!(!applies("same-node/enrol1", Variant::None));
        assert!(applies("cross-node/idle2000", Variant::Relay));
        assert!(!applies("cross-node/idle10000", Variant::Relay));
        assert!(applies("cross-node/idle10000", Variant::Inpod));
        assert!(applies("cross-node/cold", Variant::NodeDirect));
        assert!(!applies("same-node/cold", Variant::NodeDirect));
        assert!(applies("same-node/cold", Variant::None));
    }
}
