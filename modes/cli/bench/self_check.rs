//! `ambidex bench --self-check` and `--inject-delay`.

use std::time::Duration;

use lab::bench::interrupt::Interrupted;
use lab::bench::{BenchSpec, self_check, table};

use super::INTERRUPTED;
use crate::cli::Failure;

/// Exit code of a self-check that found a difference.
const DIFFERS: u8 = 3;
/// Exit code of a delay that was not detected.
const UNDETECTED: u8 = 1;

/// A time such as `1ms`, `250us` or `2s`.
pub(super) fn time(word: &str) -> Result<Duration, String> {
    let units = [("us", 1), ("ms", 1_000), ("s", 1_000_000)];
    units
        .into_iter()
        .find_map(|(unit, micros)| {
            let number: u64 = word.strip_suffix(unit)?.parse().ok()?;
            number.checked_mul(micros)
        })
        .filter(|micros| *micros > 0)
        .map(Duration::from_micros)
        .ok_or_else(|| format!("{word:?} is no time: want a number with us, ms or s, such as 1ms"))
}

pub(super) fn run(spec: &BenchSpec, delay: Option<Duration>) -> Result<(), Failure> {
    let check = match self_check::run(spec, delay, &|line| eprintln!("{line}")) {
        Ok(check) => check,
        Err(error) if error.is::<Interrupted>() => return Err(Failure::Code(INTERRUPTED)),
        Err(error) => return Err(error.into()),
    };
    println!("{}", table::comparisons(&check));
    println!();
    println!("{}", check.verdict());
    println!(
        "every sample: {}",
        spec.out.join(self_check::FILE).display()
    );
    match (check.passed(), delay) {
        (true, _) => Ok(()),
        (false, None) => Err(Failure::Code(DIFFERS)),
        (false, Some(_)) => Err(Failure::Code(UNDETECTED)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_unit() {
        assert_eq!(time("1ms"), Ok(Duration::from_millis(1)));
        assert_eq!(time("250us"), Ok(Duration::from_micros(250)));
        for wrong in [
            "",
            "1",
            "ms",
            "0ms",
            "-1s",
            "1.5ms",
            "99999999999999999999s",
        ] {
            assert!(time(wrong).is_err(), "{wrong}");
        }
    }
}
