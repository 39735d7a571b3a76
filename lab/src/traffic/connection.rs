//! One TCP connection with words for what it does and how it fails.

use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use socket2::SockRef;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpSocket, TcpStream};

use super::payload::Payload;
use super::request::{Ending, MAX_LINE, Request, Stream};

/// Largest chunk of a write, in bytes. Sizes are random up to it, so that no framing below can rely on one.
const MAX_CHUNK: usize = 64 * 1024;

/// How a connection ended or failed, as its user sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Saw {
    /// An orderly end (FIN).
    Eof,
    /// A reset (RST, or a broken pipe after one).
    Reset,
    /// Nobody listens.
    Refused,
    /// Nothing happened in time.
    Timeout,
    /// No way to the address.
    Unreachable,
    /// Bytes other than those that were sent.
    WrongData,
    /// Something else.
    Other,
}

impl Saw {
    /// What an I/O error means.
    pub fn of(error: &io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Saw::Refused,
            io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe => Saw::Reset,
            io::ErrorKind::UnexpectedEof => Saw::Eof,
            io::ErrorKind::TimedOut => Saw::Timeout,
            io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => Saw::Unreachable,
            _ => Saw::Other,
        }
    }
}

/// A check that did not go as it should.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// In one word.
    pub saw: Saw,
    message: String,
}

impl Failure {
    /// A failure in one word and in a sentence.
    pub fn new(saw: Saw, message: impl Into<String>) -> Self {
        Self {
            saw,
            message: message.into(),
        }
    }

    /// A failure while doing something.
    pub fn during(what: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::new(Saw::of(&error), format!("{what}: {error}"))
    }
}

/// A connection, its reading half buffered for the lines of the protocol.
pub struct Connection {
    /// From the peer.
    pub reader: BufReader<OwnedReadHalf>,
    /// To the peer.
    pub writer: OwnedWriteHalf,
}

impl Connection {
    /// Connects and asks for something.
    pub async fn request(to: SocketAddr, request: &Request) -> Result<Self, Failure> {
        Self::request_from(None, to, request).await
    }

    /// Connects from this port, or from any, and asks for something.
    pub async fn request_from(
        port: Option<u16>,
        to: SocketAddr,
        request: &Request,
    ) -> Result<Self, Failure> {
        let socket = if to.is_ipv4() {
            TcpSocket::new_v4()
        } else {
            TcpSocket::new_v6()
        };
        let socket = socket.map_err(Failure::during("make a socket"))?;
        if let Some(port) = port {
            let any: IpAddr = match to {
                SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
                SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
            };
            socket
                .set_reuseaddr(true)
                .and_then(|()| socket.bind((any, port).into()))
                .map_err(Failure::during(format!("bind to port {port}")))?;
        }
        let stream = socket
            .connect(to)
            .await
            .map_err(Failure::during(format!("connect to {to}")))?;
        let mut connection = Self::over(stream)?;
        connection.send_json(request).await?;
        Ok(connection)
    }

    /// A connection that stands. Every write goes out at once, so that the sizes of writes mean something.
    pub fn over(stream: TcpStream) -> Result<Self, Failure> {
        stream
            .set_nodelay(true)
            .map_err(Failure::during("set TCP_NODELAY"))?;
        let (reader, writer) = stream.into_split();
        Ok(Self {
            reader: BufReader::with_capacity(MAX_CHUNK, reader),
            writer,
        })
    }

    /// Sends a value as a line of JSON.
    pub async fn send_json(&mut self, value: &impl Serialize) -> Result<(), Failure> {
        let mut line = serde_json::to_vec(value)
            .map_err(|error| Failure::new(Saw::Other, error.to_string()))?;
        line.push(b'\n');
        self.writer
            .write_all(&line)
            .await
            .map_err(Failure::during("send a line"))
    }

    /// Reads a line without its end.
    pub async fn line(&mut self) -> Result<String, Failure> {
        let mut line = Vec::new();
        let mut limited = (&mut self.reader).take(MAX_LINE as u64);
        limited
            .read_until(b'\n', &mut line)
            .await
            .map_err(Failure::during("read a line"))?;
        if line.pop() != Some(b'\n') {
            return Err(Failure::new(
                Saw::Eof,
                "the connection ended before the end of a line",
            ));
        }
        String::from_utf8(line).map_err(|_| Failure::new(Saw::WrongData, "a line that is not text"))
    }

