//! What the script of an experiment says, done.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::driver::Driver;
use super::file::{DaemonOf, Experiment, Step, Switch, To, Which};
use super::now_us;
use crate::bench::interrupt;
use crate::standing::{Daemon, Lab, Progress};

/// How long a command of a step may take.
const COMMAND_WITHIN: Duration = Duration::from_secs(60);
/// How long a switch may take until the agent answers.
const SWITCH_WITHIN: Duration = Duration::from_secs(120);
/// How long connections may go on by the capture that a pod had: longer than any experiment.
const DRAIN: &str = "86400s";
/// Time between two looks whether an end is wanted.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// A step that was done. Times are seconds of load.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// Its number, from 1.
    pub step: usize,
    /// What it was.
    pub what: String,
    /// When it began.
    pub began_seconds: f64,
    /// When it was done.
    pub ended_seconds: f64,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// The switches that it made.
    pub switches: Vec<Switched>,
}

/// A pod that was given another capture.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Switched {
    /// The pod.
    pub pod: String,
    /// The capture that it was to have.
    pub to: To,
    /// When it was told to, in seconds of load.
    pub began_seconds: f64,
    /// When it was done.
    pub ended_seconds: f64,
    /// How long what began had to wait, in milliseconds, as the agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_ms: Option<f64>,
    /// All that the agent said of it.
    pub ledger: Value,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A time in which a pod was, or may have been, outside the mesh because a step said so. Instants are microseconds since
/// 1970.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outside {
    /// The pod.
    pub pod: String,
    /// When it began to leave.
    pub leaves_us: u64,
    /// When it had left.
    pub left_us: u64,
    /// When it began to come back.
    pub returns_us: u64,
    /// When it had come back.
    pub returned_us: u64,
}

/// Who does the steps.
pub struct Steps<'a> {
    lab: &'a Lab,
    driver: &'a mut Driver,
    begun: Instant,
    progress: Progress<'a>,
    /// Pods outside the mesh, and those that were.
    pub outside: Vec<Outside>,
}

impl<'a> Steps<'a> {
    /// For a load that began at this moment.
    pub fn new(
        lab: &'a Lab,
        driver: &'a mut Driver,
        begun: Instant,
        progress: Progress<'a>,
    ) -> Self {
        Self {
            lab,
            driver,
            begun,
            progress,
            outside: Vec::new(),
        }
    }

    /// Does all steps, each at its time, and waits until the load has gone on as long as it is to. A step that fails is
    /// noted, and the next one is done.
    ///
    /// # Errors
    /// [`interrupt::check`]'s.
    pub fn run(&mut self, experiment: &Experiment) -> Result<Vec<Done>> {
        let mut all = Vec::new();
        for (number, step) in (1..).zip(&experiment.steps) {
            if let Some(at) = step.at_seconds {
                self.wait_until(at)?;
            }
            let done = self.perform(number, step)?;
            (self.progress)(&format!(
                "{:6.1} s: {}{}",
                done.began_seconds,
                done.what,
                shown(&done)
            ));
            all.push(done);
        }
        self.wait_until(experiment.load.for_seconds)?;
        Ok(all)
    }

    fn now(&self) -> f64 {
        self.begun.elapsed().as_secs_f64()
    }

    fn wait_until(&self, seconds: f64) -> Result<()> {
        loop {
            interrupt::check()?;
            let left = seconds - self.now();
            if left <= 0.0 {
                return Ok(());
            }
            thread::sleep(LOOK_EVERY.min(Duration::from_secs_f64(left)));
        }
    }

    fn perform(&mut self, number: usize, step: &Step) -> Result<Done> {
        let began_seconds = self.now();
        let mut switches = Vec::new();
        let failed = if let Some(switch) = &step.switch {
            switches = self.switch(switch)?;
            let failed = switches.iter().find_map(|one| one.error.clone());
            failed.map(|error| anyhow!(error))
        } else if let Some(seconds) = step.wait_seconds {
            self.wait_until(began_seconds + seconds)?;
            None
        } else {
            self.disturb(step).err()
        };
        Ok(Done {
            step: number,
            what: step.describe(),
            began_seconds,
            ended_seconds: self.now(),
            error: failed.map(|error| format!("{error:#}")),
            switches,
        })
    }

