//! What is counted of changes since the agent's start.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::store::{Ended, Ledgers};
use super::{Ledger, Outcome, Way};

/// Upper limits of the buckets of how long pods were held, in seconds.
const BUCKETS: [f64; 10] = [0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 2.0];

/// Counters.
#[derive(Debug, Default)]
pub(super) struct Counters(Mutex<Counted>);

#[derive(Debug, Default)]
struct Counted {
    changes: BTreeMap<(Way, Way, Outcome), u64>,
    connections: BTreeMap<&'static str, u64>,
    held: [u64; BUCKETS.len()],
    held_count: u64,
    held_seconds: f64,
}

impl Counters {
    fn lock(&self) -> MutexGuard<'_, Counted> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn changed(&self, ledger: &Ledger) {
        let mut counted = self.lock();
        let key = (ledger.from, ledger.to, ledger.result);
        *counted.changes.entry(key).or_default() += 1;
        for (class, count) in [
            ("kept", ledger.kept as u64),
            ("delayed", ledger.delayed.count),
            ("outside", ledger.outside as u64),
        ] {
            *counted.connections.entry(class).or_default() += count;
        }
        if ledger.from != Way::None && ledger.to != Way::None {
            let held = Duration::from_micros(ledger.held_us).as_secs_f64();
            for (bucket, limit) in counted.held.iter_mut().zip(BUCKETS) {
                *bucket += u64::from(held <= limit);
            }
            counted.held_count += 1;
            counted.held_seconds += held;
        }
    }

    pub(super) fn ended(&self, how: Ended, count: usize) {
        let class = match how {
            Ended::Drained => "drained",
            Ended::Reset => "reset",
        };
        *self.lock().connections.entry(class).or_default() += count as u64;
    }
}

impl Ledgers {
    /// The metrics, as text.
    pub(crate) fn metrics(&self) -> String {
        let counted = self.counters.lock();
        let mut text = String::new();
        // Writing to a String does not fail.
        let head = |text: &mut String, name: &str, kind: &str, help: &str| {
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        };
        let name = "ambidex_switch_total";
        let help = "Changes of running pods' captures, those from and to none included.";
        head(&mut text, name, "counter", help);
        for ((from, to, result), count) in &counted.changes {
            let result = match result {
                Outcome::Done => "done",
                Outcome::Failed => "failed",
            };
            let _ = writeln!(
                text,
                "{name}{{from=\"{from}\",to=\"{to}\",result=\"{result}\"}} {count}"
            );
        }
        let name = "ambidex_switch_connections_total";
        let help = "Connections of pods whose capture changed, by what became of them.";
        head(&mut text, name, "counter", help);
        for (class, count) in &counted.connections {
            let _ = writeln!(text, "{name}{{class=\"{class}\"}} {count}");
        }
        let name = "ambidex_switch_held_seconds";
        let help = "How long pods were held for a change between two captures.";
        head(&mut text, name, "histogram", help);
        for (count, limit) in counted.held.iter().zip(BUCKETS) {
            let _ = writeln!(text, "{name}_bucket{{le=\"{limit}\"}} {count}");
        }
        let count = counted.held_count;
        let _ = writeln!(text, "{name}_bucket{{le=\"+Inf\"}} {count}");
        let _ = writeln!(text, "{name}_sum {}", counted.held_seconds);
        let _ = writeln!(text, "{name}_count {count}");
        text
    }
}
