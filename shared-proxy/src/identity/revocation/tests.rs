#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::future::Future;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::time::{Duration, SystemTime};

use prometheus_client::registry::Registry;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationList,
    CertificateRevocationListParams, DnType, IsCa, Issuer, KeyIdMethod, KeyPair, RevocationReason,
    RevokedCertParams, SerialNumber,
};
use rustls::AlertDescription;
use time::OffsetDateTime;
use tokio::time::timeout;

use super::super::handshake_tests::{ALICE, BOB, TestCa, handshake, id, in_an_hour};
use super::super::{TlsOptions, WorkloadCertificate};
use super::*;

const HOUR: Duration = Duration::from_secs(3600);

/// A list of what `ca` has revoked, issued some time ago.
fn list_of(ca: &TestCa, serials: &[Vec<u8>], issued: Duration) -> CertificateRevocationList {
    let now = OffsetDateTime::now_utc();
    let entry = |serial: &Vec<u8>| RevokedCertParams {
        serial_number: SerialNumber::from_slice(serial),
        revocation_time: now - issued,
        reason_code: Some(RevocationReason::KeyCompromise),
        invalidity_date: None,
    };
    let list = CertificateRevocationListParams {
        this_update: now - issued,
        next_update: now - issued + HOUR,
        crl_number: SerialNumber::from(1_u64),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(entry).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    list.signed_by(&ca.issuer).unwrap()
}

fn list(ca: &TestCa, revoked: &[&WorkloadCertificate]) -> String {
    let serials: Vec<_> = revoked.iter().map(|it| serial(it)).collect();
    list_of(ca, &serials, Duration::from_secs(60))
        .pem()
        .unwrap()
}

fn serial(certificate: &WorkloadCertificate) -> Vec<u8> {
    let digits = certificate.serial_hex();
    let bytes = (0..digits.len()).step_by(2);
    bytes
        .map(|at| u8::from_str_radix(&digits[at..at + 2], 16).unwrap())
        .collect()
}

/// A CA under another one, with a name of its own, and its serial number.
fn below(ca: &TestCa) -> (TestCa, Vec<u8>) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params
        .distinguished_name
        .push(DnType::CommonName, "intermediate");
    params.serial_number = Some(SerialNumber::from_slice(&[0x41; 8]));
    let root = params.signed_by(&key, &ca.issuer).unwrap().der().clone();
    let issuer = Issuer::new(params, key);
    (TestCa { issuer, root }, vec![0x41; 8])
}

fn under(revocations: &Arc<Revocations>, certificate: WorkloadCertificate) -> WorkloadCertificate {
    let options = TlsOptions {
        revocations: Some(Arc::clone(revocations)),
        key_log: None,
    };
    certificate.with_options(&options).unwrap()
}

fn metrics(revocations: &Revocations) -> String {
    let mut registry = Registry::default();
    revocations.register(&mut registry);
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
    text
}

#[test]
fn a_revoked_peer_is_refused_in_both_directions_with_the_alert_that_says_so() {
    let ca = TestCa::new();
    let revocations = Arc::new(Revocations::new());
    let alice = under(&revocations, ca.certificate(ALICE));
    let bob = ca.certificate(BOB);
    let there = || handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    let back = || handshake(bob.client_config(&[id(ALICE)]), alice.server_config());
    let stranger = ca.certificate(BOB);
    for nothing in [String::new(), list(&ca, &[]), list(&ca, &[&stranger])] {
        revocations.replace(nothing.as_bytes()).unwrap();
        assert!(there().established() && back().established());
    }

    let revoked = list(&ca, &[&stranger, &bob]);
    revocations.replace(revoked.as_bytes()).unwrap();
    let refused = there();
    assert!(
        refused.client_error().contains("Revoked"),
        "{}",
        refused.client_error()
    );
    let told = Error::AlertReceived(AlertDescription::CertificateRevoked);
    assert_eq!(refused.server_result, Err(told.clone()));
    let refused = back();
    assert!(
        refused.server_error().contains("Revoked"),
        "{}",
        refused.server_error()
    );
    assert_eq!(refused.client_result, Err(told));
    let counted = metrics(&revocations);
    for line in [
        "istio_crl_policy_rejections_total{reporter=\"source\"} 1",
        "istio_crl_policy_rejections_total{reporter=\"destination\"} 1",
        "ambidex_crl_revoked_certificates 2",
    ] {
        assert!(counted.contains(line), "{line} in {counted}");
    }

    revocations
        .replace(list(&ca, &[&stranger]).as_bytes())
        .unwrap();
    assert!(there().established() && back().established());
}

#[test]
fn what_ends_a_handshake_can_be_told_from_other_errors() {
    let error = |certificate| {
        let error = Error::InvalidCertificate(certificate);
        std::io::Error::new(std::io::ErrorKind::InvalidData, error)
    };
    let is_revocation = super::super::is_revocation;
    assert!(is_revocation(&error(CertificateError::Revoked)));
    assert!(!is_revocation(&error(CertificateError::Expired)));
    assert!(!is_revocation(&std::io::ErrorKind::UnexpectedEof.into()));
}

