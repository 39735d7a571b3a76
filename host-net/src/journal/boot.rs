//! Which boot of the machine a state directory is of.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::Path;
use std::sync::OnceLock;

/// Name of the file that holds the kernel's boot identifier.
const MARK: &str = ".boot";

/// The identifier of this boot of the kernel; empty where the kernel does not tell.
pub fn boot_id() -> String {
    static ID: OnceLock<String> = OnceLock::new();
    let read = || {
        fs::read_to_string("/proc/sys/kernel/random/boot_id")
            .map(|id| id.trim().to_owned())
            .unwrap_or_default()
    };
    ID.get_or_init(read).clone()
}

/// Removes from a state directory the JSON files (those that end in `suffix`) that an earlier boot left incomplete, and
/// marks the directory as one of this boot. A file that is damaged in the boot that wrote it stays: that is no loss of
/// power but a mistake, which somebody has to look at.
///
/// # Errors
/// When the directory cannot be read or written; the message names the file.
pub fn forget_incomplete(dir: &Path, suffix: &str) -> io::Result<()> {
    let mark = dir.join(MARK);
    let boot = boot_id();
    let marked = fs::read_to_string(&mark).ok();
    if marked.as_deref() == Some(boot.as_str()) {
        return Ok(());
    }
    if marked.is_some() {
        for entry in fs::read_dir(dir).map_err(|e| named(dir, &e))? {
            let path = entry.map_err(|e| named(dir, &e))?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            if !name.is_some_and(|name| name.ends_with(suffix) && !name.starts_with('.')) {
                continue;
            }
            let text = fs::read(&path).map_err(|e| named(&path, &e))?;
            if serde_json::from_slice::<serde::de::IgnoredAny>(&text).is_err() {
                tracing::warn!(path = %path.display(), "left incomplete when the machine stopped: forgotten");
                fs::remove_file(&path).map_err(|e| named(&path, &e))?;
            }
        }
    }
    let aside = dir.join(format!("{MARK}.{}.tmp", std::process::id()));
    // This one is waited for: it must not be there later than what is written after it.
    File::create(&aside)
        .and_then(|mut file| {
            file.write_all(boot.as_bytes())
                .and_then(|()| file.sync_all())
        })
        .and_then(|()| fs::rename(&aside, &mark))
        .and_then(|()| File::open(dir)?.sync_all())
        .map_err(|e| named(&mark, &e))
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}
