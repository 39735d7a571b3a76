//! A workload's certificate and the TLS configurations made of it.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use rustls::client::Resumption;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, VerifierBuilderError};
use rustls::sign::{CertifiedKey, SingleCertAndKey};
use rustls::version::TLS13;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, X509Certificate};

use super::key_log::KeyLogFile;
use super::verify::{Checks, ClientIdentityVerifier, ServerIdentityVerifier};
use super::{Identity, PeerError, PeerRole, PeerWatch, Revocations, peer_identity, provider};

/// The application protocol of HBONE: HTTP/2.
pub const ALPN_H2: &[u8] = b"h2";

/// Client configurations kept per certificate. Far more than the sets of identities that one workload talks to; the bound
/// only keeps a workload that dials everybody from holding everything.
const MAX_CLIENT_CONFIGS: usize = 1024;

/// Why key and chain do not make a workload certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// The leaf is not X.509.
    #[error("the certificate of {0} cannot be read: {1}")]
    Unreadable(Identity, String),
    /// The leaf proves no identity.
    #[error("the certificate issued for {0} is not a workload's: {1}")]
    NotAWorkload(Identity, #[source] PeerError),
    /// The leaf proves another identity.
    #[error("asked for a certificate of {wanted}, got one of {got}")]
    OtherIdentity {
        /// What was asked for.
        wanted: Identity,
        /// What came.
        got: Identity,
    },
    /// Key and leaf do not belong together, or the configuration is refused.
    #[error("the certificate of {0} cannot be used: {1}")]
    Tls(Identity, #[source] rustls::Error),
    /// A root is no CA certificate, or there is none.
    #[error("the roots that came with the certificate of {0} cannot be used: {1}")]
    Roots(Identity, #[source] VerifierBuilderError),
}

/// What the TLS configurations of a process have in common beside their certificates.
#[derive(Debug, Clone, Default)]
pub struct TlsOptions {
    /// Peers whose certificates are revoked are refused, and their tunnels end.
    pub revocations: Option<Arc<Revocations>>,
    /// Where the secrets of sessions are written. For debugging only.
    pub key_log: Option<Arc<KeyLogFile>>,
}

/// A certificate that proves one identity, with its key and the roots that its holder trusts.
///
/// TLS 1.3 only, ALPN `h2`, both sides prove themselves. No session is ever resumed and no ticket sent: a resumed session
/// would skip the peer's check and could cross identities.
pub struct WorkloadCertificate {
    identity: Identity,
    certified: Arc<CertifiedKey>,
    roots: Arc<RootCertStore>,
    options: TlsOptions,
    not_before: SystemTime,
    not_after: SystemTime,
    serial: String,
    root_certificates: Vec<CertificateDer<'static>>,
    server: Arc<ServerConfig>,
    /// A client configuration that expects nobody.
    client: ClientConfig,
    clients: Mutex<HashMap<Arc<[Identity]>, Arc<ClientConfig>>>,
}

impl WorkloadCertificate {
    /// Checks that leaf (first of `chain`), key and `identity` belong together, and prepares the server side.
    pub fn new(
        identity: Identity,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
        roots: Vec<CertificateDer<'static>>,
    ) -> Result<Self, CertificateError> {
        let got = peer_identity(&chain)
            .map_err(|e| CertificateError::NotAWorkload(identity.clone(), e))?;
        if got != identity {
            return Err(CertificateError::OtherIdentity {
                wanted: identity,
                got,
            });
        }
        let (not_before, not_after, serial) = validity(&identity, &chain[0])?;
        let tls = |e| CertificateError::Tls(identity.clone(), e);
        let certified = Arc::new(CertifiedKey::from_der(chain, key, &provider()).map_err(tls)?);
        let mut store = RootCertStore::empty();
        for root in &roots {
            store.add(root.clone()).map_err(tls)?;
        }
        let root_certificates = roots;
        let roots = Arc::new(store);
        let options = TlsOptions::default();
        let (server, client) = configs(&identity, &certified, &roots, &options)?;
        Ok(Self {
            identity,
            certified,
            roots,
            options,
            not_before,
            not_after,
            serial,
            root_certificates,
            server,
            client,
            clients: Mutex::default(),
        })
    }

    /// The same certificate, used with these options.
    ///
    /// # Errors
    /// The configuration is refused.
    pub fn with_options(self, options: &TlsOptions) -> Result<Self, CertificateError> {
        let (server, client) = configs(&self.identity, &self.certified, &self.roots, options)?;
        Ok(Self {
            server,
            client,
            clients: Mutex::default(),
            options: options.clone(),
            ..self
        })
    }

    /// Watches the certificates of a peer whose handshake with one of the configurations made here is done, where
    /// revocation is known of.
    pub fn watch_peer(
        &self,
        role: PeerRole,
        chain: Option<&[CertificateDer<'static>]>,
    ) -> Option<PeerWatch> {
        let revocations = self.options.revocations.as_ref()?;
        Some(revocations.watch(role, chain?, &self.roots))
    }

    /// Whom it proves.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Leaf first, then intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    /// Whom its holder trusts.
    pub fn roots(&self) -> &[CertificateDer<'static>] {
        &self.root_certificates
    }

    /// First moment of its validity (certificates count whole seconds).
    pub fn valid_from(&self) -> SystemTime {
        self.not_before
    }

    /// Last moment of its validity.
    pub fn expires(&self) -> SystemTime {
        self.not_after
    }

    /// Whether it has run out.
    pub fn is_expired(&self) -> bool {
        SystemTime::now() > self.not_after
    }

    /// The serial number in lower-case hexadecimal, two digits per byte.
    pub fn serial_hex(&self) -> &str {
        &self.serial
    }

    /// Configuration for accepting HBONE: the client must prove an identity of this certificate's trust domain. Learn
    /// which one with [`peer_identity`] from the connection's `peer_certificates()`.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// Configuration for dialling HBONE: the server must prove one of `expected`. With none expected every handshake
    /// fails. The server name given to rustls is neither sent nor checked; the peer's IP address will do.
    pub fn client_config(&self, expected: &[Identity]) -> Arc<ClientConfig> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = clients.get(expected) {
            return Arc::clone(config);
        }
        if clients.len() >= MAX_CLIENT_CONFIGS {
            clients.clear();
        }
        let expected: Arc<[Identity]> = expected.into();
        let mut config = self.client.clone();
        config
            .dangerous()
            .set_certificate_verifier(Arc::new(ServerIdentityVerifier::new(
                Checks::new(&self.roots, &self.options),
                Arc::clone(&expected),
            )));
        let config = Arc::new(config);
        clients.insert(expected, Arc::clone(&config));
        config
    }
}

impl fmt::Debug for WorkloadCertificate {
    /// Without the key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WorkloadCertificate")
            .field("identity", &self.identity)
            .field("serial", &self.serial)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

fn configs(
    identity: &Identity,
    certified: &Arc<CertifiedKey>,
    roots: &Arc<RootCertStore>,
    options: &TlsOptions,
) -> Result<(Arc<ServerConfig>, ClientConfig), CertificateError> {
    let checks = Checks::new(roots, options);
    let mut server = server_config(identity, certified, checks.clone())?;
    let mut client =
        client_config(certified, checks).map_err(|e| CertificateError::Tls(identity.clone(), e))?;
    if let Some(key_log) = &options.key_log {
        server.key_log = Arc::<KeyLogFile>::clone(key_log);
        client.key_log = Arc::<KeyLogFile>::clone(key_log);
    }
    Ok((Arc::new(server), client))
}

fn server_config(
    identity: &Identity,
    certified: &Arc<CertifiedKey>,
    checks: Checks,
) -> Result<ServerConfig, CertificateError> {
    let trust_domain = Arc::clone(identity.trust_domain());
    let verifier = ClientIdentityVerifier::new(checks, trust_domain)
        .map_err(|e| CertificateError::Roots(identity.clone(), e))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|e| CertificateError::Tls(identity.clone(), e))?
        .with_client_cert_verifier(Arc::new(verifier))
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(
    certified: &Arc<CertifiedKey>,
    checks: Checks,
) -> Result<ClientConfig, rustls::Error> {
    let nobody: Arc<[Identity]> = Arc::new([]);
    let verifier = ServerIdentityVerifier::new(checks, nobody);
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(certified))));
    config.alpn_protocols = vec![ALPN_H2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

/// First and last moment, and serial number.
fn validity(
    identity: &Identity,
    leaf: &CertificateDer<'_>,
) -> Result<(SystemTime, SystemTime, String), CertificateError> {
    let (_, leaf) = X509Certificate::from_der(leaf)
        .map_err(|e| CertificateError::Unreadable(identity.clone(), e.to_string()))?;
    let serial = leaf
        .raw_serial()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    let validity = leaf.validity();
    Ok((
        moment(validity.not_before.timestamp()),
        moment(validity.not_after.timestamp()),
        serial,
    ))
}

/// Seconds since 1970 as a time; what comes before 1970 counts as 1970.
fn moment(unix_seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(unix_seconds).unwrap_or(0))
}
