//! A node's agent and proxy: started, found ready, stopped, killed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::process::{self, Process};
use super::{Daemon, LAB_ENV, Lab, Progress};
use crate::topology::LabSpec;

/// How long a node's daemons may take to be ready. User-Mode Linux needs a good part of it.
const READY_WITHIN: Duration = Duration::from_secs(60);
/// With this environment variable set to a number of seconds, they may take as long.
const READY_ENV: &str = "AMBIDEX_LAB_READY_SECONDS";
/// Time between two questions whether they are.
const ASK_EVERY: Duration = Duration::from_millis(50);
/// How long a daemon may take to end when asked to: its own drain time and some more.
const STOPS_WITHIN: Duration = Duration::from_secs(15);
/// How long a daemon may take from its start until it can be asked to end.
const HANDLES_WITHIN: Duration = Duration::from_secs(3);
/// How long a killed process may take to go.
const GONE_WITHIN: Duration = Duration::from_secs(5);
/// Lines of a log that an error quotes.
const LOG_LINES: usize = 20;

impl Lab {
    /// Environment of a node's daemons, and of whatever speaks to them.
    pub fn environment(&self, node: u8) -> BTreeMap<String, String> {
        let path = |path: PathBuf| path.display().to_string();
        let socket = path(self.run_dir(node).join("ztunnel.sock"));
        let mut environment = BTreeMap::from([
            ("AMBIDEX_RUN_DIR".to_owned(), path(self.run_dir(node))),
            ("AMBIDEX_STATE_DIR".to_owned(), path(self.state_dir(node))),
            ("AMBIDEX_CA_DIR".to_owned(), path(self.dir().join("ca"))),
            ("NODE_NAME".to_owned(), format!("node{node}")),
            (LAB_ENV.to_owned(), self.name()),
            ("INPOD_UDS".to_owned(), socket.clone()),
            ("ZTUNNEL_UDS_ADDRESS".to_owned(), socket),
        ]);
        environment.extend(self.sources());
        environment.extend(self.spec().daemon_env);
        environment
    }

    /// Starts a daemon. It is not ready when this returns: [`Lab::wait_ready`].
    ///
    /// # Errors
    /// When it runs already or cannot start.
    pub fn start(&self, node: u8, daemon: Daemon) -> Result<()> {
        let name = daemon.name(node);
        if self.process(node, daemon).is_some() {
            bail!("{name} runs already");
        }
        let spec = self.spec();
        let (target, own_proc, (program, arguments)) = match daemon {
            // An agent sees the processes of its node, as on a cluster, where it has the node's /proc.
            Daemon::Agent => (format!("node{node}"), false, agent_command(&spec)),
            Daemon::Proxy => (format!("proxy{node}"), true, proxy_command(&spec)),
        };
        let mut command = if spec.isolate {
            process::isolated(&program, own_proc)
        } else {
            Command::new(program)
        };
        command.args(arguments).envs(self.environment(node));
        if daemon == Daemon::Proxy {
            command.envs(&spec.proxy_env);
        }
        let netns = self.netns(&target)?;
        let child = process::spawn_detached(&netns, &command, &self.log_path(node, daemon))?;
        let process = i32::try_from(child.id()).ok().and_then(Process::of_pid);
        let process = process
            .with_context(|| format!("{name} does not run{}", self.log_end(node, daemon)))?;
        self.change_record(|record| {
            record.processes.insert(name, process);
        })
    }

    /// The running daemon itself; in an isolated lab, not the process that made its namespaces.
    pub fn process(&self, node: u8, daemon: Daemon) -> Option<Process> {
        let (recorded, isolated) = {
            let inner = self.lock();
            (
                inner.record.processes.get(&daemon.name(node)).copied()?,
                inner.record.spec.isolate,
            )
        };
        if !recorded.is_alive() {
            return None;
        }
        // Before it has a child it has not come that far, and is all that there is.
        if isolated {
            Some(recorded.only_child().unwrap_or(recorded))
        } else {
            Some(recorded)
        }
    }

