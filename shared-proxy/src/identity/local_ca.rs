//! The built-in CA: a root on disk, leaves made on request in this process.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, X509Certificate};

use super::spiffe::{InvalidIdentity, check_trust_domain};
use super::{CaError, CertificateAuthority, Identity, WorkloadCertificate};

/// How long the root is valid: ten years.
pub const ROOT_VALIDITY: Duration = Duration::from_secs(3650 * 24 * 3600);
/// How long a leaf is valid unless told otherwise: a day, as in the field.
pub const DEFAULT_LEAF_TTL: Duration = Duration::from_secs(24 * 3600);

/// Certificates begin this much in the past, so that a peer whose clock is late accepts them.
const CLOCK_SKEW: Duration = Duration::from_secs(60);

mod signing;

pub use signing::SigningError;

const KEY_FILE: &str = "root-key.pem";
const CERT_FILE: &str = "root-cert.pem";
const LOCK_FILE: &str = ".root.lock";

/// A CA whose root lives in a directory as `root-key.pem` (mode 0600) and `root-cert.pem`, ECDSA P-256.
///
/// The key is read again for every leaf and not kept: taking the files away stops this CA in every process at once, and
/// putting them back lets it go on. Replacing the root by another one means restarting every process that uses it.
pub struct LocalCa {
    trust_domain: Arc<str>,
    leaf_ttl: Duration,
    files: RootFiles,
    root: CertificateDer<'static>,
    root_expires: OffsetDateTime,
}

/// Why the root cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum LocalCaError {
    /// Reading or writing failed.
    #[error("CA file {path}: {source}")]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file's content is unusable.
    #[error("CA file {path}: {reason}")]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the fix.
        reason: String,
    },
    /// The trust domain cannot be part of an identity.
    #[error(transparent)]
    TrustDomain(#[from] InvalidIdentity),
    /// Making the root failed.
    #[error("making a root certificate: {0}")]
    Generate(#[from] rcgen::Error),
}

impl LocalCa {
    /// Opens the root in `dir`, or makes one there if the directory holds none. Processes that race to make it end up
    /// with the same one. Leaves are issued for identities of `trust_domain` only and are valid for `leaf_ttl`.
    pub fn open(
        dir: impl AsRef<Path>,
        trust_domain: &str,
        leaf_ttl: Duration,
    ) -> Result<Self, LocalCaError> {
        check_trust_domain(trust_domain)?;
        let files = RootFiles::at(dir.as_ref());
        let (key, root) = files.load_or_make(trust_domain)?;
        let expires = check_pair(&files, &key, &root)?;
        Ok(Self {
            trust_domain: trust_domain.into(),
            leaf_ttl: leaf_ttl.min(ROOT_VALIDITY),
            files,
            root,
            root_expires: expires,
        })
    }

    /// The root certificate.
    pub fn root(&self) -> &CertificateDer<'static> {
        &self.root
    }

    fn check_trust_domain_of(&self, identity: &Identity) -> Result<(), CaError> {
        if *identity.trust_domain() == self.trust_domain {
            return Ok(());
        }
        Err(CaError::ForeignTrustDomain {
            identity: identity.clone(),
            trust_domain: Arc::clone(&self.trust_domain),
        })
    }

    fn leaf(&self, identity: &Identity) -> Result<WorkloadCertificate, CaError> {
        self.check_trust_domain_of(identity)?;
        let failed = |reason: String| CaError::Failed {
            identity: identity.clone(),
            reason: reason.into(),
        };
        let issuer = self.issuer().map_err(|e| failed(e.to_string()))?;
        let (key, leaf) = self
            .sign(identity, &issuer)
            .map_err(|e| failed(e.to_string()))?;
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        WorkloadCertificate::new(identity.clone(), vec![leaf], key, vec![self.root.clone()])
            .map_err(|e| failed(e.to_string()))
    }

    fn issuer(&self) -> Result<Issuer<'static, KeyPair>, LocalCaError> {
        let (key, root) = self.files.load()?;
        if root != self.root {
            let reason = "it is another root than at the start: restart all processes that use it";
            return Err(content(&self.files.cert, reason));
        }
        check_pair(&self.files, &key, &root)?;
        Issuer::from_ca_cert_der(&root, key).map_err(|e| content(&self.files.cert, e.to_string()))
    }

    fn sign(
        &self,
        identity: &Identity,
        issuer: &Issuer<'_, KeyPair>,
    ) -> Result<(KeyPair, CertificateDer<'static>), rcgen::Error> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let name = SanType::URI(identity.to_string().try_into()?);
        let params = self.leaf_params(vec![name], self.leaf_ttl);
        let leaf = params.signed_by(&key, issuer)?;
        Ok((key, leaf.der().clone()))
    }

    /// What certificates have in common, with these names, valid for `ttl` or as long as the root.
    fn leaf_params(&self, names: Vec<SanType>, ttl: Duration) -> CertificateParams {
        let mut params = CertificateParams::default();
        let now = OffsetDateTime::now_utc();
        params.not_before = now - CLOCK_SKEW;
        params.not_after = now
            .checked_add(ttl.try_into().unwrap_or(time::Duration::MAX))
            .map_or(self.root_expires, |end| end.min(self.root_expires));
        params.serial_number = Some(random_serial());
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        params
    }
}

