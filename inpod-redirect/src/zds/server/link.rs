//! One proxy's connection: Hello, namespace, hook, snapshot, then queued requests.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use host_net::netns::Netns;
use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_seqpacket::UnixSeqpacket;
use tracing::{info, warn};

use super::{
    Command, Connection, ConnectionId, ProxyConnected, ProxyEvent, ProxyHook, Registered, Shared,
    ZdsError,
};
use crate::zds::messages::{
    AddWorkload, CaptureMode, ConfigureNode, DelWorkload, GetNetns, GetState, HoldWorkload,
    KeepWorkload, ReleaseWorkload, Request, Response, SnapshotSent, WorkloadRequest,
    WorkloadResponse, ZdsHello, encode_addresses,
};
use crate::zds::transport::{Transport, TransportError};
use crate::zds::{Add, Delays, Mode, NodeConfiguration, REQUEST_TIMEOUT, Release};

/// The hook programs the kernel; it is not given for ever because pods wait for it.
const HOOK_TIMEOUT: Duration = Duration::from_secs(30);

/// Why a connection is given up.
#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("no {0} within {REQUEST_TIMEOUT:?}")]
    Timeout(&'static str),
    #[error("unexpected packet: {0}")]
    Unexpected(&'static str),
    #[error("the proxy's namespace: {0}")]
    Netns(std::io::Error),
    #[error("preparing the node for the proxy: {0}")]
    Hook(String),
    #[error("the proxy refused the node configuration: {0}")]
    Configuration(String),
}

/// Serves one proxy until its connection ends.
pub(super) async fn serve<H: ProxyHook>(
    id: ConnectionId,
    socket: UnixSeqpacket,
    shared: Arc<Shared>,
    hook: Arc<H>,
    events: mpsc::UnboundedSender<ProxyEvent>,
) {
    let mut link = Link {
        id,
        transport: Transport::new(socket),
        extension: false,
        version: 0,
    };
    match link.hello().await {
        Ok(version) => (link.extension, link.version) = (version > 0, version),
        Err(error) => {
            warn!(connection = id, %error, "proxy did not say hello");
            return;
        }
    }
    let (queue, commands) = mpsc::unbounded_channel();
    shared.state().connections.push(Connection {
        id,
        extension: link.extension,
        version: link.version,
        queue,
    });
    // Also when the task is aborted.
    let _registration = Registration {
        id,
        shared: Arc::clone(&shared),
        events: events.clone(),
    };
    let Err(error) = link.run(&shared, hook.as_ref(), &events, commands).await;
    match error {
        LinkError::Transport(TransportError::Closed) => {
            info!(connection = id, "proxy disconnected");
        }
        error => warn!(connection = id, %error, "connection to the proxy closed"),
    }
}

struct Registration {
    id: ConnectionId,
    shared: Arc<Shared>,
    events: mpsc::UnboundedSender<ProxyEvent>,
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.shared
            .state()
            .connections
            .retain(|connection| connection.id != self.id);
        let _ = self.events.send(ProxyEvent::Disconnected { id: self.id });
    }
}

struct Link {
    id: ConnectionId,
    transport: Transport,
    extension: bool,
    /// Of the extension; 0 without it.
    version: u32,
}

enum Never {}

impl Link {
    async fn hello(&mut self) -> Result<u32, LinkError> {
        let packet = timeout(REQUEST_TIMEOUT, self.transport.receive())
            .await
            .map_err(|_| LinkError::Timeout("hello"))??;
        if !packet.fds.is_empty() {
            return Err(LinkError::Unexpected("a hello with file descriptors"));
        }
        let hello: ZdsHello = packet.parse()?;
        Ok(hello.extension_version)
    }

