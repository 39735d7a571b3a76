//! One benchmark: a lab per variant, all standing at once, measured in turns.

use std::fs;
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::case::{CLIENT, Case, Path};
use super::environment::Environment;
use super::equality;
use super::interrupt::{self, Interrupted};
use super::pace::{self, Pace};
use super::proof;
use super::report::{Ended, Report};
use super::resume;
use super::stage::Stage;
use super::variant::Variant;
use super::verdict::{self, Flaw};
use crate::standing::Progress;
use crate::topology::{Overlay, Programs};

/// Seconds of the unmeasured run that each variant makes of each case.
const WARM_UP_SECONDS: u64 = 1;
/// How long after the beginning of such a run its connections are looked at.
const LOOK_AFTER: Duration = Duration::from_millis(500);

/// A benchmark as a user orders it.
#[derive(Debug, Clone)]
pub struct BenchSpec {
    /// Variants, in the order in which they are printed.
    pub variants: Vec<Variant>,
    /// Cases.
    pub cases: Vec<Case>,
    /// Rounds; in each one every variant is measured once in every case.
    pub rounds: usize,
    /// Seconds that one sample takes.
    pub seconds: u64,
    /// Overlay of the node capture.
    pub overlay: Overlay,
    /// The programs that are measured.
    pub programs: Programs,
    /// Where results.json goes.
    pub out: PathBuf,
    /// Version, profile and features of the programs, for the report.
    pub build: String,
    /// Whether to go on where the results file in [`BenchSpec::out`] ends.
    pub resume: bool,
}

/// Runs a benchmark: labs, proofs and warm-up first, then the rounds. What was found until an error is in results.json all
/// the same. A run that came to its end may still be worth nothing: [`Report::ended`] says so.
///
/// # Errors
/// When a proof does not hold, a sample has errors or took another path than was proven, or a lab cannot be built;
/// [`Interrupted`] when [`interrupt::listen`] was told to end.
pub fn run(spec: &BenchSpec, progress: Progress<'_>) -> Result<Report> {
    if spec.variants.is_empty() || spec.cases.is_empty() || spec.rounds == 0 || spec.seconds == 0 {
        bail!("nothing to measure: want at least one variant, case, round and second");
    }
    fs::create_dir_all(&spec.out).with_context(|| format!("create {}", spec.out.display()))?;
    let started = Instant::now();
    let mut report = if spec.resume {
        resume::report(spec)?
    } else {
        Report::new(spec, Environment::of_this_machine())
    };
    report.store(&spec.out)?;
    let build = |_: usize, variant: &Variant| Stage::new(variant, spec);
    let outcome = set_up(spec, &mut report, progress, &build)
        .and_then(|stages| measure(spec, stages, &build, &mut report, started, progress));
    // A tool that was interrupted together with this process may have failed before the signal was noted here.
    let outcome = match interrupt::check() {
        Err(interrupted) => Err(interrupted.into()),
        Ok(()) => outcome,
    };
    report.ended = match &outcome {
        Ok(()) => verdict(&report),
        Err(error) if error.is::<Interrupted>() => Ended::Interrupted,
        Err(error) => Ended::Failed(format!("{error:#}")),
    };
    report.store(&spec.out)?;
    outcome.map(|()| report)
}

/// How a run that came to its end ended.
pub fn verdict(report: &Report) -> Ended {
    let flaws = verdict::flaws(report);
    let text: Vec<String> = flaws.iter().map(ToString::to_string).collect();
    let text = text.join("; ");
    match flaws.as_slice() {
        [] => Ended::Finished,
        flaws if flaws.iter().all(|flaw| matches!(flaw, Flaw::Void(_))) => Ended::Void(text),
        _ => Ended::Failed(text),
    }
}

/// Builds the lab of a variant, which is the one with this index.
pub(super) type Build<'a> = &'a (dyn Fn(usize, &Variant) -> Result<Stage> + Sync);

/// Builds all labs at once, proves the path in each and warms it up.
pub(super) fn set_up(
    spec: &BenchSpec,
    report: &mut Report,
    progress: Progress<'_>,
    build: Build<'_>,
) -> Result<Vec<Stage>> {
    let paths: Vec<Path> = [Path::CrossNode, Path::SameNode]
        .into_iter()
        .filter(|path| spec.cases.iter().any(|case| case.path == *path))
        .collect();
    let wanted: Vec<(usize, &Variant)> = spec.variants.iter().enumerate().collect();
    let built = in_parallel(&wanted, progress, |&(index, variant), say| {
        let begun = Instant::now();
        let stage = build(index, variant)?;
        say(format!(
            "{variant}: lab {} stands after {:.1} s",
            stage.lab.name(),
            begun.elapsed().as_secs_f64()
        ));
        Ok(stage)
    });
    let stages = built.into_iter().collect::<Result<Vec<_>>>()?;
    report.overlay = stages.iter().find_map(Stage::overlay);
    if let Some(stage) = stages.first() {
        report.environment.ask_pod(&stage.lab.netns(CLIENT)?);
    }

    // One after the other: packets must not be missed, and only what is proven is warmed up.
    for stage in &stages {
        for &path in &paths {
            interrupt::check()?;
            let proof = proof::prove(&stage.lab, &stage.variant, path)
                .map_err(|error| stage.with_cause(error))
                .with_context(|| format!("proof of {} {path}", stage.variant))?;
            progress(&format!(
                "{} {path}: {}",
                stage.variant,
                if proof.holds() {
                    "proven"
                } else {
                    "NOT PROVEN"
                }
            ));
            report.proofs.push(proof);
        }
    }
    proof::require(&report.proofs)?;
    let warm = in_parallel(&stages, progress, |stage, _| {
        let cases = spec.cases.iter();
        let mut used = equality::Used::new();
        for case in cases.filter(|case| case.wants_warm_up() && case.applies_to(&stage.variant)) {
            let sample = thread::scope(|scope| {
                let load = scope.spawn(|| stage.sample(*case, WARM_UP_SECONDS, 0));
                thread::sleep(LOOK_AFTER);
                equality::look_at_connections(stage, &mut used);
                load.join().unwrap_or_else(|panic| resume_unwind(panic))
            });
            sample.with_context(|| format!("warm-up of {} {case}", stage.variant))?;
        }
        let mut facts = equality::facts(stage)?;
        for (place, names) in used {
            let names: Vec<String> = names.into_iter().collect();
            facts.insert(equality::used_in(place), names.join(" and "));
        }
        Ok((stage.variant.clone(), facts))
    });
    let labs = warm.into_iter().collect::<Result<Vec<_>>>()?;
    report.equality = equality::matrix(&labs, &report.proofs);
    if let Some(used) = equality::of_clients(&report.equality) {
        report.environment.congestion_control = used;
    }
    report.environment.ask_load();
    Ok(stages)
}

