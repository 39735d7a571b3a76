//! Connections that stand and do nothing: what they cost the proxies in memory, and in CPU time while they do nothing.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::{Measured, Target};
use crate::bench::accounting::{self, Memory};
use crate::bench::case::Path;
use crate::bench::interrupt;
use crate::bench::pinning::{self, End};
use crate::standing::Daemon;

/// The longest that one answer may take.
const LIMIT: Duration = Duration::from_secs(5);
/// How long connections stand before they count as idle.
const SETTLES_IN: Duration = Duration::from_millis(500);

/// Starts both proxies anew, so that no memory of earlier loads is there to be used again, and opens a tunnel.
pub fn prepare(target: &Target<'_>) -> Result<()> {
    for node in [1, 2] {
        target.stage.lab.restart(node, Daemon::Proxy)?;
    }
    target.client.run(|| Waiting::open(target.web()))??;
    Ok(())
}

/// Opens connections, makes a request on each, lets them stand, and makes another request on each.
pub fn idle(target: &Target<'_>, connections: u32) -> Result<Measured> {
    let pids = proxies(target)?;
    let before = memories(&pids)?;
    let mut open = pinning::on(End::Client, || {
        target.client.run(|| -> Result<Vec<Waiting>> {
            let mut open = Vec::new();
            for number in 1..=connections {
                interrupt::check()?;
                let connection = Waiting::open(target.web());
                open.push(connection.with_context(|| format!("connection {number}"))?);
            }
            Ok(open)
        })
    })???;
    thread::sleep(SETTLES_IN);
    let ran = |pids: &[i32]| -> Result<f64> {
        pids.iter()
            .try_fold(0.0, |sum, pid| Ok(sum + accounting::ran(*pid)?))
    };
    let (ran_before, since) = (ran(&pids)?, Instant::now());
    let end = since + Duration::from_secs(target.seconds);
    while Instant::now() < end {
        interrupt::check()?;
        thread::sleep(Duration::from_millis(20));
    }
    let idle_share = (ran(&pids)? - ran_before) / since.elapsed().as_secs_f64();
    let after = memories(&pids)?;
    pinning::on(End::Client, || {
        open.iter_mut().try_for_each(|connection| {
            interrupt::check()?;
            connection.ask().context("a connection that stood idle")
        })
    })??;

    let mut measured = Measured {
        work: f64::from(connections),
        ..Measured::default()
    };
    // On one node, its proxy has both sides of each connection.
    let sides = f64::from(connections) * 2.0 / pids.len() as f64;
    let names = ["client_side", "server_side"];
    let names = if pids.len() == 1 {
        &["side"]
    } else {
        &names[..]
    };
    for ((name, before), after) in names.iter().zip(before).zip(after) {
        let per_side = |of: fn(Memory) -> u64| (of(after) as f64 - of(before) as f64) / sides;
        let rss = per_side(|memory| memory.rss_kib);
        measured.extra.insert(format!("{name}_rss_kib"), rss);
        let pss = per_side(|memory| memory.pss_kib);
        measured.extra.insert(format!("{name}_pss_kib"), pss);
        measured.value += rss / pids.len() as f64;
    }
    measured
        .extra
        .insert("idle_cpu_ms_per_s".to_owned(), idle_share * 1e3);
    Ok(measured)
}

/// The proxies that have the connections: of the client's node and of the server's.
fn proxies(target: &Target<'_>) -> Result<Vec<i32>> {
    let mut pids = target.stage.proxy_pids()?;
    if target.path == Path::SameNode {
        pids.truncate(1);
    }
    if pids.is_empty() {
        bail!("there are no proxies whose memory could be measured");
    }
    Ok(pids)
}

fn memories(pids: &[i32]) -> Result<Vec<Memory>> {
    pids.iter()
        .map(|pid| Ok(accounting::memory(*pid)?))
        .collect()
}

/// A connection on which requests are made now and then.
pub struct Waiting {
    stream: TcpStream,
    request: Vec<u8>,
}

impl Waiting {
    /// Opens one and makes a request on it.
    pub fn open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, LIMIT)
            .with_context(|| format!("connect to {address}"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(LIMIT))?;
        let request = format!("GET / HTTP/1.1\r\nHost: {address}\r\n\r\n");
        let mut connection = Self {
            stream,
            request: request.into_bytes(),
        };
        connection.ask()?;
        Ok(connection)
    }

    /// Makes a request and waits for the whole answer.
    pub fn ask(&mut self) -> Result<()> {
        self.stream
            .write_all(&self.request)
            .context("send a request")?;
        let (mut answer, mut chunk) = (Vec::new(), [0; 1024]);
        // The server's body is one line of x.
        while !answer.ends_with(b"x\n") {
            match self.stream.read(&mut chunk).context("wait for an answer")? {
                0 => bail!("the connection ended"),
                read => answer.extend_from_slice(&chunk[..read]),
            }
        }
        if !answer.starts_with(b"HTTP/1.1 200 ") {
            bail!("an answer that is none");
        }
        Ok(())
    }
}
