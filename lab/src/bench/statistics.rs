//! Medians, intervals and tests of samples.
//!
//! Samples of a case are taken in rounds: in each one every variant is measured once, close together in time. Everything
//! here that compares two variants therefore works on pairs of the same round, so that what the machine did in that
//! minute is in both and cancels.
//!
//! [`bootstrap`] gives intervals of ratios, [`sign_flip`] tests whether there is a difference at all, [`holm`] corrects for
//! testing many cells at once, [`drift`] says how much a series moved in the course of the run.

pub mod bootstrap;
pub mod drift;
pub mod holm;
pub mod sign_flip;

use serde::{Deserialize, Serialize};

/// Median, smallest and largest of a set of samples.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Median: with an even number of samples the mean of the middle two.
    pub median: f64,
    /// Smallest.
    pub min: f64,
    /// Largest.
    pub max: f64,
}

impl Summary {
    /// Summary of samples; none if there is no sample, or if one of them is not a number.
    pub fn of(samples: &[f64]) -> Option<Self> {
        if samples.is_empty() || samples.iter().any(|sample| !sample.is_finite()) {
            return None;
        }
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        Some(Self {
            median: middle(&sorted),
            min: sorted[0],
            max: sorted[sorted.len() - 1],
        })
    }
}

/// Median of samples; none if there is no sample, or if one of them is not a number.
pub fn median(samples: &[f64]) -> Option<f64> {
    Summary::of(samples).map(|summary| summary.median)
}

/// Median of sorted samples, of which there is one at least.
fn middle(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    if sorted.len() % 2 == 1 {
        sorted[middle]
    } else {
        f64::midpoint(sorted[middle - 1], sorted[middle])
    }
}

/// An estimate with the interval that holds the true value with the stated confidence.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Estimate {
    /// The estimate.
    pub value: f64,
    /// Lower and upper end of its 95 % interval; none from fewer than [`bootstrap::LEAST`] pairs.
    pub interval: Option<[f64; 2]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_median_is_the_middle_of_the_sorted_samples() {
        let odd = Summary::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 3.0]).unwrap().median, 2.5);
        assert!(Summary::of(&[]).is_none());
        assert!(Summary::of(&[1.0, f64::NAN]).is_none());
    }
}
