//! Certificates on request, from the built-in CA.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use futures_util::future::{BoxFuture, FutureExt};
use shared_proxy::identity::{CaError, SigningError};
use tonic::server::UnaryService;
use tonic::{Request, Response, Status};

use super::Shared;
use crate::messages::certificate::{
    CreateCertificateRequest, CreateCertificateResponse, IMPERSONATED_IDENTITY,
};

/// The method.
pub(super) struct Certificates(pub(super) Arc<Shared>);

impl UnaryService<CreateCertificateRequest> for Certificates {
    type Response = CreateCertificateResponse;
    type Future = BoxFuture<'static, Result<Response<CreateCertificateResponse>, Status>>;

    fn call(&mut self, request: Request<CreateCertificateRequest>) -> Self::Future {
        let shared = Arc::clone(&self.0);
        async move {
            shared.authenticate(request.metadata())?;
            tracing::debug!(headers = ?super::shown(request.metadata()), "certificate asked for");
            let request = request.into_inner();
            // Reads the key from its file, and computes.
            tokio::task::spawn_blocking(move || issue(&shared, &request))
                .await
                .map_err(|error| Status::internal(error.to_string()))?
                .map(Response::new)
        }
        .boxed()
    }
}

fn issue(
    shared: &Shared,
    request: &CreateCertificateRequest,
) -> Result<CreateCertificateResponse, Status> {
    let asked = match u64::try_from(request.validity_duration) {
        Ok(0) | Err(_) => shared.longest_ttl,
        Ok(seconds) => Duration::from_secs(seconds).min(shared.longest_ttl),
    };
    let (identity, leaf) =
        shared
            .ca
            .sign_request(&request.csr, asked)
            .map_err(|error| match error {
                SigningError::Ca(CaError::ForeignTrustDomain { .. }) => {
                    Status::permission_denied(error.to_string())
                }
                SigningError::Ca(_) => Status::internal(error.to_string()),
                _ => Status::invalid_argument(error.to_string()),
            })?;
    let named = request.metadata.as_ref();
    if let Some(named) = named.and_then(|metadata| metadata.text(IMPERSONATED_IDENTITY))
        && named != identity.to_string()
    {
        let why = format!("the signing request names {identity}, the metadata {named}");
        return Err(Status::invalid_argument(why));
    }
    tracing::info!(%identity, valid_for = ?asked, "certificate issued");
    let cert_chain = [leaf.as_ref(), shared.ca.root().as_ref()].map(pem).into();
    Ok(CreateCertificateResponse { cert_chain })
}

/// A certificate in PEM.
pub(super) fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut pem = String::from("-----BEGIN CERTIFICATE-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = more;
    }
    pem.push_str("-----END CERTIFICATE-----\n");
    pem
}
