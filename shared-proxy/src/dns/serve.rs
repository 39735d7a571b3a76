//! Serving the queries of one scope.

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Weak};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use rand::seq::SliceRandom;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::lookup::{Client, find};
use super::message::{Incoming, LARGEST_TCP, Question, Transport, read};
use super::{DnsConfig, DnsMetrics, upstream};
use crate::capture::{Captured, ClientAddr, LocalWorkload, OrigDstAddr, Role};
use crate::core::Attachment;
use crate::drain::Signal;

/// Largest query that is read from a datagram. Queries have a name of 255 bytes at most and some options.
const LARGEST_QUERY: usize = 4096;
/// How long a TCP connection may stay without a query (RFC 7766 leaves it to the server, "in the order of a few seconds").
const IDLE: Duration = Duration::from_secs(10);
/// Datagrams that are read in one go before other tasks have their turn.
const BATCH: usize = 32;
/// Pause after an error of the socket itself: reading at once would fail again.
const PAUSE: Duration = Duration::from_millis(50);

/// What the queries of one scope share.
#[derive(Clone)]
pub(crate) struct Server {
    attachment: Attachment,
    config: Arc<DnsConfig>,
    metrics: DnsMetrics,
    waiting: Arc<Semaphore>,
    connections: Arc<Semaphore>,
}

/// What to do about a message.
enum Reply {
    /// Answered from what the mesh knows, or with an error.
    Now(Vec<u8>),
    /// To be asked of a resolver. The flag: the mesh has this name.
    Ask(Box<Question>, bool),
    /// Not answered.
    Nothing,
}

impl Server {
    pub(crate) fn new(attachment: Attachment, config: Arc<DnsConfig>, metrics: DnsMetrics) -> Self {
        Self {
            attachment,
            waiting: Arc::new(Semaphore::new(config.waiting)),
            connections: Arc::new(Semaphore::new(config.connections)),
            config,
            metrics,
        }
    }

    fn capture_mode(&self) -> &'static str {
        self.attachment.scope.id().capture_mode
    }

    fn owner(&self, client: SocketAddr, local: SocketAddr) -> Option<LocalWorkload> {
        let owner = self
            .attachment
            .scope
            .owner(Role::Dns, ClientAddr(client), OrigDstAddr(local));
        owner
            .inspect_err(|refusal| tracing::debug!(%client, %refusal, "DNS query refused"))
            .ok()
    }

    /// Looks a message up.
    fn answer(&self, bytes: &[u8], transport: Transport, pod: &LocalWorkload) -> Reply {
        let question = match read(bytes, transport) {
            Incoming::Question(question) => question,
            Incoming::Refuse(error) => return Reply::Now(error),
            Incoming::Ignore => return Reply::Nothing,
        };
        self.metrics.asked(self.capture_mode());
        let Some(name) = question.hostname() else {
            return Reply::Ask(question, false);
        };
        let core = &self.attachment.core;
        let client = Client {
            namespace: &pod.namespace,
            network: &core.config.network,
        };
        let snapshot = core.store.load();
        let Some(known) = find(&snapshot, &self.config, client, &name) else {
            return Reply::Ask(question, false);
        };
        let Some(family) = question.family() else {
            return Reply::Ask(question, true);
        };
        let mut addresses = known.addresses(&snapshot, &self.config, client, family);
        // Clients take the first one.
        addresses.shuffle(&mut rand::rng());
        tracing::trace!(%name, pod = %pod.name, kind = question.record_type(), ?addresses, "DNS query answered");
        Reply::Now(question.addresses(&addresses, known.alias_of.as_deref()))
    }

    /// Asks the resolvers. Too many questions at a time are not queued: the client asks again by itself.
    async fn ask(
        &self,
        question: &Question,
        query: &[u8],
        exists: bool,
        pod: SocketAddr,
        transport: Transport,
    ) -> Vec<u8> {
        let Ok(_permit) = self.waiting.try_acquire() else {
            tracing::debug!(%pod, "DNS query refused: too many wait for an answer");
            return question.error(ResponseCode::ServFail);
        };
        let (mode, start) = (self.capture_mode(), Instant::now());
        self.metrics.passed_on(mode);
        let scope = &*self.attachment.scope;
        let answer = upstream::ask(scope, &self.config, pod.ip(), question, query, transport).await;
        self.metrics
            .came_back(mode, start.elapsed().as_secs_f64(), answer.is_ok());
        match answer {
            Ok(answer) => question.pass_on(answer, exists),
            Err(error) => {
                tracing::debug!(%pod, %error, "DNS query not answered");
                question.error(ResponseCode::ServFail)
            }
        }
    }
}

