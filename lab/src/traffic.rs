//! Traffic between pods, with a verdict: one server that serves every check, and clients that each prove one behaviour.
//!
//! `ambidex lab traffic JSON` runs one [`TrafficCommand`] in the network namespace that it was started in, prints one
//! JSON line per result and exits with 0 (as it should be) or 1. The server never has to be told what comes: the first
//! line of each connection says what the client wants ([`Request`]).
//!
//! Payload is a stream of pseudo-random bytes that both ends make from a seed, so every byte is compared where it
//! arrives, and an error says at which offset.

mod checks;
mod connection;
mod payload;
mod request;
mod server;
mod storm;

use std::io::Write;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use connection::{Failure, Saw};
pub use request::{Ending, Request};

/// What one traffic process does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum TrafficCommand {
    /// Serve every kind of request until killed.
    Server(ServerOptions),
    /// Make one check against a server.
    Client(ClientOptions),
}

/// A server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ServerOptions {
    /// Address and port to listen on.
    pub listen: SocketAddr,
    /// A connection is given up after this time, in milliseconds.
    #[serde(default = "default_server_timeout")]
    pub timeout_ms: u64,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClientOptions {
    /// The server, or what stands for it (a service address).
    pub to: SocketAddr,
    /// The check fails when it takes longer, in milliseconds.
    #[serde(default = "default_client_timeout")]
    pub timeout_ms: u64,
    /// Port that the checks `who` and `marker` are made from. A port that nothing in the namespace has used lately shows
    /// as it is behind a redirect; one that has, with another destination, may be changed by it: both connections lead to
    /// the port of the redirect.
    #[serde(default)]
    pub from_port: Option<u16>,
    /// What to check.
    pub check: Check,
}

/// A behaviour to prove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Check {
    /// The server sees a client: which address? ([`Outcome::seen`])
    Who,
    /// A marker comes back ([`Outcome::marker`]); without one given, a random one. For whoever looks for it on the wire.
    Marker {
        /// The marker: printable, at most 200 bytes.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        marker: Option<String>,
    },
    /// Both ends send at once, in chunks of random size, and compare every byte; then the client closes its direction
    /// first and still gets the server's verdict.
    Exchange {
        /// Bytes from the client to the server.
        up: u64,
        /// Bytes from the server to the client.
        down: u64,
    },
    /// Each end in turn closes its direction first while the other goes on sending.
    HalfClose {
        /// Bytes that follow the half-close.
        bytes: u64,
    },
    /// The server resets: the client must see a reset, not an end.
    PeerReset {
        /// Bytes that come before, and must arrive.
        after: u64,
    },
    /// The client resets: the server must see a reset, not an end.
    OwnReset,
    /// Single bytes in packets of their own to a server that reads late and little.
    OneByteWrites {
        /// Number of bytes.
        count: u64,
        /// The server reads nothing for this time, in milliseconds.
        pause_ms: u64,
    },
    /// Connections that are all open at once, each of which echoes before and after all are open.
    Storm {
        /// Number of connections.
        connections: u32,
    },
}

/// What a check found. One JSON line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// Whether everything was as it should be.
    pub ok: bool,
    /// What was checked.
    pub check: Check,
    /// Against what.
    pub to: SocketAddr,
    /// Time taken, in milliseconds.
    pub millis: u64,
    /// Address of the client as the client knows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    /// Address of the client as the server saw it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<SocketAddr>,
    /// The marker that went over the wire and back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub marker: Option<String>,
    /// How the connection failed or ended, where that is the point.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub saw: Option<Saw>,
    /// Payload bytes that were compared.
    #[serde(default)]
    pub bytes: u64,
    /// Why it is not as it should be.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// What a check learned beside that all was well.
#[derive(Debug, Default)]
struct Findings {
    local: Option<SocketAddr>,
    seen: Option<SocketAddr>,
    marker: Option<String>,
    saw: Option<Saw>,
    bytes: u64,
}

