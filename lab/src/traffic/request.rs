//! What a client asks a server for: the first line of each connection, as JSON or as one bare word (for people with
//! `nc`: `who`, `echo`).

use serde::{Deserialize, Serialize};

use super::connection::Saw;

/// Longest first line, in bytes.
pub const MAX_LINE: usize = 512;

/// The first line of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// Answer with the client's address in a line, then close.
    Who,
    /// Send everything back until the client closes its direction, then close.
    Echo,
    /// Send `down` and compare `up` at the same time; when the client closed its direction, answer with a verdict.
    Exchange {
        /// What the client sends.
        up: Stream,
        /// What the server sends.
        down: Stream,
    },
    /// As the upward half of an exchange, but read late and little.
    Slow {
        /// What the client sends.
        up: Stream,
        /// Read nothing for this time, in milliseconds.
        pause_ms: u64,
        /// Read at most so many bytes at a time.
        read_bytes: usize,
        /// Wait so long between reads, in microseconds.
        every_us: u64,
    },
    /// Send `down`, wait for one byte of the client, reset the connection.
    Reset {
        /// What the server sends.
        down: Stream,
    },
    /// Answer `ready`, close this direction at once if `close_first`, compare what comes with `up`, and keep under
    /// `token` how the connection ended.
    Watch {
        /// Key of the memory.
        token: u64,
        /// Close this direction before reading.
        close_first: bool,
        /// What the client sends.
        up: Stream,
    },
    /// Answer with the memory of a watched connection, or `null` if it has not ended.
    Recall {
        /// Key of the memory.
        token: u64,
    },
}

/// A pseudo-random byte stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stream {
    /// What it is made from.
    pub seed: u64,
    /// Its length.
    pub bytes: u64,
}

impl Stream {
    /// A stream of this length from a random seed.
    pub fn random(bytes: u64) -> Self {
        Self {
            seed: rand::random(),
            bytes,
        }
    }
}

/// What a server got from a client and how it ended. The verdict of an exchange and the memory of a watched connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ending {
    /// Payload bytes that came.
    pub bytes: u64,
    /// How it ended.
    pub saw: Saw,
    /// What was wrong with the bytes.
    pub error: Option<String>,
}

impl Request {
    /// Reads a first line.
    ///
    /// # Errors
    /// The reason, for the client.
    pub fn parse(line: &str) -> Result<Self, String> {
        let line = line.trim();
        let bare = !line.starts_with(['{', '"']);
        let parsed = if bare {
            serde_json::from_value(line.into())
        } else {
            serde_json::from_str(line)
        };
        parsed.map_err(|error| format!("request {line:?}: {error}"))
    }
}
