//! What is measured of each variant.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

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

/// A kind of load.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Load {
    /// One TCP stream from client to server (iperf3).
    Bulk,
    /// 64 connections with requests one after the other (wrk against nginx).
    KeepAlive,
    /// A connection for each request, 16 at a time (wrk against nginx, `Connection: close`).
    NewConnections,
}

impl Load {
    /// All.
    pub const ALL: [Self; 3] = [Self::Bulk, Self::KeepAlive, Self::NewConnections];

    /// Unit of the main result.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Bulk => "Gbit/s",
            Self::KeepAlive => "req/s",
            Self::NewConnections => "conn/s",
        }
    }

    /// What CPU time is divided by.
    pub fn work_unit(self) -> &'static str {
        match self {
            Self::Bulk => "GB",
            Self::KeepAlive => "1,000 req",
            Self::NewConnections => "1,000 conn",
        }
    }

    /// How many bytes or operations that is.
    pub fn work_unit_size(self) -> f64 {
        match self {
            Self::Bulk => 1e9,
            Self::KeepAlive | Self::NewConnections => 1e3,
        }
    }

    /// A result with as many digits as mean something.
    pub fn show(self, value: f64) -> String {
        match self {
            Self::Bulk => format!("{value:.2}"),
            Self::KeepAlive | Self::NewConnections => format!("{value:.0}"),
        }
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Bulk => "bulk",
            Self::KeepAlive => "keepalive64",
            Self::NewConnections => "newconn",
        })
    }
}

/// A load on a path. In JSON the same word as on the command line: `cross-node/bulk`.
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

    /// The cases of the quick run: all across nodes, and the bulk stream on one node.
    pub fn quick() -> Vec<Self> {
        Self::all()
            .into_iter()
            .filter(|case| case.path == Path::CrossNode || case.load == Load::Bulk)
            .collect()
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
