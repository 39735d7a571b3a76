//! Serving the queries of one scope.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use hickory_proto::op::ResponseCode;
use rand::seq::SliceRandom;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::Semaphore;
use tokio::time::{Instant, sleep, timeout};

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
/// Queries of one TCP connection that wait for a resolver at the same time. More are read when one of these is answered.
const PIPELINED: usize = 16;
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

    /// Whether a pod is one of the resolvers, or behind the address of one. Its questions come from resolving somebody's; to
    /// ask it again would never end.
    fn is_resolver(&self, pod: IpAddr) -> bool {
        let mut upstreams = self.config.upstreams.iter().map(SocketAddr::ip);
        let snapshot = self.attachment.core.store.load();
        upstreams.any(|resolver| {
            let service = snapshot.service_by_vip(resolver);
            resolver == pod
                || service.is_some_and(|service| {
                    let mut endpoints = snapshot.endpoints(&service).iter();
                    endpoints.any(|endpoint| endpoint.addresses.contains(&pod))
                })
        })
    }

    /// Asks the resolvers. Too many questions at a time are not queued: the client asks again by itself.
    async fn ask(
        &self,
        question: &Question,
        query: &[u8],
        exists: bool,
        (client, pod): (SocketAddr, &LocalWorkload),
        transport: Transport,
    ) -> Vec<u8> {
        if self.is_resolver(client.ip()) {
            tracing::warn!(pod = %client.ip(), "a resolver's own DNS queries are captured: it would be asked its own questions, so they are refused; leave it out of the capture of DNS");
            return question.error(ResponseCode::ServFail);
        }
        let Ok(_permit) = self.waiting.try_acquire() else {
            tracing::debug!(pod = %client, "DNS query refused: too many wait for an answer");
            return question.error(ResponseCode::ServFail);
        };
        let (mode, start) = (self.capture_mode(), Instant::now());
        self.metrics.passed_on(mode);
        let scope = &*self.attachment.scope;
        let mut speakers = vec![client.ip()];
        speakers.extend(pod.addresses.iter());
        let asking = upstream::ask(scope, &self.config, &speakers, question, query, transport);
        let answer = asking.await;
        self.metrics
            .came_back(mode, start.elapsed().as_secs_f64(), answer.is_ok());
        match answer {
            Ok(answer) => question.pass_on(answer, exists),
            Err(error) => {
                tracing::debug!(pod = %client, %error, "DNS query not answered");
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
                let who = (client, &pod);
                let asking = server.ask(&question, &query, exists, who, Transport::Udp);
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

/// Answers the queries of one TCP connection until the client closes it or is silent. A query need not wait for the answer
/// to the one before (RFC 7766): each is answered as soon as its answer is there.
pub(crate) async fn tcp(server: Server, captured: Captured, signal: Signal) {
    let Ok(_permit) = Arc::clone(&server.connections).try_acquire_owned() else {
        return;
    };
    let client = captured.client.0;
    let Ok(local) = captured.stream.local_addr() else {
        return;
    };
    let Some(pod) = server.owner(client, local) else {
        return;
    };
    let (reader, mut writer) = captured.stream.into_split();
    let mut asking = FuturesUnordered::new();
    // Kept over the turns of the loop, because a query that has been read in part cannot be read again.
    let mut receiving = Box::pin(receive_framed(reader));
    let mut open = true;
    while open || !asking.is_empty() {
        let idle = sleep(IDLE);
        let answer = tokio::select! {
            biased;
            () = signal.cut() => return,
            // Nothing more is read, what was asked is answered.
            () = signal.draining(), if open => {
                open = false;
                continue;
            }
            Some(answer) = asking.next() => answer,
            received = &mut receiving, if open && asking.len() < PIPELINED => {
                let Ok(Some((query, reader))) = received else {
                    open = false;
                    continue;
                };
                receiving.set(receive_framed(reader));
                match server.answer(&query, Transport::Tcp, &pod) {
                    Reply::Now(answer) => answer,
                    Reply::Ask(question, exists) => {
                        let (server, who) = (&server, (client, &pod));
                        asking.push(async move {
                            server.ask(&question, &query, exists, who, Transport::Tcp).await
                        });
                        continue;
                    }
                    Reply::Nothing => return,
                }
            }
            () = idle, if asking.is_empty() => return,
        };
        let sent = timeout(IDLE, send_framed(&mut writer, &answer)).await;
        if !matches!(sent, Ok(Ok(()))) {
            return;
        }
    }
}

/// One query behind its length, and where the next one comes from; none when the client has closed.
async fn receive_framed(mut reader: OwnedReadHalf) -> io::Result<Option<(Vec<u8>, OwnedReadHalf)>> {
    let length = match reader.read_u16().await {
        Ok(length) => usize::from(length),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut query = vec![0; length];
    reader.read_exact(&mut query).await?;
    Ok(Some((query, reader)))
}

async fn send_framed(stream: &mut OwnedWriteHalf, answer: &[u8]) -> io::Result<()> {
    let length = u16::try_from(answer.len()).unwrap_or(LARGEST_TCP);
    let mut framed = Vec::with_capacity(answer.len() + 2);
    framed.extend_from_slice(&length.to_be_bytes());
    framed.extend_from_slice(&answer[..usize::from(length)]);
    stream.write_all(&framed).await
}
