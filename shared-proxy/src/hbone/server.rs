//! Accepts tunnels to captured pods (15008), and the streams in them.

use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::authority::Authority;
use super::baggage;
use super::client::watch;
use super::stream::HboneStream;
use super::{BAGGAGE, FORWARDED, FORWARDED_NETWORK};
use crate::capture::{Captured, ClientAddr, LocalWorkload, OrigDstAddr, Refusal, Role};
use crate::core::{Attachment, Failure};
use crate::drain::Signal;
use crate::identity::revocation::until_revoked;
use crate::identity::{
    ALPN_H2, CaError, Identity, PeerError, PeerRole, PeerStanding, PeerWatch, is_revocation,
    peer_identity,
};
use crate::inbound::{Arrival, Arrived, Claims, arrive};
use crate::probe;
use crate::relay::{self, End, RelayError};
use crate::telemetry::{ConnectionError, Direction, ResponseFlag, Step, TunnelLeg};
use crate::tls_stream::TlsStream;

/// Boxed: a future keeps room for each place that a value was moved through.
type Connection = Box<h2::server::Connection<TlsStream<TcpStream>, Bytes>>;

/// Why a connection did not become a tunnel.
#[derive(Debug, thiserror::Error)]
enum TunnelFailure {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Identity(#[source] Failure),
    #[error(transparent)]
    Certificate(#[from] CaError),
    #[error("TLS: {0}")]
    Tls(#[source] io::Error),
    #[error("the peer proves no identity: {0}")]
    Peer(#[from] PeerError),
    #[error("the peer is {peer}; its trust domain is not {expected}")]
    ForeignTrustDomain { peer: Identity, expected: Arc<str> },
    #[error("the peer did not choose HTTP/2 (ALPN h2)")]
    NotHttp2,
    #[error("HTTP/2: {0}")]
    Http2(#[source] h2::Error),
    #[error("no TLS and HTTP/2 handshake within {0:?}")]
    TimedOut(Duration),
}

impl From<TunnelFailure> for ConnectionError {
    fn from(failure: TunnelFailure) -> Self {
        let flag = match &failure {
            TunnelFailure::Refused(_) => ResponseFlag::None,
            TunnelFailure::Identity(_) | TunnelFailure::Certificate(_) => {
                ResponseFlag::IdentityError
            }
            TunnelFailure::Tls(error) if is_revocation(error) => ResponseFlag::CertificateRevoked,
            TunnelFailure::Tls(_)
            | TunnelFailure::Peer(_)
            | TunnelFailure::ForeignTrustDomain { .. } => ResponseFlag::TlsFailure,
            TunnelFailure::NotHttp2 | TunnelFailure::Http2(_) | TunnelFailure::TimedOut(_) => {
                ResponseFlag::H2HandshakeFailure
            }
        };
        Self::new(flag, failure)
    }
}

/// What the streams of one tunnel have in common.
struct Session {
    attachment: Attachment,
    client: ClientAddr,
    /// Where the tunnel ends: the pod's address.
    local: SocketAddr,
    pod: LocalWorkload,
    peer: Identity,
    standing: PeerStanding,
}

impl Session {
    /// Why a stream ended early: a tunnel that is closed breaks its streams.
    fn failure(&self, error: RelayError) -> Failure {
        if self.standing.is_revoked() {
            return Failure::PeerRevoked(self.peer.clone());
        }
        error.into()
    }
}

/// Why a stream is turned away, in HTTP's words.
struct Rejection(StatusCode);

/// Serves one tunnel until it is closed, cut, or its peer is dead.
pub(crate) async fn serve(attachment: Attachment, captured: Captured, signal: Signal) {
    let Captured {
        stream,
        client,
        dst,
    } = captured;
    let known = dst.as_ref().ok().copied();
    let limit = attachment.core.config.hbone.handshake_timeout;
    let established = tokio::select! {
        established = Box::pin(timeout(limit, establish(&attachment, stream, client, dst))) => {
            established.unwrap_or(Err(TunnelFailure::TimedOut(limit)))
        }
        () = signal.cut() => return,
    };
    match established {
        Ok((connection, session, watch)) => {
            run(connection, Arc::new(session), watch, signal).await;
        }
        Err(failure) => attachment.core.telemetry.refused(
            Direction::Inbound,
            attachment.scope.id().capture_mode,
            client,
            known,
            &failure.into(),
        ),
    }
}

async fn establish(
    attachment: &Attachment,
    tcp: TcpStream,
    client: ClientAddr,
    dst: Result<OrigDstAddr, Refusal>,
) -> Result<(Connection, Session, Option<PeerWatch>), TunnelFailure> {
    let dst = dst?;
    let pod = attachment.scope.owner(Role::InboundHbone, client, dst)?;
    let identity = attachment
        .identity_of(&pod)
        .map_err(TunnelFailure::Identity)?;
    let certificate = attachment.core.certificates.get(&identity).await?;
    let began = Instant::now();
    let tls = TlsStream::accept(tcp, certificate.server_config())
        .await
        .map_err(TunnelFailure::Tls)?;
    attachment.took(Step::TlsHandshake, Direction::Inbound, began);
    let peer = peer_identity(tls.peer_certificates().unwrap_or_default())?;
    let expected = &attachment.core.config.trust_domain;
    if peer.trust_domain() != expected {
        return Err(TunnelFailure::ForeignTrustDomain {
            peer,
            expected: expected.clone(),
        });
    }
    if tls.alpn_protocol() != Some(ALPN_H2) {
        return Err(TunnelFailure::NotHttp2);
    }
    let watch = certificate.watch_peer(PeerRole::Client, tls.peer_certificates());
    let builder = attachment.core.config.hbone.server_builder();
    let connection = builder.handshake(tls).await.map_err(TunnelFailure::Http2)?;
    let connection = Box::new(connection);
    let session = Session {
        attachment: attachment.clone(),
        client,
        local: dst.0,
        pod,
        peer,
        standing: watch.as_ref().map(PeerWatch::standing).unwrap_or_default(),
    };
    Ok((connection, session, watch))
}

async fn run(
    mut connection: Connection,
    session: Arc<Session>,
    peer_watch: Option<PeerWatch>,
    signal: Signal,
) {
    let peer = &session.peer;
    let config = session.attachment.core.config.hbone.clone();
    let pings = connection.ping_pong();
    let mut dead = pin!(watch(pings, &config));
    let of_pod = session
        .attachment
        .core
        .tunnel_to(&session.pod, session.attachment.scope.id().capture_mode);
    let mut going_away = false;
    loop {
        tokio::select! {
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    tokio::spawn(stream(session.clone(), request, respond, signal.clone()));
                }
                Some(Err(error)) => {
                    tracing::debug!(client = %session.client, %peer, %error, "tunnel ended");
                    return;
                }
                None => return,
            },
            () = signal.draining(), if !going_away => {
                going_away = true;
                connection.graceful_shutdown();
            }
            () = of_pod.draining(), if !going_away => {
                going_away = true;
                connection.graceful_shutdown();
            }
            () = signal.cut(), if going_away => return,
            () = of_pod.cut(), if going_away => return,
            () = &mut dead => {
                tracing::warn!(
                    client = %session.client, %peer,
                    "the tunnel's peer does not answer PINGs; closing the tunnel"
                );
                return;
            }
            () = until_revoked(peer_watch.as_ref()) => {
                tracing::warn!(
                    client = %session.client, %peer,
                    "the certificate of the tunnel's peer was revoked; closing the tunnel"
                );
                return;
            }
        }
    }
}

/// Serves one stream of a tunnel.
async fn stream(
    session: Arc<Session>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    signal: Signal,
) {
    let began = Instant::now();
    if let Ok(asked) = authority(&request)
        && probe::is_asked(&asked, session.client, session.local)
        && session.attachment.identity_of(&session.pod).ok().as_ref() == Some(&session.peer)
    {
        if let Ok(send) = respond.send_response(response(StatusCode::OK), false) {
            let recv = request.into_body();
            probe::answer(
                &session.attachment,
                &session.pod,
                HboneStream { send, recv },
            )
            .await;
        }
        return;
    }
    let admitted = tokio::select! {
        admitted = Box::pin(admit(&session, &request, &signal)) => admitted,
        () = signal.cut() => {
            respond.send_reset(Reason::CANCEL);
            return;
        }
    };
    let Arrived {
        record,
        application,
        admitted,
        workload,
    } = match admitted {
        Ok(arrived) => arrived,
        Err(Rejection(status)) => {
            // An error means that the peer has gone meanwhile; there is nobody left to answer.
            let _ = respond.send_response(response(status), true);
            return;
        }
    };
    let recv = request.into_body();
    let attachment = &session.attachment;
    attachment.took(Step::Total, Direction::Inbound, began);
    record.through_tunnel(TunnelLeg {
        client: session.client.0,
        server: session.local,
        stream: recv.stream_id().as_u32(),
    });
    let tells = session.attachment.core.config.response_baggage;
    let baggage = tells.then(|| HeaderValue::try_from(baggage::baggage(&workload)).ok());
    let mut answer = response(StatusCode::OK);
    if let Some(baggage) = baggage.flatten() {
        answer.headers_mut().insert(BAGGAGE, baggage);
    }
    let result = match respond.send_response(answer, false) {
        Ok(send) => {
            let stream = HboneStream { send, recv };
            tokio::select! {
                result = relay::through_tunnel(application, End::Application, stream, &record) => {
                    result.map_err(|error| session.failure(error))
                }
                () = signal.cut() => Err(admitted.cut()),
            }
        }
        Err(error) => Err(session.failure(RelayError::Tunnel(error))),
    };
    record.finish(result.map_err(Into::into));
}

fn response(status: StatusCode) -> Response<()> {
    let mut response = Response::new(());
    *response.status_mut() = status;
    response
}

/// Checks a request and connects to the application.
async fn admit(
    session: &Session,
    request: &Request<RecvStream>,
    signal: &Signal,
) -> Result<Arrived, Rejection> {
    let authority = authority(request).map_err(|reason| {
        session.attachment.core.telemetry.refused(
            Direction::Inbound,
            session.attachment.scope.id().capture_mode,
            session.client,
            Some(OrigDstAddr(session.local)),
            &ConnectionError::new(ResponseFlag::None, reason),
        );
        Rejection(StatusCode::BAD_REQUEST)
    })?;
    let arrival = Arrival {
        client: session.client,
        addr: session.local,
        authority: &authority,
        peer: Some(&session.peer),
        tunnelled: true,
        claims: claims(&session.attachment.core.config.network, request.headers()),
    };
    arrive(&session.attachment, &arrival, &session.pod, signal)
        .await
        .map_err(|failure| {
            Rejection(match failure {
                Failure::Denied(_) => StatusCode::UNAUTHORIZED,
                Failure::NotServed { .. } => StatusCode::BAD_REQUEST,
                _ => StatusCode::SERVICE_UNAVAILABLE,
            })
        })
}

/// Where a stream wants to go, or why its request is none.
pub(super) fn authority<B>(request: &Request<B>) -> Result<Authority, String> {
    if request.method() != Method::CONNECT {
        return Err(format!("method {} instead of CONNECT", request.method()));
    }
    let authority = request.uri().authority().map_or("", |a| a.as_str());
    authority
        .parse::<Authority>()
        .map_err(|error| error.to_string())
}

/// What the headers say. A peer in another network is known by its baggage only.
pub(super) fn claims(network: &str, headers: &HeaderMap) -> Claims {
    let text = |name: &HeaderName| headers.get(name).and_then(|value| value.to_str().ok());
    let foreign = text(&FORWARDED_NETWORK).filter(|theirs| *theirs != network);
    Claims {
        service: text(&FORWARDED).and_then(forwarded_host).map(str::to_owned),
        foreign_source: foreign.map(|theirs| {
            let fields = headers.get_all(BAGGAGE).iter();
            let baggage: Vec<_> = fields.filter_map(|value| value.to_str().ok()).collect();
            let source = baggage::parse(&baggage.join(","), theirs);
            Arc::new(source.unwrap_or_else(|| baggage::nobody(theirs)))
        }),
    }
}

/// The value of `host` in a `forwarded` header (RFC 7239, 4).
fn forwarded_host(header: &str) -> Option<&str> {
    header.split([';', ',']).find_map(|pair| {
        let (key, value) = pair.trim().split_once('=')?;
        key.eq_ignore_ascii_case("host")
            .then(|| value.trim_matches('"'))
    })
}
