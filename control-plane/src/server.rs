//! A control plane: serves a mesh from YAML files, and certificates from the built-in CA.

mod catalogue;
mod certificates;
pub mod directory;
mod discovery;
mod subscription;

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::ServerConfig;
use rustls::version::TLS13;
use shared_proxy::identity::{ALPN_H2, LocalCa, LocalCaError, provider};
use shared_proxy::state::{Change, Snapshot};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tonic::Status;
use tonic::body::Body;
use tonic::metadata::{KeyAndValueRef, MetadataMap};
use tonic::server::Grpc;
use tonic_prost::ProstCodec;

pub use catalogue::Catalogue;
pub use directory::DirectoryError;

use crate::ads::DELTA_AGGREGATED_RESOURCES;
use crate::ca::CREATE_CERTIFICATE;

/// A client that does not finish its handshake within this is cut off.
const HANDSHAKE_WITHIN: Duration = Duration::from_secs(10);
/// A quiet connection is tested this often, and given up when the test is not answered.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(30);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections get this long to end when the server does.
const GRACE: Duration = Duration::from_secs(5);
/// The server's own certificate is replaced after this: well within the day for which it is valid.
const RENEW_AFTER: Duration = Duration::from_secs(3600);
/// Nobody asks for as many streams on one connection.
const MAX_STREAMS: u32 = 1000;

/// What a control plane is started with.
pub struct ControlPlaneOptions {
    /// Issues certificates, the server's own too.
    pub ca: LocalCa,
    /// Names and addresses under which clients reach the server.
    pub names: Vec<String>,
    /// File with the token that clients must prove to have; read for each call. None: everybody is served.
    pub token: Option<PathBuf>,
    /// Longest validity of a workload's certificate.
    pub longest_ttl: Duration,
}

/// A control plane. Clones are the same one.
#[derive(Clone)]
pub struct ControlPlane {
    shared: Arc<Shared>,
    names: Arc<[String]>,
    end: watch::Sender<bool>,
}

/// What every call needs.
pub(crate) struct Shared {
    ca: LocalCa,
    token: Option<PathBuf>,
    longest_ttl: Duration,
    catalogue: watch::Sender<Arc<Catalogue>>,
    publishing: Mutex<()>,
    ending: watch::Receiver<bool>,
}

/// Why the server cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Its certificate cannot be made.
    #[error("certificate of the control plane: {0}")]
    Certificate(#[from] LocalCaError),
    /// TLS refuses the certificate.
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
}

impl ControlPlane {
    /// A control plane of an empty mesh.
    pub fn new(options: ControlPlaneOptions) -> Self {
        let (end, ending) = watch::channel(false);
        Self {
            shared: Arc::new(Shared {
                ca: options.ca,
                token: options.token,
                longest_ttl: options.longest_ttl,
                catalogue: watch::Sender::new(Arc::new(Catalogue::default())),
                publishing: Mutex::default(),
                ending,
            }),
            names: options.names.into(),
            end,
        }
    }

    /// Puts another mesh in force; clients are sent what differs. Encoding a large mesh takes a while, but what it shares
    /// with the one before is only compared.
    pub fn publish(&self, mesh: Snapshot) {
        self.put(|catalogue| catalogue.replaced(mesh));
    }

    /// Puts a mesh in force that differs from the one in force by `changes`, and by nothing else: that costs what the
    /// changes cost.
    pub fn update(&self, mesh: Snapshot, changes: &[Change]) {
        self.put(|catalogue| catalogue.updated(mesh, changes));
    }

    fn put(&self, next: impl FnOnce(&Catalogue) -> Catalogue) {
        let catalogue = &self.shared.catalogue;
        // One after the other; those who read do not wait meanwhile.
        let _publishing = self.shared.publishing.lock();
        let current = Arc::clone(&catalogue.borrow());
        catalogue.send_replace(Arc::new(next(&current)));
    }

    /// The root of the CA, PEM: what clients need in order to trust this server.
    pub fn root_pem(&self) -> String {
        certificates::pem(self.shared.ca.root())
    }

    /// Ends all streams, and [`serve`](Self::serve).
    pub fn shut_down(&self) {
        self.end.send_replace(true);
    }

