//! The asking side of a load: connections that stand, and connections that come and go.

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::{JoinHandle, spawn_local};
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::super::now_us;
use super::super::pattern::Pattern;
use super::{Broken, Connection, Engine, Hello, Kind, Peer, Phase, Record, micros};
use crate::traffic::Saw;

/// Ports that are tried for a connection.
const TRIES: usize = 200;
/// Long-lived connections that are being opened at a time: what stands is the point, not how fast it came.
const OPENING: usize = 16;
/// Connections of one process that may be under way before it makes no more.
const UNDER_WAY: usize = 4000;
/// A process that is later than this for a new connection leaves it out.
const LATE: Duration = Duration::from_secs(1);

/// An error of a connection, in a word and a sentence.
type Failed = (Saw, String);

/// Opens all long-lived connections and waits until each stands or has failed.
pub(super) async fn open_all(engine: &Rc<Engine>) -> Vec<JoinHandle<()>> {
    let mut wanted = Vec::new();
    for peer in &engine.plan.peers {
        wanted.extend((0..peer.busy).map(|_| (peer.clone(), Kind::Busy)));
        wanted.extend((0..peer.idle).map(|_| (peer.clone(), Kind::Idle)));
    }
    let total = wanted.len();
    let (opened, mut stands) = tokio::sync::mpsc::unbounded_channel();
    let mut tasks = Vec::new();
    let mut open = 0;
    for (number, (peer, kind)) in wanted.into_iter().enumerate() {
        if number >= OPENING && stands.recv().await.is_some() {
            open += 1;
        }
        let opened = opened.clone();
        let told = move || {
            // Nobody waits any more where the process ends.
            let _ = opened.send(());
        };
        tasks.push(spawn_local(stand(
            Rc::clone(engine),
            peer,
            kind,
            number,
            total,
            told,
        )));
    }
    while open < total && stands.recv().await.is_some() {
        open += 1;
    }
    tasks
}

/// Begins with new connections.
pub(super) fn begin_new(engine: &Rc<Engine>) -> Vec<JoinHandle<()>> {
    let peers = engine
        .plan
        .peers
        .iter()
        .filter(|peer| peer.per_second > 0.0);
    peers
        .map(|peer| spawn_local(come_and_go(Rc::clone(engine), peer.clone())))
        .collect()
}

/// A long-lived connection from its beginning to its end. `told` is called once it stands, or has failed.
async fn stand(
    engine: Rc<Engine>,
    peer: Peer,
    kind: Kind,
    number: usize,
    of: usize,
    told: impl FnOnce(),
) {
    let size = engine.plan.message_bytes;
    let mut conversation = Conversation::new(&engine, &peer, kind, size);
    let begun = conversation.open().await;
    told();
    let ended = match begun {
        Ok(stream) => {
            // Spread over the time between two messages, so that they do not all talk at once.
            let every = Duration::from_micros(engine.plan.every_us);
            let phase = every.mul_f64(number as f64 / of.max(1) as f64);
            conversation.talk(stream, every, phase).await
        }
        Err(failed) => Err(failed),
    };
    conversation.end(ended);
}

/// New connections to a peer, at their times whatever becomes of those before them.
async fn come_and_go(engine: Rc<Engine>, peer: Peer) {
    let between = Duration::from_secs_f64(1.0 / peer.per_second);
    let mut phase = engine.phase.subscribe();
    let mut due = Instant::now() + between.mul_f64(rand::random::<f64>());
    let mut tasks: tokio::task::JoinSet<()> = tokio::task::JoinSet::new();
    let mut late = 0;
    loop {
        tokio::select! {
            _ = phase.wait_for(|phase| *phase == Phase::Finishing) => break,
            () = sleep_until(due) => {}
        }
        while tasks.try_join_next().is_some() {}
        if due.elapsed() > LATE || tasks.len() >= UNDER_WAY {
            late += 1;
        } else {
            tasks.spawn_local(visit(Rc::clone(&engine), peer.clone()));
        }
        due += between;
    }
    while tasks.join_next().await.is_some() {}
    if late > 0 {
        engine.note(&Record::Late { connections: late });
    }
}

/// A new connection: one message, one answer.
async fn visit(engine: Rc<Engine>, peer: Peer) {
    let size = engine.plan.new_bytes;
    let mut conversation = Conversation::new(&engine, &peer, Kind::New, size);
    let ended = match conversation.open().await {
        Ok(stream) => conversation.close(stream).await,
        Err(failed) => Err(failed),
    };
    conversation.end(ended);
}

/// A connection with what is to be recorded of it.
struct Conversation<'a> {
    engine: &'a Rc<Engine>,
    to: SocketAddr,
    hello: Hello,
    position: u64,
    buffer: Vec<u8>,
    seen: Connection,
}

impl<'a> Conversation<'a> {
    fn new(engine: &'a Rc<Engine>, peer: &Peer, kind: Kind, message_bytes: u32) -> Self {
        let id = engine.id();
        Self {
            engine,
            to: peer.to,
            hello: Hello { id, message_bytes },
            position: 0,
            buffer: vec![0; message_bytes as usize],
            seen: Connection {
                id,
                kind,
                from: engine.plan.pod.clone(),
                to: peer.pod.clone(),
                local: None,
                begun_us: now_us(),
                ended_us: 0,
                took_us: None,
                messages: 0,
                worst_us: 0,
                broken: None,
            },
        }
    }

