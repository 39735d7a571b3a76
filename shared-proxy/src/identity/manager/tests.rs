#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

use futures_util::future::{BoxFuture, FutureExt, join_all};
use tempfile::TempDir;
use tokio::time::{sleep, timeout};

use super::super::LocalCa;
use super::*;

/// A real CA that counts, waits, fails and panics on demand.
struct Moody {
    ca: LocalCa,
    _dir: TempDir,
    delay: Duration,
    issued: AtomicUsize,
    busy: AtomicUsize,
    busiest: AtomicUsize,
    failing: AtomicBool,
    panicking: AtomicBool,
}

impl Moody {
    fn new(ttl: Duration, delay: Duration) -> Arc<Self> {
        let dir = tempfile::tempdir().unwrap();
        Arc::new(Self {
            ca: LocalCa::open(dir.path(), "cluster.local", ttl).unwrap(),
            _dir: dir,
            delay,
            issued: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            busiest: AtomicUsize::new(0),
            failing: AtomicBool::new(false),
            panicking: AtomicBool::new(false),
        })
    }

    fn fail(&self, yes: bool) {
        self.failing.store(yes, Ordering::SeqCst);
    }

    fn issued(&self) -> usize {
        self.issued.load(Ordering::SeqCst)
    }
}

impl CertificateAuthority for Moody {
    fn issue<'a>(
        &'a self,
        identity: &'a Identity,
    ) -> BoxFuture<'a, Result<WorkloadCertificate, CaError>> {
        async move {
            self.issued.fetch_add(1, Ordering::SeqCst);
            let busy = self.busy.fetch_add(1, Ordering::SeqCst) + 1;
            self.busiest.fetch_max(busy, Ordering::SeqCst);
            sleep(self.delay).await;
            self.busy.fetch_sub(1, Ordering::SeqCst);
            assert!(!self.panicking.load(Ordering::SeqCst), "on demand");
            if self.failing.load(Ordering::SeqCst) {
                return Err(CaError::Failed {
                    identity: identity.clone(),
                    reason: "out of ink".into(),
                });
            }
            self.ca.issue(identity).await
        }
        .boxed()
    }
}

const LONG: Duration = Duration::from_secs(3600);
const SOON: Duration = Duration::from_millis(20);

fn quick() -> RefreshPolicy {
    RefreshPolicy {
        retry_first: SOON,
        retry_longest: SOON * 4,
        ..RefreshPolicy::default()
    }
}

fn alice() -> Identity {
    Identity::new("cluster.local", "shop", "alice").unwrap()
}

