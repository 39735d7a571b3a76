//! The agent's end: accepts proxies, sends each the snapshot of all pods, then live changes, in strict lockstep.
//!
//! Every proxy has one task (`link`) that owns its connection; [`ZdsHandle`] puts requests into the tasks' queues. The
//! registry of pods is shared: what is registered is in the next snapshot, also a pod whose live Add failed, so that a
//! reconnect heals it.

mod link;
mod switching;

use std::collections::BTreeMap;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use host_net::netns::Netns;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio_seqpacket::UnixSeqpacketListener;
use tracing::{info, warn};

use super::{Add, Delays, Mode, NodeConfiguration, Release, WorkloadState};

/// At most five proxies are accepted in a second.
const ACCEPT_INTERVAL: Duration = Duration::from_millis(200);

/// Why the agent's end could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum ZdsError {
    /// The socket could not be made.
    #[error("ZDS socket {path}: {source}")]
    Bind {
        /// The socket's path.
        path: PathBuf,
        /// What failed.
        source: io::Error,
    },
    /// Something that is not a socket stands at the path.
    #[error(
        "ZDS socket {0}: a file that is not a socket stands there; remove it or choose another path"
    )]
    NotASocket(PathBuf),
    /// No proxy is connected.
    #[error("pod {uid}: no proxy is connected; it will be told about the pod when it connects")]
    NoProxy {
        /// Pod UID.
        uid: Arc<str>,
    },
    /// The proxy cannot serve node-captured pods.
    #[error(
        "pod {uid}: the connected proxy does not speak the extension that node capture needs; use ambidex's proxy or capture the pod in-pod"
    )]
    NoExtension {
        /// Pod UID.
        uid: Arc<str>,
    },
    /// The proxy cannot hold pods.
    #[error(
        "pod {uid}: the connected proxy cannot change a pod's capture; it is older than this agent: upgrade it first"
    )]
    NoHold {
        /// Pod UID.
        uid: Arc<str>,
    },
    /// In-pod capture without a namespace.
    #[error("pod {uid}: in-pod capture needs the pod's network namespace")]
    MissingNetns {
        /// Pod UID.
        uid: Arc<str>,
    },
    /// The proxy answered with an error.
    #[error("pod {uid}: the proxy refused: {reason}")]
    Rejected {
        /// Pod UID.
        uid: Arc<str>,
        /// The proxy's words.
        reason: String,
    },
    /// The connection broke, or the proxy did not answer in time, before the request was acknowledged.
    #[error("{what}: connection to the proxy lost before it answered: {reason}")]
    Lost {
        /// What was asked.
        what: String,
        /// Why the connection was given up.
        reason: String,
    },
    /// No connected proxy can report its state.
    #[error("no connected proxy speaks the extension that state queries need")]
    NoState,
}

/// Number of a connection, counted from 1 since the server was bound. A higher number is a later connection.
pub type ConnectionId = u64;

/// A proxy that said Hello.
#[derive(Debug, Clone)]
pub struct ProxyConnected {
    /// Number of the connection.
    pub id: ConnectionId,
    /// Whether the proxy speaks our extension.
    pub extension: bool,
    /// The proxy's own network namespace, if it speaks the extension.
    pub proxy_netns: Option<Netns>,
}

/// What happens to connections, for the agent's log and readiness.
#[derive(Debug, Clone)]
pub enum ProxyEvent {
    /// A proxy said Hello; it has not been told about any pod.
    Connected(ProxyConnected),
    /// It acknowledged the snapshot.
    SnapshotSent {
        /// Number of the connection.
        id: ConnectionId,
    },
    /// Its connection is gone. What it serves it goes on serving.
    Disconnected {
        /// Number of the connection.
        id: ConnectionId,
    },
}

/// The agent's work between a proxy's Hello and the first pod.
pub trait ProxyHook: Send + Sync + 'static {
    /// Says how this proxy is to capture on the node. Pods are announced only after it returns. The configuration is sent to a proxy
    /// that speaks the extension; `None` means that this node captures no pods on the node. An error closes the
    /// connection (the proxy connects again). Must not wait for [`ZdsHandle::add`] or [`ZdsHandle::del`]: they wait for
    /// it.
    fn on_proxy(
        &self,
        proxy: &ProxyConnected,
    ) -> impl Future<Output = Result<Option<NodeConfiguration>, String>> + Send;

    /// The proxy has its listeners and has acknowledged every pod of the snapshot: what leads traffic to it can be made.
    /// An error closes the connection. As [`ProxyHook::on_proxy`], it must not wait for pods.
    fn on_snapshot(
        &self,
        proxy: &ProxyConnected,
    ) -> impl Future<Output = Result<(), String>> + Send;
}

/// A pod in the registry.
#[derive(Debug, Clone)]
enum Registered {
    /// It can be announced.
    Ready(Arc<Add>),
    /// It is wanted, but its namespace is not at hand.
    Expected,
}

