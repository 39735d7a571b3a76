//! The proxy's end: connects, follows the agent's requests, and goes on serving whatever the agent does.
//!
//! `workloads` is the state machine (what runs, what waits, what the snapshot named); here are the connection, its
//! requests, and the rule that a broken or misbehaving agent costs a reconnect, never the data plane.

mod workloads;

use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::Netns;
use tokio::time::{Instant, MissedTickBehavior, interval_at, timeout};
use tokio_seqpacket::UnixSeqpacket;
use tracing::{debug, info, warn};

use super::messages::{
    Ack, EXTENSION_VERSION, NetnsReply, Request, Response, Version, WorkloadRequest,
    WorkloadResponse, ZdsHello, decode_addresses,
};
use super::transport::{Transport, TransportError};
use super::{Add, Delays, NodeConfiguration, REQUEST_TIMEOUT, Release};
use workloads::Workloads;

/// First pause before connecting again; doubled up to [`RECONNECT_MAX`].
const RECONNECT_MIN: Duration = Duration::from_millis(10);
/// Longest pause before connecting again.
const RECONNECT_MAX: Duration = Duration::from_secs(15);
/// How often a workload that could not be started is tried again.
const RETRY_PENDING: Duration = Duration::from_secs(5);

/// Of a proxy that serves each pod by one capture for its whole life.
const CANNOT_SWITCH: &str = "this proxy cannot change the capture of a pod";

/// What the proxy does about workloads. Called by one task, one call at a time.
pub trait WorkloadHandler: Send + Sync + 'static {
    /// Starts serving a pod; returns when every listener accepts (in-pod) or the pod is known (node). The error is sent
    /// to the agent and the pod is tried again every five seconds. Never called for a pod that runs: it is stopped first
    /// by [`WorkloadHandler::del`].
    fn add(&self, add: Add) -> impl Future<Output = Result<(), String>> + Send;

    /// Stops taking connections for a pod and returns; its connections go on for up to `drain` in the background. (The
    /// agent waits for this call, five seconds at most.)
    fn del(&self, uid: &str, drain: Duration) -> impl Future<Output = ()> + Send;

    /// Begins nothing for a pod that runs, until it is released or `within` is over; returns when nothing is being begun.
    /// The default cannot.
    fn hold(&self, uid: &str, within: Duration) -> impl Future<Output = Result<(), String>> + Send {
        let _ = (uid, within);
        async { Err(CANNOT_SWITCH.to_owned()) }
    }

    /// Serves a held pod by another capture, too: returns when that could take its connections.
    fn prepare(&self, add: Add) -> impl Future<Output = Result<(), String>> + Send {
        let _ = add;
        async { Err(CANNOT_SWITCH.to_owned()) }
    }

    /// Ends a hold, and says what waited for that. A pod that nobody holds any more is settled all the same, if it has
    /// two captures.
    fn release(&self, uid: &str, release: Release) -> impl Future<Output = Delays> + Send {
        let _ = (uid, release);
        async { Delays::default() }
    }

    /// The agent wants this pod kept if it runs; it is not started.
    fn keep(&self, uid: &str) -> impl Future<Output = ()> + Send {
        let _ = uid;
        async {}
    }

    /// The proxy serves all that the agent wants: the snapshot is complete and no pod is pending. Called again after
    /// every connection, and after every time that a pod was pending.
    fn snapshot_sent(&self) -> impl Future<Output = ()> + Send;

    /// Sets up, or changes, the scope of node-captured pods. Called before any of them is added.
    fn configure_node(
        &self,
        configuration: NodeConfiguration,
    ) -> impl Future<Output = Result<(), String>> + Send;

    /// How many pods wait for another attempt to start them, told after every change.
    fn pending(&self, pods: usize) {
        let _ = pods;
    }

    /// Open connections of a pod, for the agent's state query.
    fn connections(&self, uid: &str) -> u64;

    /// The agent is gone: everything goes on, but the proxy is not ready until the next [`WorkloadHandler::snapshot_sent`].
    fn disconnected(&self);
}

/// How to reach the agent.
#[derive(Debug, Clone)]
pub struct ClientOptions {
    /// The agent's socket.
    pub path: PathBuf,
    /// Whether to offer the extension.
    pub extension: bool,
    /// The proxy's own namespace, handed to an agent that accepts the extension.
    pub own_netns: Netns,
    /// How long a deleted pod's connections may go on when the agent does not say.
    pub default_drain: Duration,
}