    async fn run<H: ProxyHook>(
        &mut self,
        shared: &Shared,
        hook: &H,
        events: &mpsc::UnboundedSender<ProxyEvent>,
        mut commands: mpsc::UnboundedReceiver<Command>,
    ) -> Result<Never, LinkError> {
        let proxy_netns = match self.extension {
            true => Some(self.proxy_netns().await?),
            false => None,
        };
        let proxy = ProxyConnected {
            id: self.id,
            extension: self.extension,
            proxy_netns,
        };
        let _ = events.send(ProxyEvent::Connected(proxy.clone()));
        let configuration = timeout(HOOK_TIMEOUT, hook.on_proxy(&proxy))
            .await
            .unwrap_or_else(|_| Err(format!("not done within {HOOK_TIMEOUT:?}")))
            .map_err(LinkError::Hook)?;
        if let (true, Some(configuration)) = (self.extension, configuration) {
            self.configure(configuration).await?;
        }
        self.snapshot(shared).await?;
        timeout(HOOK_TIMEOUT, hook.on_snapshot(&proxy))
            .await
            .unwrap_or_else(|_| Err(format!("not done within {HOOK_TIMEOUT:?}")))
            .map_err(LinkError::Hook)?;
        let _ = events.send(ProxyEvent::SnapshotSent { id: self.id });
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.execute(command).await?,
                    // The registration in `shared` holds the sender as long as this runs.
                    None => return Err(TransportError::Closed.into()),
                },
                // Nothing is outstanding, so the proxy has nothing to say: this sees its end at once.
                packet = self.transport.receive() => {
                    packet?;
                    return Err(LinkError::Unexpected("nothing was asked"));
                }
            }
        }
    }

    async fn proxy_netns(&mut self) -> Result<Netns, LinkError> {
        self.transport.allow_extended_packets();
        let (response, mut fds) = self.request(Request::GetNetns(GetNetns {}), None).await?;
        match (response, fds.pop(), fds.is_empty()) {
            (Response::Netns(_), Some(fd), true) => Netns::from_fd(fd).map_err(LinkError::Netns),
            (Response::Ack(ack), None, _) => {
                Err(LinkError::Netns(std::io::Error::other(ack.error)))
            }
            _ => Err(LinkError::Unexpected(
                "the answer to get_netns has not exactly one file descriptor",
            )),
        }
    }

    async fn configure(&mut self, configuration: NodeConfiguration) -> Result<(), LinkError> {
        let request = Request::ConfigureNode(ConfigureNode {
            flow: configuration.flow,
            same_node: configuration.same_node,
            node_addresses: encode_addresses(&configuration.node_addresses),
        });
        self.acknowledged(request, None)
            .await?
            .map_err(LinkError::Configuration)
    }

    async fn snapshot(&mut self, shared: &Shared) -> Result<(), LinkError> {
        let pods: Vec<_> = shared
            .state()
            .registry
            .iter()
            .map(|(uid, pod)| (Arc::clone(uid), pod.clone()))
            .collect();
        let count = pods.len();
        for (uid, pod) in pods {
            let answer = match pod {
                Registered::Ready(add) if add.mode == Mode::Node && !self.extension => {
                    warn!(connection = self.id, pod = %uid, "not announced: this proxy cannot serve node-captured pods");
                    continue;
                }
                Registered::Ready(add) => self.add(&add).await?,
                Registered::Expected => {
                    let keep = Request::Keep(KeepWorkload {
                        uid: uid.to_string(),
                    });
                    self.acknowledged(keep, None).await?
                }
            };
            if let Err(reason) = answer {
                warn!(connection = self.id, pod = %uid, %reason, "the proxy refused a pod of the snapshot");
            }
        }
        if let Err(reason) = self
            .acknowledged(Request::SnapshotSent(SnapshotSent {}), None)
            .await?
        {
            warn!(connection = self.id, %reason, "the proxy refused the snapshot");
        }
        info!(connection = self.id, pods = count, "snapshot sent");
        Ok(())
    }

    /// Executes one queued request; an error ends the connection, and is told to the one who asked.
    async fn execute(&mut self, command: Command) -> Result<(), LinkError> {
        match command {
            Command::Add(add, reply) => {
                let answer = self.add(&add).await;
                let _ = reply.send(told(&add.uid, &answer));
                answer.map(|_| ())
            }
            Command::Del(uid, drain, reply) => {
                let request = Request::Del(DelWorkload {
                    uid: uid.to_string(),
                    drain_millis: self.extension.then(|| millis(drain)),
                });
                let answer = self.acknowledged(request, None).await;
                let _ = reply.send(told(&uid, &answer));
                answer.map(|_| ())
            }
            Command::Hold(uid, within, reply) => {
                let request = Request::Hold(HoldWorkload {
                    uid: uid.to_string(),
                    within_millis: millis(within),
                });
                let answer = self.acknowledged(request, None).await;
                let _ = reply.send(told(&uid, &answer));
                answer.map(|_| ())
            }
            Command::Release(uid, release, reply) => {
                let (stays, drain) = match release {
                    Release::Stays => (true, Duration::ZERO),
                    Release::Changes { drain } => (false, drain),
                };
                let request = Request::Release(ReleaseWorkload {
                    uid: uid.to_string(),
                    stays,
                    drain_millis: millis(drain),
                });
                let answer = self.answered(request, None).await;
                let _ = reply.send(told(&uid, &answer));
                answer.map(|_| ())
            }
            Command::State(reply) => {
                let answer = self.request(Request::GetState(GetState {}), None).await;
                let answer = match answer {
                    Ok((Response::State(state), fds)) if fds.is_empty() => Ok(state.workloads),
                    Ok(_) => Err(LinkError::Unexpected("not the answer to get_state")),
                    Err(error) => Err(error),
                };
                let (told, end) = match answer {
                    Ok(workloads) => (Ok(workloads), Ok(())),
                    Err(error) => (Err(lost("state query", &error)), Err(error)),
                };
                let _ = reply.send(told);
                end
            }
        }
    }

    async fn add(&mut self, add: &Add) -> Result<Result<(), String>, LinkError> {
        let request = Request::Add(AddWorkload {
            uid: add.uid.to_string(),
            workload_info: Some(add.info.clone()),
            capture_mode: match self.extension {
                true => CaptureMode::from(add.mode).into(),
                false => CaptureMode::Unspecified.into(),
            },
            addresses: match self.extension {
                true => encode_addresses(&add.addresses),
                false => Vec::new(),
            },
            guests: self.extension && add.guests,
        });
        let fd = add.netns.as_ref().map(Netns::as_fd);
        self.acknowledged(request, fd).await
    }

    async fn acknowledged(
        &mut self,
        request: Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Result<(), String>, LinkError> {
        let answer = self.answered(request, fd).await?;
        Ok(answer.map(drop))
    }

    /// As [`Link::acknowledged`], with what else the acknowledgement says.
    async fn answered(
        &mut self,
        request: Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<Result<Delays, String>, LinkError> {
        match self.request(request, fd).await? {
            (Response::Ack(ack), fds) if fds.is_empty() => Ok(match ack.error {
                error if error.is_empty() => Ok(ack.delays.unwrap_or_default().into()),
                error => Err(error),
            }),
            _ => Err(LinkError::Unexpected("not an ack")),
        }
    }

    /// One request and its answer. A late answer would be taken for the next one's, so a timeout ends the connection.
    async fn request(
        &mut self,
        request: Request,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(Response, Vec<OwnedFd>), LinkError> {
        let exchange = async {
            self.transport
                .send(
                    &WorkloadRequest::from(request),
                    fd.as_ref().map(AsFd::as_fd),
                )
                .await?;
            let packet = self.transport.receive().await?;
            let response: WorkloadResponse = packet.parse()?;
            let payload = response
                .payload
                .ok_or(LinkError::Unexpected("an empty response"))?;
            Ok((payload, packet.fds))
        };
        timeout(REQUEST_TIMEOUT, exchange)
            .await
            .map_err(|_| LinkError::Timeout("answer"))?
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn told<T: Clone>(
    uid: &Arc<str>,
    answer: &Result<Result<T, String>, LinkError>,
) -> Result<T, ZdsError> {
    match answer {
        Ok(Ok(said)) => Ok(said.clone()),
        Ok(Err(reason)) => Err(ZdsError::Rejected {
            uid: Arc::clone(uid),
            reason: reason.clone(),
        }),
        Err(error) => Err(lost(uid, error)),
    }
}

fn lost(what: &str, error: &LinkError) -> ZdsError {
    ZdsError::Lost {
        what: what.to_owned(),
        reason: error.to_string(),
    }
}
