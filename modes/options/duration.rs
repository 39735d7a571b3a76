//! Durations as the field's environment writes them: `5s`, `1m30s`, `250ms`, `24h`.

use std::time::Duration;

/// Units, the longer name of two first.
const UNITS: [(&str, u64); 5] = [
    ("ms", 1),
    ("s", 1000),
    ("m", 60_000),
    ("h", 3_600_000),
    ("d", 86_400_000),
];

/// Reads a duration: whole numbers, each with its unit.
///
/// # Errors
/// Says what is wrong with the text.
pub fn parse(text: &str) -> Result<Duration, String> {
    let wrong =
        || format!("`{text}` is no duration: want numbers with units, as in 30s, 5m, 1h30m");
    let mut rest = text.trim();
    let mut total = 0_u64;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(wrong)?;
        let (number, after) = rest.split_at(digits);
        let letters = after
            .find(|c: char| c.is_ascii_digit())
            .unwrap_or(after.len());
        let (unit, next) = after.split_at(letters);
        let (_, millis) = UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(wrong)?;
        total = number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(*millis))
            .and_then(|part| total.checked_add(part))
            .ok_or_else(wrong)?;
        rest = next;
    }
    Ok(Duration::from_millis(total))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    #[rstest::rstest]
    #[case("5s", Some(5_000))]
    #[case("250ms", Some(250))]
    #[case("1m30s", Some(90_000))]
    #[case("24h", Some(86_400_000))]
    #[case("0s", Some(0))]
    #[case("", None)]
    #[case("5", None)]
    #[case("s", None)]
    #[case("5x", None)]
    #[case("-5s", None)]
    #[case("99999999999999999999s", None)]
    #[case("18446744073709551615h", None)]
    fn durations(#[case] text: &str, #[case] millis: Option<u64>) {
        assert_eq!(parse(text).ok(), millis.map(Duration::from_millis));
    }
}
