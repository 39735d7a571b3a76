//! What a run was told, and what it found.

use std::fmt;
use std::fs::OpenOptions;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A parser that is fed inputs of a few kilobytes one by one has no business with more, in a process of its own.
const LARGEST_MIB: u64 = 256;

/// What the environment says.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) inputs: u64,
    pub(crate) seed: u64,
    record: Option<PathBuf>,
}

impl Settings {
    pub(crate) fn from_environment() -> Self {
        let number = |name: &str| {
            let text = std::env::var(name).ok()?;
            match text.parse::<u64>() {
                Ok(number) => Some(number),
                Err(error) => panic!("{name}={text}: {error}"),
            }
        };
        let clock = || {
            SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| since.as_secs())
        };
        Self {
            inputs: number("AMBIDEX_FUZZ_INPUTS").unwrap_or(crate::DEFAULT_INPUTS),
            // Another one each time, so that many short runs see more than one.
            seed: number("AMBIDEX_FUZZ_SEED").unwrap_or_else(clock),
            record: std::env::var_os("AMBIDEX_FUZZ_RECORD").map(PathBuf::from),
        }
    }

    /// A set of settings without the environment.
    #[cfg(test)]
    pub(crate) fn of(inputs: u64, seed: u64) -> Self {
        Self {
            inputs,
            seed,
            record: None,
        }
    }

    pub(crate) fn note(&self, found: &Found) {
        let Some(path) = &self.record else { return };
        let peak = peak_mib();
        assert!(
            peak.is_none_or(|peak| peak <= LARGEST_MIB),
            "{found}: the process grew to {peak:?} MiB"
        );
        let peak = peak.map_or("?".to_owned(), |peak| peak.to_string());
        let written = OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .and_then(|mut file| writeln!(file, "{}\t{peak}", found.columns()));
        if let Err(error) = written {
            panic!("{}: {error}", path.display());
        }
    }
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Found {
    name: &'static str,
    seed: u64,
    pub(crate) taken: u64,
    pub(crate) refused: u64,
    /// Different reasons of refusal, and kinds of what was taken.
    pub(crate) ways: usize,
    pub(crate) slowest: Duration,
    pub(crate) took: Duration,
}

impl Found {
    pub(crate) fn new(name: &'static str, seed: u64) -> Self {
        Self {
            name,
            seed,
            taken: 0,
            refused: 0,
            ways: 0,
            slowest: Duration::ZERO,
            took: Duration::ZERO,
        }
    }

    /// Name, inputs, seed, seconds, taken, refused, ways, slowest input in milliseconds.
    fn columns(&self) -> String {
        let Self {
            name,
            seed,
            taken,
            refused,
            ways,
            slowest,
            took,
        } = self;
        format!(
            "{name}\t{}\t{seed}\t{:.0}\t{taken}\t{refused}\t{ways}\t{:.1}",
            taken + refused,
            took.as_secs_f64(),
            slowest.as_secs_f64() * 1000.0,
        )
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            name,
            seed,
            taken,
            refused,
            ways,
            slowest,
            took,
        } = self;
        write!(
            f,
            "fuzz {name}, seed {seed}: {taken} inputs taken, {refused} refused, in {ways} ways, {took:.1?}, slowest {slowest:.1?}"
        )
    }
}

/// The most memory that this process ever had.
fn peak_mib() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").trim().parse().ok()?;
    Some(kib / 1024)
}