    fn disturb(&mut self, step: &Step) -> Result<()> {
        if let Some(pod) = &step.corrupt {
            return self.driver.corrupt(pod);
        }
        if let Some(exec) = &step.exec {
            let command: Vec<&str> = exec.command.iter().map(String::as_str).collect();
            let done = self.lab.run(&exec.target, &command, COMMAND_WITHIN)?;
            return done.success(&exec.command.join(" ")).map(drop);
        }
        let daemon = |of: &DaemonOf| match of.daemon {
            Which::Agent => Daemon::Agent,
            Which::Proxy => Daemon::Proxy,
        };
        if let Some(of) = &step.kill {
            self.lab.kill(of.node, daemon(of))?;
            self.lab.start(of.node, daemon(of))?;
            return self.lab.wait_ready(of.node, &|_| {});
        }
        if let Some(of) = &step.restart {
            return self.lab.restart(of.node, daemon(of));
        }
        Ok(())
    }

    /// Gives pods another capture, one after the other; one that fails keeps nobody else from it.
    fn switch(&mut self, switch: &Switch) -> Result<Vec<Switched>> {
        let mut all = Vec::new();
        for pod in &switch.pods {
            interrupt::check()?;
            let (began_seconds, began_us) = (self.now(), now_us());
            if switch.to == To::None {
                self.outside.push(Outside {
                    pod: pod.clone(),
                    leaves_us: began_us,
                    left_us: u64::MAX,
                    returns_us: u64::MAX,
                    returned_us: u64::MAX,
                });
            }
            let answer = self.tell(pod, switch.to);
            let ended_us = now_us();
            let open = self.outside.iter_mut().rev().find(|span| span.pod == *pod);
            if let (Ok(_), Some(span)) = (&answer, open) {
                if switch.to == To::None {
                    span.left_us = ended_us;
                } else if span.returned_us == u64::MAX {
                    (span.returns_us, span.returned_us) = (began_us, ended_us);
                }
            }
            let held = answer.as_ref().ok().and_then(held_us);
            let error = answer.as_ref().err().map(|error| format!("{error:#}"));
            all.push(Switched {
                pod: pod.clone(),
                to: switch.to,
                began_seconds,
                ended_seconds: self.now(),
                held_ms: held.map(|us| us / 1e3),
                ledger: answer.unwrap_or_default(),
                error,
            });
        }
        Ok(all)
    }

    /// Says so to the agent of the pod's node, as an operator does.
    fn tell(&self, name: &str, to: To) -> Result<Value> {
        let topology = self.lab.topology();
        let (node, pod) = topology
            .pod(name)
            .with_context(|| format!("no pod {name}"))?;
        let program = self.lab.spec().programs.ambidex.display().to_string();
        let pod = format!("{}/{name}", pod.namespace);
        let command = [
            &program,
            "mode",
            "set",
            &pod,
            to.word(),
            "--drain",
            DRAIN,
            "-o",
            "json",
        ];
        let done = self.lab.run(&node.name, &command, SWITCH_WITHIN)?;
        if done.code != 0 {
            bail!("{}{}", done.stdout, done.stderr.trim());
        }
        let said = done.stdout;
        serde_json::from_str(&said).with_context(|| format!("what was said of {pod}: {said}"))
    }
}

/// How long what began had to wait: the first number of this name, wherever the agent has it.
fn held_us(ledger: &Value) -> Option<f64> {
    match ledger {
        Value::Object(keys) => {
            let own = keys.get("held_us").and_then(Value::as_f64);
            own.or_else(|| keys.values().find_map(held_us))
        }
        Value::Array(items) => items.iter().find_map(held_us),
        _ => None,
    }
}

fn shown(done: &Done) -> String {
    if let Some(error) = &done.error {
        return format!(": {error}");
    }
    let held: Vec<String> = done
        .switches
        .iter()
        .filter_map(|one| one.held_ms)
        .map(|held| format!("{held:.0}"))
        .collect();
    if held.is_empty() {
        return String::new();
    }
    format!(", held {} ms", held.join(", "))
}
