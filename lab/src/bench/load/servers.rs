//! What answers in a server's pod.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use host_net::netns::Netns;

use super::process::Running;
use crate::bench::delay::DelayLine;
use crate::bench::pinning::{self, End};
use crate::topology::APPLICATION_PORT;

/// Port of the iperf3 server.
pub const BULK_PORT: u16 = 5201;
/// Port of nginx behind a delay line.
const BEHIND_PORT: u16 = APPLICATION_PORT - 1;
/// As many connections as nginx may have: more than any case opens.
const NGINX_CONNECTIONS: u32 = 16_384;

/// The servers of one pod: nginx and iperf3.
#[derive(Debug)]
pub struct Servers {
    _line: Option<DelayLine>,
    nginx: Running,
    iperf3: Running,
}

impl Servers {
    /// Starts both; `directory` takes nginx's files. With a delay, clients reach nginx through a delay line.
    ///
    /// # Errors
    /// When one cannot be started.
    pub fn start(netns: &Netns, directory: &Path, delay: Option<Duration>) -> Result<Self> {
        let port = delay.map_or(APPLICATION_PORT, |_| BEHIND_PORT);
        std::fs::create_dir_all(directory)?;
        let configuration = directory.join("nginx.conf");
        std::fs::write(&configuration, nginx_configuration(directory, port))?;
        let path = configuration
            .to_str()
            .context("a directory whose name is not UTF-8")?;
        let nginx = Running::start(
            netns,
            End::Server,
            "nginx",
            &["-c", path, "-p", &directory.display().to_string()],
        )?;
        let iperf3 = Running::start(
            netns,
            End::Server,
            "iperf3",
            &["-s", "-p", &BULK_PORT.to_string()],
        )?;
        let line = delay.map(|delay| {
            let start = || DelayLine::start(netns, APPLICATION_PORT, BEHIND_PORT, delay);
            pinning::on(End::Server, start)?
        });
        Ok(Self {
            _line: line.transpose()?,
            nginx,
            iperf3,
        })
    }

    /// Pids of the servers, without nginx's worker.
    pub fn pids(&self) -> [u32; 2] {
        [self.nginx.pid(), self.iperf3.pid()]
    }
}

/// One worker, keep-alive without end, an answer from memory of 64 bytes, no log.
fn nginx_configuration(directory: &Path, port: u16) -> String {
    let directory = directory.display();
    format!(
        "daemon off;\nworker_processes 1;\npid {directory}/nginx.pid;\nerror_log {directory}/error.log;\n\
         events {{ worker_connections {NGINX_CONNECTIONS}; }}\n\
         http {{\n  access_log off;\n  keepalive_requests 1000000000;\n  keepalive_timeout 3600s;\n\
         client_body_temp_path {directory}/b; proxy_temp_path {directory}/p; fastcgi_temp_path {directory}/f; \
         uwsgi_temp_path {directory}/u; scgi_temp_path {directory}/s;\n\
         server {{ listen {port} backlog=4096; location / {{ return 200 \"{}\\n\"; }} }}\n}}\n",
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
