//! One event per connection, written when it ends, and at DEBUG one when it is opened. Target `access`; a filter directive
//! such as `access=off` silences them.

use std::net::SocketAddr;

use tracing::Level;

use super::connection::{Fixed, Late};
use super::{ConnectionError, Direction, Endpoint};

/// Target of the events.
pub const TARGET: &str = "access";

/// Bytes that a connection moved, in the connection's own terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Moved {
    /// Client towards destination.
    pub sent: u64,
    /// Destination towards client.
    pub received: u64,
}

/// Name of the cluster of one end; an empty one is not known.
fn cluster(endpoint: &Endpoint) -> Option<&str> {
    let workload = endpoint.workload.as_deref()?;
    Some(&*workload.cluster_id).filter(|cluster| !cluster.is_empty())
}

/// An event about both ends of a connection, with the fields that follow them.
macro_rules! ends {
    ($level:expr, $fixed:expr, $late:expr, {$($rest:tt)*}, $message:literal) => {{
        let (source, destination) = (&$fixed.source, &$late.destination);
        let source_identity = source.identity.as_ref().map(ToString::to_string);
        let destination_identity = destination.identity.as_ref().map(ToString::to_string);
        tracing::event!(
            target: TARGET,
            $level,
            {
                src.addr = %source.addr,
                src.workload = source.workload.as_deref().map(|w| &*w.name),
                src.namespace = source.workload.as_deref().map(|w| &*w.namespace),
                src.identity = source_identity.as_deref(),
                src.cluster = cluster(source),
                dst.addr = %destination.addr,
                dst.hbone_addr = $late.hbone_addr.as_ref().map(tracing::field::display),
                dst.service = $late.service.as_deref().map(|s| &*s.hostname),
                dst.workload = destination.workload.as_deref().map(|w| &*w.name),
                dst.namespace = destination.workload.as_deref().map(|w| &*w.namespace),
                dst.identity = destination_identity.as_deref(),
                dst.cluster = cluster(destination),
                direction = $fixed.direction.as_str(),
                capture_mode = $fixed.capture_mode,
                $($rest)*
            },
            $message
        )
    }};
}

/// The opening of a connection, when it is known where it goes: DEBUG, once for each that is counted as opened.
pub(super) fn opened(fixed: &Fixed, late: &Late) {
    if tracing::enabled!(target: TARGET, Level::DEBUG) {
        ends!(Level::DEBUG, fixed, late, {}, "connection opened");
    }
}

/// The end of an opened connection: INFO without an error, ERROR with one. A key without a value is left out.
///
/// `bytes_sent` and `bytes_recv` are what the reporting workload sent and received. The source sends what its connection
/// sends; at the destination it is the other way round, hence the swap.
pub(super) fn complete(fixed: &Fixed, late: &Late, moved: Moved, error: Option<&ConnectionError>) {
    let enabled = match error {
        None => tracing::enabled!(target: TARGET, Level::INFO),
        Some(_) => tracing::enabled!(target: TARGET, Level::ERROR),
    };
    if !enabled {
        return;
    }
    let (bytes_sent, bytes_recv) = match fixed.direction {
        Direction::Outbound => (moved.sent, moved.received),
        Direction::Inbound => (moved.received, moved.sent),
    };
    let duration = format!("{}ms", fixed.started.elapsed().as_millis());
    macro_rules! event {
        ($level:expr) => {
            ends!($level, fixed, late, {
                bytes_sent = bytes_sent,
                bytes_recv = bytes_recv,
                duration = &*duration,
                error = error.map(tracing::field::display)
            }, "connection complete")
        };
    }
    match error {
        None => event!(Level::INFO),
        Some(_) => event!(Level::ERROR),
    }
}

/// A connection that was refused before it was opened.
pub(super) fn refused(
    direction: Direction,
    capture_mode: &'static str,
    client: SocketAddr,
    destination: Option<SocketAddr>,
    reason: &ConnectionError,
) {
    tracing::event!(
        target: TARGET,
        Level::WARN,
        {
            src.addr = %client,
            dst.addr = destination.map(tracing::field::display),
            direction = direction.as_str(),
            capture_mode = capture_mode,
            error = %reason
        },
        "connection failed"
    );
}
