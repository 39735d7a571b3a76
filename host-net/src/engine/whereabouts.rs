//! Finding a namespace again from what a record says about it.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::netns::{Netns, NetnsId};

/// Whether `path` is the namespace `id`.
pub(super) fn leads_to(path: &Path, id: NetnsId) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.dev() == id.dev && meta.ino() == id.ino)
}

/// The path of the namespace below `/run/netns`, if it has a name.
pub(super) fn named_path(id: NetnsId) -> Option<PathBuf> {
    let names = Netns::list_named().ok()?;
    let mut paths = names.iter().map(|name| Netns::path_of(name));
    paths.find(|path| leads_to(path, id))
}

/// Opens the namespace `id`: by the recorded path, as the current one, by name, or through any process that is in it.
/// None if it is gone, as far as can be seen from here.
pub(super) fn open(id: NetnsId, recorded: Option<&Path>) -> Option<Netns> {
    let by_path = recorded.map(Path::to_path_buf).into_iter();
    let own = PathBuf::from("/proc/thread-self/ns/net");
    by_path
        .chain([own])
        .chain(named_path(id))
        .chain(process_paths())
        .filter(|path| leads_to(path, id))
        .filter_map(|path| Netns::open(path).ok())
        // Between looking and opening another namespace may have come to the same path.
        .find(|netns| netns.id() == id)
}

fn process_paths() -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            entry
                .file_name()
                .to_str()
                .is_some_and(|name| name.bytes().all(|b| b.is_ascii_digit()))
        })
        .map(|entry| entry.path().join("ns/net"))
}
