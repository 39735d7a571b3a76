//! Where and with what was measured.

use std::process::Command;
use std::thread;
use std::time::Duration;

use host_net::netns::Netns;
use serde::{Deserialize, Serialize};

use super::accounting;

/// How long the machine is watched for foreign work before the first sample.
const WATCH: Duration = Duration::from_millis(500);
/// More than this share of the processors busy with something else makes samples doubtful.
const BUSY: f64 = 0.10;

/// Where and with what was measured.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Environment {
    /// Kernel release.
    pub kernel: String,
    /// Processor model.
    pub processor: String,
    /// Processors.
    pub processors: usize,
    /// Versions of the tools that made the load and the captures.
    pub tools: Vec<String>,
    /// TCP congestion control in the pods.
    pub congestion_control: String,
    /// MTU of the pods.
    pub mtu: String,
    /// Average number of runnable tasks over one minute at the start, this program's own not yet among them.
    pub load_average: String,
    /// Share of all processors that was busy while the labs stood warm and idle, right before the first sample.
    pub busy_before: Option<f64>,
    /// Whether the machine was a User-Mode Linux process, whose numbers compare with each other only. Left out if not.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub user_mode_linux: bool,
}

impl Environment {
    /// Asks this machine.
    pub fn of_this_machine() -> Self {
        let processor = read("/proc/cpuinfo")
            .lines()
            .find_map(|line| {
                line.strip_prefix("model name")
                    .and_then(|rest| rest.split_once(": "))
            })
            .map(|(_, name)| name.to_owned())
            .unwrap_or_default();
        Self {
            kernel: read("/proc/sys/kernel/osrelease"),
            processor,
            processors: thread::available_parallelism().map_or(0, usize::from),
            tools: [
                ("iperf3", "--version"),
                ("wrk", "--version"),
                ("nginx", "-v"),
                ("tcpdump", "--version"),
            ]
            .into_iter()
            .filter_map(|(program, argument)| first_line(program, argument))
            .collect(),
            congestion_control: String::new(),
            mtu: String::new(),
            load_average: read("/proc/loadavg")
                .split(' ')
                .next()
                .unwrap_or_default()
                .to_owned(),
            busy_before: None,
            user_mode_linux: is_user_mode_linux(&read("/proc/cpuinfo")),
        }
    }

    /// Asks what is in force in a pod.
    pub fn ask_pod(&mut self, pod: &Netns) {
        // A pod that cannot be entered shows in the first sample.
        let _ = pod.run(|| {
            self.congestion_control = read("/proc/sys/net/ipv4/tcp_congestion_control");
            self.mtu = first_line_of(
                Command::new("ip").args(["-o", "link", "show", "dev", "eth0"]),
                |line| {
                    let (_, rest) = line.split_once(" mtu ")?;
                    rest.split(' ').next().map(str::to_owned)
                },
            )
            .unwrap_or_default();
        });
    }

    /// Watches how busy the idle machine is.
    pub fn ask_load(&mut self) {
        let before = accounting::machine();
        thread::sleep(WATCH);
        if let (Ok(before), Ok(after)) = (before, accounting::machine()) {
            let all = WATCH.as_secs_f64() * self.processors.max(1) as f64;
            self.busy_before = Some(after.since(before).total() / all);
        }
    }

    /// What makes the results doubtful, if something does.
    pub fn doubt(&self) -> Option<String> {
        let busy = self.busy_before.filter(|busy| *busy > BUSY)?;
        Some(format!(
            "the machine was {:.0} % busy with something else before the first sample",
            busy * 100.0
        ))
    }
}

fn is_user_mode_linux(cpuinfo: &str) -> bool {
    cpuinfo
        .lines()
        .any(|line| line.starts_with("vendor_id") && line.ends_with(": User Mode Linux"))
}

fn read(path: &str) -> String {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn first_line(program: &str, argument: &str) -> Option<String> {
    first_line_of(Command::new(program).arg(argument), |line| {
        Some(line.trim().to_owned())
    })
}

fn first_line_of(command: &mut Command, take: impl Fn(&str) -> Option<String>) -> Option<String> {
    let output = command.output().ok()?;
    let text = [output.stdout, output.stderr].concat();
    take(String::from_utf8_lossy(&text).lines().next()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_described() {
        let mut environment = Environment::of_this_machine();
        assert!(environment.processors > 0 && environment.kernel.contains('.'));
        assert!(
            environment
                .tools
                .iter()
                .any(|tool| tool.starts_with("iperf 3")),
            "{:?}",
            environment.tools
        );
        assert!(
            !environment.user_mode_linux,
            "this runs in no machine of the lab's"
        );
        let guest = "processor\t: 0\nvendor_id\t: User Mode Linux\nmodel name\t: UML\n";
        assert!(is_user_mode_linux(guest));
        environment.ask_load();
        assert!(
            environment
                .busy_before
                .is_some_and(|busy| (0.0..=1.2).contains(&busy))
        );
        environment.busy_before = Some(0.5);
        assert!(
            environment
                .doubt()
                .is_some_and(|doubt| doubt.contains("50 %"))
        );
        environment.busy_before = Some(0.01);
        assert_eq!(environment.doubt(), None);
    }
}
