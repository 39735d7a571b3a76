//! Going on with a benchmark that was interrupted.
//!
//! What counts as measured is a case in a round with all its variants: only samples that were taken close together may be
//! compared, so a case that was broken off in the middle of a round is measured again in that round. Labs are built and
//! proven anew.

use std::fs;
use std::path::Path as FilePath;

use anyhow::{Result, bail};

use super::case::Case;
use super::environment::Environment;
use super::report::{Ended, RESULTS, Report};
use super::run::BenchSpec;

/// The report to go on with: the one in the directory of `spec`, or an empty one where there is none.
///
/// # Errors
/// When what was measured there is not what `spec` wants measured, or not by this program or on this machine.
pub fn report(spec: &BenchSpec) -> Result<Report> {
    let wanted = Report::new(spec, Environment::of_this_machine());
    let file = spec.out.join(RESULTS);
    if !file.exists() {
        return Ok(wanted);
    }
    let mut found = Report::load(&file)?;
    if let Some(difference) = difference(&found, &wanted) {
        bail!(
            "{} cannot be continued: {difference}; another --out or no --resume begins anew",
            file.display()
        );
    }
    // Of somebody else's proxy, a file has only the name.
    found.variants = wanted.variants;
    for sample in &mut found.samples {
        if let Some(variant) = found
            .variants
            .iter()
            .find(|v| v.as_str() == sample.variant.as_str())
        {
            sample.variant = variant.clone();
        }
    }
    let done = done(&found);
    found
        .samples
        .retain(|sample| done.contains(&(sample.round, sample.case)));
    found.proofs.clear();
    found.ended = Ended::Running;
    found.sessions += 1;
    Ok(found)
}

/// Rounds of cases in which every variant was measured.
pub fn done(report: &Report) -> Vec<(usize, Case)> {
    let mut done = Vec::new();
    for round in 0..report.rounds {
        for &case in &report.cases {
            let mut variants = report.variants.iter().filter(|v| case.applies_to(v));
            let is_measured = |variant| {
                let samples = report.of(variant, case);
                samples.iter().any(|sample| sample.round == round)
            };
            if variants.all(is_measured) {
                done.push((round, case));
            }
        }
    }
    done
}

fn difference(found: &Report, wanted: &Report) -> Option<String> {
    let words = |report: &Report| {
        let variants: Vec<String> = report.variants.iter().map(ToString::to_string).collect();
        variants.join(",")
    };
    let cases = |report: &Report| {
        let cases: Vec<String> = report.cases.iter().map(ToString::to_string).collect();
        cases.join(",")
    };
    let machine = |report: &Report| {
        let machine = &report.environment;
        format!(
            "{}, {} x {}",
            machine.kernel, machine.processors, machine.processor
        )
    };
    let both = [
        ("variants", words(found), words(wanted)),
        ("cases", cases(found), cases(wanted)),
        (
            "rounds",
            found.rounds.to_string(),
            wanted.rounds.to_string(),
        ),
        (
            "seconds",
            found.seconds_per_sample.to_string(),
            wanted.seconds_per_sample.to_string(),
        ),
        (
            "overlay",
            found.overlay_ordered.to_string(),
            wanted.overlay_ordered.to_string(),
        ),
        ("build", found.build.clone(), wanted.build.clone()),
        ("program", found.program.clone(), wanted.program.clone()),
        ("machine", machine(found), machine(wanted)),
    ];
    both.into_iter()
        .find(|(_, found, wanted)| found != wanted)
        .map(|(what, found, wanted)| format!("its {what} are {found}, not {wanted}"))
}

/// A number that is another one for another program: FNV-1a of its bytes. Empty where it cannot be read.
pub fn digest(program: &FilePath) -> String {
    let Ok(bytes) = fs::read(program) else {
        return String::new();
    };
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::report::examples;
    use crate::bench::variant::Variant;
    use crate::bench::verdict::RELAY_CASE;

    fn both() -> (BenchSpec, Report, tempfile::TempDir) {
        let directory = tempfile::tempdir().unwrap();
        let variants = [Variant::None, Variant::Inpod];
        let mut report = examples::report(
            &variants,
            &[RELAY_CASE],
            &[
                (Variant::None, &[1.0, 2.0, 3.0]),
                (Variant::Inpod, &[1.0, 2.0]),
            ],
        );
        report.seconds_taken = 100.0;
        report.ended = Ended::Interrupted;
        report.store(directory.path()).unwrap();
        let spec = BenchSpec {
            resume: true,
            out: directory.path().to_path_buf(),
            ..examples::spec(&variants, &[RELAY_CASE], 3)
        };
        (spec, report, directory)
    }

    #[test]
    fn whole_rounds_are_kept_and_broken_ones_measured_again() {
        let (spec, before, _directory) = both();
        let again = report(&spec).unwrap();
        assert_eq!(done(&again), [(0, RELAY_CASE), (1, RELAY_CASE)]);
        assert_eq!(again.samples.len(), 4);
        assert_eq!(
            (again.sessions, again.ended),
            (before.sessions + 1, Ended::Running)
        );
        assert!((again.seconds_taken - 100.0).abs() < 1e-9);
    }

    #[test]
    fn another_benchmark_is_not_continued() {
        let (spec, _, _directory) = both();
        for (other, named) in [
            (
                BenchSpec {
                    rounds: 4,
                    ..spec.clone()
                },
                "rounds",
            ),
            (
                BenchSpec {
                    seconds: 9,
                    ..spec.clone()
                },
                "seconds",
            ),
            (
                BenchSpec {
                    build: "2".to_owned(),
                    ..spec.clone()
                },
                "build",
            ),
            (
                BenchSpec {
                    variants: vec![Variant::None],
                    ..spec.clone()
                },
                "variants",
            ),
        ] {
            let error = report(&other).unwrap_err().to_string();
            assert!(error.contains(named), "{error}");
        }
        let nothing = tempfile::tempdir().unwrap();
        let fresh = BenchSpec {
            out: nothing.path().to_path_buf(),
            ..spec
        };
        assert_eq!(report(&fresh).unwrap().samples.len(), 0);
    }
}
