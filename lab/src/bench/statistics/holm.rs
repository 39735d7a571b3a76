//! Holm's correction: among many tests some find a difference by chance.

/// p-values that hold for all tests together (Holm 1979): compare each with the level that the whole may be wrong with.
/// Order is that of the arguments.
pub fn adjusted(p_values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p_values.len()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let mut result = vec![1.0; p_values.len()];
    let mut largest: f64 = 0.0;
    for (rank, at) in order.into_iter().enumerate() {
        largest = largest.max(p_values[at] * (p_values.len() - rank) as f64);
        result[at] = largest.min(1.0);
    }
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_is_multiplied_by_all_and_order_is_kept() {
        let adjusted = adjusted(&[0.04, 0.01, 0.03, 0.5]);
        for (found, expected) in adjusted.iter().zip([0.09, 0.04, 0.09, 0.5]) {
            assert!((found - expected).abs() < 1e-12, "{adjusted:?}");
        }
    }
}
