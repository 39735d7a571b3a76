//! Keeps the certificates of the identities served here fresh.

mod requests;

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use rand::Rng;
use rustls::pki_types::CertificateDer;
use tokio::runtime::Handle;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;

use super::{CaError, CertificateAuthority, Identity, TlsOptions, WorkloadCertificate};
use requests::{Demand, Requests};

/// When certificates are renewed and failed requests repeated. The defaults are the field's.
#[derive(Debug, Clone, PartialEq)]
pub struct RefreshPolicy {
    /// A certificate is renewed after this part of what is left of its life.
    pub renew_after: f64,
    /// The moment of renewal moves randomly by up to this part of the wait, so that certificates issued together are not
    /// renewed together.
    pub renew_jitter: f64,
    /// Wait after the first failure; it doubles with each further one.
    pub retry_first: Duration,
    /// Longest wait after a failure.
    pub retry_longest: Duration,
    /// The wait after a failure moves randomly by up to this part.
    pub retry_jitter: f64,
    /// Requests in progress at one time, over all identities. Of those that wait, the one goes first whose certificate a
    /// connection waits for, then those for identities that have none, and renewals last.
    pub concurrent: usize,
}

impl Default for RefreshPolicy {
    fn default() -> Self {
        Self {
            renew_after: 0.5,
            renew_jitter: 0.1,
            retry_first: Duration::from_millis(500),
            retry_longest: Duration::from_secs(150),
            retry_jitter: 0.2,
            concurrent: 8,
        }
    }
}

/// A certificate that is renewed sooner than this after it was issued would keep the CA busy.
const SHORTEST_RENEWAL: Duration = Duration::from_millis(100);

impl RefreshPolicy {
    /// The wait until a certificate that has `left` to live is renewed.
    fn renewal(&self, left: Duration) -> Duration {
        jittered(left.mul_f64(self.renew_after), self.renew_jitter).max(SHORTEST_RENEWAL)
    }

    /// The wait after the `failures`-th failure in a row (from 1).
    fn retry(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        let wait = self.retry_first.saturating_mul(1 << doublings);
        jittered(wait.min(self.retry_longest), self.retry_jitter)
    }
}

fn jittered(wait: Duration, part: f64) -> Duration {
    if part > 0.0 {
        wait.mul_f64(1.0 + rand::rng().random_range(-part..=part))
    } else {
        wait
    }
}

/// The certificates of the identities served here. One request per identity at a time, whoever asks; renewed in the
/// background; kept until they expire when the CA fails.
pub struct Certificates {
    shared: Arc<Shared>,
    runtime: Handle,
    kept: Mutex<HashMap<Identity, Kept>>,
}

/// What the background tasks need.
struct Shared {
    ca: Arc<dyn CertificateAuthority>,
    options: TlsOptions,
    policy: RefreshPolicy,
    requests: Arc<Requests>,
}

/// One identity: its task and what the task has achieved.
struct Kept {
    progress: watch::Receiver<Progress>,
    /// Ends a wait of the task.
    hurry: Arc<Notify>,
    demand: Arc<Demand>,
    task: AbortHandle,
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.task.abort();
    }
}

#[derive(Debug, Clone, Default)]
struct Progress {
    certificate: Option<Arc<WorkloadCertificate>>,
    /// The last request failed thus.
    failure: Option<CaError>,
}

/// What a request for a certificate can be told at once.
enum Answer {
    Ready(Result<Arc<WorkloadCertificate>, CaError>),
    /// The certificate ran out with no failure known: its task overslept (the machine was suspended or its clock moved).
    Overslept,
    NotYet,
}

impl Progress {
    fn answer(&self) -> Answer {
        match (&self.certificate, &self.failure) {
            (Some(certificate), _) if !certificate.is_expired() => {
                Answer::Ready(Ok(Arc::clone(certificate)))
            }
            (Some(certificate), Some(failure)) => Answer::Ready(Err(CaError::Expired {
                identity: certificate.identity().clone(),
                reason: failure.to_string().into(),
            })),
            (Some(_), None) => Answer::Overslept,
            (None, Some(failure)) => Answer::Ready(Err(failure.clone())),
            (None, None) => Answer::NotYet,
        }
    }
}

