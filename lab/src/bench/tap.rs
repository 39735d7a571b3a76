//! Listening on a device with tcpdump, and knowing that nothing was missed.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;

use super::load::Running;
use super::pcap::Capture;

/// Size of tcpdump's ring in KiB: as much as a proof sends, so that nothing is lost even if tcpdump gets no CPU meanwhile.
const RING_KIB: &str = "32768";
/// How long packets stay in the ring at most before tcpdump gets them (its read timeout is 1 s), and some more.
pub const DRAIN: Duration = Duration::from_millis(1500);
/// A file that has not grown for this time, and has what it should have, is complete.
const QUIET: Duration = Duration::from_millis(100);

/// A device that is being listened on, for TCP.
#[derive(Debug)]
pub struct Tap {
    label: String,
    file: PathBuf,
    running: Running,
    stderr: JoinHandle<String>,
}

/// What a tap saw.
#[derive(Debug, Default)]
pub struct Heard {
    /// The packets.
    pub capture: Capture,
    /// Packets that passed the device and are not in the capture, because tcpdump was too slow.
    pub dropped: u64,
}

impl Tap {
    /// Listens from now on; packets go into `file`.
    ///
    /// # Errors
    /// When tcpdump cannot listen on the device; with what it says.
    pub fn start(netns: &Netns, device: &str, label: String, file: PathBuf) -> Result<Self> {
        let path = file.to_str().context("a directory that is not UTF-8")?;
        let mut command = Command::new("tcpdump");
        command
            .args(["-i", device, "-n", "-s", "0", "-B", RING_KIB, "-U"])
            .args(["-Z", "root", "-w", path, "tcp"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = netns
            .run(|| command.spawn())?
            .context("cannot start tcpdump: is it installed? (`make deps`)")?;
        let said = until_it_listens(&mut child);
        let stderr = child.stderr.take();
        let running = Running::new(child);
        let said = said.with_context(|| format!("tcpdump on {label}"))?;
        let stderr = all_that_it_says(said, stderr);
        Ok(Self {
            label,
            file,
            running,
            stderr,
        })
    }

    /// Ends listening once `complete` is true of what was captured, at the latest at `deadline`, which should be [`DRAIN`]
    /// after the last packet. Whether the capture is complete is the caller's to judge again.
    ///
    /// # Errors
    /// When tcpdump does not end, does not say how many packets it missed, or the capture cannot be read.
    pub fn finish(self, deadline: Instant, complete: impl Fn(&Capture) -> bool) -> Result<Heard> {
        let label = self.label;
        wait_for_file(&self.file, deadline, complete);
        self.running
            .stop()
            .with_context(|| format!("tcpdump on {label}"))?;
        let said = match self.stderr.join() {
            Ok(said) => said,
            Err(_) => bail!("what tcpdump on {label} said is lost"),
        };
        let dropped = dropped(&said)
            .with_context(|| format!("tcpdump on {label} does not say what it missed: {said}"))?;
        let capture = Capture::parse(&std::fs::read(&self.file)?)
            .with_context(|| format!("capture of {label}"))?;
        std::fs::remove_file(&self.file)?;
        Ok(Heard { capture, dropped })
    }
}

/// What tcpdump says until it ends, after what it has said.
pub(crate) fn all_that_it_says(
    said: String,
    stderr: Option<std::process::ChildStderr>,
) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut text = said;
        if let Some(mut stderr) = stderr {
            // What was read until an error is judged as all that there is.
            let _ = stderr.read_to_string(&mut text);
        }
        text
    })
}

/// Reads what tcpdump says until it listens.
pub(crate) fn until_it_listens(child: &mut Child) -> Result<String> {
    let stderr = child.stderr.as_mut().context("no standard error")?;
    let (mut said, mut byte) = (Vec::new(), [0]);
    while stderr.read(&mut byte)? == 1 {
        said.push(byte[0]);
        if said.ends_with(b"listening on") {
            return Ok(String::from_utf8_lossy(&said).into_owned());
        }
    }
    bail!("{}", String::from_utf8_lossy(&said).trim())
}

fn wait_for_file(file: &Path, deadline: Instant, complete: impl Fn(&Capture) -> bool) {
    let (mut length, mut since) = (0, Instant::now());
    while Instant::now() < deadline {
        let current = std::fs::metadata(file).map_or(0, |metadata| metadata.len());
        if current != length {
            (length, since) = (current, Instant::now());
        } else if since.elapsed() >= QUIET {
            let capture = std::fs::read(file).map(|bytes| Capture::parse(&bytes));
            if matches!(&capture, Ok(Ok(capture)) if complete(capture)) {
                return;
            }
            since = Instant::now();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The sum of all packets that tcpdump says were dropped, by the kernel or by the interface. The first of these lines is
/// always there when it ends as it should.
pub(crate) fn dropped(said: &str) -> Option<u64> {
    let mut sum = None;
    for line in said.lines() {
        let Some((count, what)) = line.trim().split_once(' ') else {
            continue;
        };
        if what.starts_with("packet") && what.contains(" dropped by ") {
            sum = Some(sum.unwrap_or(0) + count.parse::<u64>().ok()?);
        }
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missed_packets_are_known() {
        let said = "tcpdump: listening on eth0, link-type EN10MB (Ethernet), snapshot length 262144 bytes\n\
            1 packet captured\n3 packets received by filter\n0 packets dropped by kernel\n";
        assert_eq!(dropped(said), Some(0));
        let missed = said.replace("0 packets dropped", "2 packets dropped");
        assert_eq!(dropped(&missed), Some(2));
        let both = format!("{missed}1 packet dropped by interface\n");
        assert_eq!(dropped(&both), Some(3));
        assert_eq!(dropped("tcpdump: listening on eth0\n"), None, "killed");
    }

    #[test]
    fn a_device_that_is_not_there_is_an_error_that_says_so() {
        let netns = Netns::current().unwrap();
        let file = std::env::temp_dir().join("never-written.pcap");
        let error = Tap::start(&netns, "nodev0", "here nodev0".to_owned(), file).unwrap_err();
        let text = format!("{error:#}");
        assert!(
            text.contains("here nodev0") && text.contains("nodev0: "),
            "{text}"
        );
    }
}
