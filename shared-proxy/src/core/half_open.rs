//! Closes connections that are half-open and silent for too long.

use std::sync::Weak;
use std::time::{Duration, Instant};

use super::Shared;

/// Bounds of the time between two looks.
const EVERY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(30));

/// Looks again and again, as long as the core lives. A connection is closed at the first look after its time.
pub(super) async fn close(core: Weak<Shared>, limit: Duration) {
    let Some(mut watch) = core.upgrade().map(|core| core.telemetry.half_open_watch()) else {
        return;
    };
    let every = (limit / 4).clamp(EVERY.0, EVERY.1);
    loop {
        tokio::time::sleep(every).await;
        if core.strong_count() == 0 {
            return;
        }
        let ended = watch.sweep(Instant::now(), limit);
        if ended > 0 {
            tracing::info!(connections = ended, silent_for = ?limit, "half-open connections closed");
        }
    }
}