    /// Serves until [`shut_down`](Self::shut_down), then lets connections end for a few seconds.
    ///
    /// # Errors
    /// The server's own certificate cannot be made at the start. Later errors are logged.
    pub async fn serve(&self, listener: TcpListener) -> Result<(), ServeError> {
        let mut acceptor = self.acceptor()?;
        let mut made = Instant::now();
        let mut ending = self.shared.ending.clone();
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = ending.wait_for(|ending| *ending) => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => continue,
            };
            let (tcp, peer) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    // Out of descriptors, most likely: trying again at once would only make heat.
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            if made.elapsed() > RENEW_AFTER {
                match self.acceptor() {
                    Ok(renewed) => acceptor = renewed,
                    Err(error) => tracing::error!(%error, "the previous certificate stays in use"),
                }
                made = Instant::now();
            }
            let (acceptor, shared) = (acceptor.clone(), Arc::clone(&self.shared));
            connections.spawn(async move {
                if let Err(error) = serve_connection(tcp, acceptor, shared).await {
                    tracing::debug!(%peer, %error, "connection");
                }
            });
        }
        let all = async { while connections.join_next().await.is_some() {} };
        if tokio::time::timeout(GRACE, all).await.is_err() {
            tracing::info!("connections that did not end are cut");
        }
        Ok(())
    }

    fn acceptor(&self) -> Result<TlsAcceptor, ServeError> {
        let (certificate, key) = self.shared.ca.issue_server(&self.names)?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&TLS13])?
            .with_no_client_auth()
            .with_single_cert(vec![certificate], key)?;
        config.alpn_protocols = vec![ALPN_H2.to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

async fn serve_connection(
    tcp: TcpStream,
    acceptor: TlsAcceptor,
    shared: Arc<Shared>,
) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
    tcp.set_nodelay(true)?;
    let tls = tokio::time::timeout(HANDSHAKE_WITHIN, acceptor.accept(tcp)).await??;
    let mut ending = shared.ending.clone();
    let service = service_fn(|request| call(Arc::clone(&shared), request));
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .max_concurrent_streams(MAX_STREAMS)
        .serve_connection(TokioIo::new(tls), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        _ = ending.wait_for(|ending| *ending) => {}
    }
    connection.as_mut().graceful_shutdown();
    Ok(connection.await?)
}

async fn call(
    shared: Arc<Shared>,
    request: http::Request<Incoming>,
) -> Result<http::Response<Body>, Infallible> {
    Ok(match request.uri().path() {
        DELTA_AGGREGATED_RESOURCES => {
            Grpc::new(ProstCodec::default())
                .max_decoding_message_size(crate::transport::MAX_MESSAGE)
                .streaming(discovery::Discovery(shared), request)
                .await
        }
        CREATE_CERTIFICATE => {
            Grpc::new(ProstCodec::default())
                .unary(certificates::Certificates(shared), request)
                .await
        }
        path => Status::unimplemented(format!("there is no {path} here")).into_http(),
    })
}

impl Shared {
    /// Lets those pass who know the token, or everybody if there is none.
    fn authenticate(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let Some(path) = &self.token else {
            return Ok(());
        };
        let token = std::fs::read_to_string(path).map_err(|error: io::Error| {
            tracing::error!(path = %path.display(), %error, "the token cannot be read: nobody is served");
            Status::unavailable("the control plane cannot read its token")
        })?;
        let given = metadata
            .get("authorization")
            .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        let wanted = token.trim().as_bytes();
        match given {
            Some(given) if !wanted.is_empty() && same(given, wanted) => Ok(()),
            Some(_) => Err(Status::unauthenticated("the token is not the right one")),
            None => Err(Status::unauthenticated("a bearer token is needed")),
        }
    }
}

/// What accompanies a call, for the log: the token is nobody's business.
fn shown(metadata: &MetadataMap) -> Vec<(&str, &str)> {
    let headers = metadata.iter().filter_map(|entry| match entry {
        KeyAndValueRef::Ascii(key, value) => Some((key.as_str(), value.to_str().ok()?)),
        KeyAndValueRef::Binary(..) => None,
    });
    headers.filter(|(key, _)| *key != "authorization").collect()
}

/// Compares in a time that does not depend on where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |all, (a, b)| all | (a ^ b)) == 0
}
