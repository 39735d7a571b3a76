//! Fisher's randomisation test for pairs.
//!
//! If two variants are the same, then in each round it was chance which of the two came out ahead: the logarithm of their
//! ratio could as well have had the other sign. Of all 2ⁿ ways to set the signs of n rounds, the p-value is the share whose
//! sum is at least as far from zero as the one found. That is exact for every n and every distribution, which neither a
//! t-test (wants normal differences) nor a bootstrap (too narrow for few rounds, so it would find differences that are not
//! there) can say of n = 8.
//!
//! The smallest p-value is 2¹⁻ⁿ: fewer than 6 rounds cannot find anything at 5 %, and with m tests it takes
//! n ≥ 1 + log₂(m / 0.05) ([`rounds_needed`]). Power in one cell at 5 %, by simulation with normal noise of standard
//! deviation s per round: a difference of 1.5 s is found in 95 of 100 cases from 8 rounds, one of 1 s in 61 from 8 and in 90
//! from 12.

/// Most rounds for which all signs are tried; more are summed into this many groups.
const EXACT: usize = 16;
/// Sums closer than this share are the same sum, added in another order.
const SAME: f64 = 1e-9;

/// Two-sided p-value of the hypothesis that both of each pair are the same but for chance. 1 without pairs; numbers must be
/// positive.
pub fn p_value(pairs: &[(f64, f64)]) -> f64 {
    let ratios: Vec<f64> = pairs.iter().map(|(a, b)| (a / b).ln()).collect();
    // More rounds than can be tried in full are summed up into as many groups: exact still, with a little less power.
    let mut groups = vec![0.0; ratios.len().min(EXACT)];
    for (at, ratio) in ratios.iter().enumerate() {
        groups[at % EXACT] += ratio;
    }
    if groups.is_empty() || groups.iter().any(|sum| !sum.is_finite()) {
        return 1.0;
    }
    let found = groups.iter().sum::<f64>().abs();
    let scale = groups.iter().map(|sum| sum.abs()).sum::<f64>();
    let all = 1_u32 << groups.len();
    let as_far = (0..all)
        .filter(|signs| {
            let sum: f64 = groups
                .iter()
                .enumerate()
                .map(|(at, value)| if signs >> at & 1 == 1 { -value } else { *value })
                .sum();
            sum.abs() >= found - SAME * scale
        })
        .count();
    as_far as f64 / f64::from(all)
}

/// Rounds from which `tests` tests together can find anything at `level`.
pub fn rounds_needed(tests: usize, level: f64) -> usize {
    (2..=EXACT)
        .find(|rounds| 2_f64.powi(1 - *rounds as i32) * tests as f64 <= level)
        .unwrap_or(EXACT)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(logarithms: &[f64]) -> Vec<(f64, f64)> {
        logarithms.iter().map(|log| (log.exp(), 1.0)).collect()
    }

    #[test]
    fn p_values_are_those_counted_by_hand() {
        // All of one sign: only that and its opposite are as far from zero.
        assert_eq!(p_value(&pairs(&[0.1; 6])), 2.0 / 64.0);
        // Signs of 1, 2 and 4 make every odd sum from -7 to 7 once: 5 and 7 and their opposites.
        assert_eq!(p_value(&pairs(&[-0.1, 0.2, 0.4])), 4.0 / 8.0);
        assert_eq!(p_value(&pairs(&[0.1, -0.1])), 1.0);
        assert_eq!(p_value(&[]), 1.0);
        assert_eq!(p_value(&[(1.0, 0.0)]), 1.0);
    }

    #[test]
    fn many_rounds_are_summed_into_groups() {
        assert_eq!(p_value(&pairs(&[0.1; 40])), 2.0 / 65536.0);
    }

    #[test]
    fn equal_variants_are_found_different_no_more_often_than_promised() {
        let mut state = 1_u64;
        let mut uniform = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (state >> 11) as f64 / (1_u64 << 53) as f64 - 0.5
        };
        let mut found = 0;
        for _ in 0..400 {
            let logs: Vec<f64> = (0..8).map(|_| uniform() * uniform()).collect();
            found += usize::from(p_value(&pairs(&logs)) <= 0.05);
        }
        assert!((4..=36).contains(&found), "{found} of 400");
    }

    #[test]
    fn more_cells_need_more_rounds() {
        assert_eq!(rounds_needed(1, 0.05), 6);
        assert_eq!(rounds_needed(2, 0.05), 7);
        assert_eq!(rounds_needed(12, 0.05), 9);
    }
}
