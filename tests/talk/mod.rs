//! Long-lived connections whose every byte is compared, and what their users saw of them.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lab::standing::Lab;

/// Where the applications listen.
pub const PORT: u16 = 8097;
/// Far over what an answer takes, on whatever machine: a connection that is silent for so long is broken.
pub const PATIENCE: Duration = Duration::from_secs(40);
/// Bytes of a message.
const MESSAGE: usize = 3000;

/// An application that says back what it hears, on every connection.
pub struct Echo {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Echo {
    pub fn start(lab: &Lab, target: &str) -> Self {
        let netns = lab.netns(target).unwrap();
        let listener = netns.run(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT)));
        let listener = listener.unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let ends = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&ends);
        let thread = std::thread::spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => drop(std::thread::spawn(move || say_back(stream))),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn say_back(mut stream: TcpStream) {
    stream.set_nonblocking(false).unwrap();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer) {
        if stream.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}

/// A connection, and what its user saw of it.
pub struct Talk {
    what: String,
    stream: TcpStream,
    ends: Arc<AtomicBool>,
    messages: Arc<AtomicU64>,
    /// How many messages an idle one is to have sent.
    pub wanted: Arc<AtomicU64>,
    broken: Arc<Mutex<Option<String>>>,
    thread: Option<JoinHandle<()>>,
}

impl Talk {
    /// Opens a connection and sends a message. An idle one speaks again when it is asked to, others all the time.
    pub fn open(lab: &Lab, from: &str, to: SocketAddr, idle: bool) -> Self {
        let what = format!("{} from {from} to {to}", if idle { "idle" } else { "busy" });
        let netns = lab.netns(from).unwrap();
        let stream = netns.run(|| TcpStream::connect_timeout(&to, PATIENCE));
        let mut stream = stream.unwrap().unwrap_or_else(|e| panic!("{what}: {e}"));
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        message(&mut stream, 0).unwrap_or_else(|e| panic!("{what}: {e}"));
        let mut talk = Self {
            what,
            stream: stream.try_clone().unwrap(),
            ends: Arc::default(),
            messages: Arc::new(AtomicU64::new(1)),
            wanted: Arc::new(AtomicU64::new(1)),
            broken: Arc::default(),
            thread: None,
        };
        let (ends, messages, wanted, broken) = (
            Arc::clone(&talk.ends),
            Arc::clone(&talk.messages),
            Arc::clone(&talk.wanted),
            Arc::clone(&talk.broken),
        );
        talk.thread = Some(std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let sent = messages.load(Ordering::Relaxed);
                if idle && sent >= wanted.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
                if let Err(error) = message(&mut stream, sent) {
                    if !ends.load(Ordering::Relaxed) {
                        *broken.lock().unwrap() = Some(error.to_string());
                    }
                    return;
                }
                messages.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(25));
            }
        }));
        talk
    }

    /// Whether this is the address of its end.
    pub fn is(&self, at: SocketAddr) -> bool {
        self.stream.local_addr().is_ok_and(|local| local == at)
    }

    /// Has it say one more thing, if it is idle.
    pub fn speak(&self) {
        let next = self.messages.load(Ordering::Relaxed) + 1;
        self.wanted.fetch_max(next, Ordering::Relaxed);
    }

    pub fn broken(&self) -> Option<String> {
        let broken = self.broken.lock().unwrap();
        broken
            .as_ref()
            .map(|error| format!("{}: {error}", self.what))
    }
}

impl Drop for Talk {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        let _ = self.stream.shutdown(Shutdown::Both);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Sends a message that no other one is like, and compares every byte of what comes back.
pub fn message(stream: &mut TcpStream, number: u64) -> std::io::Result<()> {
    let byte = |at: usize| (number.wrapping_mul(31) as usize).wrapping_add(at * 7) as u8;
    let sent: Vec<u8> = (0..MESSAGE).map(byte).collect();
    stream.write_all(&sent)?;
    let mut heard = vec![0; MESSAGE];
    stream.read_exact(&mut heard)?;
    if sent == heard {
        Ok(())
    } else {
        Err(std::io::Error::other("other bytes came back"))
    }
}

/// All of them say something after this moment, and hear it back.
#[track_caller]
pub fn assert_alive(when: &str, talks: &[Talk]) {
    let goals: Vec<u64> = talks
        .iter()
        .map(|talk| {
            let goal = talk.messages.load(Ordering::Relaxed) + 2;
            talk.wanted.store(goal, Ordering::Relaxed);
            goal
        })
        .collect();
    let limit = Instant::now() + PATIENCE;
    loop {
        let broken: Vec<String> = talks.iter().filter_map(Talk::broken).collect();
        assert!(
            broken.is_empty(),
            "{when}: {} broken: {broken:#?}",
            broken.len()
        );
        let silent: Vec<&str> = talks
            .iter()
            .zip(&goals)
            .filter(|(talk, goal)| talk.messages.load(Ordering::Relaxed) < **goal)
            .map(|(talk, _)| talk.what.as_str())
            .collect();
        if silent.is_empty() {
            return;
        }
        assert!(Instant::now() < limit, "{when}: silent: {silent:#?}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
