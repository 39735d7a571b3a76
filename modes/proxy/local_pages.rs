//! The admin pages on a Unix socket beside ZDS, for the command line of the node. Every proxy of the node has its own: while
//! one replaces another there are two.

use std::fs;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use std::os::unix::fs::PermissionsExt;

/// What a socket of a proxy is called: the time of its start in milliseconds, with as many digits as any other, so that
/// names sort by age; then the process.
fn name() -> String {
    let started = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_millis());
    format!("{started:015}-{}.sock", std::process::id())
}

/// The file of a socket; it goes when this is dropped.
#[derive(Debug)]
pub(super) struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // It may be gone with its whole directory.
        let _ = fs::remove_file(&self.0);
    }
}

/// Listens in `directory` for root only, after removing what dead proxies left there.
pub(super) fn listen(directory: &Path) -> io::Result<(UnixListener, SocketFile)> {
    fs::create_dir_all(directory)?;
    // Of the directory, so that there is no moment at which somebody else may connect.
    fs::set_permissions(directory, fs::Permissions::from_mode(0o700))?;
    for path in sockets(directory)? {
        let nobody = UnixStream::connect(&path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
        if nobody {
            fs::remove_file(&path)?;
        }
    }
    let path = directory.join(name());
    let listener = UnixListener::bind(&path)?;
    Ok((listener, SocketFile(path)))
}

/// The sockets in `directory`, of the oldest proxy first. None when there is no directory.
pub(crate) fn sockets(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut paths = Vec::new();
    for entry in entries {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "sock")
        {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn sockets_of_the_dead_are_removed_and_those_of_the_living_stay() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path().join("proxies");
        assert!(sockets(&directory).unwrap().is_empty());
        let (living, file) = listen(&directory).unwrap();
        let dead = directory.join("000000000000001-1.sock");
        drop(UnixListener::bind(&dead).unwrap());
        std::thread::sleep(std::time::Duration::from_millis(2));
        let (_second, second_file) = listen(&directory).unwrap();
        let found = sockets(&directory).unwrap();
        assert_eq!(found, [file.0.clone(), second_file.0.clone()]);
        drop((living, file));
        assert_eq!(
            sockets(&directory).unwrap(),
            std::slice::from_ref(&second_file.0)
        );
    }
}