impl Certificates {
    /// Certificates from `ca`. Renewal runs on the Tokio runtime that this is called on.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn new(ca: Arc<dyn CertificateAuthority>, policy: RefreshPolicy) -> Self {
        Self::with_options(ca, policy, TlsOptions::default())
    }

    /// As [`new`](Self::new); every certificate is used with these options.
    ///
    /// # Panics
    /// Outside a Tokio runtime.
    pub fn with_options(
        ca: Arc<dyn CertificateAuthority>,
        policy: RefreshPolicy,
        options: TlsOptions,
    ) -> Self {
        Self {
            shared: Arc::new(Shared {
                ca,
                options,
                requests: Requests::new(policy.concurrent),
                policy,
            }),
            runtime: Handle::current(),
            kept: Mutex::default(),
        }
    }

    /// The certificate of an identity: at once if there is one in force, else when the CA has answered. While requests
    /// to the CA fail, the last failure is returned without waiting for the next one.
    pub async fn get(&self, identity: &Identity) -> Result<Arc<WorkloadCertificate>, CaError> {
        let (mut progress, hurry, _waiting) = {
            let mut kept = self.lock();
            let entry = self.entry(&mut kept, identity);
            if let Answer::Ready(answer) = entry.progress.borrow().answer() {
                return answer;
            }
            (
                entry.progress.clone(),
                Arc::clone(&entry.hurry),
                entry.demand.wait(),
            )
        };
        loop {
            match progress.borrow_and_update().answer() {
                Answer::Ready(answer) => return answer,
                Answer::Overslept => hurry.notify_one(),
                Answer::NotYet => {}
            }
            if progress.changed().await.is_err() {
                return Err(CaError::Forgotten(identity.clone()));
            }
        }
    }

    /// Asks for an identity's certificate ahead of its first use.
    pub fn warm(&self, identity: &Identity) {
        self.entry(&mut self.lock(), identity);
    }

    /// Drops an identity's certificate and stops renewing it. Connections that use it live on.
    pub fn forget(&self, identity: &Identity) {
        self.lock().remove(identity);
    }

    /// What is held, ordered by identity.
    pub fn list(&self) -> Vec<CertificateInfo> {
        let mut list: Vec<_> = self
            .lock()
            .iter()
            .map(|(identity, kept)| CertificateInfo::of(identity, &kept.progress.borrow()))
            .collect();
        list.sort_by(|a, b| a.identity.cmp(&b.identity));
        list
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Identity, Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The identity's entry. A task that has ended (its CA panicked) is replaced.
    fn entry<'a>(
        &self,
        kept: &'a mut HashMap<Identity, Kept>,
        identity: &Identity,
    ) -> &'a mut Kept {
        let entry = kept
            .entry(identity.clone())
            .or_insert_with(|| self.start(identity));
        if entry.task.is_finished() {
            *entry = self.start(identity);
        }
        entry
    }

    fn start(&self, identity: &Identity) -> Kept {
        let (sender, progress) = watch::channel(Progress::default());
        let hurry = Arc::new(Notify::new());
        let demand = Arc::new(Demand::default());
        let watched = Watched {
            identity: identity.clone(),
            progress: sender,
            hurry: Arc::clone(&hurry),
            demand: Arc::clone(&demand),
        };
        let task = keep_fresh(Arc::clone(&self.shared), watched);
        Kept {
            progress,
            hurry,
            demand,
            task: self.runtime.spawn(task).abort_handle(),
        }
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("policy", &self.shared.policy)
            .field("held", &self.list())
            .finish()
    }
}

/// What the task of one identity shares with those who ask for its certificate.
struct Watched {
    identity: Identity,
    progress: watch::Sender<Progress>,
    hurry: Arc<Notify>,
    demand: Arc<Demand>,
}