    /// Reads a line of JSON.
    pub async fn json<T: DeserializeOwned>(&mut self) -> Result<T, Failure> {
        let line = self.line().await?;
        serde_json::from_str(&line)
            .map_err(|error| Failure::new(Saw::WrongData, format!("{line:?}: {error}")))
    }

    /// Closes the direction to the peer.
    pub async fn close_write(&mut self) -> Result<(), Failure> {
        self.writer
            .shutdown()
            .await
            .map_err(Failure::during("close the sending direction"))
    }

    /// Requires that the peer closes its direction, with nothing before.
    pub async fn expect_end(&mut self) -> Result<(), Failure> {
        let mut byte = [0];
        match self
            .reader
            .read(&mut byte)
            .await
            .map_err(Failure::during("wait for the end"))?
        {
            0 => Ok(()),
            _ => Err(Failure::new(
                Saw::WrongData,
                "data where the connection should end",
            )),
        }
    }

    /// Ends the connection with a reset.
    pub fn reset(self) -> Result<(), Failure> {
        let linger = SockRef::from(self.writer.as_ref()).set_linger(Some(Duration::ZERO));
        linger.map_err(Failure::during("set SO_LINGER"))?;
        // Dropping the writing half would send an orderly end first.
        self.writer.forget();
        Ok(())
    }
}

/// Sends a stream in chunks of random size.
pub async fn send_stream(
    writer: &mut (impl AsyncWrite + Unpin),
    stream: Stream,
) -> Result<(), Failure> {
    let mut payload = Payload::new(stream.seed);
    while payload.offset() < stream.bytes {
        let left = stream.bytes - payload.offset();
        let chunk =
            rand::random_range(1..=MAX_CHUNK).min(usize::try_from(left).unwrap_or(MAX_CHUNK));
        let offset = payload.offset();
        let bytes = payload.take(chunk);
        writer
            .write_all(bytes)
            .await
            .map_err(Failure::during(format_args!("send at offset {offset}")))?;
    }
    Ok(())
}

/// Reads and compares exactly a stream, not what follows it.
pub async fn receive_stream(
    reader: &mut (impl AsyncRead + Unpin),
    stream: Stream,
) -> Result<(), Failure> {
    let mut payload = Payload::new(stream.seed);
    let mut buffer = vec![0; MAX_CHUNK];
    while payload.offset() < stream.bytes {
        let offset = payload.offset();
        let wanted =
            usize::try_from(stream.bytes - offset).map_or(MAX_CHUNK, |left| left.min(MAX_CHUNK));
        let got = reader.read(&mut buffer[..wanted]).await;
        let got = got.map_err(Failure::during(format_args!("receive at offset {offset}")))?;
        if got == 0 {
            return Err(Failure::new(
                Saw::Eof,
                format!("ended after {offset} of {} bytes", stream.bytes),
            ));
        }
        let same = payload.compare(&buffer[..got]);
        same.map_err(|at| Failure::new(Saw::WrongData, format!("wrong byte at offset {at}")))?;
    }
    Ok(())
}

/// Reads to the end, at most `read_bytes` at a time, with a rest of `between` after each read, and judges what came.
pub async fn receive_all(
    reader: &mut (impl AsyncRead + Unpin),
    stream: Stream,
    read_bytes: usize,
    between: Duration,
) -> Ending {
    let mut payload = Payload::new(stream.seed);
    let mut buffer = vec![0; read_bytes.clamp(1, MAX_CHUNK)];
    let ending = |bytes: u64, saw, error: Option<String>| Ending { bytes, saw, error };
    loop {
        let bytes = payload.offset();
        let got = match reader.read(&mut buffer).await {
            Ok(0) if bytes == stream.bytes => return ending(bytes, Saw::Eof, None),
            Ok(0) => {
                return ending(
                    bytes,
                    Saw::Eof,
                    Some(format!("ended after {bytes} of {} bytes", stream.bytes)),
                );
            }
            Ok(got) => got,
            Err(error) => {
                return ending(
                    bytes,
                    Saw::of(&error),
                    Some(format!("after {bytes} bytes: {error}")),
                );
            }
        };
        if bytes + got as u64 > stream.bytes {
            return ending(
                bytes,
                Saw::WrongData,
                Some(format!("more than {} bytes", stream.bytes)),
            );
        }
        if let Err(at) = payload.compare(&buffer[..got]) {
            return ending(
                at,
                Saw::WrongData,
                Some(format!("wrong byte at offset {at}")),
            );
        }
        if !between.is_zero() {
            tokio::time::sleep(between).await;
        }
    }
}