impl TrafficCommand {
    /// A server on this port, on all IPv4 addresses of its namespace.
    pub fn server(port: u16) -> Self {
        TrafficCommand::Server(ServerOptions {
            listen: SocketAddr::from(([0, 0, 0, 0], port)),
            timeout_ms: default_server_timeout(),
        })
    }

    /// A check with the default timeout.
    pub fn client(to: SocketAddr, check: Check) -> Self {
        TrafficCommand::Client(ClientOptions {
            to,
            timeout_ms: default_client_timeout(),
            from_port: None,
            check,
        })
    }

    /// As the one argument of `ambidex lab traffic`.
    ///
    /// # Errors
    /// Never in practice; JSON has a form for every command.
    pub fn to_json(&self) -> Result<String> {
        Ok(serde_json::to_string(self)?)
    }

    /// Reads the one argument of `ambidex lab traffic`.
    ///
    /// # Errors
    /// When it is not a command; the error says where.
    pub fn from_json(text: &str) -> Result<Self> {
        serde_json::from_str(text).with_context(|| format!("traffic command {text}"))
    }
}

/// Runs a command in this process and network namespace and prints its JSON lines. Returns the exit code.
///
/// # Errors
/// When a server cannot listen, or standard output is closed. A failed check is not an error but exit code 1.
pub fn run(command: &TrafficCommand) -> Result<i32> {
    match command {
        TrafficCommand::Server(options) => {
            let announce = |address: SocketAddr| {
                print_line(&serde_json::json!({ "listening": address }).to_string())
            };
            raise_descriptor_limit();
            runtime()?.block_on(server::serve(options, announce))?;
            Ok(0)
        }
        TrafficCommand::Client(options) => {
            let outcome = check(options)?;
            print_line(&serde_json::to_string(&outcome)?)?;
            Ok(i32::from(!outcome.ok))
        }
    }
}

/// Makes one check from this thread's network namespace.
///
/// # Errors
/// When there are no resources to begin with; everything else is in the [`Outcome`].
pub fn check(options: &ClientOptions) -> Result<Outcome> {
    raise_descriptor_limit();
    let started = Instant::now();
    let limit = Duration::from_millis(options.timeout_ms);
    let result = runtime()?.block_on(async {
        match tokio::time::timeout(limit, checks::perform(options)).await {
            Ok(result) => result,
            Err(_) => Err(Failure::new(
                Saw::Timeout,
                format!("not done after {} ms", options.timeout_ms),
            )),
        }
    });
    let millis = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let (ok, findings, error) = match result {
        Ok(findings) => (true, findings, None),
        Err(failure) => {
            let findings = Findings {
                saw: Some(failure.saw),
                ..Findings::default()
            };
            (false, findings, Some(failure.to_string()))
        }
    };
    Ok(Outcome {
        ok,
        check: options.check.clone(),
        to: options.to,
        millis,
        local: findings.local,
        seen: findings.seen,
        marker: findings.marker,
        saw: findings.saw,
        bytes: findings.bytes,
        error,
    })
}

/// Serves from this thread's network namespace until the listener fails. `ready` is called with the address once
/// connections are accepted.
///
/// # Errors
/// When it cannot listen, or `ready` fails.
pub fn serve(options: &ServerOptions, ready: impl FnOnce(SocketAddr) -> Result<()>) -> Result<()> {
    raise_descriptor_limit();
    runtime()?.block_on(server::serve(options, ready))
}

/// One thread: sockets stay in the namespace of the caller, and the generator competes with what it measures as little
/// as possible.
fn runtime() -> Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the traffic runtime")
}

/// Many connections need more descriptors than the usual soft limit of 1024. Failing to get them shows in the connections.
pub(crate) fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < hard
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, hard, hard);
    }
}

fn print_line(line: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("write the result")
}

fn default_server_timeout() -> u64 {
    120_000
}

fn default_client_timeout() -> u64 {
    30_000
}

#[cfg(test)]
mod tests;