/// Requests, waits, requests again, until aborted.
async fn keep_fresh(shared: Arc<Shared>, watched: Watched) {
    let Watched {
        identity,
        progress,
        hurry,
        demand,
    } = watched;
    let mut failures: u32 = 0;
    loop {
        let issued = {
            let _turn = shared.requests.turn(&demand).await;
            let issued = shared.ca.issue(&identity).await;
            issued.and_then(|certificate| usable(certificate, &shared.options))
        };
        let wait = match issued {
            Ok(certificate) => {
                failures = 0;
                demand.serve();
                let left = left(certificate.expires());
                let wait = shared.policy.renewal(left);
                tracing::debug!(%identity, serial = certificate.serial_hex(), renew_in = ?wait, "certificate issued");
                progress.send_modify(|p| {
                    p.certificate = Some(Arc::new(certificate));
                    p.failure = None;
                });
                wait
            }
            Err(error) => {
                failures = failures.saturating_add(1);
                let wait = shared.policy.retry(failures);
                tracing::warn!(%identity, %error, retry_in = ?wait, "no certificate from the CA");
                progress.send_modify(|p| p.failure = Some(error));
                wait
            }
        };
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = hurry.notified() => {}
        }
    }
}

/// A certificate that has run out before it arrived is a failure: taken for a success it would be asked for again at once.
fn usable(
    certificate: WorkloadCertificate,
    options: &TlsOptions,
) -> Result<WorkloadCertificate, CaError> {
    let identity = certificate.identity().clone();
    let failed = |reason: &str| CaError::Failed {
        identity,
        reason: reason.into(),
    };
    if certificate.is_expired() {
        let reason =
            "the CA answered with a certificate that has already expired: check both clocks";
        return Err(failed(reason));
    }
    certificate
        .with_options(options)
        .map_err(|error| failed(&error.to_string()))
}

fn left(expires: SystemTime) -> Duration {
    expires
        .duration_since(SystemTime::now())
        .unwrap_or(Duration::ZERO)
}

/// One identity's certificate, for the config dump.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateInfo {
    /// Whose certificate.
    pub identity: Identity,
    /// Whether there is one.
    pub state: CertificateState,
    /// Serial number in hexadecimal, if there is a certificate.
    pub serial: Option<String>,
    /// Beginning of its validity.
    pub not_before: Option<SystemTime>,
    /// End of its validity.
    pub not_after: Option<SystemTime>,
    /// The certificate and its intermediates.
    pub chain: Vec<CertificateDer<'static>>,
    /// Whom its holder trusts.
    pub roots: Vec<CertificateDer<'static>>,
}

/// What can be had for an identity.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateState {
    /// The first answer of the CA is awaited.
    Initializing,
    /// There is a certificate in force.
    Available,
    /// There is a certificate in force, but renewing it fails.
    NotRenewed(CaError),
    /// There is none in force.
    Unavailable(CaError),
}

impl CertificateInfo {
    fn of(identity: &Identity, progress: &Progress) -> Self {
        let state = match (progress.answer(), &progress.failure) {
            (Answer::Ready(Ok(_)), None) => CertificateState::Available,
            (Answer::Ready(Ok(_)), Some(failure)) => CertificateState::NotRenewed(failure.clone()),
            (Answer::Ready(Err(error)), _) => CertificateState::Unavailable(error),
            (Answer::Overslept | Answer::NotYet, _) => CertificateState::Initializing,
        };
        let certificate = progress.certificate.as_ref();
        Self {
            identity: identity.clone(),
            state,
            serial: certificate.map(|c| c.serial_hex().to_owned()),
            not_before: certificate.map(|c| c.valid_from()),
            not_after: certificate.map(|c| c.expires()),
            chain: certificate.map_or_else(Vec::new, |c| c.chain().to_vec()),
            roots: certificate.map_or_else(Vec::new, |c| c.roots().to_vec()),
        }
    }
}

#[cfg(test)]
mod tests;