/// What a connection's task is asked to do.
#[derive(Debug)]
enum Command {
    Add(Arc<Add>, oneshot::Sender<Result<(), ZdsError>>),
    Del(Arc<str>, Duration, oneshot::Sender<Result<(), ZdsError>>),
    Hold(Arc<str>, Duration, oneshot::Sender<Result<(), ZdsError>>),
    Release(Arc<str>, Release, oneshot::Sender<Result<Delays, ZdsError>>),
    State(oneshot::Sender<Result<Vec<WorkloadState>, ZdsError>>),
}

#[derive(Debug)]
struct Connection {
    id: ConnectionId,
    extension: bool,
    /// Of the extension; 0 without it.
    version: u32,
    // Unbounded: every sender waits for the answer to its request, so callers bound it.
    queue: mpsc::UnboundedSender<Command>,
}

impl Connection {
    /// False if the connection is gone.
    fn tell(&self, command: Command) -> bool {
        self.queue.send(command).is_ok()
    }
}

/// How long proxies may take that are not the one that is being connected.
const OTHERS_ANSWER_WITHIN: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
struct State {
    registry: BTreeMap<Arc<str>, Registered>,
    /// In the order of connecting; the last is the latest.
    connections: Vec<Connection>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The listening end. See [`ZdsServer::run`].
#[derive(Debug)]
pub struct ZdsServer {
    listener: UnixSeqpacketListener,
    path: PathBuf,
    inode: u64,
    shared: Arc<Shared>,
}

impl ZdsServer {
    /// Makes the socket: creates its directory, removes a socket that an earlier agent left, allows only the owner.
    pub fn bind(path: impl AsRef<Path>) -> Result<Self, ZdsError> {
        let path = path.as_ref();
        let failed = |source| ZdsError::Bind {
            path: path.to_path_buf(),
            source,
        };
        if let Some(directory) = path.parent() {
            std::fs::create_dir_all(directory).map_err(failed)?;
        }
        match std::fs::symlink_metadata(path) {
            Ok(found) if found.file_type().is_socket() => {
                std::fs::remove_file(path).map_err(failed)?;
            }
            Ok(_) => return Err(ZdsError::NotASocket(path.to_path_buf())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let listener = UnixSeqpacketListener::bind(path).map_err(failed)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
        let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
        Ok(Self {
            listener,
            path: path.to_path_buf(),
            inode,
            shared: Arc::default(),
        })
    }

    /// The handle through which pods are announced. Pods may be registered before [`ZdsServer::run`].
    pub fn handle(&self) -> ZdsHandle {
        ZdsHandle {
            shared: Arc::clone(&self.shared),
        }
    }

    /// Accepts and serves proxies until the future is dropped, which closes all connections.
    pub async fn run<H: ProxyHook>(
        mut self,
        hook: Arc<H>,
        events: mpsc::UnboundedSender<ProxyEvent>,
    ) {
        let mut tasks = JoinSet::new();
        let mut next_id: ConnectionId = 1;
        loop {
            while tasks.try_join_next().is_some() {}
            let socket = match self.listener.accept().await {
                Ok(socket) => socket,
                Err(error) => {
                    warn!(%error, "accepting a proxy failed");
                    tokio::time::sleep(ACCEPT_INTERVAL).await;
                    continue;
                }
            };
            match socket.peer_cred() {
                Ok(peer) if peer.uid() == 0 => {
                    let id = next_id;
                    next_id += 1;
                    info!(connection = id, "proxy connected");
                    let shared = Arc::clone(&self.shared);
                    tasks.spawn(link::serve(
                        id,
                        socket,
                        shared,
                        Arc::clone(&hook),
                        events.clone(),
                    ));
                }
                Ok(peer) => warn!(uid = peer.uid(), "refused a ZDS peer that is not root"),
                Err(error) => {
                    warn!(%error, "refused a ZDS peer whose credentials cannot be read")
                }
            }
            tokio::time::sleep(ACCEPT_INTERVAL).await;
        }
    }
}

impl Drop for ZdsServer {
    fn drop(&mut self) {
        // A successor may have put its own socket at this path.
        let ours = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|found| found.file_type().is_socket() && found.ino() == self.inode);
        if ours && let Err(error) = std::fs::remove_file(&self.path) {
            warn!(path = %self.path.display(), %error, "ZDS socket not removed");
        }
    }
}

/// Announces pods to the connected proxies. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ZdsHandle {
    shared: Arc<Shared>,
}

impl ZdsHandle {
    /// Registers the pod and announces it to the latest connection; returns when the proxy acknowledged, that is, when
    /// it serves the pod. The pod stays registered on any error but [`ZdsError::MissingNetns`]: the proxy hears of it
    /// with the next snapshot.
    pub async fn add(&self, add: Add) -> Result<(), ZdsError> {
        let uid = Arc::clone(&add.uid);
        let answer = {
            let mut state = self.shared.state();
            let add = Arc::new(checked(add)?);
            state
                .registry
                .insert(Arc::clone(&uid), Registered::Ready(Arc::clone(&add)));
            let Some(latest) = state.connections.last() else {
                return Err(ZdsError::NoProxy { uid });
            };
            if add.mode == Mode::Node && !latest.extension {
                return Err(ZdsError::NoExtension { uid });
            }
            let (reply, answer) = oneshot::channel();
            // A failure drops `reply`, which the receiver reports.
            let _ = latest.queue.send(Command::Add(add, reply));
            answer
        };
        answer.await.unwrap_or_else(|_| Err(lost(&uid)))
    }

