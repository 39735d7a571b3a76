//! Made-up reports, for tests.

use std::path::Path as FilePath;

use super::{Report, Sample};
use crate::bench::accounting::Cpu;
use crate::bench::case::{Case, Path};
use crate::bench::counters::Counters;
use crate::bench::environment::Environment;
use crate::bench::proof::{Leg, Proof, Statement};
use crate::bench::run::BenchSpec;
use crate::bench::variant::Variant;
use crate::topology::{Overlay, Programs};

/// A proof with one statement, which holds.
pub fn proven(variant: &Variant, path: Path) -> Proof {
    Proof {
        variant: variant.clone(),
        path,
        statements: vec![Statement {
            claim: "every byte arrives".to_owned(),
            holds: true,
            found: "all".to_owned(),
        }],
        client_seen: None,
        taps: Vec::new(),
        client_leg: Leg::default(),
        tunnel_leg: None,
    }
}

/// An order of these variants and cases.
pub fn spec(variants: &[Variant], cases: &[Case], rounds: usize) -> BenchSpec {
    BenchSpec {
        variants: variants.to_vec(),
        cases: cases.to_vec(),
        rounds,
        seconds: 1,
        overlay: Overlay::Auto,
        programs: Programs::beside(FilePath::new("/x/ambidex")),
        out: "/x".into(),
        build: "1.2.3 release".to_owned(),
        resume: false,
    }
}

/// A report with these results, one per round, in each of the cases. Each sample took a second, of 2 GB or 2 million
/// operations, with 3 s of the proxies and 8 s of the machine.
pub fn report(variants: &[Variant], cases: &[Case], values: &[(Variant, &[f64])]) -> Report {
    let rounds = values.first().map_or(0, |(_, values)| values.len());
    let spec = spec(variants, cases, rounds);
    let mut report = Report::new(&spec, Environment::of_this_machine());
    for &case in cases {
        for (variant, values) in values {
            let samples = values.iter().enumerate();
            report
                .samples
                .extend(samples.map(|(round, value)| sample(variant, case, round, *value)));
        }
    }
    report
}

fn sample(variant: &Variant, case: Case, round: usize, value: f64) -> Sample {
    let proxies = if *variant == Variant::None { 0.0 } else { 1.0 };
    Sample {
        variant: variant.clone(),
        case,
        round,
        begun_seconds: 0.0,
        value,
        work: 2.0 * case.load.work_unit_size(),
        latency_us: None,
        extra: Default::default(),
        proxies_cpu: Cpu {
            user: proxies,
            system: 2.0 * proxies,
            interrupts: 0.0,
        },
        machine_cpu: Cpu {
            user: 4.0,
            system: 2.0,
            interrupts: 2.0,
        },
        foreign_seconds: 0.0,
        stolen_seconds: 0.0,
        wall_seconds: 1.0,
        overlays: [Counters::default(); 2],
    }
}
