//! The processes of a load: one in each pod that takes part, started, told what to do, ended, and their records read.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::engine::{Connection, Peer, Plan, Record, Second, Served};
use super::file::Experiment;
use crate::bench::interrupt;
use crate::bench::load::Running;
use crate::standing::Lab;
use crate::topology::APPLICATION_PORT;

/// How long a process may take to listen.
const LISTENS_WITHIN: Duration = Duration::from_secs(60);
/// How long opening may take for each connection, beside its patience.
const OPENS_WITHIN: Duration = Duration::from_millis(500);
/// Time between two looks whether an end is wanted.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// All processes of a load.
#[derive(Debug)]
pub struct Driver {
    talkers: Vec<Talker>,
    patience: Duration,
    connections: u32,
}

#[derive(Debug)]
struct Talker {
    pod: String,
    stdin: Option<ChildStdin>,
    said: Receiver<String>,
    records: PathBuf,
    errors: PathBuf,
    running: Running,
}

/// All that the processes recorded.
#[derive(Debug, Default)]
pub struct Records {
    /// Connections, in the order in which they began.
    pub connections: Vec<Connection>,
    /// What servers saw go wrong.
    pub served: Vec<Served>,
    /// Messages of long-lived connections by second.
    pub seconds: BTreeMap<u64, Second>,
    /// New connections that the load came too late for.
    pub late: u64,
}

impl Driver {
    /// Starts a process in each pod that takes part; all of them listen when this returns. Records go into `directory`.
    ///
    /// # Errors
    /// When one does not come so far; and [`interrupt::check`]'s.
    pub fn start(lab: &Lab, experiment: &Experiment, directory: &Path) -> Result<Self> {
        let mut driver = Self {
            talkers: Vec::new(),
            patience: Duration::from_secs_f64(experiment.load.patience_seconds),
            connections: experiment.load.long_lived.connections,
        };
        for plan in plans(lab, experiment, directory)? {
            driver.talkers.push(Talker::start(lab, &plan)?);
        }
        for talker in &driver.talkers {
            talker.await_word("listening", LISTENS_WITHIN)?;
        }
        Ok(driver)
    }

    /// Makes the long-lived connections, and waits until each stands or has failed.
    ///
    /// # Errors
    /// When a process ends, or takes far too long.
    pub fn open(&mut self) -> Result<()> {
        let within = self.patience + OPENS_WITHIN * self.connections + LISTENS_WITHIN;
        self.tell_all("open")?;
        for talker in &self.talkers {
            talker.await_word("open", within)?;
        }
        Ok(())
    }

    /// Begins with new connections.
    ///
    /// # Errors
    /// When a process has ended.
    pub fn load(&mut self) -> Result<()> {
        self.tell_all("load")
    }

    /// Has the application of a pod answer once with a wrong byte.
    ///
    /// # Errors
    /// When its process has ended, or it has none.
    pub fn corrupt(&mut self, pod: &str) -> Result<()> {
        let talker = self.talkers.iter_mut().find(|talker| talker.pod == pod);
        let talker = talker.with_context(|| format!("{pod} takes no part in the load"))?;
        talker.tell("corrupt")
    }

    /// Has everybody say something once more and end, and reads what all recorded.
    ///
    /// # Errors
    /// When a process ends before, takes far too long, or its records cannot be read.
    pub fn finish(mut self) -> Result<Records> {
        let within = self.patience * 4 + LISTENS_WITHIN;
        self.tell_all("finish")?;
        for talker in &self.talkers {
            talker.await_word("finished", within)?;
        }
        let mut records = Records::default();
        for talker in self.talkers {
            talker.end(&mut records)?;
        }
        let begun = |connection: &Connection| (connection.begun_us, connection.id);
        records.connections.sort_by_key(begun);
        Ok(records)
    }

    fn tell_all(&mut self, word: &str) -> Result<()> {
        self.talkers
            .iter_mut()
            .try_for_each(|talker| talker.tell(word))
    }
}

