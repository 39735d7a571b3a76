//! The secrets of TLS sessions in a file, so that a capture of their bytes can be read. For debugging only.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use rustls::KeyLog;

/// Why a file is not taken for secrets.
#[derive(Debug, thiserror::Error)]
pub enum KeyLogError {
    /// It cannot be opened or made.
    #[error("key log {path}: {source}")]
    File {
        /// Which file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Not a regular file.
    #[error("key log {0}: not a regular file")]
    NotAFile(PathBuf),
    /// Somebody else could read all traffic with it.
    #[error(
        "key log {path}: others may use it (mode {mode:04o}, owner {owner}): remove it, or chmod 600 and chown it to this process's user"
    )]
    NotPrivate {
        /// Which file.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
        /// User id of its owner.
        owner: u32,
    },
}

/// A file in the format of `SSLKEYLOGFILE` (draft-ietf-tls-keylogfile), which Wireshark reads. It is appended to, and
/// nobody but the process's own user may read it. With it and a capture, everything that goes through the tunnels can be
/// read.
pub struct KeyLogFile {
    path: PathBuf,
    file: Mutex<File>,
    failed: AtomicBool,
}

impl KeyLogFile {
    /// Opens the file, or makes it with mode 0600.
    ///
    /// # Errors
    /// It cannot be written, or others may read it.
    pub fn open(path: &Path) -> Result<Self, KeyLogError> {
        let failed = |source| KeyLogError::File {
            path: path.to_owned(),
            source,
        };
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(path)
            .map_err(failed)?;
        // Asked of what was opened: the name may mean something else in a moment.
        let opened = file.metadata().map_err(failed)?;
        if !opened.is_file() {
            return Err(KeyLogError::NotAFile(path.to_owned()));
        }
        let own_user = std::fs::metadata("/proc/self").map_err(failed)?.uid();
        if opened.mode() & 0o077 != 0 || opened.uid() != own_user {
            return Err(KeyLogError::NotPrivate {
                path: path.to_owned(),
                mode: opened.mode() & 0o7777,
                owner: opened.uid(),
            });
        }
        Ok(Self {
            path: path.to_owned(),
            file: Mutex::new(file),
            failed: AtomicBool::new(false),
        })
    }
}

impl KeyLog for KeyLogFile {
    fn log(&self, label: &str, client_random: &[u8], secret: &[u8]) {
        let line = format!("{label} {} {}\n", hex(client_random), hex(secret));
        let mut file = self.file.lock().unwrap_or_else(PoisonError::into_inner);
        // One write per line: another process may append to the same file.
        if let Err(error) = file.write_all(line.as_bytes())
            && !self.failed.swap(true, Ordering::Relaxed)
        {
            tracing::warn!(path = %self.path.display(), %error, "TLS secrets are lost to the key log");
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Debug for KeyLogFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyLogFile")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use std::fs::{self, Permissions};
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn lines_are_appended_to_a_private_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        let log = KeyLogFile::open(&path).unwrap();
        log.log("CLIENT_TRAFFIC_SECRET_0", &[0x0a; 2], &[0xff, 0x01]);
        let again = KeyLogFile::open(&path).unwrap();
        again.log("EXPORTER_SECRET", &[0], &[1]);
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!(
            text,
            "CLIENT_TRAFFIC_SECRET_0 0a0a ff01\nEXPORTER_SECRET 00 01\n"
        );
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
    }

    #[test]
    fn a_file_that_others_may_use_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        fs::write(&path, "").unwrap();
        for mode in [0o644, 0o640, 0o620, 0o606] {
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            let link = dir.path().join(format!("link-{mode:o}"));
            symlink(&path, &link).unwrap();
            for path in [&path, &link] {
                let error = KeyLogFile::open(path).unwrap_err();
                assert!(matches!(error, KeyLogError::NotPrivate { .. }), "{error}");
                assert!(error.to_string().contains("chmod 600"), "{error}");
            }
        }
        let error = KeyLogFile::open(Path::new("/dev/null")).unwrap_err();
        assert!(matches!(error, KeyLogError::NotAFile(_)), "{error}");
    }
}
