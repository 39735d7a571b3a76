//! Certificates and revocation lists that `openssl` makes with the lab's CA: whatever our own CA would not issue.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tempfile::TempDir;

use super::Stage;

/// `openssl ca` wants a file for what the command line does not say.
const CONFIG: &str = "[ca]\ndefault_ca = lab\n[lab]\ndatabase = index.txt\nnew_certs_dir = .\n\
    rand_serial = yes\ncrlnumber = crlnumber\ndefault_md = sha256\npolicy = anything\nunique_subject = no\n\
    [anything]\ncommonName = optional\n";

/// The lab's CA in the hands of `openssl`.
pub struct Authority {
    dir: TempDir,
    ca: PathBuf,
}

/// A certificate and its key, in PEM.
#[derive(Debug, Clone)]
pub struct KeyPair {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

/// From when to when a certificate is valid, in seconds from now.
pub type Span = (i64, i64);

/// For as long as any test takes.
pub const VALID: Span = (-60, 3600);

impl Authority {
    pub fn of(stage: &Stage) -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("ca.cnf"), CONFIG).unwrap();
        fs::write(dir.path().join("crlnumber"), "01\n").unwrap();
        fs::write(dir.path().join("index.txt"), "").unwrap();
        let ca = stage.lab.dir().join("ca");
        Self { dir, ca }
    }

    /// The root certificate.
    pub fn root(&self) -> PathBuf {
        self.ca.join("root-cert.pem")
    }

    /// A certificate with these alternative names, in openssl's form (`URI:spiffe://…`).
    pub fn issue(&self, name: &str, alternative_names: &[&str], valid: Span) -> KeyPair {
        let at = |end: &str| self.dir.path().join(format!("{name}.{end}"));
        let (key, request, certificate) = (at("key"), at("csr"), at("crt"));
        let mut extensions = "extendedKeyUsage = serverAuth, clientAuth\n".to_owned();
        if !alternative_names.is_empty() {
            let names = alternative_names.join(",");
            extensions.push_str(&format!("subjectAltName = {names}\n"));
        }
        fs::write(at("ext"), extensions).unwrap();
        self.openssl(&[
            "req",
            "-new",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-subj",
            "/CN=judge",
            "-keyout",
            path(&key),
            "-out",
            path(&request),
        ]);
        let (from, until) = (stamp(valid.0), stamp(valid.1));
        self.ca(&[
            "-in",
            path(&request),
            "-out",
            path(&certificate),
            "-extfile",
            path(&at("ext")),
            "-startdate",
            &from,
            "-enddate",
            &until,
            "-notext",
        ]);
        KeyPair { certificate, key }
    }

    /// A revocation list in PEM with these serial numbers (hexadecimal) on it.
    pub fn revocation_list(&self, serials: &[String]) -> String {
        let entry = |serial: &String| {
            let serial = serial.to_uppercase();
            let (until, since) = (stamp(86_400), stamp(-1));
            format!("R\t{until}\t{since}\t{serial}\tunknown\t/CN=revoked\n")
        };
        let index: String = serials.iter().map(entry).collect();
        fs::write(self.dir.path().join("index.txt"), index).unwrap();
        let list = self.dir.path().join("crl.pem");
        self.ca(&["-gencrl", "-crldays", "1", "-out", path(&list)]);
        fs::read_to_string(list).unwrap()
    }

    fn ca(&self, arguments: &[&str]) {
        let (root, key) = (self.root(), self.ca.join("root-key.pem"));
        let common = [
            "ca",
            "-batch",
            "-config",
            "ca.cnf",
            "-cert",
            path(&root),
            "-keyfile",
            path(&key),
        ];
        self.openssl(&[&common[..], arguments].concat());
    }

    fn openssl(&self, arguments: &[&str]) {
        let mut openssl = Command::new("openssl");
        openssl.args(arguments).current_dir(self.dir.path());
        let done = openssl.output().expect("openssl is installed");
        let errors = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "openssl {arguments:?}: {errors}");
    }
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A moment as openssl reads it: `YYMMDDHHMMSSZ`.
fn stamp(seconds_from_now: i64) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let at = now.as_secs().checked_add_signed(seconds_from_now).unwrap();
    let date = Command::new("date")
        .args(["-u", "+%y%m%d%H%M%SZ", "-d", &format!("@{at}")])
        .output()
        .unwrap();
    String::from_utf8(date.stdout).unwrap().trim().to_owned()
}

/// How long a program of a judge may take on a loaded machine.
pub const JUDGED_WITHIN: Duration = Duration::from_secs(60);
