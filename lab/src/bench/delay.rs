//! A delay line in front of a pod's application: the known difference with which the benchmark checks itself.
//!
//! Bytes towards the application are passed on a fixed time after they came, in order and without a limit of rate; answers
//! go back at once. The line is a relay of its own, outside proxies and kernel, so it works with every capture and wherever
//! the kernel has no netem. Because the relay itself costs time, both of two compared labs have one, and only the delay
//! differs. Times are the timer's: up to a millisecond longer than ordered, never shorter.

#![allow(
    clippy::disallowed_methods,
    reason = "the line stands in for a part of the application, not of a proxy"
)]

use std::io;
use std::net::{Ipv4Addr, TcpListener as StdListener};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::{Bytes, BytesMut};
use host_net::netns::Netns;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

/// Chunks on their way at once in one connection.
const ON_THE_WAY: usize = 256;
/// Largest chunk, in bytes.
const CHUNK: usize = 64 * 1024;

/// A running delay line; it ends when this is dropped.
#[derive(Debug)]
pub struct DelayLine {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl DelayLine {
    /// Listens on a port of all addresses in a namespace and passes connections on to another port of the loopback there.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the port is taken.
    pub fn start(netns: &Netns, from: u16, to: u16, delay: Duration) -> Result<Self> {
        let listener = netns
            .run(|| StdListener::bind((Ipv4Addr::UNSPECIFIED, from)))?
            .with_context(|| format!("delay line: listen on port {from}"))?;
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("delay line: runtime")?;
        let (stop, stopped) = oneshot::channel();
        let netns = netns.clone();
        // The whole thread is in the namespace: the connections to the application must be made there.
        let thread = std::thread::Builder::new()
            .name("delay-line".to_owned())
            .spawn(move || {
                let served = netns.run(|| {
                    runtime.block_on(async {
                        tokio::select! {
                            _ = stopped => Ok(()),
                            ended = serve(listener, to, delay) => ended,
                        }
                    })
                });
                if let Err(error) = served.and_then(|ended| ended) {
                    tracing::warn!(%error, "delay line");
                }
            })?;
        Ok(Self {
            stop: Some(stop),
            thread: Some(thread),
        })
    }
}

impl Drop for DelayLine {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

async fn serve(listener: StdListener, to: u16, delay: Duration) -> io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    loop {
        match listener.accept().await {
            Ok((client, _)) => {
                tokio::spawn(async move {
                    // How a connection ends is its two ends' business: the load counts what failed.
                    let _ = pass(client, to, delay).await;
                });
            }
            // Out of descriptors for a moment.
            Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
        }
    }
}

async fn pass(mut client: TcpStream, to: u16, delay: Duration) -> io::Result<()> {
    let mut application = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
    client.set_nodelay(true)?;
    application.set_nodelay(true)?;
    let (mut requests, mut answers) = client.split();
    let (mut from_application, mut to_application) = application.split();
    let (sender, mut line) = mpsc::channel::<(Instant, Bytes)>(ON_THE_WAY);
    let enter = async move {
        loop {
            let mut chunk = BytesMut::with_capacity(CHUNK);
            let read = requests.read_buf(&mut chunk).await?;
            if read == 0 || sender.send((Instant::now(), chunk.freeze())).await.is_err() {
                return io::Result::Ok(());
            }
        }
    };
    let leave = async {
        while let Some((came, chunk)) = line.recv().await {
            if !delay.is_zero() {
                tokio::time::sleep_until(came + delay).await;
            }
            to_application.write_all(&chunk).await?;
        }
        to_application.shutdown().await
    };
    let back = async {
        tokio::io::copy(&mut from_application, &mut answers).await?;
        answers.shutdown().await
    };
    tokio::try_join!(enter, leave, back).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{SocketAddr, TcpStream as StdStream};
    use std::time::Instant as Clock;

    #[test]
    fn requests_are_late_and_whole_and_answers_are_not() {
        let netns = Netns::current().unwrap();
        let server = StdListener::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap().port();
        let delay = Duration::from_millis(200);
        // Between finding a free port and taking it somebody else may.
        let (from, _line) = (0..20)
            .find_map(|_| {
                let free = StdListener::bind("127.0.0.1:0").unwrap();
                let from = free.local_addr().unwrap().port();
                drop(free);
                Some((from, DelayLine::start(&netns, from, to, delay).ok()?))
            })
            .unwrap();
        let echo = std::thread::spawn(move || {
            let (mut stream, _) = server.accept().unwrap();
            let mut all = Vec::new();
            let mut first = [0; 1];
            stream.read_exact(&mut first).unwrap();
            stream.write_all(b"!").unwrap();
            stream.read_to_end(&mut all).unwrap();
            stream.write_all(&all).unwrap();
        });
        let mut client = StdStream::connect(SocketAddr::from(([127, 0, 0, 1], from))).unwrap();
        let sent = Clock::now();
        client.write_all(b"?").unwrap();
        client.read_exact(&mut [0; 1]).unwrap();
        let took = sent.elapsed();
        assert!(took >= delay && took < 10 * delay, "{took:?}");
        let payload: Vec<u8> = (0..1_000_000_u32).map(|byte| byte as u8).collect();
        client.write_all(&payload).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).unwrap();
        assert!(answer == payload, "{} bytes", answer.len());
        echo.join().unwrap();
    }
}