/// Follows the agent until `shutdown` is ready, connecting again whenever the connection ends.
pub async fn run<H: WorkloadHandler>(
    options: ClientOptions,
    handler: Arc<H>,
    shutdown: impl Future<Output = ()>,
) {
    let mut client = Client {
        workloads: Workloads::new(handler, options.default_drain),
        options,
    };
    tokio::select! {
        () = shutdown => {}
        () = client.follow() => {}
    }
}

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum ClientError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("connecting to {path}: {source}")]
    Connect {
        path: String,
        source: std::io::Error,
    },
    #[error("the agent did not take a packet within {REQUEST_TIMEOUT:?}")]
    Stuck,
    #[error("protocol error: {0}")]
    Protocol(String),
}

struct Client<H> {
    options: ClientOptions,
    workloads: Workloads<H>,
}

/// What to answer to one request.
enum Answer {
    Ack(Result<(), String>),
    Released(Result<Delays, String>),
    Response(Response),
    OwnNetns,
}

impl<H: WorkloadHandler> Client<H> {
    async fn follow(&mut self) {
        let mut pause = RECONNECT_MIN;
        loop {
            let (error, reached_snapshot) = self.connection().await;
            if reached_snapshot {
                pause = RECONNECT_MIN;
            }
            match &error {
                // An agent that is not there yet is not worth a line for every attempt.
                ClientError::Connect { .. } if pause > RECONNECT_MIN && pause < RECONNECT_MAX => {
                    debug!(%error, "no agent");
                }
                error => warn!(%error, "no connection to the agent; what is served goes on"),
            }
            let again = Instant::now() + pause;
            pause = (pause * 2).min(RECONNECT_MAX);
            loop {
                let next = (Instant::now() + RETRY_PENDING).min(again);
                tokio::time::sleep_until(next).await;
                if next == again {
                    break;
                }
                self.workloads.retry_pending().await;
            }
        }
    }

    /// One connection, from connect to its end; and whether it came to the end of a snapshot.
    async fn connection(&mut self) -> (ClientError, bool) {
        let socket = match UnixSeqpacket::connect(&self.options.path).await {
            Ok(socket) => socket,
            Err(source) => {
                let path = self.options.path.display().to_string();
                return (ClientError::Connect { path, source }, false);
            }
        };
        info!("handling new stream");
        self.workloads.connected();
        let Err(error) = self.serve(Transport::new(socket)).await;
        (error, self.workloads.disconnected())
    }

    async fn serve(
        &mut self,
        mut transport: Transport,
    ) -> Result<std::convert::Infallible, ClientError> {
        let hello = ZdsHello {
            version: Version::V1.into(),
            extension_version: match self.options.extension {
                true => EXTENSION_VERSION,
                false => 0,
            },
        };
        sent(transport.send(&hello, None)).await?;
        let mut retry = interval_at(Instant::now() + RETRY_PENDING, RETRY_PENDING);
        retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut extension = Extension::Undecided;
        loop {
            let packet = tokio::select! {
                packet = transport.receive() => packet,
                _ = retry.tick() => {
                    self.workloads.retry_pending().await;
                    continue;
                }
            };
            let answer = match packet {
                Ok(packet) => {
                    let request = packet.parse::<WorkloadRequest>();
                    match request.map(|request| request.payload) {
                        Ok(Some(request)) => {
                            extension = extension.after(&request, self.options.extension);
                            if extension == Extension::Agreed {
                                transport.allow_extended_packets();
                            }
                            self.answer(request, packet.fds, extension).await
                        }
                        Ok(None) => Err(ClientError::Protocol("unknown request".to_owned())),
                        Err(error) => Err(error.into()),
                    }
                }
                Err(error) => Err(error.into()),
            };
            match answer {
                Ok(Answer::Ack(result)) => {
                    let ack = WorkloadResponse::ack(result.err().unwrap_or_default());
                    sent(transport.send(&ack, None)).await?;
                }
                Ok(Answer::Released(result)) => {
                    let delays = result.as_ref().ok().map(Into::into);
                    let error = result.err().unwrap_or_default();
                    let ack = WorkloadResponse::from(Response::Ack(Ack { error, delays }));
                    sent(transport.send(&ack, None)).await?;
                }
                Ok(Answer::Response(response)) => {
                    sent(transport.send(&WorkloadResponse::from(response), None)).await?;
                }
                Ok(Answer::OwnNetns) => {
                    let reply = WorkloadResponse::from(Response::Netns(NetnsReply {}));
                    let fd = self.options.own_netns.as_fd();
                    sent(transport.send(&reply, Some(fd))).await?;
                }
                Err(ClientError::Transport(
                    error @ (TransportError::Closed | TransportError::Io(_)),
                )) => return Err(error.into()),
                Err(error) => {
                    // Tell the agent why, if it still listens.
                    let nack = WorkloadResponse::ack(error.to_string());
                    let _ = sent(transport.send(&nack, None)).await;
                    return Err(error);
                }
            }
        }
    }

