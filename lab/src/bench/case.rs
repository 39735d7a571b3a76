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
    pub const ALL: [Self; 9] = [
        Self::bulk(1, Way::Up),
        Self::bulk(1, Way::Down),
        Self::bulk(8, Way::Up),
        Self::bulk(8, Way::Down),
        Self::RequestResponse { connections: 1 },
        Self::RequestResponse { connections: 64 },
        Self::NewConnections,
        Self::FirstByte,
        Self::Cold,
    ];

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
        }
    }

    /// Whether more of the main result is better.
    pub fn higher_is_better(self) -> bool {
        match self {
            Self::Bulk { .. } | Self::RequestResponse { .. } | Self::NewConnections => true,
            Self::FirstByte | Self::Cold => false,
        }
    }

    /// How long a sample is.
    pub fn amount(self) -> Amount {
        match self {
            Self::Bulk { .. }
            | Self::RequestResponse { .. }
            | Self::NewConnections
            | Self::FirstByte
            | Self::Cold => Amount::Seconds,
        }
    }

    /// What CPU time is divided by.
    pub fn work_unit(self) -> &'static str {
        match self {
            Self::Bulk { .. } => "GB",
            Self::RequestResponse { .. } => "1,000 req",
            Self::NewConnections | Self::FirstByte | Self::Cold => "1,000 conn",
        }
    }

    /// How many bytes or operations that is.
    pub fn work_unit_size(self) -> f64 {
        match self {
            Self::Bulk { .. } => 1e9,
            Self::RequestResponse { .. } | Self::NewConnections | Self::FirstByte | Self::Cold => {
                1e3
            }
        }
    }

    /// A result with as many digits as mean something.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Bulk { .. } => format!("{value:.2}"),
            Self::RequestResponse { .. } | Self::NewConnections | Self::FirstByte | Self::Cold => {
                format!("{value:.0}")
            }
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
            // Inside the proxy there are no tunnels.
            Load::Cold => *variant != Variant::NodeDirect || self.path == Path::CrossNode,
            _ => true,
        }
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
        Self::all()
            .into_iter()
            .find(|case| case.to_string() == word)
            .ok_or_else(|| {
                let known: Vec<String> = Self::all().iter().map(Self::to_string).collect();
                format!("{word:?} is not a case: {}", known.join(", "))
            })
    }
}