    /// Pids of all running daemons by name, in the pid namespace of the caller.
    pub fn pids(&self) -> BTreeMap<String, i32> {
        let mut pids = BTreeMap::new();
        for node in &self.topology().nodes {
            for daemon in [Daemon::Agent, Daemon::Proxy] {
                if let Some(process) = self.process(node.index, daemon) {
                    pids.insert(daemon.name(node.index), process.pid);
                }
            }
        }
        pids
    }

    /// Ends a daemon with SIGTERM, which lets it drain.
    ///
    /// # Errors
    /// When it does not end within 15 s; it is killed then.
    pub fn stop(&self, node: u8, daemon: Daemon) -> Result<()> {
        let Some(process) = self.process(node, daemon) else {
            return Ok(());
        };
        // A daemon that has only just started would never see it: it is the first process of its pid namespace.
        process::wait_until(HANDLES_WITHIN, || {
            process.handles(Signal::SIGTERM) || !process.is_alive()
        });
        process.signal(Signal::SIGTERM)?;
        if process.wait_gone(STOPS_WITHIN) {
            return self.forget(node, daemon);
        }
        self.kill(node, daemon)?;
        bail!(
            "{} did not end within {STOPS_WITHIN:?} of SIGTERM{}",
            daemon.name(node),
            self.log_end(node, daemon)
        )
    }

    /// Ends a daemon with SIGKILL.
    ///
    /// # Errors
    /// When it does not go.
    pub fn kill(&self, node: u8, daemon: Daemon) -> Result<()> {
        let Some(process) = self.process(node, daemon) else {
            return Ok(());
        };
        process.signal(Signal::SIGKILL)?;
        if !process.wait_gone(GONE_WITHIN) {
            bail!("{} does not go", daemon.name(node));
        }
        self.forget(node, daemon)
    }

    /// Stops a daemon, starts it again and waits until the node is ready.
    ///
    /// # Errors
    /// As the three steps.
    pub fn restart(&self, node: u8, daemon: Daemon) -> Result<()> {
        self.stop(node, daemon)?;
        self.start(node, daemon)?;
        self.wait_ready(node, &|_| {})
    }

    /// Waits until the node's agent says that the node is set up and its proxy is ready.
    ///
    /// # Errors
    /// When a daemon ends meanwhile, or after 60 s (or what `AMBIDEX_LAB_READY_SECONDS` says); with the end of the logs.
    pub fn wait_ready(&self, node: u8, progress: Progress<'_>) -> Result<()> {
        let started = Instant::now();
        let ordered = std::env::var(READY_ENV).ok();
        let within = ordered.and_then(|seconds| seconds.parse().ok());
        let within = within.map_or(READY_WITHIN, Duration::from_secs);
        let mut reported = 0;
        loop {
            let answer = match self.agent_health(node) {
                Ok((200, _)) => return Ok(()),
                Ok((code, text)) => format!("the agent answers {code} {}", text.trim()),
                Err(error) => format!("{error:#}"),
            };
            for daemon in [Daemon::Agent, Daemon::Proxy] {
                if self.process(node, daemon).is_none() {
                    bail!(
                        "{} does not run{}",
                        daemon.name(node),
                        self.log_end(node, daemon)
                    );
                }
            }
            let waited = started.elapsed();
            if waited >= within {
                let logs = [Daemon::Agent, Daemon::Proxy]
                    .map(|daemon| self.log_end(node, daemon))
                    .concat();
                bail!("node{node} is not ready after {within:?}: {answer}{logs}");
            }
            if waited.as_secs() >= reported + 2 {
                reported = waited.as_secs();
                progress(&format!(
                    "waiting for node{node} since {reported} s: {answer}"
                ));
            }
            thread::sleep(ASK_EVERY);
        }
    }

