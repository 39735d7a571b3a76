//! Traffic that carries a marker, between pods, all the time: what sees it on a node's uplink has seen a pod's bytes in the
//! clear.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use host_net::netns::Netns;

use super::wire::Tap;
use super::{Stage, eventually};

/// What every message consists of.
pub const MARKER: &str = "marked-and-never-in-the-clear-0123456789";
/// HBONE.
const TUNNEL_PORT: u16 = 15008;
/// Where the applications listen.
const PORT: u16 = 8093;
/// How long a step of a connection that is opened for one message may take.
const STEP: Duration = Duration::from_millis(1500);
/// How long an answer in a connection that stays open may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Time between two messages.
const EVERY: Duration = Duration::from_millis(20);

/// What has become of the messages of one way.
#[derive(Default)]
struct Count {
    ok: AtomicU64,
    failed: AtomicU64,
}

/// Messages between two pods in both directions, in connections of their own and in one that stays open, while the uplinks
/// of both nodes are listened to.
pub struct Marked {
    ends: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
    /// Messages in connections of their own, by way.
    own: Vec<Arc<Count>>,
    /// Messages in the connections that stay open.
    open: Vec<Arc<Count>>,
    taps: Vec<Tap>,
}

impl Marked {
    /// Begins, and waits until messages come through in both directions.
    pub fn between(scene: &Stage, one: &str, other: &str) -> Self {
        let taps = ["node1", "node2"].map(|node| scene.tap(node, "eth0", ""));
        let mut marked = Self {
            ends: Arc::default(),
            threads: Vec::new(),
            own: Vec::new(),
            open: Vec::new(),
            taps: taps.into(),
        };
        for pod in [one, other] {
            marked.serve(&scene.lab.netns(pod).unwrap());
        }
        for (from, to) in [(one, other), (other, one)] {
            let netns = scene.lab.netns(from).unwrap();
            marked.speak(netns, (scene.ip(to), PORT).into());
        }
        marked.flows("at the beginning");
        marked
    }

    /// Waits until messages come through again in both directions, and in both kinds of connections.
    pub fn flows(&self, when: &str) {
        let counts = || self.own.iter().chain(&self.open);
        let before: Vec<u64> = counts().map(|count| count.ok()).collect();
        eventually(
            &format!("messages come through {when}"),
            Duration::from_secs(60),
            || {
                counts()
                    .zip(&before)
                    .all(|(count, before)| count.ok() > before + 3)
            },
        );
    }

    /// Messages in connections of their own that failed so far.
    pub fn failed(&self) -> u64 {
        self.own
            .iter()
            .map(|count| count.failed.load(Ordering::Relaxed))
            .sum()
    }

    /// Messages in connections of their own that came through so far.
    pub fn succeeded(&self) -> u64 {
        self.own.iter().map(|count| count.ok()).sum()
    }

    /// Ends, and fails if the marker was on a wire, or any byte beside the tunnels.
    pub fn assert_never_in_the_clear(mut self) {
        self.stop();
        for tap in std::mem::take(&mut self.taps) {
            let wire = tap.finish();
            assert!(!wire.capture.streams.is_empty(), "{}: silent", wire.label);
            for (flow, stream) in &wire.capture.streams {
                assert!(
                    [flow.from.port(), flow.to.port()].contains(&TUNNEL_PORT),
                    "{}: {} bytes beside the tunnels from {} to {}",
                    wire.label,
                    stream.len(),
                    flow.from,
                    flow.to
                );
            }
            let packets = std::fs::read(&wire.file).unwrap();
            let needle = MARKER.as_bytes();
            assert!(
                !packets.windows(needle.len()).any(|bytes| bytes == needle),
                "{}: the marker in the clear",
                wire.label
            );
        }
    }

    fn stop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let ended = thread.join();
            if !std::thread::panicking() {
                ended.expect("an application ends by itself");
            }
        }
    }

    fn serve(&mut self, netns: &Netns) {
        #[allow(
            clippy::disallowed_methods,
            reason = "an application of a test, no part of the proxy"
        )]
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)));
        let listener = listener.unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let ends = Arc::clone(&self.ends);
        self.threads.push(std::thread::spawn(move || {
            let mut clients = Vec::new();
            while !ends.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        let ends = Arc::clone(&ends);
                        clients.push(std::thread::spawn(move || echo(stream, &ends)));
                    }
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
                clients.retain(|client| !client.is_finished());
            }
            clients.into_iter().for_each(|client| drop(client.join()));
        }));
    }

    fn speak(&mut self, netns: Netns, to: SocketAddr) {
        let (own, open) = (Arc::new(Count::default()), Arc::new(Count::default()));
        self.own.push(Arc::clone(&own));
        self.open.push(Arc::clone(&open));
        let (ends, place) = (Arc::clone(&self.ends), netns.clone());
        self.threads.push(std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let said = connect(&place, to).and_then(|mut stream| message(&mut stream, STEP));
                own.note(said.is_ok());
                std::thread::sleep(EVERY);
            }
        }));
        let ends = Arc::clone(&self.ends);
        self.threads.push(std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let Ok(mut stream) = connect(&netns, to) else {
                    open.note(false);
                    std::thread::sleep(EVERY);
                    continue;
                };
                while !ends.load(Ordering::Relaxed) {
                    let said = message(&mut stream, PATIENCE);
                    open.note(said.is_ok());
                    if said.is_err() {
                        break;
                    }
                    std::thread::sleep(EVERY);
                }
            }
        }));
    }
}

impl Drop for Marked {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Count {
    fn ok(&self) -> u64 {
        self.ok.load(Ordering::Relaxed)
    }

    fn note(&self, ok: bool) {
        let counter = if ok { &self.ok } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

fn connect(netns: &Netns, to: SocketAddr) -> io::Result<TcpStream> {
    #[allow(
        clippy::disallowed_methods,
        reason = "an application of a test, no part of the proxy"
    )]
    let stream = netns.run(|| TcpStream::connect_timeout(&to, STEP))??;
    stream.set_nodelay(true)?;
    Ok(stream)
}

fn message(stream: &mut TcpStream, limit: Duration) -> io::Result<()> {
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(MARKER.as_bytes())?;
    let mut answer = [0; MARKER.len()];
    stream.read_exact(&mut answer)?;
    if answer == *MARKER.as_bytes() {
        Ok(())
    } else {
        Err(io::Error::other("another message"))
    }
}

fn echo(mut stream: TcpStream, ends: &AtomicBool) {
    let short = Some(Duration::from_millis(200));
    if stream.set_nonblocking(false).is_err() || stream.set_read_timeout(short).is_err() {
        return;
    }
    let mut idle = Instant::now();
    let mut buffer = [0; 4096];
    while !ends.load(Ordering::Relaxed) && idle.elapsed() < Duration::from_secs(60) {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if stream.write_all(&buffer[..count]).is_err() {
                    return;
                }
                idle = Instant::now();
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => return,
        }
    }
}