impl Talker {
    fn start(lab: &Lab, plan: &Plan) -> Result<Self> {
        let errors = plan.records.with_extension("log");
        let json = serde_json::to_string(plan).context("plan of a load")?;
        let mut command = Command::new(&lab.spec().programs.ambidex);
        command
            .args(["lab", "load", &json])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&errors).with_context(|| errors.display().to_string())?);
        let spawned = lab.netns(&plan.pod)?.run(|| command.spawn())?;
        let mut child = spawned.with_context(|| format!("start the load of {}", plan.pod))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let running = Running::new(child);
        let stdout = stdout.context("no standard output")?;
        let (tell, said) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if tell.send(line).is_err() {
                    return;
                }
            }
        });
        Ok(Self {
            pod: plan.pod.clone(),
            stdin,
            said,
            records: plan.records.clone(),
            errors,
            running,
        })
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        let told = self.stdin.as_mut().map(|stdin| writeln!(stdin, "{word}"));
        match told {
            Some(Ok(())) => Ok(()),
            _ => bail!("{}", self.ended()),
        }
    }

    fn await_word(&self, word: &str, within: Duration) -> Result<()> {
        let deadline = Instant::now() + within;
        loop {
            match self.said.recv_timeout(LOOK_EVERY) {
                Ok(said) if said == word => return Ok(()),
                Ok(_) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("{}", self.ended()),
                Err(RecvTimeoutError::Timeout) => {
                    interrupt::check()?;
                    if Instant::now() >= deadline {
                        bail!("the load of {} is not {word:?} after {within:?}", self.pod);
                    }
                }
            }
        }
    }

    fn ended(&self) -> String {
        let errors = std::fs::read_to_string(&self.errors).unwrap_or_default();
        format!("the load of {} has ended: {}", self.pod, errors.trim())
    }

    /// Lets the process end and reads what it recorded.
    fn end(mut self, into: &mut Records) -> Result<()> {
        // It writes what its server saw last when its input ends.
        drop(self.stdin.take());
        while self.said.recv().is_ok() {}
        self.running
            .stop()
            .with_context(|| format!("end the load of {}", self.pod))?;
        let shown = || self.records.display().to_string();
        let file = File::open(&self.records).with_context(shown)?;
        for line in BufReader::new(file).lines() {
            let line = line.with_context(shown)?;
            match serde_json::from_str(&line).with_context(shown)? {
                Record::Connection(connection) => into.connections.push(connection),
                Record::Served(served) => into.served.push(served),
                Record::Second(second) => merge(&mut into.seconds, second),
                Record::Late { connections } => into.late += connections,
            }
        }
        Ok(())
    }
}

fn merge(seconds: &mut BTreeMap<u64, Second>, second: Second) {
    let entry = seconds.entry(second.second).or_insert_with(|| Second {
        second: second.second,
        ..Second::default()
    });
    entry.messages += second.messages;
    entry.sum_us += second.sum_us;
    entry.worst_us = entry.worst_us.max(second.worst_us);
}

/// The plan of each process: connections are dealt out to the pairs one after the other, busy and idle ones in turns.
fn plans(lab: &Lab, experiment: &Experiment, directory: &Path) -> Result<Vec<Plan>> {
    let load = &experiment.load;
    let topology = lab.topology();
    let address = |pod: &str| -> Result<SocketAddr> {
        let (_, pod) = topology.pod(pod).with_context(|| format!("no pod {pod}"))?;
        Ok((pod.ip, APPLICATION_PORT).into())
    };
    let mut plans = BTreeMap::new();
    for (number, pod) in (1_u16..).zip(experiment.talkers()) {
        let plan = Plan {
            pod: pod.to_owned(),
            number,
            listen: ([0, 0, 0, 0], APPLICATION_PORT).into(),
            records: directory.join(format!("{pod}.records")),
            patience_ms: (load.patience_seconds * 1e3) as u64,
            message_bytes: load.long_lived.message_bytes,
            every_us: (load.long_lived.every_seconds * 1e6) as u64,
            new_bytes: load.new.message_bytes.max(1),
            peers: Vec::new(),
        };
        plans.insert(pod, plan);
    }
    let (count, pairs) = (load.long_lived.connections, load.pairs.len() as u32);
    let idle = (f64::from(count) * load.long_lived.idle_share).round() as u32;
    for (index, pair) in (0_u32..).zip(&load.pairs) {
        let share = |of: u32| of / pairs + u32::from(index < of % pairs);
        let peer = Peer {
            pod: pair.to.clone(),
            to: address(&pair.to)?,
            // What is left over of the idle ones goes to the first pairs, so that of the busy ones must not.
            busy: share(count).saturating_sub(share(idle)),
            idle: share(idle),
            per_second: load.new.per_second / f64::from(pairs),
        };
        if let Some(plan) = plans.get_mut(pair.from.as_str()) {
            plan.peers.push(peer);
        }
    }
    Ok(plans.into_values().collect())
}