    /// Registers a pod without announcing it: for pods that are known before any proxy connects.
    pub fn register(&self, add: Add) -> Result<(), ZdsError> {
        let add = Arc::new(checked(add)?);
        let uid = Arc::clone(&add.uid);
        self.shared
            .state()
            .registry
            .insert(uid, Registered::Ready(add));
        Ok(())
    }

    /// Registers a pod whose namespace is not at hand: the next snapshot tells the proxy to keep it if it runs.
    pub fn expect(&self, uid: &str) {
        self.shared
            .state()
            .registry
            .entry(Arc::from(uid))
            .or_insert(Registered::Expected);
    }

    /// Unregisters the pod and tells every connection; returns when all acknowledged that they take no connections for
    /// it any more. `drain` is how long its connections may go on (understood with the extension only). The first error
    /// is returned; a pod that was never announced is no error.
    pub async fn del(&self, uid: &str, drain: Duration) -> Result<(), ZdsError> {
        let uid: Arc<str> = Arc::from(uid);
        let answers: Vec<_> = {
            let mut state = self.shared.state();
            state.registry.remove(&uid);
            state
                .connections
                .iter()
                .map(|connection| {
                    let (reply, answer) = oneshot::channel();
                    let _ = connection
                        .queue
                        .send(Command::Del(Arc::clone(&uid), drain, reply));
                    answer
                })
                .collect()
        };
        let mut result = Ok(());
        for answer in answers {
            let one = answer.await.unwrap_or_else(|_| Err(lost(&uid)));
            if result.is_ok() {
                result = one;
            } else if let Err(error) = one {
                warn!(%error, "another proxy failed to stop a pod");
            }
        }
        result
    }

    /// Announces the node-captured pods to one connection, which is to serve them again.
    pub async fn announce_node_pods(&self, id: ConnectionId) {
        let announce = |connection: &Connection, add: &Arc<Add>, reply| {
            connection.id == id && connection.tell(Command::Add(Arc::clone(add), reply))
        };
        self.tell_of_node_pods(announce).await;
    }

    /// Tells every connection but one that the node-captured pods are not its own any more: it cuts their connections, so
    /// that their ends learn of it while there is still a way to them.
    pub async fn take_node_pods_from_others(&self, id: ConnectionId) {
        let take = |connection: &Connection, add: &Arc<Add>, reply| {
            let del = Command::Del(Arc::clone(&add.uid), Duration::ZERO, reply);
            connection.id != id && connection.extension && connection.tell(del)
        };
        self.tell_of_node_pods(take).await;
    }

    /// Queues a request for each connection and each node-captured pod, and waits for the answers: not for ever, because a
    /// proxy that hangs must not keep the others from serving.
    async fn tell_of_node_pods(
        &self,
        tell: impl Fn(&Connection, &Arc<Add>, oneshot::Sender<Result<(), ZdsError>>) -> bool,
    ) {
        let answers: Vec<_> = {
            let state = self.shared.state();
            let pods = state.registry.values().filter_map(|pod| match pod {
                Registered::Ready(add) if add.mode == Mode::Node => Some(add),
                _ => None,
            });
            pods.flat_map(|add| state.connections.iter().map(move |it| (it, add)))
                .filter_map(|(connection, add)| {
                    let (reply, answer) = oneshot::channel();
                    tell(connection, add, reply).then_some(answer)
                })
                .collect()
        };
        let all = async {
            for answer in answers {
                // A connection that was lost serves nobody, or will be told everything again.
                let _ = answer.await;
            }
        };
        if tokio::time::timeout(OTHERS_ANSWER_WITHIN, all)
            .await
            .is_err()
        {
            warn!("a proxy does not answer; it is not waited for");
        }
    }

    /// What the latest connection that speaks the extension serves.
    pub async fn state(&self) -> Result<Vec<WorkloadState>, ZdsError> {
        let answer = {
            let state = self.shared.state();
            let latest = state
                .connections
                .iter()
                .rfind(|connection| connection.extension)
                .ok_or(ZdsError::NoState)?;
            let (reply, answer) = oneshot::channel();
            let _ = latest.queue.send(Command::State(reply));
            answer
        };
        answer.await.unwrap_or_else(|_| Err(lost("state query")))
    }

    /// Whether a proxy is connected.
    pub fn has_proxy(&self) -> bool {
        !self.shared.state().connections.is_empty()
    }
}

fn checked(mut add: Add) -> Result<Add, ZdsError> {
    match add.mode {
        Mode::Inpod if add.netns.is_none() => Err(ZdsError::MissingNetns { uid: add.uid }),
        Mode::Inpod => Ok(add),
        Mode::Node => {
            add.netns = None;
            Ok(add)
        }
    }
}

fn lost(what: &str) -> ZdsError {
    ZdsError::Lost {
        what: what.to_owned(),
        reason: "the connection was closed".to_owned(),
    }
}
