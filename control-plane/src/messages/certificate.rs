//! Package `istio.v1.auth`: certificates on request.

use prost::Message;

use super::discovery::Struct;

/// Key of [`CreateCertificateRequest::metadata`] under which a node's proxy names the workload that it asks for.
pub const IMPERSONATED_IDENTITY: &str = "ImpersonatedIdentity";

/// A request for a certificate.
#[derive(Clone, PartialEq, Message)]
pub struct CreateCertificateRequest {
    /// The signing request, PEM.
    #[prost(string, tag = "1")]
    pub csr: String,
    /// How long the certificate should be valid, in seconds.
    #[prost(int64, tag = "3")]
    pub validity_duration: i64,
    /// [`IMPERSONATED_IDENTITY`].
    #[prost(message, optional, tag = "4")]
    pub metadata: Option<Struct>,
}

/// A certificate.
#[derive(Clone, PartialEq, Message)]
pub struct CreateCertificateResponse {
    /// PEM: leaf first, then intermediates, root last. An element may hold several certificates.
    #[prost(string, repeated, tag = "1")]
    pub cert_chain: Vec<String>,
}
