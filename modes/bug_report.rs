//! One archive with everything that somebody needs who looks at a node from afar, and with nothing that is secret.
//!
//! Every part is gathered by itself: what cannot be had, because a daemon is dead or hangs, is noted in the archive, and the
//! rest is there. Every text passes through [`redact::Secrets`] on its way in.

mod daemons;
mod node;
pub mod redact;

use std::fmt::Display;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use nix::fcntl::OFlag;

use crate::doctor::collect::Sources;
use redact::Secrets;

/// Bytes of a log that are taken, from its end.
const LOG_BYTES: u64 = 8 << 20;

/// What to gather.
#[derive(Debug, Clone)]
pub struct Request {
    /// Where the node's daemons and files are.
    pub sources: Sources,
    /// The built-in CA, whose key is kept out and whose certificate is taken.
    pub ca_dir: PathBuf,
    /// Logs beside those that are found.
    pub logs: Vec<PathBuf>,
}

/// What became of the parts.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// Names of the files in the archive.
    pub taken: Vec<String>,
    /// What could not be had, and why.
    pub missing: Vec<(String, String)>,
}

/// Writes the archive. `told` hears of each part: its name, and why it is missing if it is.
///
/// # Errors
/// The archive itself cannot be written. Parts that cannot be gathered are no error.
pub async fn write(
    request: &Request,
    archive: &Path,
    told: impl FnMut(&str, Option<&str>),
) -> io::Result<Outcome> {
    use std::os::unix::fs::OpenOptionsExt;
    let named =
        |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", archive.display()));
    // Not for everybody: names of pods and addresses are nobody's business either. Never through a link of somebody's.
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .custom_flags(OFlag::O_NOFOLLOW.bits())
        .open(archive)
        .map_err(named)?;
    let stem = archive.file_name().unwrap_or_default().to_string_lossy();
    let root = stem
        .trim_end_matches(".gz")
        .trim_end_matches(".tar")
        .trim_end_matches(".tgz");
    let mut report = Report {
        archive: tar::Builder::new(GzEncoder::new(file, Compression::default())),
        root: root.to_owned(),
        secrets: Secrets::of_node(&request.ca_dir),
        outcome: Outcome::default(),
        told,
        written: Ok(()),
    };
    node::gather(request, &mut report).await;
    daemons::gather(request, &mut report).await;
    report.finish().map_err(named)
}

/// An archive that grows.
struct Report<F> {
    archive: tar::Builder<GzEncoder<File>>,
    root: String,
    secrets: Secrets,
    outcome: Outcome,
    told: F,
    /// The first failure to write the archive; nothing more is written after it.
    written: io::Result<()>,
}

impl<F: FnMut(&str, Option<&str>)> Report<F> {
    /// Adds a part, or notes why there is none.
    fn add<E: Display>(&mut self, name: &str, part: Result<String, E>) {
        match part {
            Ok(text) => {
                self.append(name, &text);
                (self.told)(name, None);
            }
            Err(error) => {
                let why = self.secrets.redact(&error.to_string());
                (self.told)(name, Some(&why));
                self.outcome.missing.push((name.to_owned(), why));
            }
        }
    }

    /// Adds a value as JSON.
    fn add_json<T: serde::Serialize, E: Display>(&mut self, name: &str, part: Result<T, E>) {
        let text = part.map_err(|error| error.to_string()).and_then(|value| {
            serde_json::to_string_pretty(&value).map_err(|error| error.to_string())
        });
        self.add(name, text.map(|text| text + "\n"));
    }

    /// Adds a file, or the end of a large one.
    fn add_file(&mut self, name: &str, path: &Path) {
        let text = end_of(path).map_err(|error| format!("{}: {error}", path.display()));
        self.add(name, text);
    }

    fn append(&mut self, name: &str, text: &str) {
        if self.written.is_err() {
            return;
        }
        let text = self.secrets.redact(text);
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        let path = format!("{}/{name}", self.root);
        self.written = self.archive.append_data(&mut header, path, text.as_bytes());
        self.outcome.taken.push(name.to_owned());
    }

    fn finish(mut self) -> io::Result<Outcome> {
        let missing = self.outcome.missing.iter();
        let missing: String = missing
            .map(|(name, why)| format!("{name}: {why}\n"))
            .collect();
        self.append("missing.txt", &missing);
        self.written?;
        let mut file = self.archive.into_inner()?.finish()?;
        file.flush()?;
        file.sync_all()?;
        Ok(self.outcome)
    }
}

/// The text of a file, or its last part from the beginning of a line on.
fn end_of(path: &Path) -> io::Result<String> {
    use std::io::{Read, Seek, SeekFrom};
    use std::os::unix::fs::OpenOptionsExt;
    // A named pipe would be waited for.
    let mut file = File::options()
        .read(true)
        .custom_flags(OFlag::O_NONBLOCK.bits())
        .open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    let from = metadata.len().saturating_sub(LOG_BYTES);
    file.seek(SeekFrom::Start(from))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    Ok(match from {
        0 => text.into_owned(),
        // A line that is cut may have lost what says that it is secret.
        _ => text
            .split_once('\n')
            .map_or(String::new(), |(_, rest)| rest.to_owned()),
    })
}

/// A name that is one component of a path.
fn component(name: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let name: String = name
        .chars()
        .map(|c| if plain(c) { c } else { '_' })
        .collect();
    match name.trim_matches('.') {
        "" => "_".to_owned(),
        _ => name,
    }
}

#[cfg(test)]
mod tests {
    use super::component;

    #[test]
    fn names_stay_inside_the_archive() {
        assert_eq!(component("shop/cart"), "shop_cart");
        assert_eq!(component(".."), "_");
        assert_eq!(component("a b\n"), "a_b_");
    }
}
