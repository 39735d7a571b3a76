//! Listening on devices with tcpdump.

use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::segments::{self, Segment};
use crate::explain::story::Stage;

/// Bytes of each packet that are kept: all headers, those of an overlay's inner packet included.
const KEPT: &str = "200";
/// TCP, and whatever may carry it from one end of an overlay to the other.
const FILTER: &str = "tcp or udp";

/// A device that is listened on.
#[derive(Debug)]
struct Tap {
    place: usize,
    device: String,
    file: PathBuf,
    child: Child,
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.file);
    }
}

/// All devices that are listened on.
#[derive(Debug)]
pub(super) struct Taps(Vec<Tap>);

impl Taps {
    /// Listens from now on.
    pub(super) fn start(stage: &Stage, devices: &[(usize, String)]) -> Result<Self> {
        let mut taps = Vec::new();
        for (number, (place, device)) in devices.iter().enumerate() {
            let file = std::env::temp_dir().join(format!(
                "ambidex-trace-{}-{number}.pcap",
                std::process::id()
            ));
            let mut command = Command::new("tcpdump");
            command
                .args(["-i", device, "-n", "-s", KEPT, "-U", "--immediate-mode"])
                .args(["-Z", "root", "-w"])
                .arg(&file)
                .arg(FILTER)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::piped());
            let child = stage.namespaces[*place]
                .run(|| command.spawn())?
                .context("cannot start tcpdump: is it installed?")?;
            taps.push(Tap {
                place: *place,
                device: device.clone(),
                file,
                child,
            });
        }
        // They start at the same time; each says when it listens.
        for tap in &mut taps {
            let name = &stage.live.places[tap.place].name;
            listens(&mut tap.child)
                .with_context(|| format!("tcpdump on {} of {name}", tap.device))?;
        }
        Ok(Self(taps))
    }

    /// Ends listening; what was heard, in the order of time.
    pub(super) fn finish(self) -> Result<Vec<Segment>> {
        let mut all = Vec::new();
        for tap in &self.0 {
            let pid = i32::try_from(tap.child.id()).context("a pid")?;
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        for mut tap in self.0 {
            // What is not read from it keeps it from ending.
            drop(tap.child.stderr.take());
            tap.child.wait().context("tcpdump does not end")?;
            let bytes = std::fs::read(&tap.file)?;
            all.extend(
                segments::parse(&bytes, tap.place, &tap.device)
                    .with_context(|| format!("what tcpdump wrote of {}", tap.device))?,
            );
        }
        all.sort_by_key(|segment| segment.micros);
        Ok(all)
    }
}

/// Reads what tcpdump says until it listens.
fn listens(child: &mut Child) -> Result<()> {
    let stderr = child.stderr.as_mut().context("no standard error")?;
    let (mut said, mut byte) = (Vec::new(), [0]);
    while stderr.read(&mut byte)? == 1 {
        said.push(byte[0]);
        if said.ends_with(b"listening on") {
            return Ok(());
        }
    }
    bail!("{}", String::from_utf8_lossy(&said).trim())
}