#[test]
fn a_list_without_a_successor_still_counts() {
    let ca = TestCa::new();
    let revocations = Arc::new(Revocations::new());
    let (alice, bob) = (
        under(&revocations, ca.certificate(ALICE)),
        ca.certificate(BOB),
    );
    let old = list_of(&ca, &[serial(&bob)], 48 * HOUR);
    revocations.replace(old.der()).unwrap();
    let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    assert!(done.client_error().contains("Revoked"));
}

/// Whoever has both lists of one issuer in a file means the later one, in whatever order.
#[test]
fn the_latest_list_of_an_issuer_counts() {
    let ca = TestCa::new();
    let revocations = Arc::new(Revocations::new());
    let (alice, bob) = (
        under(&revocations, ca.certificate(ALICE)),
        ca.certificate(BOB),
    );
    let lists = [
        list_of(&ca, &[], 2 * HOUR).pem().unwrap(),
        list_of(&ca, &[serial(&bob)], HOUR).pem().unwrap(),
    ];
    for order in [[0, 1], [1, 0]] {
        let both = order.map(|at| lists[at].as_str()).concat();
        revocations.replace(both.as_bytes()).unwrap();
        let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
        assert!(done.client_error().contains("Revoked"));
    }
}

/// Both CAs have the same name; only one has issued the peer's certificate.
#[test]
fn a_list_that_the_issuer_has_not_signed_is_not_relied_on() {
    let (ours, forger) = (TestCa::new(), TestCa::new());
    let revocations = Arc::new(Revocations::new());
    let alice = under(&revocations, ours.certificate(ALICE));
    let (bob, carol) = (ours.certificate(BOB), ours.certificate(BOB));
    revocations
        .replace(list(&forger, &[&bob]).as_bytes())
        .unwrap();
    let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    let error = done.client_error();
    assert!(
        error.contains("cannot be relied on") && error.contains(BOB),
        "{error}"
    );
    let done = handshake(alice.client_config(&[id(BOB)]), carol.server_config());
    assert!(done.established(), "it is on no list");
}

#[test]
fn a_revoked_intermediate_takes_its_leaves_with_it() {
    let root = TestCa::new();
    let (intermediate, its_serial) = below(&root);
    let revocations = Arc::new(Revocations::new());
    let alice = under(&revocations, root.certificate(ALICE));
    let (leaf, key) = intermediate.leaf(&[BOB], in_an_hour());
    let chain = vec![leaf, intermediate.root.clone()];
    let bob = WorkloadCertificate::new(id(BOB), chain, key, vec![root.root.clone()]).unwrap();
    let there = || handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    assert!(there().established());
    let below_it = list(&intermediate, &[]);
    let above_it = list_of(&root, &[its_serial], HOUR).pem().unwrap();
    revocations
        .replace((below_it + &above_it).as_bytes())
        .unwrap();
    assert!(there().client_error().contains("Revoked"));
}

/// What no list can be read from, and words of the error.
#[rstest::rstest]
#[case::text("certificates, revoked".to_owned(), "list 1: ")]
#[case::cut("-----BEGIN X509 CRL-----\nMIIB".to_owned(), "neither revocation lists")]
#[case::another_kind(TestCa::new().issuer.key().serialize_pem(), "something else")]
#[case::second(list(&TestCa::new(), &[]) + "-----BEGIN X509 CRL-----\nMAA=\n-----END X509 CRL-----\n", "list 2: ")]
fn a_bad_file_leaves_the_lists_in_force(#[case] bad: String, #[case] words: &str) {
    let ca = TestCa::new();
    let revocations = Arc::new(Revocations::new());
    let (alice, bob) = (
        under(&revocations, ca.certificate(ALICE)),
        ca.certificate(BOB),
    );
    revocations.replace(list(&ca, &[&bob]).as_bytes()).unwrap();
    let error = revocations.replace(bad.as_bytes()).unwrap_err().to_string();
    assert!(error.contains(words), "{error}");
    let done = handshake(alice.client_config(&[id(BOB)]), bob.server_config());
    assert!(done.client_error().contains("Revoked"));
}

async fn soon(what: impl Future<Output = ()>) {
    timeout(Duration::from_secs(20), what)
        .await
        .expect("it did not happen within 20 s");
}

