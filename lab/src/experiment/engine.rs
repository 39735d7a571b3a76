//! The load of one pod: a process in its namespace that serves connections and opens connections to others.
//!
//! It takes one word a line on standard input, and answers one a line: `open` makes the long-lived connections (answer:
//! `open`), `load` begins with new ones, `corrupt` has one answer be wrong, `finish` has every connection say something
//! once more and ends them (answer: `finished`). It says `listening` at first and ends with its input. What became of each
//! connection goes into a file, one [`Record`] a line.
//!
//! On a connection the client says a `Hello`, then messages of one size, each of which the server answers with as many
//! bytes. Both compare all that they hear with the [`Pattern`](super::pattern::Pattern) of the connection.

mod client;
mod server;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufWriter, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, watch};

use super::now_us;
use crate::traffic::{Saw, raise_descriptor_limit};

/// Source ports of clients, each used once before one comes again, so that a packet or a line of a log names its
/// connection. Those of proxies that speak with a pod's address are below.
pub const CLIENT_PORTS: std::ops::RangeInclusive<u16> = 33_000..=65_500;
/// What a connection begins with.
const MAGIC: [u8; 8] = *b"adxload1";
/// Bytes of a [`Hello`].
const HELLO: usize = 20;

/// What a process of the load does.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Its pod.
    pub pod: String,
    /// Its number among all processes: what the numbers of its connections begin with.
    pub number: u16,
    /// Where it serves.
    pub listen: SocketAddr,
    /// Where its records go.
    pub records: PathBuf,
    /// Whoever hears nothing for so many milliseconds has lost his connection.
    pub patience_ms: u64,
    /// Bytes of a message of a long-lived connection.
    pub message_bytes: u32,
    /// Time between such messages, in microseconds.
    pub every_us: u64,
    /// Bytes of a message of a new connection.
    pub new_bytes: u32,
    /// Whom it talks with.
    pub peers: Vec<Peer>,
}

/// Whom a process talks with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// The pod.
    pub pod: String,
    /// Its address.
    pub to: SocketAddr,
    /// Long-lived connections that talk all the time.
    pub busy: u32,
    /// Long-lived connections that talk at the beginning and at the end.
    pub idle: u32,
    /// New connections in a second.
    pub per_second: f64,
}

/// What kind of connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// Long-lived, talks all the time.
    Busy,
    /// Long-lived, talks at the beginning and at the end.
    Idle,
    /// One message there and one back.
    New,
}

/// A line of the file that a process of the load writes.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "lowercase")]
pub enum Record {
    /// A connection that has ended, by its client.
    Connection(Connection),
    /// What a server saw go wrong.
    Served(Served),
    /// The messages of long-lived connections in one second.
    Second(Second),
    /// New connections that were due and not made, because the process came too late for them.
    Late {
        /// How many.
        connections: u64,
    },
}

/// A connection that has ended, by its client. Times are microseconds, instants since 1970.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Connection {
    /// Its number: no other connection of the experiment has it.
    pub id: u64,
    /// Its kind.
    pub kind: Kind,
    /// The pod whose connection it is.
    pub from: String,
    /// The pod that it leads to.
    pub to: String,
    /// Its own end, as its client knows it; one that was not connected has no address of its own yet (0.0.0.0).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<SocketAddr>,
    /// When it began.
    pub begun_us: u64,
    /// When it ended.
    pub ended_us: u64,
    /// Until the first answer was there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub took_us: Option<u64>,
    /// Messages that were answered.
    pub messages: u64,
    /// The longest time to an answer.
    pub worst_us: u64,
    /// How it broke.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<Broken>,
}

/// How a connection broke.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Broken {
    /// When.
    pub at_us: u64,
    /// In a word.
    pub saw: Saw,
    /// In a sentence.
    pub what: String,
}

/// What a server saw go wrong on a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Served {
    /// Number of the connection.
    pub id: u64,
    /// The server's pod.
    pub by: String,
    /// How it broke.
    pub broken: Broken,
}

/// The messages of long-lived connections in one second.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Second {
    /// Which one, since 1970.
    pub second: u64,
    /// Messages that were answered.
    pub messages: u64,
    /// Time to all answers, in microseconds.
    pub sum_us: u64,
    /// The longest time to an answer.
    pub worst_us: u64,
}

/// What a client says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Hello {
    id: u64,
    message_bytes: u32,
}