    /// A daemon that was started and not ended from here, and does not run: its name and the end of its log.
    pub fn ended_daemon(&self) -> Option<String> {
        let started: Vec<String> = self.lock().record.processes.keys().cloned().collect();
        let topology = self.topology();
        let nodes = topology.nodes.iter().map(|node| node.index);
        let daemons = nodes.flat_map(|node| [Daemon::Agent, Daemon::Proxy].map(|d| (node, d)));
        let mut ended = daemons.filter(|(node, daemon)| {
            started.contains(&daemon.name(*node)) && self.process(*node, *daemon).is_none()
        });
        let (node, daemon) = ended.next()?;
        Some(format!(
            "{} has ended{}",
            daemon.name(node),
            self.log_end(node, daemon)
        ))
    }

    /// Whether the node's agent says that all is ready, without waiting.
    pub fn is_ready(&self, node: u8) -> bool {
        matches!(self.agent_health(node), Ok((200, _)))
    }

    /// Asks `GET /healthz` on the agent's socket: status and body.
    fn agent_health(&self, node: u8) -> Result<(u16, String)> {
        self.ask_agent(node, "/healthz")
    }

    /// Asks a node's agent for a page of its API: status and body.
    ///
    /// # Errors
    /// When it does not answer, or not in HTTP.
    pub fn ask_agent(&self, node: u8, page: &str) -> Result<(u16, String)> {
        let path = self.run_dir(node).join("agent.sock");
        let mut stream = UnixStream::connect(&path).with_context(|| path.display().to_string())?;
        let limit = Some(Duration::from_secs(5));
        stream.set_read_timeout(limit)?;
        stream.set_write_timeout(limit)?;
        let request = format!("GET {page} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream
            .read_to_end(&mut answer)
            .context("answer of the agent")?;
        parse_answer(&String::from_utf8_lossy(&answer)).context("answer of the agent is not HTTP")
    }

    fn forget(&self, node: u8, daemon: Daemon) -> Result<()> {
        // What made the namespaces goes by itself, but is in the way of a new start until then.
        let recorded = self
            .lock()
            .record
            .processes
            .get(&daemon.name(node))
            .copied();
        if let Some(process) = recorded {
            process.wait_gone(GONE_WITHIN);
        }
        self.change_record(|record| {
            record.processes.remove(&daemon.name(node));
        })
    }

    /// The last lines of a daemon's log, to end an error message with.
    fn log_end(&self, node: u8, daemon: Daemon) -> String {
        let path = self.log_path(node, daemon);
        let text = fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let end = lines[lines.len().saturating_sub(LOG_LINES)..].join("\n");
        if end.is_empty() {
            String::new()
        } else {
            format!("\n--- end of {}:\n{end}", path.display())
        }
    }
}

fn agent_command(spec: &LabSpec) -> (PathBuf, Vec<String>) {
    let mut arguments = vec!["agent".to_owned()];
    let flags: [(&str, &dyn std::fmt::Display); 5] = [
        ("--mode", &spec.mode),
        ("--node-flow", &spec.node_flow),
        ("--inpod-rules", &spec.inpod_rules),
        ("--overlay", &spec.overlay),
        ("--same-node", &spec.same_node),
    ];
    for (flag, value) in flags {
        arguments.push(flag.to_owned());
        arguments.push(value.to_string());
    }
    if !spec.mends {
        arguments.extend(["--verify-every".to_owned(), "0s".to_owned()]);
    }
    arguments.extend(spec.agent_args.iter().cloned());
    (spec.programs.ambidex.clone(), arguments)
}

fn proxy_command(spec: &LabSpec) -> (PathBuf, Vec<String>) {
    let (program, mut arguments) = match spec.proxy_command.as_deref() {
        Some([program, arguments @ ..]) => (PathBuf::from(program), arguments.to_vec()),
        _ => (spec.programs.ambidex.clone(), vec!["proxy".to_owned()]),
    };
    arguments.extend(spec.proxy_args.iter().cloned());
    (program, arguments)
}

fn parse_answer(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head
        .strip_prefix("HTTP/1.")?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    Some((status, body.to_owned()))
}
