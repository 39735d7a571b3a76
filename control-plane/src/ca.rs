//! The client of CreateCertificate: certificates from the mesh's CA.

use std::fmt;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use http::uri::PathAndQuery;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use shared_proxy::identity::{
    CaError, CertificateAuthority, CertificateError, Identity, WorkloadCertificate,
};
use tokio::sync::Mutex;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use crate::messages::certificate::{
    CreateCertificateRequest, CreateCertificateResponse, IMPERSONATED_IDENTITY,
};
use crate::messages::discovery::Struct;
use crate::transport::{ConnectError, Connection, Endpoint};

/// Path of the call.
pub const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";

/// An answer may take this long.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A CA that is asked over gRPC. The key is made here and never leaves.
///
/// It tries once per request: [`Certificates`](shared_proxy::identity::Certificates) repeats what fails.
pub struct CaClient {
    endpoint: Endpoint,
    ttl: Duration,
    /// The connection in use; another one is made when a call on it fails.
    connection: Mutex<Option<Grpc<Connection>>>,
}

/// Why the CA's answer is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    /// The CA cannot be reached.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The key or the signing request cannot be made.
    #[error("signing request: {0}")]
    Request(#[from] rcgen::Error),
    /// The CA refused, or the connection broke.
    #[error("the CA at {address} answered {code:?}: {message}")]
    Refused {
        /// Which CA.
        address: String,
        /// gRPC code.
        code: tonic::Code,
        /// Its words.
        message: String,
    },
    /// No answer in time.
    #[error("the CA at {0} did not answer within {ANSWER_WITHIN:?}")]
    Timeout(String),
    /// The answer holds something that is not PEM.
    #[error("the CA's answer: {0}")]
    Pem(rustls::pki_types::pem::Error),
    /// The answer holds no leaf or no root.
    #[error(
        "the CA's answer holds {0} certificates: it must hold the leaf first and the root last"
    )]
    Incomplete(usize),
    /// The certificate is not what was asked for.
    #[error("the CA's answer is not usable: {0}")]
    Certificate(#[from] CertificateError),
    /// The path cannot be made.
    #[error("{0}")]
    Path(#[from] http::uri::InvalidUri),
}

impl CaClient {
    /// Certificates from the CA at `endpoint`, asked to be valid for `ttl`.
    pub fn new(endpoint: Endpoint, ttl: Duration) -> Self {
        Self {
            endpoint,
            ttl,
            connection: Mutex::default(),
        }
    }

    async fn request(&self, identity: &Identity) -> Result<WorkloadCertificate, IssueError> {
        let (key, csr) = signing_request(identity)?;
        let request = CreateCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.ttl.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(Struct {
                fields: [(
                    IMPERSONATED_IDENTITY.to_owned(),
                    identity.to_string().into(),
                )]
                .into(),
            }),
        };
        let response = match tokio::time::timeout(ANSWER_WITHIN, self.call(request)).await {
            Ok(answered) => answered?,
            Err(_) => {
                // Nothing says that the next call on it would be answered.
                *self.connection.lock().await = None;
                return Err(IssueError::Timeout(self.endpoint.address.to_string()));
            }
        };
        let (chain, roots) = chain_and_roots(&response)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(WorkloadCertificate::new(
            identity.clone(),
            chain,
            key,
            roots,
        )?)
    }

    async fn call(
        &self,
        message: CreateCertificateRequest,
    ) -> Result<CreateCertificateResponse, IssueError> {
        let mut request = tonic::Request::new(message);
        *request.metadata_mut() = self.endpoint.metadata()?;
        let mut connection = self.connection().await?;
        let refused = |status: tonic::Status| IssueError::Refused {
            address: self.endpoint.address.to_string(),
            code: status.code(),
            message: status.message().to_owned(),
        };
        let answer = connection
            .unary(
                request,
                PathAndQuery::try_from(CREATE_CERTIFICATE)?,
                ProstCodec::<CreateCertificateRequest, CreateCertificateResponse>::default(),
            )
            .await;
        match answer {
            Ok(response) => Ok(response.into_inner()),
            Err(status) => {
                if may_be_the_connections_end(status.code()) {
                    *self.connection.lock().await = None;
                }
                Err(refused(status))
            }
        }
    }

    /// The connection in use if it still takes calls, else another one. Calls run on it side by side.
    async fn connection(&self) -> Result<Grpc<Connection>, IssueError> {
        let mut current = self.connection.lock().await;
        if let Some(connection) = current.as_mut()
            && connection.ready().await.is_ok()
        {
            return Ok(connection.clone());
        }
        let mut connection = self.endpoint.connect().await?;
        // Needed before the first call.
        if let Err(source) = connection.ready().await {
            let address = self.endpoint.address.clone();
            return Err(ConnectError::Http { address, source }.into());
        }
        *current = Some(connection.clone());
        Ok(connection)
    }
}

impl CertificateAuthority for CaClient {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<WorkloadCertificate, CaError>> {
        async move {
            self.request(identity)
                .await
                .map_err(|error| CaError::Failed {
                    identity: identity.clone(),
                    reason: error.to_string().into(),
                })
        }
        .boxed()
    }
}

impl fmt::Debug for CaClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaClient")
            .field("endpoint", &self.endpoint)
            .field("ttl", &self.ttl)
            .finish_non_exhaustive()
    }
}

/// Whether a call may have failed so because of what carried it. The other codes are a CA's answers.
fn may_be_the_connections_end(code: tonic::Code) -> bool {
    use tonic::Code;
    matches!(
        code,
        Code::Unavailable
            | Code::Unknown
            | Code::Internal
            | Code::Cancelled
            | Code::DeadlineExceeded
    )
}

/// A fresh ECDSA P-256 key, and the request (PEM) for a certificate whose only name is the identity.
fn signing_request(identity: &Identity) -> Result<(KeyPair, String), rcgen::Error> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
    let request = params.serialize_request(&key)?.pem()?;
    Ok((key, request))
}

/// Leaf and intermediates, and roots. The last element of the answer holds the roots, of which there are several while a
/// CA is replaced; an answer of one element has its root at the end.
pub(crate) fn chain_and_roots(
    response: &CreateCertificateResponse,
) -> Result<(Vec<CertificateDer<'static>>, Vec<CertificateDer<'static>>), IssueError> {
    let mut chain = Vec::new();
    let mut last = 0;
    for element in &response.cert_chain {
        let before = chain.len();
        for certificate in CertificateDer::pem_slice_iter(element.as_bytes()) {
            chain.push(certificate.map_err(IssueError::Pem)?);
        }
        if chain.len() > before {
            last = before;
        }
    }
    let roots_at = if last == 0 {
        chain.len().saturating_sub(1)
    } else {
        last
    };
    if roots_at == 0 {
        return Err(IssueError::Incomplete(chain.len()));
    }
    let roots = chain.split_off(roots_at);
    Ok((chain, roots))
}
