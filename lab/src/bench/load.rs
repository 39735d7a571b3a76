//! Traffic from tools that everybody knows: iperf3 for bulk streams, wrk against nginx for requests.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::case::{Load, Way};
use super::interrupt;
use crate::topology::APPLICATION_PORT;

/// Port of the iperf3 server.
pub const BULK_PORT: u16 = 5201;
/// Time that a tool may take beyond the duration that it was asked for.
const GRACE: Duration = Duration::from_secs(15);
/// Time that a process may take to end when asked to.
const ENDS_WITHIN: Duration = Duration::from_secs(3);
/// Time between two looks at a process: the bench itself should use no CPU to speak of.
const LOOK_EVERY: Duration = Duration::from_millis(10);

/// What one run of a tool found.
#[derive(Debug, Clone, PartialEq)]
pub struct Measured {
    /// In the case's unit: Gbit/s, requests/s, connections/s.
    pub value: f64,
    /// Work done: bytes, or requests.
    pub work: f64,
    /// Failed requests; a sample with any is not a sample.
    pub errors: u64,
    /// Latency in microseconds, where the tool tells.
    pub latency_us: Option<Latency>,
    /// Numbers that the case has beyond these, with their unit in the name: `rss_kib`.
    pub extra: BTreeMap<String, f64>,
}

/// Percentiles of a latency, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// The 50th.
    pub p50: f64,
    /// The 99th.
    pub p99: f64,
    /// The 99.9th, where it can be told.
    pub p999: Option<f64>,
}

/// A process that ends with its guard.
#[derive(Debug)]
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Asked first: nginx ends its workers, which would stay if it was killed.
        if self.end().is_err() {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

impl Running {
    /// Guards a process.
    pub fn new(child: Child) -> Self {
        Self(child)
    }

    /// Starts a program in a namespace, with its output thrown away.
    pub fn start(netns: &Netns, program: &str, arguments: &[&str]) -> Result<Self> {
        spawn(netns, program, arguments, Stdio::null, Stdio::null).map(Self)
    }

    /// Asks it to end (SIGTERM) and waits.
    ///
    /// # Errors
    /// When it does not end; it is killed then.
    pub fn stop(mut self) -> Result<()> {
        self.end().map(|_| ())
    }

    fn end(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.0.try_wait()? {
            return Ok(status);
        }
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let deadline = Instant::now() + ENDS_WITHIN;
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status);
            }
            std::thread::sleep(LOOK_EVERY);
        }
        bail!("process {pid} did not end within {ENDS_WITHIN:?} of SIGTERM")
    }
}

fn spawn(
    netns: &Netns,
    program: &str,
    arguments: &[&str],
    stdout: fn() -> Stdio,
    stderr: fn() -> Stdio,
) -> Result<Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(stdout())
        .stderr(stderr());
    netns
        .run(|| command.spawn())?
        .with_context(|| format!("cannot start {program}: is it installed? (`make deps`)"))
}

/// Runs a program in a namespace to its end and returns what it printed.
///
/// # Errors
/// When it fails, with what it wrote; when it takes longer than `limit`; and [`interrupt::check`]'s.
pub fn output_of(
    netns: &Netns,
    program: &str,
    arguments: &[impl AsRef<str>],
    limit: Duration,
) -> Result<String> {
    let arguments: Vec<&str> = arguments.iter().map(AsRef::as_ref).collect();
    let mut child = spawn(netns, program, &arguments, Stdio::piped, Stdio::piped)?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let mut running = Running(child);
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
        interrupt::check()?;
        if Instant::now() >= deadline {
            bail!(
                "{program} {} did not end within {limit:?}",
                arguments.join(" ")
            );
        }
        std::thread::sleep(LOOK_EVERY);
    };
    let text = |thread: JoinHandle<String>| thread.join().unwrap_or_default();
    let (stdout, stderr) = (text(stdout), text(stderr));
    if !status.success() {
        bail!(
            "{program} {} ended with {status}: {}",
            arguments.join(" "),
            [stdout.trim(), stderr.trim()].join(" ").trim()
        );
    }
    Ok(stdout)
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read until an error is all that there is to show.
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// The servers of one pod: nginx and iperf3.
#[derive(Debug)]
pub struct Servers {
    _nginx: Running,
    _iperf3: Running,
}

