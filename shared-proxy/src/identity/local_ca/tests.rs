#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};
use std::time::SystemTime;

use x509_parser::extensions::GeneralName;

use super::*;

fn open(dir: &Path) -> Result<LocalCa, LocalCaError> {
    LocalCa::open(dir, "cluster.local", DEFAULT_LEAF_TTL)
}

fn alice() -> Identity {
    Identity::new("cluster.local", "shop", "alice").unwrap()
}

async fn issue(ca: &LocalCa) -> WorkloadCertificate {
    ca.issue(&alice()).await.unwrap()
}

#[test]
fn the_root_is_made_once_and_its_key_is_private() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("deep/ca");
    let first = open(&dir).unwrap();
    let again = open(&dir).unwrap();
    assert_eq!(first.root(), again.root());
    let mode = |file| fs::metadata(dir.join(file)).unwrap().mode() & 0o777;
    assert_eq!(mode(KEY_FILE), 0o600);
    assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    let (_, root) = X509Certificate::from_der(first.root()).unwrap();
    let life = root.validity().time_to_expiration().unwrap();
    assert!((life.whole_days() - 3649).abs() <= 1, "{life}");
    let mut names: Vec<_> = fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [LOCK_FILE, CERT_FILE, KEY_FILE],
        "nothing temporary is left"
    );
}

#[tokio::test]
async fn a_leaf_is_what_the_field_expects() {
    let dir = tempfile::tempdir().unwrap();
    let ca = open(dir.path()).unwrap();
    let certificate = issue(&ca).await;
    let (_, leaf) = X509Certificate::from_der(&certificate.chain()[0]).unwrap();
    let san = leaf.subject_alternative_name().unwrap().unwrap().value;
    let uri = alice().to_string();
    assert_eq!(san.general_names, [GeneralName::URI(&uri)]);
    assert!(!leaf.is_ca());
    let algorithm = &leaf.public_key().algorithm;
    let curve = algorithm.parameters.as_ref().unwrap().as_oid().unwrap();
    assert_eq!(curve.to_id_string(), "1.2.840.10045.3.1.7", "P-256");
    let now = SystemTime::now();
    let begun = now.duration_since(certificate.valid_from()).unwrap();
    assert!((60..70).contains(&begun.as_secs()), "{begun:?}");
    let left = certificate.expires().duration_since(now).unwrap();
    assert!(left <= DEFAULT_LEAF_TTL && left > DEFAULT_LEAF_TTL - Duration::from_secs(10));
    assert_eq!(certificate.serial_hex().len(), 32);
    assert_ne!(certificate.serial_hex(), issue(&ca).await.serial_hex());
}

#[tokio::test]
async fn a_leaf_never_outlives_the_root() {
    let dir = tempfile::tempdir().unwrap();
    let ca = LocalCa::open(dir.path(), "cluster.local", Duration::MAX).unwrap();
    let root_expires: SystemTime = ca.root_expires.into();
    assert_eq!(issue(&ca).await.expires(), root_expires);
}

#[tokio::test]
async fn leaves_of_two_processes_trust_each_other() {
    let dir = tempfile::tempdir().unwrap();
    let (one, two) = (open(dir.path()).unwrap(), open(dir.path()).unwrap());
    let (_, root) = X509Certificate::from_der(one.root()).unwrap();
    let leaf = issue(&two).await;
    let (_, leaf) = X509Certificate::from_der(&leaf.chain()[0]).unwrap();
    assert_eq!(leaf.issuer(), root.subject());
    assert_eq!(one.root(), two.root());
}

#[tokio::test]
async fn another_trust_domain_is_not_vouched_for() {
    let dir = tempfile::tempdir().unwrap();
    let ca = open(dir.path()).unwrap();
    let stranger = Identity::new("other.example", "shop", "alice").unwrap();
    let error = ca.issue(&stranger).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "spiffe://other.example/ns/shop/sa/alice: this CA issues certificates for trust domain cluster.local only"
    );
    assert!(LocalCa::open(dir.path(), "Not/A/Domain", DEFAULT_LEAF_TTL).is_err());
}

/// Prints the root that this process gets.
#[test]
#[ignore = "the test below runs it, in processes of its own"]
fn racer() {
    let dir = std::env::var_os("LOCAL_CA_RACE_DIR").expect("the directory to race in");
    let ca = open(Path::new(&dir)).unwrap();
    let root: String = ca.root().iter().map(|b| format!("{b:02x}")).collect();
    println!("ROOT={root};");
}