    /// Connects and exchanges the first message.
    async fn open(&mut self) -> Result<TcpStream, Failed> {
        let begun = Instant::now();
        let mut stream = self.connect().await?;
        let hello = self.hello.bytes();
        within(self.engine, "say hello", stream.write_all(&hello)).await?;
        self.exchange(&mut stream).await?;
        self.seen.took_us = Some(micros(begun.elapsed()));
        Ok(stream)
    }

    async fn connect(&mut self) -> Result<TcpStream, Failed> {
        let mut last = (Saw::Other, "no port is free".to_owned());
        for _ in 0..TRIES {
            let local: SocketAddr = (Ipv4Addr::UNSPECIFIED, self.engine.port()).into();
            // Known by its port also when it comes to nothing.
            self.seen.local = Some(local);
            let begin = || -> io::Result<TcpSocket> {
                let socket = TcpSocket::new_v4()?;
                socket.set_reuseaddr(true)?;
                socket.set_nodelay(true)?;
                socket.bind(local)?;
                Ok(socket)
            };
            let error = match begin() {
                Ok(socket) => {
                    match timeout(self.engine.patience(), socket.connect(self.to)).await {
                        Ok(Ok(stream)) => {
                            self.seen.local = stream.local_addr().ok();
                            return Ok(stream);
                        }
                        Ok(Err(error)) => error,
                        Err(_) => return Err(silent(self.engine, "connect")),
                    }
                }
                Err(error) => error,
            };
            last = (Saw::of(&error), format!("connect: {error}"));
            // Taken by a connection that has not quite ended.
            if !matches!(
                error.kind(),
                io::ErrorKind::AddrInUse | io::ErrorKind::AddrNotAvailable
            ) {
                break;
            }
        }
        Err(last)
    }

    /// Says a message and compares its answer.
    async fn exchange(&mut self, stream: &mut TcpStream) -> Result<(), Failed> {
        let begun = Instant::now();
        let (up, down) = (Pattern::up(self.hello.id), Pattern::down(self.hello.id));
        up.fill(self.position, &mut self.buffer);
        within(self.engine, "send", stream.write_all(&self.buffer)).await?;
        within(self.engine, "receive", stream.read_exact(&mut self.buffer)).await?;
        if let Some(at) = down.first_wrong(self.position, &self.buffer) {
            return Err((Saw::WrongData, format!("heard a wrong byte at {at}")));
        }
        self.position += self.buffer.len() as u64;
        let took = begun.elapsed();
        self.seen.messages += 1;
        self.seen.worst_us = self.seen.worst_us.max(micros(took));
        if self.seen.kind != Kind::New {
            self.engine.answered(took);
        }
        Ok(())
    }

    /// Talks until the end: a message from time to time, or none, and one more when all ends.
    async fn talk(
        &mut self,
        mut stream: TcpStream,
        every: Duration,
        first: Duration,
    ) -> Result<(), Failed> {
        let mut phase = self.engine.phase.subscribe();
        let busy = self.seen.kind == Kind::Busy;
        let mut wait = first;
        loop {
            let next = async {
                if busy {
                    sleep(wait).await;
                } else {
                    std::future::pending().await
                }
            };
            let mut unasked = [0];
            tokio::select! {
                _ = phase.wait_for(|phase| *phase == Phase::Finishing) => break,
                () = next => {}
                // Nobody speaks without being asked: it has ended, and an idle one shows it when it happens.
                read = stream.read(&mut unasked) => return Err(match read {
                    Ok(0) => (Saw::Eof, "ended by the other end".to_owned()),
                    Ok(_) => (Saw::WrongData, "heard a byte that nothing asked for".to_owned()),
                    Err(error) => (Saw::of(&error), format!("between two messages: {error}")),
                }),
            }
            let begun = Instant::now();
            self.exchange(&mut stream).await?;
            wait = every.saturating_sub(begun.elapsed());
        }
        self.exchange(&mut stream).await?;
        self.close(stream).await
    }

    /// Ends the connection and waits until the server has, too.
    async fn close(&mut self, mut stream: TcpStream) -> Result<(), Failed> {
        within(self.engine, "end", stream.shutdown()).await?;
        let mut byte = [0];
        match within(self.engine, "wait for the end", stream.read(&mut byte)).await? {
            0 => Ok(()),
            _ => Err((Saw::WrongData, "a byte behind the last one".to_owned())),
        }
    }

    fn end(mut self, ended: Result<(), Failed>) {
        self.seen.ended_us = now_us();
        self.seen.broken = ended.err().map(|(saw, what)| Broken {
            at_us: self.seen.ended_us,
            saw,
            what,
        });
        self.engine.note(&Record::Connection(self.seen));
    }
}

/// Something that the other end has to do in time.
async fn within<T>(
    engine: &Engine,
    what: &str,
    done: impl Future<Output = io::Result<T>>,
) -> Result<T, Failed> {
    match timeout(engine.patience(), done).await {
        Ok(done) => done.map_err(|error| (Saw::of(&error), format!("{what}: {error}"))),
        Err(_) => Err(silent(engine, what)),
    }
}

fn silent(engine: &Engine, what: &str) -> Failed {
    (
        Saw::Timeout,
        format!("{what}: nothing within {:?}", engine.patience()),
    )
}
