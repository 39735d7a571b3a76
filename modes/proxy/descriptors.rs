//! File descriptors: a proxy is started with the limit of an ordinary program, and needs more.

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// What a node of 250 pods takes (3 listeners and 2 sockets of the DNS proxy each, and what tells of their namespaces), with
/// 5 000 connections of two or three descriptors.
const NEEDED: u64 = 16_384;

/// Raises the limit to the highest that the process may have, and says what it is.
pub(super) fn raise_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        if soft < hard {
            setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        }
        Ok((soft, hard))
    });
    match raised {
        Ok((before, limit)) if limit < NEEDED => tracing::warn!(
            before,
            limit,
            needed = NEEDED,
            "few file descriptors: connections beyond them are not accepted; raise the hard limit (ulimit -Hn)"
        ),
        Ok((before, limit)) => tracing::info!(before, limit, "limit of file descriptors"),
        Err(error) => tracing::warn!(%error, "the limit of file descriptors stays as it is"),
    }
}
