//! Connections one after the other, timed from the call of connect to the first byte of the answer.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::process::output_of_client;
use super::{Latency, Measured, Target};
use crate::bench::case::Path;
use crate::bench::interrupt;
use crate::bench::pinning::{self, End};
use crate::bench::variant::Variant;

/// The longest that a connection may take.
const LIMIT: Duration = Duration::from_secs(5);
/// What every tunnel's connection has as destination: HBONE, and HBONE between pods of a node over the proxy's loopback.
const TUNNELS: &str = "( dport = :15008 or dport = :15088 )";
/// How long a proxy has to notice that its tunnel is gone before the next connection. None of it is measured.
const NOTICES_WITHIN: Duration = Duration::from_millis(5);

/// One request on a connection of its own. Returns the time to the first byte of the answer, once all of it has come.
///
/// # Errors
/// When the connection fails or the answer is none.
pub fn request(address: SocketAddr, limit: Duration) -> Result<Duration> {
    let begun = Instant::now();
    let mut stream = TcpStream::connect_timeout(&address, limit)
        .with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(limit))?;
    let text = format!("GET / HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(text.as_bytes())?;
    let mut answer = vec![0; 4096];
    let first = stream
        .read(&mut answer)
        .context("first byte of the answer")?;
    let taken = begun.elapsed();
    answer.truncate(first);
    stream
        .read_to_end(&mut answer)
        .context("end of the answer")?;
    if !answer.starts_with(b"HTTP/1.1 200 ") {
        let shown = String::from_utf8_lossy(&answer[..answer.len().min(80)]).into_owned();
        bail!("{address} answers {shown:?}");
    }
    Ok(taken)
}

/// Connection after connection while the tunnels stay as they are.
pub fn first_byte(target: &Target<'_>) -> Result<Measured> {
    let times = pinning::on(End::Client, || {
        target.client.run(|| -> Result<Vec<f64>> {
            let end = Instant::now() + Duration::from_secs(target.seconds);
            let mut times = Vec::new();
            while Instant::now() < end {
                interrupt::check()?;
                times.push(microseconds(request(target.web(), LIMIT)?));
            }
            Ok(times)
        })
    })???;
    measured(times)
}

/// Connection after connection, each of which needs a tunnel of its own: what stands is destroyed in the kernel before.
/// That every connection opened one, and only one, is what the kernel's table of sockets says.
pub fn cold(target: &Target<'_>) -> Result<Measured> {
    let tunnels = Tunnels::of(target)?;
    let end = Instant::now() + Duration::from_secs(target.seconds);
    let (mut times, mut opened) = (Vec::new(), 0);
    tunnels.destroy()?;
    while times.is_empty() || Instant::now() < end {
        interrupt::check()?;
        std::thread::sleep(NOTICES_WITHIN);
        let time = pinning::on(End::Client, || {
            target.client.run(|| request(target.web(), LIMIT))
        })???;
        times.push(microseconds(time));
        let stood = tunnels.destroy()?;
        if tunnels.expected && stood != 1 {
            bail!(
                "connection {} opened {stood} tunnels, want one: it is not cold",
                times.len()
            );
        }
        opened += stood;
    }
    let mut measured = measured(times)?;
    if tunnels.expected {
        measured
            .extra
            .insert("tunnels_opened".to_owned(), opened as f64);
    }
    Ok(measured)
}

/// The tunnels that the client's proxy has.
struct Tunnels {
    netns: host_net::netns::Netns,
    /// Whether a connection leaves one behind.
    expected: bool,
}

impl Tunnels {
    fn of(target: &Target<'_>) -> Result<Self> {
        let variant = &target.stage.variant;
        let direct = *variant == Variant::NodeDirect && target.path == Path::SameNode;
        Ok(Self {
            // A tunnel's socket is where the proxy captures: in the pod, or in its own namespace.
            netns: if variant.is_node() {
                target.stage.lab.netns("proxy1")?
            } else {
                target.client.clone()
            },
            expected: !matches!(variant, Variant::None | Variant::Relay) && !direct,
        })
    }

    /// Destroys all and returns how many there were.
    fn destroy(&self) -> Result<usize> {
        let arguments = ["-K", "-H", "-t", "-n", "state", "established", TUNNELS];
        let text = output_of_client(&self.netns, "ss", &arguments, LIMIT)?;
        Ok(text.lines().filter(|line| !line.trim().is_empty()).count())
    }
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn measured(times: Vec<f64>) -> Result<Measured> {
    let work = times.len() as f64;
    let latency = Latency::of(times).context("no connection was made")?;
    Ok(Measured {
        value: latency.p50,
        work,
        latency_us: Some(latency),
        ..Measured::default()
    })
}

#[cfg(test)]
#[allow(clippy::disallowed_methods)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn an_answer_that_is_none_is_an_error() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let answers: [&[u8]; 3] = [
            b"HTTP/1.1 200 OK\r\n\r\nfine",
            b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
            b"",
        ];
        let server = std::thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = [0; 1024];
                assert!(stream.read(&mut request).unwrap() > 0);
                stream.write_all(answer).unwrap();
            }
        });
        let taken = request(address, LIMIT).unwrap();
        assert!(taken > Duration::ZERO);
        let error = request(address, LIMIT).unwrap_err().to_string();
        assert!(error.contains("503"), "{error}");
        assert!(request(address, LIMIT).is_err(), "no answer at all");
        server.join().unwrap();
        assert!(request(address, LIMIT).is_err(), "nobody listens");
    }
}
