//! The suite as it runs in the machine: its tests in order, and the lab that they share.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use host_net::dump::Dump;
use host_net::netns::Netns;
use lab::standing::{self, Captured, ScopedLab};
use lab::topology::{LabSpec, Mode, NodeFlow, Overlay, Programs};

use crate::report::{Report, TestReport};
use crate::{absent, flows, golden, removal, set_up, switching};

/// A test: its name, and what it does with the suite.
pub type Test = (&'static str, fn(&mut Suite) -> Result<()>);

/// All tests in the order in which they run. The first one needs a machine that has not loaded geneve yet.
pub const TESTS: [Test; 10] = [
    ("geneve::absent_is_one_sentence", absent::one_sentence),
    ("geneve::set_up_dump_hybrid", |suite| {
        set_up::dump(suite, NodeFlow::Hybrid)
    }),
    ("geneve::listings_hybrid", |suite| {
        golden::listings(suite, NodeFlow::Hybrid)
    }),
    ("geneve::four_flows_hybrid", |suite| {
        flows::four(suite, NodeFlow::Hybrid)
    }),
    ("geneve::removal_hybrid", |suite| {
        removal::leaves_nothing(suite, NodeFlow::Hybrid)
    }),
    (OF_ALL, switching::open_connections_go_on),
    ("geneve::set_up_dump_tunnel", |suite| {
        set_up::dump(suite, NodeFlow::Tunnel)
    }),
    ("geneve::listings_tunnel", |suite| {
        golden::listings(suite, NodeFlow::Tunnel)
    }),
    ("geneve::four_flows_tunnel", |suite| {
        flows::four(suite, NodeFlow::Tunnel)
    }),
    ("geneve::removal_tunnel", |suite| {
        removal::leaves_nothing(suite, NodeFlow::Tunnel)
    }),
];

/// Run with `AMBIDEX_TEST_SUITE=all` only: it needs a lab of its own.
pub const OF_ALL: &str = "geneve::open_connections_go_on";

/// Name of the lab: always the same, so that labs with and without capture can be compared.
const LAB: &str = "gnv";
/// Bound of one command in the lab.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// What tests share: at most one lab at a time.
pub struct Suite {
    runtime: tokio::runtime::Runtime,
    programs: Programs,
    /// The machine before any lab.
    pub machine_before: Dump,
    bare: Option<[Dump; 2]>,
    lab: Option<(NodeFlow, Result<ScopedLab, String>)>,
}

/// Runs the tests with these names, one after the other, and writes down how each ended. True when all passed.
pub fn run(path: &Path, names: &[String]) -> Result<bool> {
    let mut suite = Suite::new()?;
    let mut report = Report::default();
    for (name, test) in TESTS {
        if !names.iter().any(|wanted| wanted == name) {
            continue;
        }
        let started = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| test(&mut suite)));
        let error = match outcome {
            Ok(outcome) => outcome.err().map(|error| format!("{error:#}")),
            Err(_) => Some("it panicked; the console says where".to_owned()),
        };
        let seconds = started.elapsed().as_secs_f64();
        println!(
            "{name}: {seconds:.1} s {}",
            error.as_deref().unwrap_or("ok")
        );
        report.tests.push(TestReport {
            name: name.to_owned(),
            seconds,
            error,
        });
        report.store(path)?;
    }
    drop(suite);
    let passed = report.tests.iter().all(|test| test.error.is_none());
    report.exit_code = Some(u8::from(!passed));
    report.store(path)?;
    Ok(passed)
}

impl Suite {
    fn new() -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let machine = Netns::current()?;
        let machine_before = runtime.block_on(host_net::dump::dump(&machine))?;
        Ok(Self {
            runtime,
            programs: Programs::beside(Path::new(env!("CARGO_BIN_EXE_ambidex"))),
            machine_before,
            bare: None,
            lab: None,
        })
    }

    /// The program under test.
    pub fn ambidex(&self) -> &Path {
        &self.programs.ambidex
    }

    /// The state of a namespace.
    pub fn dump(&self, netns: &Netns) -> Result<Dump> {
        Ok(self.runtime.block_on(host_net::dump::dump(netns))?)
    }

    /// The lab with this flow over geneve: built when it is first asked for, in place of any other.
    pub fn lab(&mut self, flow: NodeFlow) -> Result<&ScopedLab> {
        if self
            .lab
            .as_ref()
            .is_none_or(|(standing, _)| *standing != flow)
        {
            self.lab = None;
            let spec = LabSpec {
                node_flow: flow,
                overlay: Overlay::Geneve,
                ..LabSpec::new(LAB, Mode::Node, self.programs.clone())
            };
            let lab = match self.bare() {
                Ok(_) => build(&spec),
                Err(error) => Err(format!("{error:#}")),
            };
            self.lab = Some((flow, lab));
        }
        match &self.lab {
            Some((_, Ok(lab))) => Ok(lab),
            // Once is enough: building takes its time, and the reason stays the same.
            Some((_, Err(error))) => Err(anyhow!("{error}")),
            None => bail!("no lab was built"),
        }
    }

    /// The programs under test, for a lab of its own. No other lab stands beside it.
    pub fn programs(&mut self) -> Programs {
        self.lab = None;
        self.programs.clone()
    }

    /// Takes the lab with this flow, to remove it.
    pub fn take_lab(&mut self, flow: NodeFlow) -> Result<ScopedLab> {
        self.lab(flow)?;
        match self.lab.take() {
            Some((_, Ok(lab))) => Ok(lab),
            _ => bail!("no lab was built"),
        }
    }

    /// The first node and its proxy in a lab where nothing has been captured: what an agent finds when it comes.
    pub fn bare(&mut self) -> Result<[Dump; 2]> {
        if self.bare.is_none() {
            let spec = LabSpec::new(LAB, Mode::None, self.programs.clone());
            let lab = build(&spec).map_err(|error| anyhow!("{error}"))?;
            self.bare = Some([
                self.dump(&lab.netns("node1")?)?,
                self.dump(&lab.netns("proxy1")?)?,
            ]);
            lab.down()?;
        }
        self.bare.clone().context("no bare lab")
    }
}

/// Builds a lab.
pub fn build(spec: &LabSpec) -> Result<ScopedLab, String> {
    standing::up(spec, &|line| println!("{line}"))
        .map(standing::Lab::scoped)
        .map_err(|error| format!("{error:#}"))
}

/// Runs `ambidex` with arguments in a target of the lab.
pub fn ambidex_in(lab: &ScopedLab, target: &str, arguments: &[&str]) -> Result<Captured> {
    let program = lab.spec().programs.ambidex.display().to_string();
    lab.run(
        target,
        &[&[program.as_str()], arguments].concat(),
        COMMAND_LIMIT,
    )
}