    /// Follows one request. An error is a violation of the protocol and ends the connection.
    async fn answer(
        &mut self,
        request: Request,
        mut fds: Vec<std::os::fd::OwnedFd>,
        extension: Extension,
    ) -> Result<Answer, ClientError> {
        let violation = |text: &str| Err(ClientError::Protocol(text.to_owned()));
        let wanted = match &request {
            Request::Add(add) => usize::from(!workloads::is_node(add)),
            _ => 0,
        };
        if fds.len() != wanted {
            return violation(&format!(
                "{} file descriptors where {wanted} belong",
                fds.len()
            ));
        }
        let is_extension = matches!(
            request,
            Request::GetNetns(_)
                | Request::ConfigureNode(_)
                | Request::GetState(_)
                | Request::Hold(_)
                | Request::Release(_)
        ) || matches!(&request, Request::Add(add) if workloads::is_node(add));
        if is_extension && extension != Extension::Agreed {
            return violation("a request of the extension, which was not agreed on");
        }
        match request {
            Request::Add(add) => Ok(Answer::Ack(self.workloads.add(add, fds.pop()).await)),
            Request::Keep(keep) => match self.workloads.keep(keep.uid).await {
                true => Ok(Answer::Ack(Ok(()))),
                false => violation("keep after the snapshot"),
            },
            Request::Del(del) => {
                let drain = del.drain_millis.map(Duration::from_millis);
                self.workloads.del(&del.uid, drain).await;
                Ok(Answer::Ack(Ok(())))
            }
            Request::SnapshotSent(_) => match self.workloads.snapshot_sent().await {
                true => Ok(Answer::Ack(Ok(()))),
                false => violation("a second snapshot end"),
            },
            Request::GetNetns(_) => Ok(Answer::OwnNetns),
            Request::ConfigureNode(configure) => {
                let node_addresses = match decode_addresses(&configure.node_addresses) {
                    Ok(addresses) => addresses,
                    Err(length) => {
                        return violation(&format!("a node address of {length} bytes"));
                    }
                };
                let configuration = NodeConfiguration {
                    flow: configure.flow,
                    same_node: configure.same_node,
                    node_addresses,
                };
                Ok(Answer::Ack(self.workloads.configure(configuration).await))
            }
            Request::Hold(hold) => {
                let within = Duration::from_millis(hold.within_millis);
                Ok(Answer::Ack(self.workloads.hold(&hold.uid, within).await))
            }
            Request::Release(release) => {
                let how = match release.stays {
                    true => Release::Stays,
                    false => Release::Changes {
                        drain: Duration::from_millis(release.drain_millis),
                    },
                };
                let released = self.workloads.release(&release.uid, how).await;
                Ok(Answer::Released(released))
            }
            Request::GetState(_) => Ok(Answer::Response(Response::State(self.workloads.state()))),
        }
    }
}

/// Whether both ends speak the extension: the agent says so by its first request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Extension {
    Undecided,
    Agreed,
    Plain,
}

impl Extension {
    fn after(self, request: &Request, offered: bool) -> Self {
        match (self, request) {
            (Extension::Undecided, Request::GetNetns(_)) if offered => Extension::Agreed,
            (Extension::Undecided, _) => Extension::Plain,
            (decided, _) => decided,
        }
    }
}

async fn sent(
    sending: impl Future<Output = Result<(), TransportError>>,
) -> Result<(), ClientError> {
    timeout(REQUEST_TIMEOUT, sending)
        .await
        .map_err(|_| ClientError::Stuck)?
        .map_err(Into::into)
}
