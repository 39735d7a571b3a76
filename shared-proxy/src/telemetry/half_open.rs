//! Finds connections of which one end has said that it is done while the other one is silent and never ends.
//!
//! Both TCP connections may be alive in their kernels for ever then: an application that forgets to close is no dead peer, so
//! no keepalive finds it. Silence is what counts, not age: a half-closed connection may carry a long answer.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::LiveConnections;

/// Remembers half-open connections from one look to the next.
#[derive(Debug)]
pub struct HalfOpenWatch {
    live: Arc<LiveConnections>,
    seen: HashMap<u64, Seen>,
}

/// What a half-open connection had moved, and since when it has moved nothing more.
#[derive(Debug)]
struct Seen {
    moved: u64,
    since: Instant,
}

impl HalfOpenWatch {
    pub(super) fn new(live: Arc<LiveConnections>) -> Self {
        Self {
            live,
            seen: HashMap::new(),
        }
    }

    /// Ends the connections that are half-open and have been silent for `limit`, as of `now`; returns how many. Their ends
    /// see a reset.
    pub fn sweep(&mut self, now: Instant, limit: Duration) -> usize {
        let mut still = HashMap::new();
        let mut ended = 0;
        for live in self.live.all() {
            let Some(end) = live.half_open() else {
                continue;
            };
            let moved = live.bytes();
            let seen = match self.seen.remove(&live.id()) {
                Some(seen) if seen.moved == moved => seen,
                _ => Seen { moved, since: now },
            };
            let silent = now.saturating_duration_since(seen.since);
            if silent >= limit && live.cut_as(format!(
                "half-open: the {end} ended its direction, and nothing was moved for {silent:.0?}"
            )) {
                ended += 1;
            } else {
                still.insert(live.id(), seen);
            }
        }
        self.seen = still;
        ended
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;
    use crate::drain::{Drainer, Phase};
    use crate::telemetry::{Direction, Endpoint, Opening, Telemetry, TelemetryOptions};

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn only_silence_after_one_end_has_ended_is_too_long() {
        let telemetry = Telemetry::new(TelemetryOptions::default());
        let drainer = Drainer::new();
        let open = || {
            let signal = drainer.signal();
            let end = |text: &str| Endpoint::unknown(text.parse().unwrap());
            let record = telemetry.open(Opening {
                direction: Direction::Outbound,
                capture_mode: "inpod",
                source: end("10.0.0.1:40000"),
                destination: end("10.0.0.2:80"),
                destination_service: None,
                hbone_addr: None,
                mutual_tls: false,
            });
            record.ended_by(signal.cutter());
            (record, signal)
        };
        let [whole, silent, talking, both] = [open(), open(), open(), open()];
        silent.0.client_ended();
        talking.0.application_ended();
        both.0.client_ended();
        both.0.application_ended();
        let mut watch = telemetry.half_open_watch();
        let start = Instant::now();
        assert_eq!(watch.sweep(start, LIMIT), 0);
        assert_eq!(watch.sweep(start + LIMIT / 2, LIMIT), 0);
        talking.0.sent(1);
        assert_eq!(watch.sweep(start + LIMIT, LIMIT), 1);
        let phases = [&whole, &silent, &talking, &both].map(|(_, signal)| signal.phase());
        assert_eq!(phases, [Phase::Open, Phase::Cut, Phase::Open, Phase::Open]);
        // Seen to have moved only at the last look.
        assert_eq!(watch.sweep(start + 2 * LIMIT - LIMIT / 10, LIMIT), 0);
        assert_eq!(watch.sweep(start + 2 * LIMIT, LIMIT), 1, "and not twice");
        assert_eq!(talking.1.phase(), Phase::Cut);
        for (record, _) in [whole, silent, talking, both] {
            record.finish(Ok(()));
        }
        assert_eq!(watch.sweep(start + 9 * LIMIT, LIMIT), 0);
    }
}