#[test]
fn processes_that_race_get_the_same_root() {
    let dir = tempfile::tempdir().unwrap();
    let processes: Vec<_> = (0..6)
        .map(|_| {
            Command::new(std::env::current_exe().unwrap())
                .args([
                    "--ignored",
                    "--exact",
                    "identity::local_ca::tests::racer",
                    "--nocapture",
                ])
                .env("LOCAL_CA_RACE_DIR", dir.path())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    let roots: Vec<String> = processes
        .into_iter()
        .map(|process| {
            let output = String::from_utf8(process.wait_with_output().unwrap().stdout).unwrap();
            let (_, root) = output.split_once("ROOT=").expect("a root");
            root.split_once(';').unwrap().0.to_owned()
        })
        .collect();
    assert!(
        roots
            .iter()
            .all(|root| *root == roots[0] && root.len() > 100)
    );
}

#[test]
fn threads_that_race_get_the_same_root() {
    let dir = tempfile::tempdir().unwrap();
    let roots: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| open(dir.path()).unwrap().root().clone()))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(roots.iter().all(|root| *root == roots[0]));
}

#[test]
fn a_root_whose_making_was_interrupted_is_made_again() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join(KEY_FILE), "half a key").unwrap();
    fs::write(dir.path().join("root-key.pem.tmp"), "half").unwrap();
    let ca = open(dir.path()).unwrap();
    assert_eq!(ca.root(), open(dir.path()).unwrap().root());
}

#[rstest::rstest]
#[case::no_key(|dir: &Path| fs::remove_file(dir.join(KEY_FILE)).unwrap(), "root-key.pem: missing")]
#[case::open_key(|dir: &Path| fs::set_permissions(dir.join(KEY_FILE), fs::Permissions::from_mode(0o640)).unwrap(), "(mode 0640): chmod 600")]
#[case::broken_key(|dir: &Path| fs::write(dir.join(KEY_FILE), "x").unwrap(), "root-key.pem")]
#[case::broken_certificate(|dir: &Path| fs::write(dir.join(CERT_FILE), "x").unwrap(), "root-cert.pem: no certificate in PEM")]
#[case::another_roots_key(|dir: &Path| {
    let other = tempfile::tempdir().unwrap();
    open(other.path()).unwrap();
    fs::copy(other.path().join(KEY_FILE), dir.join(KEY_FILE)).unwrap();
}, "different roots")]
#[case::leaf_as_root(|dir: &Path| {
    let key = KeyPair::from_pem(&fs::read_to_string(dir.join(KEY_FILE)).unwrap()).unwrap();
    let leaf = CertificateParams::default().self_signed(&key).unwrap();
    fs::write(dir.join(CERT_FILE), leaf.pem()).unwrap();
}, "not a CA certificate")]
fn unusable_files_are_errors_that_name_them(#[case] spoil: fn(&Path), #[case] word: &str) {
    let dir = tempfile::tempdir().unwrap();
    open(dir.path()).unwrap();
    spoil(dir.path());
    let error = open(dir.path()).err().expect("an error").to_string();
    assert!(error.contains(word), "{error}");
    assert!(error.contains(dir.path().to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn without_its_files_it_issues_nothing_and_with_them_again() {
    let dir = tempfile::tempdir().unwrap();
    let ca = open(dir.path()).unwrap();
    let identity: Identity = "spiffe://cluster.local/ns/a/sa/b".parse().unwrap();
    ca.issue(&identity).await.unwrap();
    let (key, away) = (dir.path().join(KEY_FILE), dir.path().join("away"));
    fs::rename(&key, &away).unwrap();
    let error = ca.issue(&identity).await.unwrap_err().to_string();
    assert!(error.contains(KEY_FILE), "{error}");
    fs::rename(&away, &key).unwrap();
    ca.issue(&identity).await.unwrap();

    let other = tempfile::tempdir().unwrap();
    open(other.path()).unwrap();
    for file in [KEY_FILE, CERT_FILE] {
        fs::copy(other.path().join(file), dir.path().join(file)).unwrap();
    }
    let error = ca.issue(&identity).await.unwrap_err().to_string();
    assert!(error.contains("restart"), "{error}");
}
