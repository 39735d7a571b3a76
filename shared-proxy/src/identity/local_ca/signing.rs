//! Certificates for keys that somebody else holds: what a control plane with this CA in it issues.

use std::time::Duration;

use rcgen::{CertificateSigningRequestParams, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use super::LocalCa;
use crate::identity::{CaError, Identity, InvalidIdentity};

/// Why a signing request is not granted.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// Not a signing request in PEM, or its signature is wrong.
    #[error("the signing request cannot be read: {0}")]
    Request(rcgen::Error),
    /// It must ask for exactly one name, an identity.
    #[error("the signing request asks for {0} names; it must ask for one, a SPIFFE ID as URI")]
    Names(usize),
    /// The name is no workload's identity.
    #[error("the signing request: {0}")]
    Identity(#[from] InvalidIdentity),
    /// This CA does not vouch for it, or cannot sign.
    #[error(transparent)]
    Ca(#[from] CaError),
}

impl LocalCa {
    /// A certificate for the key and the one identity that a signing request (PEM) names, valid for at most `ttl`, and that
    /// identity. Whether the asker may have it is for the caller to know.
    ///
    /// # Errors
    /// The request is malformed, or the identity is not this CA's to vouch for.
    pub fn sign_request(
        &self,
        request: &str,
        ttl: Duration,
    ) -> Result<(Identity, CertificateDer<'static>), SigningError> {
        let request =
            CertificateSigningRequestParams::from_pem(request).map_err(SigningError::Request)?;
        let identity: Identity = match &request.params.subject_alt_names[..] {
            [SanType::URI(uri)] => uri.as_str().parse()?,
            names => return Err(SigningError::Names(names.len())),
        };
        self.check_trust_domain_of(&identity)?;
        let failed = failure(&identity);
        let issuer = self.issuer().map_err(|e| failed(e.to_string()))?;
        let name = SanType::URI(
            identity
                .to_string()
                .try_into()
                .map_err(|e: rcgen::Error| failed(e.to_string()))?,
        );
        let leaf = self
            .leaf_params(vec![name], ttl)
            .signed_by(&request.public_key, &issuer)
            .map_err(|e| failed(e.to_string()))?;
        let leaf = leaf.der().clone();
        Ok((identity, leaf))
    }

    /// A certificate and its key for a server that clients reach under `names`: DNS names and addresses.
    ///
    /// # Errors
    /// A name is not one, or the CA cannot sign.
    pub fn issue_server(
        &self,
        names: &[String],
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), super::LocalCaError> {
        let issuer = self.issuer()?;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut san = Vec::with_capacity(names.len());
        for name in names {
            san.push(match name.parse() {
                Ok(ip) => SanType::IpAddress(ip),
                Err(_) => SanType::DnsName(name.as_str().try_into()?),
            });
        }
        let leaf = self
            .leaf_params(san, self.leaf_ttl)
            .signed_by(&key, &issuer)?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok((leaf.der().clone(), key))
    }
}

fn failure(identity: &Identity) -> impl Fn(String) -> CaError + use<> {
    let identity = identity.clone();
    move |reason| CaError::Failed {
        identity: identity.clone(),
        reason: reason.into(),
    }
}
