//! The node capture over real geneve: a small suite in a kernel that surely has it.
//!
//! Many kernels on which this is built have no geneve, so the suite brings its own: User-Mode Linux (a Linux kernel that
//! is a program) boots on this machine's root file system in two seconds, and this program runs itself there, with the
//! real `ambidex` and `ambidex-cni`. Outside it speaks as any test program does. The kernel has iptables-legacy only,
//! which makes this the suite of that variant, too.

mod absent;
mod arguments;
mod flows;
mod golden;
#[path = "../listings/mod.rs"]
mod listings;
mod machine;
mod removal;
mod report;
mod set_up;
mod suite;
mod switching;
#[allow(clippy::unwrap_used, clippy::disallowed_methods)]
#[path = "../talk/mod.rs"]
mod talk;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail};

use arguments::Arguments;
use report::Report;

/// First argument of the program in the machine: the report's path and the names of the tests follow.
const INSIDE: &str = "--inside-the-machine";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    let outcome = if words.next_if_eq(INSIDE).is_some() {
        inside(words)
    } else {
        outside(&Arguments::parse(words))
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(101),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::from(101)
        }
    }
}

fn inside(mut words: impl Iterator<Item = String>) -> Result<bool> {
    let report = words.next().context("no path for the report")?;
    suite::run(report.as_ref(), &words.collect::<Vec<_>>())
}

fn outside(arguments: &Arguments) -> Result<bool> {
    let started = Instant::now();
    let all = std::env::var("AMBIDEX_TEST_SUITE").is_ok_and(|suite| suite == "all");
    let names: Vec<&str> = suite::TESTS
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| arguments.wants(name) && (all || *name != suite::OF_ALL))
        .collect();
    if arguments.list {
        names.iter().for_each(|name| println!("{name}: test"));
        if !arguments.terse {
            println!("\n{} tests, 0 benchmarks", names.len());
        }
        return Ok(true);
    }
    println!("\nrunning {} tests", names.len());
    let mut report = Report {
        exit_code: Some(0),
        ..Report::default()
    };
    if !names.is_empty() {
        report = machine::run(&names)?;
    }
    // A test that was never reached has not passed.
    let passed = report.tests.iter().filter(|test| test.error.is_none());
    let passed = passed.count().min(names.len());
    let failed = names.len() - passed;
    let good = failed == 0 && report.exit_code == Some(0);
    for test in &report.tests {
        let verdict = if test.error.is_some() { "FAILED" } else { "ok" };
        println!("test {} ... {verdict} <{:.3}s>", test.name, test.seconds);
    }
    for name in names.iter().skip(report.tests.len()) {
        println!("test {name} ... FAILED <0.000s>");
    }
    for test in &report.tests {
        if let Some(error) = &test.error {
            println!("\n---- {} ----\n{error}", test.name);
        }
    }
    println!(
        "\ntest result: {}. {passed} passed; {failed} failed; 0 ignored; 0 measured; {} filtered out; finished in {:.2}s\n",
        if good { "ok" } else { "FAILED" },
        suite::TESTS.len() - names.len(),
        started.elapsed().as_secs_f64()
    );
    if !good && failed == 0 {
        bail!("every test passed, but the suite did not end well");
    }
    Ok(good)
}
