//! Logs of the daemons: text or JSON on standard output, written by a thread of its own so that a full pipe never stops
//! a worker, many lines at a time.

mod writer;

use std::io::{self, IsTerminal};

use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt, reload};

/// Filter when `RUST_LOG` says nothing.
const DEFAULT_FILTER: &str = "info";

/// Keeps the log's thread alive, and can change the filter while the program runs.
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    /// The filter that the program started with.
    initial: String,
    lines: writer::Lines,
    _guard: writer::Guard,
}

/// Starts logging: filter from `RUST_LOG`, JSON when `LOG_FORMAT=json`.
///
/// # Errors
/// The log's thread cannot be started.
pub fn start() -> io::Result<Log> {
    let (lines, guard) = writer::start(io::stdout())?;
    let filter =
        EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_FILTER));
    let initial = filter.to_string();
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    // no-color.org: set and not empty.
    let kept = lines.clone();
    let no_colour = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let colour = std::io::stdout().is_terminal() && !no_colour;
    // A second subscriber in one process can only come from a test; the first one stays.
    let _ = if std::env::var("LOG_FORMAT").is_ok_and(|format| format == "json") {
        registry
            .with(fmt::layer().json().flatten_event(true).with_writer(lines))
            .try_init()
    } else {
        registry
            .with(fmt::layer().with_ansi(colour).with_writer(lines))
            .try_init()
    };
    Ok(Log {
        filter: handle,
        initial,
        lines: kept,
        _guard: guard,
    })
}

impl Log {
    /// The filter in force.
    pub fn level(&self) -> String {
        self.filter
            .with_current(ToString::to_string)
            .unwrap_or_default()
    }

    /// Reads how many lines were lost because nobody read the log for long.
    pub fn lost_lines(&self) -> impl Fn() -> u64 + Send + Sync + 'static {
        let lines = self.lines.clone();
        move || lines.lost_in_all()
    }

    /// Adds levels to the filter, which take the place of those that it has for the same targets; `reset` goes back to the one
    /// of the start. The error is a sentence for the operator.
    pub fn set_level(&self, levels: &str) -> Result<(), String> {
        let filter = if levels == "reset" {
            EnvFilter::try_new(&self.initial)
        } else {
            let directives = directives(levels)?;
            EnvFilter::try_new(format!("{},{directives}", self.level()))
        };
        let filter = filter.map_err(|e| format!("{levels:?} is not a log filter: {e}"))?;
        self.filter.reload(filter).map_err(|e| e.to_string())
    }
}

/// Levels as the field writes them, `LEVEL`, `TARGET=LEVEL` or `TARGET:LEVEL` with commas, as a filter is written.
fn directives(levels: &str) -> Result<String, String> {
    let is_level = |text: &str| !text.is_empty() && text.parse::<LevelFilter>().is_ok();
    let directive = |clause: &str| {
        let clause = clause.trim();
        let parts = clause.rsplit_once(['=', ':']);
        match parts {
            None if is_level(clause) => Ok(clause.to_owned()),
            Some((target, level)) if !target.is_empty() && is_level(level) => {
                Ok(format!("{target}={level}"))
            }
            _ => Err(format!(
                "{clause:?} is neither LEVEL nor TARGET=LEVEL (off, error, warn, info, debug, trace)"
            )),
        }
    };
    let all: Result<Vec<_>, _> = levels.split(',').map(directive).collect();
    Ok(all?.join(","))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[test]
    fn levels_are_read_as_the_field_writes_them() {
        for (levels, expected) in [
            ("debug", "debug"),
            ("access:off", "access=off"),
            (
                "info, shared_proxy::core=trace",
                "info,shared_proxy::core=trace",
            ),
            ("shared_proxy::core:warn", "shared_proxy::core=warn"),
        ] {
            assert_eq!(directives(levels).unwrap(), expected);
        }
        for wrong in [
            "",
            "loud",
            "access=loud",
            "=info",
            "info,,",
            "shared_proxy::core",
        ] {
            assert!(directives(wrong).is_err(), "{wrong:?}");
        }
    }
}