impl Servers {
    /// Starts both; `directory` takes nginx's files.
    pub fn start(netns: &Netns, directory: &Path) -> Result<Self> {
        std::fs::create_dir_all(directory)?;
        let configuration = directory.join("nginx.conf");
        std::fs::write(&configuration, nginx_configuration(directory))?;
        let path = configuration
            .to_str()
            .context("a directory whose name is not UTF-8")?;
        let nginx = Running::start(
            netns,
            "nginx",
            &["-c", path, "-p", &directory.display().to_string()],
        )?;
        let iperf3 = Running::start(netns, "iperf3", &["-s", "-p", &BULK_PORT.to_string()])?;
        Ok(Self {
            _nginx: nginx,
            _iperf3: iperf3,
        })
    }
}

/// One worker, keep-alive without end, an answer from memory of 64 bytes, no log.
fn nginx_configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "daemon off;\nworker_processes 1;\npid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n\
         events {{ worker_connections 8192; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 3600s;\n\
         client_body_temp_path {directory}/b; proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f; \
         uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;\n\
         server {{ listen {APPLICATION_PORT} backlog=4096; location / {{ return 200 \"{}\\n\"; }} }}\n}}\n",
        "x".repeat(63)
    )
}

/// Whether all `ports` are listened on in a namespace (proc(5), /proc/net/tcp, state 0A).
pub fn listening(netns: &Netns, ports: &[u16]) -> Result<bool> {
    let text = netns.run(|| {
        ["tcp", "tcp6"]
            .map(|table| {
                std::fs::read_to_string(format!("/proc/thread-self/net/{table}"))
                    .unwrap_or_default()
            })
            .concat()
    })?;
    let mut open: BTreeMap<u16, bool> = ports.iter().map(|port| (*port, false)).collect();
    for line in text.lines() {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (Some(local), Some(_), Some("0A")) = (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let port = local
            .rsplit_once(':')
            .and_then(|(_, port)| u16::from_str_radix(port, 16).ok());
        if let Some(state) = port.and_then(|port| open.get_mut(&port)) {
            *state = true;
        }
    }
    Ok(open.into_values().all(|is_open| is_open))
}

/// Runs one load for `seconds` from the client's namespace.
pub fn run(load: Load, client: &Netns, server: Ipv4Addr, seconds: u64) -> Result<Measured> {
    let limit = Duration::from_secs(seconds) + GRACE;
    match load {
        Load::Bulk { streams, way } => {
            let mut arguments = vec!["-c".to_owned(), server.to_string()];
            arguments.extend(["-p".to_owned(), BULK_PORT.to_string()]);
            arguments.extend(["-P".to_owned(), streams.to_string()]);
            arguments.extend(["-t".to_owned(), seconds.to_string()]);
            arguments.extend(["-J", "--connect-timeout", "5000"].map(str::to_owned));
            if way == Way::Down {
                arguments.push("-R".to_owned());
            }
            iperf3_result(&output_of(client, "iperf3", &arguments, limit)?)
        }
        Load::RequestResponse { connections } => wrk(client, server, connections, seconds, &[]),
        Load::NewConnections => wrk(client, server, 16, seconds, &["-H", "Connection: close"]),
    }
}

fn wrk(
    client: &Netns,
    server: Ipv4Addr,
    connections: u8,
    seconds: u64,
    more: &[&str],
) -> Result<Measured> {
    let mut arguments = vec!["-t".to_owned(), "1".to_owned()];
    arguments.extend(["-c".to_owned(), connections.to_string()]);
    arguments.extend(["-d".to_owned(), format!("{seconds}s")]);
    arguments.extend(["--timeout", "5s", "--latency"].map(str::to_owned));
    arguments.extend(more.iter().map(|&word| word.to_owned()));
    arguments.push(format!("http://{server}:{APPLICATION_PORT}/"));
    let limit = Duration::from_secs(seconds) + GRACE;
    wrk_result(&output_of(client, "wrk", &arguments, limit)?)
}

fn iperf3_result(text: &str) -> Result<Measured> {
    let json: Value = serde_json::from_str(text).context("iperf3 printed no JSON")?;
    let received = &json["end"]["sum_received"];
    let bits = received["bits_per_second"]
        .as_f64()
        .with_context(|| format!("iperf3 reports no result: {}", json["error"]))?;
    let bytes = received["bytes"]
        .as_f64()
        .context("iperf3 reports no bytes")?;
    if bytes <= 0.0 {
        bail!("iperf3 transferred nothing");
    }
    Ok(Measured {
        value: bits / 1e9,
        work: bytes,
        errors: 0,
        latency_us: None,
        extra: BTreeMap::new(),
    })
}

fn wrk_result(text: &str) -> Result<Measured> {
    let after = |label: &str| {
        text.lines()
            .find_map(|line| line.trim().strip_prefix(label))
            .map(str::trim)
    };
    let value: f64 = after("Requests/sec:")
        .context("wrk reports no rate")?
        .parse()?;
    let requests: f64 = text
        .lines()
        .find_map(|line| line.trim().split_once(" requests in "))
        .context("wrk reports no requests")?
        .0
        .parse()?;
    let mut errors = 0;
    if let Some(line) = after("Socket errors:") {
        errors += line
            .split(',')
            .filter_map(|part| part.trim().rsplit(' ').next()?.parse::<u64>().ok())
            .sum::<u64>();
    }
    if let Some(line) = after("Non-2xx or 3xx responses:") {
        errors += line.parse::<u64>()?;
    }
    let latency_us = match (after("50%"), after("99%")) {
        (Some(median), Some(tail)) => Some(Latency {
            p50: microseconds(median)?,
            p99: microseconds(tail)?,
            p999: None,
        }),
        _ => None,
    };
    Ok(Measured {
        value,
        work: requests,
        errors,
        latency_us,
        extra: BTreeMap::new(),
    })
}

fn microseconds(text: &str) -> Result<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6), ("m", 60e6)];
    let (number, factor) = units
        .iter()
        .find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)))
        .with_context(|| format!("wrk reports a latency of {text:?}"))?;
    Ok(number.parse::<f64>()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 1s test @ http://10.244.2.10:8080/\n  1 threads and 64 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.10ms  200.00us   9.00ms   90.00%\n  \
        Latency Distribution\n     50%    1.05ms\n     75%    1.20ms\n     90%    1.40ms\n     99%  890.00us\n  \
        12345 requests in 1.00s, 2.50MB read\n  Socket errors: connect 0, read 3, write 0, timeout 1\n\
        Requests/sec:  12340.50\nTransfer/sec:      2.50MB\n";

    #[test]
    fn what_wrk_prints_is_understood() {
        let measured = wrk_result(WRK).unwrap();
        assert_eq!(
            (measured.value, measured.work, measured.errors),
            (12340.5, 12345.0, 4)
        );
        let latency = measured.latency_us.unwrap();
        assert_eq!((latency.p50, latency.p99), (1050.0, 890.0));
        assert!(wrk_result("unable to connect").is_err());
    }

    #[test]
    fn what_iperf3_prints_is_understood() {
        let text = r#"{"end":{"sum_received":{"bytes":125000000,"bits_per_second":1e9}}}"#;
        let measured = iperf3_result(text).unwrap();
        assert_eq!((measured.value, measured.work), (1.0, 125e6));
        assert!(
            iperf3_result(r#"{"error":"unable to connect"}"#)
                .unwrap_err()
                .to_string()
                .contains("unable to connect")
        );
    }
}
