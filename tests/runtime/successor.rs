//! A proxy beside those of a lab, in a namespace of its own.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, Command};

use host_net::netns::Netns;
use lab::standing::Lab;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::Sandbox;

/// A proxy of node1 that the lab did not plan, in a namespace of its own; it is killed when this goes.
pub struct Successor {
    pub place: Sandbox,
    process: Child,
    log: PathBuf,
}

impl Successor {
    /// Starts it where `place` is.
    pub fn start(lab: &Lab, place: Sandbox) -> Self {
        let log = lab.dir().join("log").join(format!("{}.log", place.name));
        let file = File::create(&log).unwrap();
        let mut command = Command::new(crate::harness::ambidex());
        command
            .arg("proxy")
            .envs(lab.environment(1))
            .stdout(file.try_clone().unwrap())
            .stderr(file);
        let netns = Netns::open(&place.netns).unwrap();
        let process = netns.run(|| command.spawn()).unwrap().unwrap();
        Self {
            place,
            process,
            log,
        }
    }

    /// Kills it; its namespace stays.
    pub fn kill(&mut self) {
        let pid = Pid::from_raw(i32::try_from(self.process.id()).unwrap());
        let _ = kill(pid, Signal::SIGKILL);
        let _ = self.process.wait();
    }

    /// The state of its namespace.
    pub fn dump(&self) -> String {
        crate::harness::dump(&Netns::open(&self.place.netns).unwrap())
    }
}

impl Drop for Successor {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = fs::read_to_string(&self.log).unwrap_or_default();
            eprintln!("--- {}:\n{log}", self.log.display());
        }
    }
}
