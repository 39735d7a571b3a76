//! Files that are complete or not there.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use super::InstallError;

/// What the names of files that are being written contain.
const BEING_WRITTEN: &str = ".ambidex-tmp.";

fn at(path: &Path) -> impl Fn(io::Error) -> InstallError {
    let path = path.to_owned();
    move |error| InstallError::Io(path.clone(), error)
}

/// The whole file.
pub(super) fn read(path: &Path) -> Result<Vec<u8>, InstallError> {
    fs::read(path).map_err(at(path))
}

/// Permission bits of a file.
pub(super) fn mode(path: &Path) -> Result<u32, InstallError> {
    let metadata = fs::metadata(path).map_err(at(path))?;
    Ok(metadata.permissions().mode() & 0o7777)
}

/// Whether everybody may execute a file.
pub(super) fn is_executable(path: &Path) -> bool {
    mode(path).is_ok_and(|mode| mode & 0o111 == 0o111)
}

/// Writes a file under another name and renames it into its place.
pub(super) fn write_atomically(path: &Path, bytes: &[u8], mode: u32) -> Result<(), InstallError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!(".{name}{BEING_WRITTEN}{}", std::process::id()));
    let written = || -> io::Result<()> {
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&aside)?;
        file.write_all(bytes)?;
        file.set_permissions(fs::Permissions::from_mode(mode))?;
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    written().map_err(|error| {
        let _ = fs::remove_file(&aside);
        InstallError::Io(path.to_owned(), error)
    })
}

/// Removes what a killed installer was writing.
pub(super) fn remove_stale(dir: &Path) -> Result<(), InstallError> {
    for name in names(dir)? {
        let Some((_, pid)) = name.rsplit_once(BEING_WRITTEN) else {
            continue;
        };
        let lives = pid != std::process::id().to_string() && Path::new("/proc").join(pid).exists();
        if !lives {
            remove_if_there(&dir.join(&name))?;
        }
    }
    Ok(())
}

/// Removes a file; false if there was none.
pub(super) fn remove_if_there(path: &Path) -> Result<bool, InstallError> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(InstallError::Io(path.to_owned(), error)),
    }
}

/// Names in a directory, sorted as a runtime sorts them: by their bytes.
pub(super) fn names(dir: &Path) -> Result<Vec<String>, InstallError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(at(dir))? {
        let name = entry.map_err(at(dir))?.file_name();
        names.extend(name.into_string());
    }
    names.sort();
    Ok(names)
}