#[tokio::test]
async fn tunnels_end_whose_peers_are_revoked_and_no_others() {
    let ca = TestCa::new();
    let revocations = Arc::new(Revocations::new());
    let alice = under(&revocations, ca.certificate(ALICE));
    let (bob, carol) = (ca.certificate(BOB), ca.certificate(BOB));
    let watch = |peer: &WorkloadCertificate, role| alice.watch_peer(role, Some(peer.chain()));
    let of_bob = watch(&bob, PeerRole::Server).unwrap();
    let of_carol = watch(&carol, PeerRole::Client).unwrap();
    drop(watch(&bob, PeerRole::Server));
    revocations.replace(list(&ca, &[&bob]).as_bytes()).unwrap();
    soon(until_revoked(Some(&of_bob))).await;
    assert!(of_bob.standing().is_revoked() && !of_carol.standing().is_revoked());
    assert!(format!("{revocations:?}").contains("watched: 2"));
    // Revoked between the handshake and now.
    let late = watch(&bob, PeerRole::Client).unwrap();
    soon(until_revoked(Some(&late))).await;
    // It is counted once, however often its list comes.
    revocations.replace(list(&ca, &[&bob]).as_bytes()).unwrap();
    let counted = metrics(&revocations);
    for reporter in ["source", "destination"] {
        let line = format!("ambidex_crl_closed_tunnels_total{{reporter=\"{reporter}\"}} 1");
        assert!(counted.contains(&line), "{line} in {counted}");
    }
    drop((of_bob, of_carol, late));
    assert!(format!("{revocations:?}").contains("watched: 0"));
}

/// The peer's certificate ran out while its tunnel stood, and is revoked then.
#[tokio::test]
async fn a_tunnel_whose_peers_certificate_has_run_out_can_be_revoked() {
    let ca = TestCa::new();
    let revocations = Arc::new(Revocations::new());
    let alice = under(&revocations, ca.certificate(ALICE));
    let soon_over = SystemTime::now() + Duration::from_secs(2);
    let (leaf, key) = ca.leaf(&[BOB], soon_over);
    let bob = WorkloadCertificate::new(id(BOB), vec![leaf], key, vec![ca.root.clone()]).unwrap();
    let watch = alice.watch_peer(PeerRole::Server, Some(bob.chain()));
    while !bob.is_expired() {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    revocations.replace(list(&ca, &[]).as_bytes()).unwrap();
    let standing = watch.as_ref().unwrap().standing();
    assert!(!standing.is_revoked(), "that it ran out ends no tunnel");
    revocations.replace(list(&ca, &[&bob]).as_bytes()).unwrap();
    soon(until_revoked(watch.as_ref())).await;
}

fn rename_over(path: &Path, text: &str) {
    let other = path.with_extension("other");
    fs::write(&other, text).unwrap();
    fs::rename(&other, path).unwrap();
}

async fn until(what: impl Fn() -> bool) {
    soon(async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_file_may_come_later_and_is_followed() {
    let ca = TestCa::new();
    let (bob, carol) = (ca.certificate(BOB), ca.certificate(BOB));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    let revocations = Arc::new(Revocations::new());
    let task = follow_file(&path, Arc::clone(&revocations)).unwrap();
    assert_eq!(revocations.revoked(), 0);
    fs::write(&path, list(&ca, &[&bob])).unwrap();
    until(|| revocations.revoked() == 1).await;
    rename_over(&path, &list(&ca, &[&bob, &carol]));
    until(|| revocations.revoked() == 2).await;
    let failures = |count: u32| {
        let line = format!("ambidex_crl_failed_loads_total {count}\n");
        metrics(&revocations).contains(&line)
    };
    fs::write(&path, "garbage").unwrap();
    until(|| failures(1)).await;
    fs::remove_file(&path).unwrap();
    until(|| failures(2)).await;
    assert_eq!(revocations.revoked(), 2, "the last good lists stay");
    fs::write(&path, "").unwrap();
    until(|| revocations.revoked() == 0).await;
    task.abort();
}

/// As Kubernetes replaces a ConfigMap: the file is a link through a link to a directory, which is exchanged.
#[tokio::test]
async fn a_directory_that_is_exchanged_is_noticed() {
    let ca = TestCa::new();
    let bob = ca.certificate(BOB);
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    for (version, text) in [("v1", list(&ca, &[])), ("v2", list(&ca, &[&bob]))] {
        fs::create_dir(at(version)).unwrap();
        fs::write(at(version).join("ca-crl.pem"), text).unwrap();
    }
    symlink("v1", at("..data")).unwrap();
    symlink("..data/ca-crl.pem", at("ca-crl.pem")).unwrap();
    let revocations = Arc::new(Revocations::new());
    let task = follow_file(at("ca-crl.pem"), Arc::clone(&revocations)).unwrap();
    symlink("v2", at("..data_tmp")).unwrap();
    fs::rename(at("..data_tmp"), at("..data")).unwrap();
    until(|| revocations.revoked() == 1).await;
    task.abort();
}

#[tokio::test]
async fn a_file_that_is_bad_from_the_beginning_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crl.pem");
    fs::write(&path, "garbage").unwrap();
    let error = follow_file(&path, Arc::new(Revocations::new())).unwrap_err();
    let error = error.to_string();
    assert!(error.contains("crl.pem: list 1: "), "{error}");
    let error = follow_file(dir.path(), Arc::new(Revocations::new())).unwrap_err();
    assert!(error.to_string().contains("directory"), "{error}");
}
