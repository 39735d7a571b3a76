//! Drift: whether the machine was the same at the end of a run as at its beginning.

use super::median;

/// Fewest samples of a series whose drift can be told from noise.
pub const LEAST: usize = 4;
/// A baseline that moved by more than this share makes its cell doubtful.
pub const LIMIT: f64 = 0.10;

/// By which share the median of the second half of a series differs from that of the first half; with an odd number of
/// samples the middle one is in neither. None from fewer than [`LEAST`] samples.
pub fn drift(series: &[f64]) -> Option<f64> {
    if series.len() < LEAST {
        return None;
    }
    let half = series.len() / 2;
    let first = median(&series[..half])?;
    let second = median(&series[series.len() - half..])?;
    (first > 0.0).then(|| second / first - 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_that_falls_drifts_and_a_noisy_one_does_not() {
        let falls = drift(&[10.0, 10.0, 9.0, 8.0, 7.0, 7.0]).unwrap();
        assert!((falls + 0.3).abs() < 1e-9, "{falls}");
        let noisy = drift(&[10.0, 9.0, 11.0, 5.0, 10.0, 9.5, 10.5]).unwrap();
        assert!(noisy.abs() < LIMIT, "{noisy}");
        assert_eq!(drift(&[1.0, 2.0, 3.0]), None);
    }
}