/// Answers datagrams until told to drain, and closes the socket then.
pub(crate) async fn udp(server: Server, socket: UdpSocket, signal: Signal) {
    let Ok(local) = socket.local_addr() else {
        return;
    };
    let socket = Arc::new(socket);
    loop {
        tokio::select! {
            biased;
            () = signal.draining() => return,
            _ = socket.readable() => {}
        }
        for _ in 0..BATCH {
            match receive(&socket) {
                Ok((query, client)) => {
                    serve_datagram(&server, &socket, query, client, local, &signal)
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::debug!(%error, "receiving a DNS query failed");
                    tokio::time::sleep(PAUSE).await;
                    break;
                }
            }
        }
    }
}

/// Reads one datagram. The buffer is on the stack here, so that an idle scope holds none.
fn receive(socket: &UdpSocket) -> io::Result<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; LARGEST_QUERY];
    let (length, client) = socket.try_recv_from(&mut buffer)?;
    Ok((buffer[..length].to_vec(), client))
}

fn serve_datagram(
    server: &Server,
    socket: &Arc<UdpSocket>,
    query: Vec<u8>,
    client: SocketAddr,
    local: SocketAddr,
    signal: &Signal,
) {
    let Some(pod) = server.owner(client, local) else {
        return;
    };
    match server.answer(&query, Transport::Udp, &pod) {
        // A full socket buffer loses the answer, as the network may.
        Reply::Now(answer) => {
            let _ = socket.try_send_to(&answer, client);
        }
        Reply::Ask(question, exists) => {
            // A draining scope's socket closes at once; it must not be held by whoever waits for a resolver.
            let (server, socket): (_, Weak<UdpSocket>) = (server.clone(), Arc::downgrade(socket));
            let signal = signal.clone();
            tokio::spawn(async move {
                let asking = server.ask(&question, &query, exists, client, Transport::Udp);
                let answer = tokio::select! {
                    biased;
                    () = signal.draining() => return,
                    answer = asking => answer,
                };
                if let Some(socket) = socket.upgrade() {
                    let _ = socket.try_send_to(&answer, client);
                }
            });
        }
        Reply::Nothing => {}
    }
}

/// Answers the queries of one TCP connection, one after the other, until the client closes it or is silent.
pub(crate) async fn tcp(server: Server, captured: Captured, signal: Signal) {
    let Ok(_permit) = Arc::clone(&server.connections).try_acquire_owned() else {
        return;
    };
    let client = captured.client.0;
    let mut stream = captured.stream;
    let Ok(local) = stream.local_addr() else {
        return;
    };
    let Some(pod) = server.owner(client, local) else {
        return;
    };
    loop {
        let query = tokio::select! {
            biased;
            () = signal.draining() => return,
            query = timeout(IDLE, receive_framed(&mut stream)) => query,
        };
        let Ok(Ok(Some(query))) = query else {
            return;
        };
        let answer = match server.answer(&query, Transport::Tcp, &pod) {
            Reply::Now(answer) => answer,
            Reply::Ask(question, exists) => {
                let asking = server.ask(&question, &query, exists, client, Transport::Tcp);
                tokio::select! {
                    biased;
                    () = signal.cut() => return,
                    answer = asking => answer,
                }
            }
            Reply::Nothing => return,
        };
        let sent = timeout(IDLE, send_framed(&mut stream, &answer)).await;
        if !matches!(sent, Ok(Ok(()))) {
            return;
        }
    }
}

/// One query behind its length; none when the client has closed.
async fn receive_framed(stream: &mut TcpStream) -> io::Result<Option<Vec<u8>>> {
    let length = match stream.read_u16().await {
        Ok(length) => usize::from(length),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut query = vec![0; length];
    stream.read_exact(&mut query).await?;
    Ok(Some(query))
}

async fn send_framed(stream: &mut TcpStream, answer: &[u8]) -> io::Result<()> {
    let length = u16::try_from(answer.len()).unwrap_or(LARGEST_TCP);
    let mut framed = Vec::with_capacity(answer.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(&answer[..usize::from(length)]);
    stream.write_all(&framed).await
}