/// Waits for a condition, at most 20 s.
async fn until(condition: impl Fn() -> bool) {
    timeout(Duration::from_secs(20), async {
        while !condition() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("it did not happen within 20 s");
}

fn state(certificates: &Certificates) -> CertificateState {
    certificates.list().remove(0).state
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_who_ask_at_once_share_one_request() {
    let ca = Moody::new(LONG, Duration::from_millis(50));
    let certificates = Certificates::new(ca.clone(), quick());
    let alice = alice();
    let all = join_all((0..50).map(|_| certificates.get(&alice))).await;
    let first = all[0].as_ref().unwrap();
    assert!(all.iter().all(|c| Arc::ptr_eq(c.as_ref().unwrap(), first)));
    assert!(Arc::ptr_eq(first, &certificates.get(&alice).await.unwrap()));
    assert_eq!(ca.issued(), 1);
    let info = certificates.list().remove(0);
    assert_eq!(info.state, CertificateState::Available);
    assert_eq!(info.serial.as_deref(), Some(first.serial_hex()));
    assert_eq!(info.not_after, Some(first.expires()));
}

#[tokio::test]
async fn a_warm_identity_is_there_before_it_is_asked_for() {
    let ca = Moody::new(LONG, SOON);
    let certificates = Certificates::new(ca.clone(), quick());
    certificates.warm(&alice());
    assert_eq!(state(&certificates), CertificateState::Initializing);
    until(|| state(&certificates) == CertificateState::Available).await;
    certificates.get(&alice()).await.unwrap();
    assert_eq!(ca.issued(), 1);
}

#[tokio::test]
async fn certificates_are_renewed_in_the_background() {
    let ca = Moody::new(Duration::from_secs(5), Duration::ZERO);
    let certificates = Certificates::new(ca.clone(), quick());
    let begin = Instant::now();
    let first = certificates.get(&alice()).await.unwrap();
    // A lifetime of whole seconds has 4 to 5 s left; half of that, within a tenth, is 1.8 to 2.75 s.
    until(|| ca.issued() == 2).await;
    let waited = begin.elapsed();
    assert!(waited >= Duration::from_millis(1750), "{waited:?}");
    assert!(!first.is_expired(), "renewed before it ran out");
    until(|| certificates.list()[0].serial.as_deref() != Some(first.serial_hex())).await;
    let second = certificates.get(&alice()).await.unwrap();
    assert!(second.expires() > first.expires());
}

#[tokio::test]
async fn a_failing_ca_is_survived_until_the_certificate_expires() {
    let ca = Moody::new(Duration::from_secs(5), Duration::ZERO);
    let certificates = Certificates::new(ca.clone(), quick());
    let first = certificates.get(&alice()).await.unwrap();
    ca.fail(true);
    until(|| matches!(state(&certificates), CertificateState::NotRenewed(_))).await;
    let kept = certificates.get(&alice()).await.unwrap();
    assert!(Arc::ptr_eq(&first, &kept));
    until(|| first.is_expired()).await;
    assert_eq!(
        certificates.get(&alice()).await.unwrap_err().to_string(),
        "the certificate of spiffe://cluster.local/ns/shop/sa/alice has expired and could not be renewed: \
         no certificate for spiffe://cluster.local/ns/shop/sa/alice: out of ink"
    );
    assert!(matches!(
        state(&certificates),
        CertificateState::Unavailable(_)
    ));
    ca.fail(false);
    until(|| state(&certificates) == CertificateState::Available).await;
    certificates.get(&alice()).await.unwrap();
}

#[tokio::test]
async fn the_first_failure_is_told_at_once_and_repeated_requests_recover() {
    let ca = Moody::new(LONG, SOON);
    ca.fail(true);
    let policy = RefreshPolicy {
        retry_first: Duration::from_secs(2),
        ..RefreshPolicy::default()
    };
    let certificates = Certificates::new(ca.clone(), policy);
    let begin = Instant::now();
    assert!(certificates.get(&alice()).await.is_err());
    assert!(certificates.get(&alice()).await.is_err());
    assert!(
        begin.elapsed() < Duration::from_millis(1500),
        "no wait for the next try"
    );
    assert_eq!(ca.issued(), 1, "asking does not hurry the CA");
    ca.fail(false);
    until(|| state(&certificates) == CertificateState::Available).await;
    assert!(begin.elapsed() >= Duration::from_millis(1500));
}

#[tokio::test]
async fn a_certificate_that_arrives_expired_is_a_failure() {
    let ca = Moody::new(Duration::ZERO, Duration::ZERO);
    // Whole seconds: now is over when the next one begins.
    let certificates = Certificates::new(ca.clone(), RefreshPolicy::default());
    let error = timeout(Duration::from_secs(5), certificates.get(&alice())).await;
    let error = error.unwrap().unwrap_err().to_string();
    assert!(error.contains("already expired"), "{error}");
    assert_eq!(ca.issued(), 1);
}

#[tokio::test]
async fn forgetting_ends_the_wait_and_the_renewal() {
    let ca = Moody::new(LONG, LONG);
    let certificates = Arc::new(Certificates::new(ca.clone(), quick()));
    let waiting = tokio::spawn({
        let certificates = Arc::clone(&certificates);
        async move { certificates.get(&alice()).await }
    });
    until(|| ca.issued() == 1).await;
    certificates.forget(&alice());
    let error = timeout(Duration::from_secs(5), waiting).await.unwrap();
    assert_eq!(error.unwrap().unwrap_err(), CaError::Forgotten(alice()));
    assert!(certificates.list().is_empty());
}

#[tokio::test]
async fn renewal_ends_with_the_manager() {
    let ca = Moody::new(LONG, Duration::ZERO);
    let certificates = Certificates::new(ca.clone(), quick());
    certificates.get(&alice()).await.unwrap();
    drop(certificates);
    until(|| Arc::strong_count(&ca) == 1).await;
}

#[tokio::test]
async fn a_panic_of_the_ca_is_not_the_end() {
    let ca = Moody::new(LONG, Duration::ZERO);
    ca.panicking.store(true, Ordering::SeqCst);
    let certificates = Certificates::new(ca.clone(), quick());
    assert!(certificates.get(&alice()).await.is_err());
    ca.panicking.store(false, Ordering::SeqCst);
    until(|| {
        certificates
            .lock()
            .values()
            .all(|kept| kept.task.is_finished())
    })
    .await;
    certificates.get(&alice()).await.unwrap();
}

#[tokio::test]
async fn requests_of_many_identities_are_limited() {
    let ca = Moody::new(LONG, SOON);
    let certificates = Certificates::new(
        ca.clone(),
        RefreshPolicy {
            concurrent: 3,
            ..quick()
        },
    );
    let identities: Vec<_> = (0..12)
        .map(|n| Identity::new("cluster.local", "shop", format!("sa{n}")).unwrap())
        .collect();
    let all = join_all(identities.iter().map(|identity| certificates.get(identity))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(ca.busiest.load(Ordering::SeqCst), 3);
}

#[test]
fn waits_double_and_stay_within_their_jitter() {
    let plain = RefreshPolicy {
        retry_jitter: 0.0,
        renew_jitter: 0.0,
        ..RefreshPolicy::default()
    };
    let waits: Vec<f64> = (1..=11).map(|n| plain.retry(n).as_secs_f64()).collect();
    assert_eq!(
        waits,
        [
            0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 150.0, 150.0
        ]
    );
    assert_eq!(plain.retry(u32::MAX), plain.retry_longest);
    assert_eq!(plain.renewal(LONG), LONG / 2);
    let policy = RefreshPolicy::default();
    let renewals: Vec<_> = (0..200).map(|_| policy.renewal(LONG)).collect();
    assert!(
        renewals
            .iter()
            .all(|w| *w >= LONG.mul_f64(0.45) && *w <= LONG.mul_f64(0.55))
    );
    assert!(renewals.iter().any(|w| *w != renewals[0]));
}