impl Hello {
    fn bytes(self) -> [u8; HELLO] {
        let mut bytes = [0; HELLO];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.id.to_be_bytes());
        bytes[16..].copy_from_slice(&self.message_bytes.to_be_bytes());
        bytes
    }

    fn parse(bytes: &[u8; HELLO]) -> Option<Self> {
        let id: [u8; 8] = bytes[8..16].try_into().ok()?;
        let size: [u8; 4] = bytes[16..].try_into().ok()?;
        let hello = Self {
            id: u64::from_be_bytes(id),
            message_bytes: u32::from_be_bytes(size),
        };
        (bytes[..8] == MAGIC && (1..=1 << 20).contains(&hello.message_bytes)).then_some(hello)
    }
}

/// How far the process has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Phase {
    /// Long-lived connections only.
    Standing,
    /// New ones, too.
    Loaded,
    /// Nothing new; what is open says something once more and ends.
    Finishing,
}

/// What all tasks of the process have in common.
struct Engine {
    plan: Plan,
    records: RefCell<BufWriter<File>>,
    phase: watch::Sender<Phase>,
    next_id: Cell<u64>,
    next_port: Cell<u16>,
    /// Answers that are to be wrong.
    corrupt: Cell<u32>,
    seconds: RefCell<BTreeMap<u64, Second>>,
}

impl Engine {
    fn patience(&self) -> Duration {
        Duration::from_millis(self.plan.patience_ms)
    }

    fn id(&self) -> u64 {
        let id = self.next_id.get();
        self.next_id.set(id + 1);
        (u64::from(self.plan.number) << 40) | id
    }

    fn port(&self) -> u16 {
        let port = self.next_port.get();
        let next = port + 1;
        self.next_port.set(if CLIENT_PORTS.contains(&next) {
            next
        } else {
            *CLIENT_PORTS.start()
        });
        port
    }

    fn note(&self, record: &Record) {
        let mut records = self.records.borrow_mut();
        // A file that cannot be written ends short, which its reader notices by the last line.
        let _ = serde_json::to_writer(&mut *records, record).map(|()| records.write_all(b"\n"));
    }

    fn answered(&self, took: Duration) {
        let took = micros(took);
        let second = now_us() / 1_000_000;
        let mut seconds = self.seconds.borrow_mut();
        let entry = seconds.entry(second).or_insert_with(|| Second {
            second,
            ..Second::default()
        });
        entry.messages += 1;
        entry.sum_us += took;
        entry.worst_us = entry.worst_us.max(took);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// Does what a plan (its JSON) and the words on standard input say, until standard input ends.
///
/// # Errors
/// When the plan is none, the port cannot be listened on, or the records cannot be written.
pub fn run(plan: &str) -> Result<()> {
    let plan: Plan = serde_json::from_str(plan).context("plan of a load")?;
    raise_descriptor_limit();
    let (told, mut words) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            if told.send(line).is_err() {
                return;
            }
        }
    });
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime of the load")?;
    let shown = plan.records.display().to_string();
    let records = File::create(&plan.records).context(shown)?;
    let engine = Rc::new(Engine {
        records: RefCell::new(BufWriter::new(records)),
        phase: watch::Sender::new(Phase::Standing),
        next_id: Cell::new(1),
        next_port: Cell::new(*CLIENT_PORTS.start()),
        corrupt: Cell::new(0),
        seconds: RefCell::default(),
        plan,
    });
    tokio::task::LocalSet::new().block_on(&runtime, async {
        let server = server::listen(&engine.plan)?;
        tokio::task::spawn_local(server::serve(server, Rc::clone(&engine)));
        say("listening")?;
        let mut tasks = Vec::new();
        while let Some(word) = words.recv().await {
            match word.as_str() {
                "open" => {
                    tasks.extend(client::open_all(&engine).await);
                    say("open")?;
                }
                "load" => {
                    engine.phase.send_replace(Phase::Loaded);
                    tasks.extend(client::begin_new(&engine));
                }
                "corrupt" => engine.corrupt.set(engine.corrupt.get() + 1),
                "finish" => {
                    engine.phase.send_replace(Phase::Finishing);
                    for task in tasks.drain(..) {
                        // A task that panicked has no record, which its reader notices.
                        let _ = task.await;
                    }
                    for second in engine.seconds.take().into_values() {
                        engine.note(&Record::Second(second));
                    }
                    engine
                        .records
                        .borrow_mut()
                        .flush()
                        .context("records of the load")?;
                    say("finished")?;
                }
                _ => {}
            }
        }
        // What the server saw of the clients' ends, which may come last.
        engine
            .records
            .borrow_mut()
            .flush()
            .context("records of the load")
    })
}

fn say(word: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{word}")
        .and_then(|()| out.flush())
        .context("tell what was done")
}

#[cfg(test)]
mod tests;
