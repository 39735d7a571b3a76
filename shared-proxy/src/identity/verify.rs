//! The checks of a peer: its certificate chains to the roots, its one URI SAN is an identity that is acceptable, and
//! nothing of the chain is revoked. DNS names play no part.

use std::fmt;
use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, VerifierBuilderError, WebPkiClientVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerMisbehaved,
    RootCertStore, SignatureScheme,
};
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::revocation::{PeerRole, Revocations};
use super::{Identity, InvalidIdentity, TlsOptions, provider};

/// Why a peer's certificate is not accepted although it chains to a root.
#[derive(Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The peer sent none.
    #[error("the peer has no certificate")]
    NoCertificate,
    /// Not X.509.
    #[error("the peer's certificate cannot be read: {0}")]
    Unreadable(String),
    /// SPIFFE wants exactly one URI SAN.
    #[error("the peer's certificate has no URI SAN, so it names no identity")]
    NoIdentity,
    /// SPIFFE wants exactly one URI SAN.
    #[error("the peer's certificate names several identities: {}", .0.join(", "))]
    SeveralIdentities(Vec<String>),
    /// The URI SAN is not a workload's SPIFFE ID.
    #[error("the peer's URI SAN: {0}")]
    NotSpiffe(#[from] InvalidIdentity),
    /// It proved an identity, but not one that may answer there.
    #[error("the peer is {got}, wanted {}", list(.wanted))]
    Unexpected {
        /// What it proved.
        got: Identity,
        /// What would have been right.
        wanted: Arc<[Identity]>,
    },
    /// It is vouched for by somebody else.
    #[error("the peer is {got}, of a trust domain other than {local}")]
    ForeignTrustDomain {
        /// What it proved.
        got: Identity,
        /// Our own trust domain.
        local: Arc<str>,
    },
}

/// rustls shows a custom verifier's error in its debug form, so that form is for people too.
impl fmt::Debug for PeerError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl PeerError {
    /// The error of this kind inside an I/O error that a TLS handshake ended with, if that is why it did.
    pub fn in_io_error(error: &io::Error) -> Option<&Self> {
        match error.get_ref()?.downcast_ref::<Error>()? {
            Error::InvalidCertificate(CertificateError::Other(other)) => other.0.downcast_ref(),
            _ => None,
        }
    }
}

/// Whether a TLS handshake ended because the peer's certificate is revoked.
pub fn is_revocation(error: &io::Error) -> bool {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref());
    matches!(
        tls,
        Some(Error::InvalidCertificate(CertificateError::Revoked))
    )
}

fn list(identities: &[Identity]) -> String {
    match identities {
        [] => "nobody".to_owned(),
        some => some
            .iter()
            .map(Identity::to_string)
            .collect::<Vec<_>>()
            .join(" or "),
    }
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        let certificate = match error {
            PeerError::NoCertificate => return Error::NoCertificatesPresented,
            PeerError::Unreadable(_) => CertificateError::BadEncoding,
            other => CertificateError::Other(OtherError(Arc::new(other))),
        };
        Error::InvalidCertificate(certificate)
    }
}

/// The identity that a peer's certificates (leaf first) prove, if the chain has been verified: exactly one URI SAN, and
/// it is a workload's SPIFFE ID.
pub fn peer_identity(certs: &[CertificateDer<'_>]) -> Result<Identity, PeerError> {
    identity_of(certs.first().ok_or(PeerError::NoCertificate)?)
}

fn identity_of(leaf: &CertificateDer<'_>) -> Result<Identity, PeerError> {
    let (_, leaf) =
        X509Certificate::from_der(leaf).map_err(|e| PeerError::Unreadable(e.to_string()))?;
    let san = leaf
        .subject_alternative_name()
        .map_err(|e| PeerError::Unreadable(e.to_string()))?
        .ok_or(PeerError::NoIdentity)?;
    let uris: Vec<&str> = san
        .value
        .general_names
        .iter()
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    match uris[..] {
        [] => Err(PeerError::NoIdentity),
        [uri] => Ok(uri.parse::<Identity>()?),
        _ => Err(PeerError::SeveralIdentities(
            uris.into_iter().map(str::to_owned).collect(),
        )),
    }
}

/// What both sides check a peer's chain with.
#[derive(Debug, Clone)]
pub(super) struct Checks {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
    revocations: Option<Arc<Revocations>>,
}

impl Checks {
    pub(super) fn new(roots: &Arc<RootCertStore>, options: &TlsOptions) -> Self {
        Self {
            provider: provider(),
            roots: Arc::clone(roots),
            revocations: options.revocations.clone(),
        }
    }

    fn revocation(
        &self,
        role: PeerRole,
        who: &Identity,
        chain: (&CertificateDer<'_>, &[CertificateDer<'_>]),
        now: UnixTime,
    ) -> Result<(), Error> {
        match &self.revocations {
            Some(revocations) => revocations.check(role, who, chain, &self.roots, now),
            None => Ok(()),
        }
    }
}

/// Client side: the server must prove one of the expected identities.
#[derive(Debug)]
pub(super) struct ServerIdentityVerifier {
    checks: Checks,
    expected: Arc<[Identity]>,
}

impl ServerIdentityVerifier {
    pub(super) fn new(checks: Checks, expected: Arc<[Identity]>) -> Self {
        Self { checks, expected }
    }

    fn algorithms(&self) -> &WebPkiSupportedAlgorithms {
        &self.checks.provider.signature_verification_algorithms
    }
}

impl ServerCertVerifier for ServerIdentityVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_server_cert_signed_by_trust_anchor(
            &ParsedCertificate::try_from(end_entity)?,
            &self.checks.roots,
            intermediates,
            now,
            self.algorithms().all,
        )?;
        let got = identity_of(end_entity)?;
        if !self.expected.contains(&got) {
            return Err(PeerError::Unexpected {
                got,
                wanted: Arc::clone(&self.expected),
            }
            .into());
        }
        let chain = (end_entity, intermediates);
        self.checks.revocation(PeerRole::Server, &got, chain, now)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, self.algorithms())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms().supported_schemes()
    }
}

/// Server side: the client must prove an identity of the local trust domain. Which one may do what is policy's business.
#[derive(Debug)]
pub(super) struct ClientIdentityVerifier {
    chain: Arc<dyn ClientCertVerifier>,
    checks: Checks,
    trust_domain: Arc<str>,
}

impl ClientIdentityVerifier {
    pub(super) fn new(
        checks: Checks,
        trust_domain: Arc<str>,
    ) -> Result<Self, VerifierBuilderError> {
        let (roots, provider) = (Arc::clone(&checks.roots), Arc::clone(&checks.provider));
        let chain = WebPkiClientVerifier::builder_with_provider(roots, provider)
            .clear_root_hint_subjects()
            .build()?;
        Ok(Self {
            chain,
            checks,
            trust_domain,
        })
    }
}

impl ClientCertVerifier for ClientIdentityVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.chain.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self
            .chain
            .verify_client_cert(end_entity, intermediates, now)?;
        let got = identity_of(end_entity)?;
        if *got.trust_domain() != self.trust_domain {
            return Err(PeerError::ForeignTrustDomain {
                got,
                local: Arc::clone(&self.trust_domain),
            }
            .into());
        }
        let chain = (end_entity, intermediates);
        self.checks.revocation(PeerRole::Client, &got, chain, now)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.chain.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}
