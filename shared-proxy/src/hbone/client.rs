//! Opens tunnels, and streams in them.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::task::noop_waker_ref;
use h2::Reason;
use h2::client::SendRequest;
use http::{HeaderMap, Method, Request, StatusCode, Uri};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::timeout;

use super::HboneConfig;
use super::authority::Authority;
use super::liveness::until_dead;
use super::stream::HboneStream;
use crate::core::DialError;
use crate::identity::revocation::until_revoked;
use crate::identity::{
    ALPN_H2, CaError, Identity, PeerRole, PeerStanding, PeerWatch, WorkloadCertificate,
};
use crate::pool::Multiplexed;
use crate::telemetry::TunnelLeg;
use crate::tls_stream::TlsStream;

/// A handle to a standing tunnel. It closes when its last handle is dropped and its last stream has ended.
#[derive(Clone)]
pub struct Tunnel {
    requests: SendRequest<Bytes>,
    closed: Arc<AtomicBool>,
    standing: PeerStanding,
    tls_handshake: Duration,
    /// Our end and the peer's.
    ends: Option<(SocketAddr, SocketAddr)>,
}

/// Why there is no tunnel.
#[derive(Debug, thiserror::Error)]
pub enum TunnelError {
    /// We cannot prove who we are.
    #[error(transparent)]
    Certificate(#[from] CaError),
    /// The TCP connection failed.
    #[error(transparent)]
    Dial(#[from] DialError),
    /// The TLS handshake failed, or the peer is not who it should be.
    #[error("TLS with {0}: {1}")]
    Tls(SocketAddr, #[source] io::Error),
    /// The peer does not speak HTTP/2 on this port.
    #[error("{0} did not choose HTTP/2 (ALPN h2): it is no HBONE endpoint")]
    NotHttp2(SocketAddr),
    /// HTTP/2 failed to start.
    #[error("HTTP/2 with {0}: {1}")]
    Http2(SocketAddr, #[source] h2::Error),
    /// The handshake took too long.
    #[error("{0} did not finish the TLS and HTTP/2 handshake within {1:?}")]
    HandshakeTimedOut(SocketAddr, Duration),
}

/// Why there is no stream in a tunnel that stands.
#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    /// The peer did not look at the request: its connection is going away or takes no more streams. Another
    /// connection may do.
    #[error("the tunnel takes no more streams: {0}")]
    NotTaken(#[source] h2::Error),
    /// The tunnel broke before it answered.
    #[error("the tunnel broke before it answered: {0}")]
    Broken(#[source] h2::Error),
    /// The peer answered, but not with 200.
    #[error("the peer refused: {} ({})", .0, meaning(*.0))]
    Status(StatusCode),
    /// The peer did not answer.
    #[error("the peer did not answer the CONNECT within {0:?}")]
    TimedOut(Duration),
    /// The request could not be built.
    #[error("cannot build the CONNECT request: {0}")]
    Request(#[source] http::Error),
}

/// What a status means between two ends of HBONE.
fn meaning(status: StatusCode) -> &'static str {
    match status {
        StatusCode::BAD_REQUEST => "it does not serve that address",
        StatusCode::UNAUTHORIZED => "denied by policy",
        StatusCode::SERVICE_UNAVAILABLE => "it cannot reach the application",
        _ => "unexpected",
    }
}

impl fmt::Debug for Tunnel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tunnel")
            .field("open", &self.is_open())
            .finish_non_exhaustive()
    }
}

impl Multiplexed for Tunnel {
    fn is_open(&self) -> bool {
        if self.closed.load(Ordering::Acquire) {
            return false;
        }
        // Tells of a GOAWAY that has arrived; streams may live on after it.
        let mut cx = Context::from_waker(noop_waker_ref());
        !matches!(
            self.requests.clone().poll_ready(&mut cx),
            Poll::Ready(Err(_))
        )
    }

    fn stream_limit(&self) -> usize {
        self.requests.current_max_send_streams()
    }
}

impl Tunnel {
    /// Makes a tunnel of a connection to `peer`: TCP, or a stream of another tunnel. We prove who we are with `certificate`,
    /// and the peer has to be one of `expected`.
    ///
    /// # Errors
    /// Everything but [`TunnelError::Certificate`] and [`TunnelError::Dial`].
    pub async fn open<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        io: T,
        peer: SocketAddr,
        certificate: &WorkloadCertificate,
        expected: &[Identity],
        config: &HboneConfig,
    ) -> Result<Self, TunnelError> {
        timeout(
            config.handshake_timeout,
            Self::handshake(io, peer, certificate, expected, config),
        )
        .await
        .map_err(|_| TunnelError::HandshakeTimedOut(peer, config.handshake_timeout))?
    }

    async fn handshake<T: AsyncRead + AsyncWrite + Send + Unpin + 'static>(
        io: T,
        peer: SocketAddr,
        certificate: &WorkloadCertificate,
        expected: &[Identity],
        config: &HboneConfig,
    ) -> Result<Self, TunnelError> {
        // An address as server name sends no SNI; whether the name fits is not asked either.
        let name = ServerName::IpAddress(peer.ip().into());
        let began = Instant::now();
        let tls = TlsStream::connect(io, certificate.client_config(expected), name)
            .await
            .map_err(|error| TunnelError::Tls(peer, error))?;
        let tls_handshake = began.elapsed();
        if tls.alpn_protocol() != Some(ALPN_H2) {
            return Err(TunnelError::NotHttp2(peer));
        }
        let watch = certificate.watch_peer(PeerRole::Server, tls.peer_certificates());
        let (requests, connection) = config
            .client_builder()
            .handshake(tls)
            .await
            .map_err(|error| TunnelError::Http2(peer, error))?;
        let closed = Arc::new(AtomicBool::new(false));
        // Boxed: a future keeps room for each place that a value was moved through.
        let connection = Box::new(connection);
        let standing = watch.as_ref().map(PeerWatch::standing).unwrap_or_default();
        let driven = Driven {
            closed: closed.clone(),
            watch,
            peer,
        };
        tokio::spawn(drive(connection, driven, config.clone()));
        Ok(Self {
            requests,
            closed,
            standing,
            tls_handshake,
            ends: None,
        })
    }

    /// Tells which TCP connection it is made of: our end and the peer's.
    pub fn made_of(self, local: SocketAddr, peer: SocketAddr) -> Self {
        Self {
            ends: Some((local, peer)),
            ..self
        }
    }

    /// How both ends of the tunnel name one of its streams; `None` when it is not known of which TCP connection it is made.
    pub fn leg(&self, stream: &HboneStream) -> Option<TunnelLeg> {
        self.ends.map(|(client, server)| TunnelLeg {
            client,
            server,
            stream: stream.recv.stream_id().as_u32(),
        })
    }

    /// Whether it ended because the peer's certificate was revoked.
    pub fn peer_standing(&self) -> &PeerStanding {
        &self.standing
    }

    /// How long its TLS handshake took.
    pub fn tls_handshake(&self) -> Duration {
        self.tls_handshake
    }

    /// Opens a stream to `target`. Returns when the peer has answered 200: then the application's connection stands.
    ///
    /// # Errors
    /// See [`StreamError`]; after [`StreamError::NotTaken`] and [`StreamError::Broken`] this tunnel is of no more use.
    pub async fn connect(
        &self,
        target: &Authority,
        headers: HeaderMap,
        limit: Duration,
    ) -> Result<HboneStream, StreamError> {
        timeout(limit, self.request(target, headers))
            .await
            .map_err(|_| StreamError::TimedOut(limit))?
    }

    async fn request(
        &self,
        target: &Authority,
        headers: HeaderMap,
    ) -> Result<HboneStream, StreamError> {
        let uri = Uri::builder()
            .authority(target.to_string())
            .build()
            .map_err(StreamError::Request)?;
        let mut request = Request::builder()
            .method(Method::CONNECT)
            .uri(uri)
            .body(())
            .map_err(StreamError::Request)?;
        *request.headers_mut() = headers;
        let ready = self.requests.clone().ready().await;
        // Until here nothing of the request was sent.
        let (response, send) = ready
            .and_then(|mut requests| requests.send_request(request, false))
            .map_err(StreamError::NotTaken)?;
        let response = response.await.map_err(|error| {
            let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
            if refused || error.is_go_away() {
                StreamError::NotTaken(error)
            } else {
                StreamError::Broken(error)
            }
        })?;
        if response.status() != StatusCode::OK {
            return Err(StreamError::Status(response.status()));
        }
        Ok(HboneStream {
            send,
            recv: response.into_body(),
        })
    }
}

/// What the task that runs a connection knows of it.
struct Driven {
    closed: Arc<AtomicBool>,
    watch: Option<PeerWatch>,
    peer: SocketAddr,
}

/// Runs a connection until it ends, its peer is dead, or the peer's certificate is revoked. Its streams fail with it.
async fn drive<T: AsyncRead + AsyncWrite + Unpin>(
    mut connection: Box<h2::client::Connection<TlsStream<T>, Bytes>>,
    driven: Driven,
    config: HboneConfig,
) {
    let Driven {
        closed,
        watch: peer_watch,
        peer,
    } = driven;
    let pings = connection.ping_pong();
    let result = tokio::select! {
        result = &mut connection => result,
        () = watch(pings, &config) => {
            tracing::warn!(%peer, "the tunnel's peer does not answer PINGs; closing the tunnel");
            Ok(())
        }
        () = until_revoked(peer_watch.as_ref()) => {
            tracing::warn!(%peer, "the certificate of the tunnel's peer was revoked; closing the tunnel");
            Ok(())
        }
    };
    closed.store(true, Ordering::Release);
    if let Err(error) = result {
        tracing::debug!(%peer, %error, "tunnel ended");
    }
}

/// Ends when the peer is dead.
pub(super) async fn watch(pings: Option<h2::PingPong>, config: &HboneConfig) {
    match pings {
        Some(pings) => until_dead(pings, config).await,
        None => std::future::pending().await,
    }
}