impl CertificateAuthority for LocalCa {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<WorkloadCertificate, CaError>> {
        async move { self.leaf(identity) }.boxed()
    }
}

/// 16 random bytes; the top bit is clear and the next one set, so that it is positive and never shorter.
fn random_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = (bytes[0] & 0x7f) | 0x40;
    SerialNumber::from_slice(&bytes)
}

struct RootFiles {
    dir: PathBuf,
    key: PathBuf,
    cert: PathBuf,
}

impl RootFiles {
    fn at(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            key: dir.join(KEY_FILE),
            cert: dir.join(CERT_FILE),
        }
    }

    /// The certificate is written last, so once it is there the key is too and nothing is being made any more.
    fn load_or_make(
        &self,
        trust_domain: &str,
    ) -> Result<(KeyPair, CertificateDer<'static>), LocalCaError> {
        if self.made()? {
            return self.load();
        }
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.dir)
            .map_err(file(&self.dir))?;
        let lock_path = self.dir.join(LOCK_FILE);
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&lock_path)
            .map_err(file(&lock_path))?;
        lock.lock().map_err(file(&lock_path))?;
        if !self.made()? {
            let (key, cert) = make_root(trust_domain)?;
            self.write(&self.key, 0o600, &key)?;
            self.write(&self.cert, 0o644, &cert)?;
        }
        self.load()
    }

    fn made(&self) -> Result<bool, LocalCaError> {
        self.cert.try_exists().map_err(file(&self.cert))
    }

    /// A reader sees the whole file or none. Called with the lock held, so one temporary name is enough.
    fn write(&self, path: &Path, mode: u32, text: &str) -> Result<(), LocalCaError> {
        let temporary = path.with_extension("pem.tmp");
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(file(&temporary)(e)),
            _ => {}
        }
        OpenOptions::new()
            .create_new(true)
            .write(true)
            .mode(mode)
            .open(&temporary)
            .and_then(|mut f| {
                f.write_all(text.as_bytes())?;
                f.sync_all()
            })
            .map_err(file(&temporary))?;
        fs::rename(&temporary, path).map_err(file(path))?;
        File::open(&self.dir)
            .and_then(|dir| dir.sync_all())
            .map_err(file(&self.dir))
    }

    fn load(&self) -> Result<(KeyPair, CertificateDer<'static>), LocalCaError> {
        let cert = fs::read(&self.cert).map_err(file(&self.cert))?;
        let cert = CertificateDer::from_pem_slice(&cert)
            .map_err(|e| content(&self.cert, format!("no certificate in PEM: {e}")))?;
        let mode = match fs::metadata(&self.key) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let reason = format!(
                    "missing, but its certificate is there: restore it, or remove {CERT_FILE} to make another root"
                );
                return Err(content(&self.key, reason));
            }
            other => other.map_err(file(&self.key))?.mode(),
        };
        if mode & 0o077 != 0 {
            let reason = format!("others may use it (mode {:04o}): chmod 600", mode & 0o7777);
            return Err(content(&self.key, reason));
        }
        let key = fs::read_to_string(&self.key).map_err(file(&self.key))?;
        let key = KeyPair::from_pem(&key).map_err(|e| content(&self.key, e.to_string()))?;
        Ok((key, cert))
    }
}

fn file(path: &Path) -> impl FnOnce(io::Error) -> LocalCaError {
    let path = path.to_owned();
    move |source| LocalCaError::File { path, source }
}

fn content(path: &Path, reason: impl Into<String>) -> LocalCaError {
    LocalCaError::Content {
        path: path.to_owned(),
        reason: reason.into(),
    }
}

/// A fresh root: key and certificate in PEM.
fn make_root(trust_domain: &str) -> Result<(String, String), LocalCaError> {
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
    let mut params = CertificateParams::default();
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + ROOT_VALIDITY;
    params.serial_number = Some(random_serial());
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::OrganizationName, trust_domain);
    params
        .distinguished_name
        .push(DnType::CommonName, "Ambidex root");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let cert = params.self_signed(&key)?;
    Ok((key.serialize_pem(), cert.pem()))
}

/// Fails unless the certificate is a CA's, in force, and of this key. Returns its end.
fn check_pair(
    files: &RootFiles,
    key: &KeyPair,
    cert: &CertificateDer<'_>,
) -> Result<OffsetDateTime, LocalCaError> {
    let refuse = |reason: &str| Err(content(&files.cert, reason));
    let (_, root) =
        X509Certificate::from_der(cert).map_err(|e| content(&files.cert, e.to_string()))?;
    if !root.is_ca() {
        return refuse("not a CA certificate");
    }
    if root.public_key().raw != key.subject_public_key_info() {
        return refuse(
            "it is not the certificate of root-key.pem: the two files come from different roots",
        );
    }
    if !root.validity().is_valid() {
        return refuse(
            "it has expired or is not valid yet: remove both files to make another root",
        );
    }
    Ok(root.validity().not_after.to_datetime())
}

#[cfg(test)]
mod tests;
