//! How a connection ended, in the words of telemetry.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use super::DialError;
use crate::capture::Refusal;
use crate::hbone::authority::Authority;
use crate::hbone::client::{StreamError, TunnelError};
use crate::identity::{CaError, Identity, is_revocation};
use crate::relay::RelayError;
use crate::socks5;
use crate::state::policy::Verdict;
use crate::telemetry::{ConnectionError, ResponseFlag};

/// Why a connection was not served, or not to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    #[error(transparent)]
    Refused(#[from] Refusal),
    #[error("{0} is a port of the proxy itself")]
    OwnPort(SocketAddr),
    #[error("the workload at {address} ({pod}) is not known: the control plane has not told of it")]
    UnknownWorkload { address: IpAddr, pod: String },
    #[error("the control plane was asked whose address {0} is, and has not answered")]
    NotTold(IpAddr),
    #[error("{0}")]
    Identity(String),
    #[error("no healthy endpoint of {service} for port {port}")]
    NoHealthyEndpoint { service: String, port: u16 },
    #[error("{what} {name} is not known, or none of its endpoints is healthy")]
    UnknownGateway { what: &'static str, name: String },
    #[error("no address of hostname {hostname}: {reason}")]
    Unresolved { hostname: Arc<str>, reason: String },
    #[error(
        "authority {authority} in a tunnel to {local}: that is not this workload, nor is this its waypoint"
    )]
    NotServed { authority: Authority, local: IpAddr },
    #[error("authority {0}: the workload serves no such name and port")]
    UnknownHostname(Authority),
    #[error("{0}")]
    Denied(Verdict),
    #[error(transparent)]
    Socks5(#[from] socks5::Error),
    #[error(transparent)]
    Certificate(#[from] CaError),
    #[error(transparent)]
    Dial(#[from] DialError),
    #[error(transparent)]
    Tunnel(Arc<TunnelError>),
    #[error("opening the tunnel was abandoned")]
    TunnelAbandoned,
    #[error("the certificate of the tunnel's peer, {0}, was revoked")]
    PeerRevoked(Identity),
    #[error("the certificate of the tunnel's peer was revoked")]
    TunnelRevoked,
    #[error(transparent)]
    Stream(#[from] StreamError),
    #[error(transparent)]
    Relay(#[from] RelayError),
    #[error(
        "this proxy opened it itself: its pod is captured on the node and in its namespace at once (`ambidex verify`)"
    )]
    CapturedTwice,
    #[error("cut: its capture ended and its time to finish was over")]
    Cut,
}

impl Failure {
    /// The label `response_flags`.
    pub(crate) fn flag(&self) -> ResponseFlag {
        match self {
            Self::Refused(_)
            | Self::OwnPort(_)
            | Self::NotServed { .. }
            | Self::Socks5(_)
            | Self::Relay(_)
            | Self::CapturedTwice
            | Self::Cut => ResponseFlag::None,
            Self::Denied(_) => ResponseFlag::Denied,
            Self::PeerRevoked(_) | Self::TunnelRevoked => ResponseFlag::CertificateRevoked,
            Self::Identity(_) | Self::Certificate(_) => ResponseFlag::IdentityError,
            Self::Dial(_)
            | Self::UnknownWorkload { .. }
            | Self::NotTold(_)
            | Self::NoHealthyEndpoint { .. }
            | Self::UnknownGateway { .. }
            | Self::Unresolved { .. }
            | Self::UnknownHostname(_)
            | Self::TunnelAbandoned
            | Self::Stream(_) => ResponseFlag::Connect,
            Self::Tunnel(error) => match &**error {
                TunnelError::Certificate(_) => ResponseFlag::IdentityError,
                TunnelError::Dial(DialError::TimedOut { .. }) => ResponseFlag::NetworkPolicy,
                TunnelError::Dial(_) => ResponseFlag::Connect,
                TunnelError::Tls(_, error) if is_revocation(error) => {
                    ResponseFlag::CertificateRevoked
                }
                TunnelError::Tls(..) => ResponseFlag::TlsFailure,
                TunnelError::NotHttp2(_)
                | TunnelError::Http2(..)
                | TunnelError::HandshakeTimedOut(..) => ResponseFlag::H2HandshakeFailure,
            },
        }
    }

    /// For telemetry.
    pub(crate) fn describe(&self) -> ConnectionError {
        ConnectionError::new(self.flag(), self)
    }
}

impl From<Failure> for ConnectionError {
    fn from(failure: Failure) -> Self {
        failure.describe()
    }
}
