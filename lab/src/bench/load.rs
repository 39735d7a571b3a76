//! Traffic from tools that everybody knows: iperf3 for bulk streams, wrk against nginx for requests.

use std::io::Read;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use host_net::netns::Netns;
use serde_json::Value;

use super::case::Load;
use crate::topology::APPLICATION_PORT;

/// Port of the iperf3 server.
pub const BULK_PORT: u16 = 5201;
/// Time that a tool may take beyond the duration that it was asked for.
const GRACE: Duration = Duration::from_secs(15);

/// What one run of a tool found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// In the case's unit: Gbit/s, requests/s, connections/s.
    pub value: f64,
    /// Work done: bytes, or requests.
    pub work: f64,
    /// Failed requests; a sample with any is not a sample.
    pub errors: u64,
    /// Latency in microseconds at the 50th and 99th percentile, where the tool tells.
    pub latency_us: Option<(f64, f64)>,
}

/// A process that ends with its guard.
#[derive(Debug)]
pub struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts a program in a namespace, with its output thrown away.
    pub fn start(netns: &Netns, program: &str, arguments: &[&str]) -> Result<Self> {
        spawn(netns, program, arguments, Stdio::null()).map(Self)
    }

    /// Starts a program that writes a line to standard error when it is ready, and waits for that line.
    pub fn start_until_it_says(
        netns: &Netns,
        program: &str,
        arguments: &[&str],
        says: &str,
    ) -> Result<Self> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = netns
            .run(|| command.spawn())?
            .with_context(|| format!("cannot start {program}"))?;
        let mut stderr = child.stderr.take().context("no standard error")?;
        let mut said = Vec::new();
        let mut byte = [0];
        while stderr.read(&mut byte)? == 1 {
            said.push(byte[0]);
            if said.ends_with(says.as_bytes()) {
                // Whatever else it has to say must not block it.
                std::thread::spawn(move || std::io::copy(&mut stderr, &mut std::io::sink()));
                return Ok(Self(child));
            }
        }
        let status = child.wait()?;
        bail!(
            "{program} ended with {status}: {}",
            String::from_utf8_lossy(&said)
        )
    }

    /// Asks it to end (SIGTERM), waits, and returns whether it ended well.
    pub fn stop(mut self) -> Result<bool> {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id())?);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM)?;
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if let Some(status) = self.0.try_wait()? {
                return Ok(status.success());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        bail!("process {pid} did not end within 5 s of SIGTERM")
    }
}

fn spawn(netns: &Netns, program: &str, arguments: &[&str], output: Stdio) -> Result<Child> {
    let mut command = Command::new(program);
    command
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(output)
        .stderr(Stdio::null());
    netns
        .run(|| command.spawn())?
        .with_context(|| format!("cannot start {program}: is it installed? (`make deps`)"))
}

/// Runs a program in a namespace to its end and returns what it printed.
pub fn output_of(
    netns: &Netns,
    program: &str,
    arguments: &[&str],
    limit: Duration,
) -> Result<String> {
    let mut child = spawn(netns, program, arguments, Stdio::piped())?;
    let mut stdout = child.stdout.take().context("no standard output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let mut running = Running(child);
    let deadline = Instant::now() + limit;
    let status = loop {
        if let Some(status) = running.0.try_wait()? {
            break status;
        }
        if Instant::now() >= deadline {
            bail!(
                "{program} {} did not end within {limit:?}",
                arguments.join(" ")
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = match reader.join() {
        Ok(text) => text.with_context(|| format!("reading the output of {program}"))?,
        Err(_) => bail!("reading the output of {program} failed"),
    };
    if !status.success() {
        bail!(
            "{program} {} ended with {status}: {}",
            arguments.join(" "),
            text.trim()
        );
    }
    Ok(text)
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

/// Runs one load for `seconds` from the client's namespace.
pub fn run(load: Load, client: &Netns, server: Ipv4Addr, seconds: u64) -> Result<Measured> {
    let limit = Duration::from_secs(seconds) + GRACE;
    let duration = seconds.to_string();
    let url = format!("http://{server}:{APPLICATION_PORT}/");
    let wrk_time = format!("{seconds}s");
    match load {
        Load::Bulk => {
            let (server, port) = (server.to_string(), BULK_PORT.to_string());
            let arguments = [
                "-c",
                &server,
                "-p",
                &port,
                "-t",
                &duration,
                "-J",
                "--connect-timeout",
                "5000",
            ];
            iperf3_result(&output_of(client, "iperf3", &arguments, limit)?)
        }
        Load::KeepAlive => wrk_result(&output_of(
            client,
            "wrk",
            &[
                "-t",
                "1",
                "-c",
                "64",
                "-d",
                &wrk_time,
                "--timeout",
                "5s",
                "--latency",
                &url,
            ],
            limit,
        )?),
        Load::NewConnections => wrk_result(&output_of(
            client,
            "wrk",
            &[
                "-t",
                "1",
                "-c",
                "16",
                "-d",
                &wrk_time,
                "--timeout",
                "5s",
                "--latency",
                "-H",
                "Connection: close",
                &url,
            ],
            limit,
        )?),
    }
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
        (Some(median), Some(tail)) => Some((microseconds(median)?, microseconds(tail)?)),
        _ => None,
    };
    Ok(Measured {
        value,
        work: requests,
        errors,
        latency_us,
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
        assert_eq!(measured.latency_us, Some((1050.0, 890.0)));
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
