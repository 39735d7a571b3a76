//! The server: one listener, or one of each family, one task per connection, whatever the first line asks for.

use std::collections::VecDeque;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::SockRef;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};

use super::ServerOptions;
use super::connection::{Connection, Failure, receive_all, send_stream};
use super::request::{Ending, Request, Stream};

/// Backlog: a storm's connections come all at once.
const BACKLOG: u32 = 4096;
/// Ended connections that are remembered.
const MEMORY: usize = 256;
/// Receive buffer of a slow reader, in bytes: small, so that its slowness reaches the sender.
const SLOW_RECEIVE_BUFFER: usize = 4096;

/// How watched connections ended, the latest last.
#[derive(Debug, Clone, Default)]
struct Memory(Arc<Mutex<VecDeque<(u64, Ending)>>>);

impl Memory {
    fn keep(&self, token: u64, ending: Ending) {
        let mut endings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if endings.len() == MEMORY {
            endings.pop_front();
        }
        endings.push_back((token, ending));
    }

    fn recall(&self, token: u64) -> Option<Ending> {
        let endings = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        endings
            .iter()
            .find(|(kept, _)| *kept == token)
            .map(|(_, ending)| ending.clone())
    }
}

/// Serves until the listener fails.
pub async fn serve(
    options: &ServerOptions,
    ready: impl FnOnce(SocketAddr) -> Result<()>,
) -> Result<()> {
    let listener =
        listen(options.listen).with_context(|| format!("listen on {}", options.listen))?;
    let at = listener.local_addr().context("address of the listener")?;
    // Whoever listens on every address does so in both families, with clients' addresses as they are.
    let twin = match at.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => listen((Ipv6Addr::UNSPECIFIED, at.port()).into()).ok(),
        _ => None,
    };
    ready(at)?;
    let memory = Memory::default();
    let limit = Duration::from_millis(options.timeout_ms);
    loop {
        let accepted = match &twin {
            Some(twin) => tokio::select! {
                accepted = listener.accept() => accepted,
                accepted = twin.accept() => accepted,
            },
            None => listener.accept().await,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of descriptors, or a client that went away before it was accepted: the next may do.
                tracing::warn!(%error, "accept");
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            }
        };
        let memory = memory.clone();
        tokio::spawn(async move {
            match tokio::time::timeout(limit, answer(stream, &memory)).await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => tracing::debug!(%failure, "connection"),
                Err(_) => tracing::debug!(?limit, "connection given up"),
            }
        });
    }
}

fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() {
        TcpSocket::new_v4()?
    } else {
        let socket = TcpSocket::new_v6()?;
        SockRef::from(&socket).set_only_v6(true)?;
        socket
    };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn answer(stream: TcpStream, memory: &Memory) -> Result<(), Failure> {
    let peer = stream
        .peer_addr()
        .map_err(Failure::during("address of the client"))?;
    let mut connection = Connection::over(stream)?;
    let request = match Request::parse(&connection.line().await?) {
        Ok(request) => request,
        Err(reason) => {
            return connection
                .send_json(&serde_json::json!({ "error": reason }))
                .await;
        }
    };
    match request {
        Request::Who => connection.send_json(&peer).await,
        Request::Echo => echo(connection).await,
        Request::Exchange { up, down } => {
            let receive = receive_all(&mut connection.reader, up, usize::MAX, Duration::ZERO);
            let (verdict, sent) = tokio::join!(receive, send_stream(&mut connection.writer, down));
            sent?;
            connection.send_json(&verdict).await
        }
        Request::Slow {
            up,
            pause_ms,
            read_bytes,
            every_us,
        } => {
            let socket = SockRef::from(connection.writer.as_ref());
            socket
                .set_recv_buffer_size(SLOW_RECEIVE_BUFFER)
                .map_err(Failure::during("set SO_RCVBUF"))?;
            tokio::time::sleep(Duration::from_millis(pause_ms)).await;
            let between = Duration::from_micros(every_us);
            let verdict = receive_all(&mut connection.reader, up, read_bytes, between).await;
            connection.send_json(&verdict).await
        }
        Request::Reset { down } => {
            send_stream(&mut connection.writer, down).await?;
            connection
                .reader
                .read_u8()
                .await
                .map_err(Failure::during("wait for the word to reset"))?;
            connection.reset()
        }
        Request::Watch {
            token,
            close_first,
            up,
        } => watch(connection, memory, token, close_first, up).await,
        Request::Recall { token } => connection.send_json(&memory.recall(token)).await,
    }
}

async fn echo(mut connection: Connection) -> Result<(), Failure> {
    let copied = tokio::io::copy_buf(&mut connection.reader, &mut connection.writer).await;
    copied.map_err(Failure::during("echo"))?;
    connection.close_write().await
}

async fn watch(
    mut connection: Connection,
    memory: &Memory,
    token: u64,
    close_first: bool,
    up: Stream,
) -> Result<(), Failure> {
    connection
        .writer
        .write_all(b"ready\n")
        .await
        .map_err(Failure::during("say ready"))?;
    if close_first {
        connection.close_write().await?;
    }
    let ending = receive_all(&mut connection.reader, up, usize::MAX, Duration::ZERO).await;
    memory.keep(token, ending);
    Ok(())
}
