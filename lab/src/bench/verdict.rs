//! Whether a report is what its reader takes it for: complete, proven, and measured on a machine that could tell.

use std::fmt;

use super::case::{Case, Load, Path, Way};
use super::report::Report;
use super::statistics::median;
use super::variant::Variant;

/// A relay below this share of no mesh, in one stream across nodes, is not the bound of anything: something else held the
/// stream back, and what was held back with it cannot be told.
pub const RELAY_FLOOR: f64 = 0.45;

/// The case that the relay is judged in.
pub const RELAY_CASE: Case = Case {
    path: Path::CrossNode,
    load: Load::Bulk {
        streams: 1,
        way: Way::Up,
    },
};

/// Why a report must not be believed.
#[derive(Debug, Clone, PartialEq)]
pub enum Flaw {
    /// A variant's path was never proven.
    NoProof(Variant, Path),
    /// A proof does not hold: its first failed statement.
    Unproven(Variant, Path, String),
    /// Samples that should be there: a variant's in a case.
    Missing {
        /// Variant.
        variant: Variant,
        /// Case.
        case: Case,
        /// Rounds in which it was measured, each once.
        found: usize,
        /// Rounds ordered.
        wanted: usize,
    },
    /// The relay was too slow to be a bound: its share of no mesh.
    Void(f64),
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoProof(variant, path) => write!(f, "{variant} {path}: the path was not proven"),
            Self::Unproven(variant, path, statement) => {
                write!(f, "{variant} {path}: the proof does not hold: {statement}")
            }
            Self::Missing {
                variant,
                case,
                found,
                wanted,
            } => write!(f, "{variant} {case}: {found} samples of {wanted}"),
            Self::Void(share) => write!(
                f,
                "in {RELAY_CASE} the relay came to {share:.2} of none, less than {RELAY_FLOOR}: \
                 the machine was not able to tell"
            ),
        }
    }
}

/// All that is wrong with a report of a run that came to its end.
pub fn flaws(report: &Report) -> Vec<Flaw> {
    let mut flaws = unproven(report);
    flaws.extend(missing(report));
    flaws.extend(void(report));
    flaws
}

fn unproven(report: &Report) -> Vec<Flaw> {
    let mut flaws = Vec::new();
    for variant in &report.variants {
        for path in [Path::CrossNode, Path::SameNode] {
            if !report.cases.iter().any(|case| case.path == path) {
                continue;
            }
            let mut proofs = report
                .proofs
                .iter()
                .filter(|proof| proof.variant == *variant && proof.path == path)
                .peekable();
            if proofs.peek().is_none() {
                flaws.push(Flaw::NoProof(variant.clone(), path));
            }
            flaws.extend(proofs.filter_map(|proof| {
                if proof.statements.is_empty() {
                    return Some(Flaw::NoProof(variant.clone(), path));
                }
                let failed = proof.failed().next()?;
                let statement = format!("{}: {}", failed.claim, failed.found);
                Some(Flaw::Unproven(variant.clone(), path, statement))
            }));
        }
    }
    flaws
}

fn missing(report: &Report) -> Vec<Flaw> {
    let mut flaws = Vec::new();
    for &case in &report.cases {
        for variant in &report.variants {
            if !case.applies_to(variant) {
                continue;
            }
            let samples = report.of(variant, case);
            let found = (0..report.rounds)
                .filter(|round| {
                    samples
                        .iter()
                        .filter(|sample| sample.round == *round)
                        .count()
                        == 1
                })
                .count();
            if found != report.rounds {
                flaws.push(Flaw::Missing {
                    variant: variant.clone(),
                    case,
                    found,
                    wanted: report.rounds,
                });
            }
        }
    }
    flaws
}

fn void(report: &Report) -> Option<Flaw> {
    let of = |variant: &Variant| {
        let values: Vec<f64> = report
            .of(variant, RELAY_CASE)
            .iter()
            .map(|sample| sample.value)
            .collect();
        median(&values)
    };
    let share = of(&Variant::Relay)? / of(&Variant::None)?;
    // A share that is not a number is not above the floor either.
    (!share.is_finite() || share < RELAY_FLOOR).then_some(Flaw::Void(share))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::examples::{self, proven};

    fn report(relay: f64) -> Report {
        let mut report = examples::report(
            &[Variant::None, Variant::Relay],
            &[RELAY_CASE],
            &[
                (Variant::None, &[10.0, 10.0]),
                (Variant::Relay, &[relay, relay]),
            ],
        );
        report.proofs = report
            .variants
            .iter()
            .map(|variant| proven(variant, Path::CrossNode))
            .collect();
        report
    }

    #[test]
    fn a_whole_run_has_no_flaw() {
        assert_eq!(flaws(&report(5.0)), []);
    }

    #[test]
    fn a_slow_relay_makes_a_run_void() {
        assert_eq!(flaws(&report(4.5)), [], "at the floor");
        let flaws = flaws(&report(4.4));
        assert!(matches!(flaws[..], [Flaw::Void(share)] if (share - 0.44).abs() < 1e-9));
        assert!(
            flaws[0].to_string().contains("0.44 of none"),
            "{}",
            flaws[0]
        );
    }

    #[test]
    fn a_missing_or_repeated_sample_is_a_flaw() {
        let mut lacking = report(5.0);
        let taken = lacking.samples.pop().unwrap();
        let flaw = Flaw::Missing {
            variant: Variant::Relay,
            case: RELAY_CASE,
            found: 1,
            wanted: 2,
        };
        assert_eq!(flaws(&lacking), [flaw]);
        // The same round twice does not make up for it.
        let mut twice = taken;
        twice.round = 0;
        lacking.samples.push(twice);
        assert!(matches!(
            flaws(&lacking)[..],
            [Flaw::Missing { found: 0, .. }]
        ));
    }

    #[test]
    fn a_dropped_or_failed_proof_is_a_flaw() {
        let mut dropped = report(5.0);
        dropped.proofs.pop();
        let flaw = Flaw::NoProof(Variant::Relay, Path::CrossNode);
        assert_eq!(flaws(&dropped), std::slice::from_ref(&flaw));
        let mut empty = report(5.0);
        empty.proofs[1].statements.clear();
        assert_eq!(flaws(&empty), [flaw]);
        let mut failed = report(5.0);
        failed.proofs[0].statements[0].holds = false;
        assert!(matches!(
            &flaws(&failed)[..],
            [Flaw::Unproven(Variant::None, _, _)]
        ));
    }
}