/// Does `work` for all items, each in a thread of its own; results are in the order of the items. On a single processor
/// one after the other: what waits there for the others' work meets the limits that are set for its own.
fn in_parallel<T: Sync, R: Send>(
    items: &[T],
    progress: Progress<'_>,
    work: impl Fn(&T, &dyn Fn(String)) -> Result<R> + Sync,
) -> Vec<Result<R>> {
    let single = thread::available_parallelism().is_ok_and(|processors| processors.get() == 1);
    let turn = Mutex::new(());
    thread::scope(|scope| {
        let (sender, lines) = mpsc::channel();
        let (work, turn) = (&work, &turn);
        let threads: Vec<_> = items
            .iter()
            .map(|item| {
                let sender = sender.clone();
                // A line that nobody reads any more is not missed.
                scope.spawn(move || {
                    let _turn = single.then(|| turn.lock().unwrap_or_else(PoisonError::into_inner));
                    work(item, &|line| drop(sender.send(line)))
                })
            })
            .collect();
        drop(sender);
        for line in lines {
            progress(&line);
        }
        threads
            .into_iter()
            .map(|thread| match thread.join() {
                Ok(result) => result,
                Err(panic) => std::panic::resume_unwind(panic),
            })
            .collect()
    })
}

/// In which order variants are measured in a round: each one comes first, second and so on equally often, so that what a
/// machine does in the course of a minute favours none.
pub(super) fn turns(round: usize, variants: usize) -> impl Iterator<Item = usize> {
    (0..variants).map(move |turn| (turn + round) % variants)
}

/// Each round has labs of its own: processes of one and the same program differ for as long as they live, and what they
/// differ by would pass for a difference of variants.
fn measure(
    spec: &BenchSpec,
    mut stages: Vec<Stage>,
    build: Build<'_>,
    report: &mut Report,
    started: Instant,
    progress: Progress<'_>,
) -> Result<()> {
    let done = resume::done(report);
    let earlier = report.seconds_taken;
    let steps: Vec<(usize, Case)> = (0..spec.rounds)
        .flat_map(|round| spec.cases.iter().map(move |case| (round, *case)))
        .filter(|step| !done.contains(step))
        .collect();
    if !done.is_empty() {
        progress(&format!(
            "{} of {} steps were measured before",
            done.len(),
            done.len() + steps.len()
        ));
    }
    let mut pace = Pace::default();
    // What was measured before took this long at least: a better guess than the mean of other cases.
    for step in &done {
        let taken = report.samples.iter().filter(|s| (s.round, s.case) == *step);
        let taken: f64 = taken.map(|sample| sample.wall_seconds).sum();
        pace.took(
            step.1,
            Duration::try_from_secs_f64(taken).unwrap_or_default(),
        );
    }
    let mut of_round = steps.first().map(|(round, _)| *round);
    for (index, &(round, case)) in steps.iter().enumerate() {
        if of_round.replace(round) != Some(round) {
            stages.clear();
            let mut proven = Report::new(spec, report.environment.clone());
            stages = set_up(spec, &mut proven, progress, build)?;
        }
        let begun = Instant::now();
        let mut line = Vec::new();
        for turn in turns(round, stages.len()) {
            interrupt::check()?;
            let stage = &stages[turn];
            if !case.applies_to(&stage.variant) {
                continue;
            }
            let begun_seconds = earlier + started.elapsed().as_secs_f64();
            let mut sample = stage
                .sample(case, spec.seconds, round)
                .with_context(|| format!("round {} of {} {case}", round + 1, stage.variant))?;
            sample.begun_seconds = begun_seconds;
            line.push(format!("{} {}", stage.variant, case.show(sample.value)));
            report.samples.push(sample);
        }
        pace.took(case, begun.elapsed());
        let left = pace.left(steps[index + 1..].iter().map(|(_, case)| *case));
        progress(&format!(
            "round {}/{} {case}: {} {}; {} to go",
            round + 1,
            spec.rounds,
            line.join(", "),
            case.unit(),
            pace::show(left.unwrap_or_default()),
        ));
        report.seconds_taken = earlier + started.elapsed().as_secs_f64();
        report.store(&spec.out)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_variant_is_measured_at_every_turn_equally_often() {
        let mut seen = [[0; 4]; 4];
        for round in 0..8 {
            for (turn, variant) in turns(round, 4).enumerate() {
                seen[variant][turn] += 1;
            }
        }
        assert_eq!(seen, [[2; 4]; 4]);
    }
}
