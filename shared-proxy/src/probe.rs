//! The capture probe: proof that a pod's connections reach this proxy and that tunnels to the pod reach it, too.
//!
//! Whoever wants to know opens a TCP connection from the pod's network namespace to [`ADDRESS`], which belongs to nobody,
//! and sends a [`Question`] of one line. If the pod is captured, the connection arrives at a proxy as every connection that
//! the pod opens; that proxy opens a tunnel to the pod itself, with the pod's certificate, as every peer would, and asks
//! there. The end of that tunnel answers with what it is. So one answer shows both directions of the capture, the pod's
//! certificate, and which capture it is. Without a capture nobody answers.
//!
//! Such connections are in no access log and no metric: they are not the pod's.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::capture::{Captured, ClientAddr, HBONE_PORT, LocalWorkload, OrigDstAddr, Role};
use crate::core::{Attachment, Failure};
use crate::hbone::authority::Authority;
use crate::hbone::client::{StreamError, TunnelError};
use crate::hbone::stream::HboneStream;
use crate::hbone::stream_io::StreamIo;
use crate::outbound;
use crate::pool::PoolKey;

/// Where a probe goes: link-local, so that no router passes it on where nothing captures it, next to the address that the
/// field's probe exemption uses (169.254.7.127).
pub const ADDRESS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(169, 254, 7, 126)), 15099);

/// Where the probe of a pod without IPv4 goes: next to the field's address of the same use.
pub const ADDRESS6: SocketAddr = SocketAddr::new(
    IpAddr::V6(Ipv6Addr::new(
        0xfd16, 0x9254, 0x7127, 0x1337, 0xffff, 0xffff, 0xffff, 0xfffe,
    )),
    15099,
);

/// Most bytes of a question or an answer.
const LIMIT: u64 = 1024;
/// How long each end waits for the other.
const WITHIN: Duration = Duration::from_secs(5);

/// What a probe asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    /// Comes back in the answer, so that it cannot be an older one's.
    pub nonce: String,
}

/// What it hears.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// The pod's capture works both ways.
    Reached(Reached),
    /// The proxy was reached, and the pod was not: why.
    Failed(String),
}

/// What a probe reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// Of the question.
    pub nonce: String,
    /// UID of the pod, as the proxy knows it.
    pub uid: String,
    /// The capture by which the question arrived at the pod.
    pub capture_mode: String,
    /// Whether it came through a tunnel. A capture may hand connections within a node over without one.
    pub tunnelled: bool,
}

/// Why the pod was not reached.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error(transparent)]
    Capture(#[from] Failure),
    #[error("no tunnel to the pod itself: {0}")]
    Tunnel(#[from] TunnelError),
    #[error("no stream in a tunnel to the pod itself: {0}")]
    Stream(#[from] StreamError),
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Whether a captured connection is a probe.
pub(crate) fn is_probe(captured: &Captured) -> bool {
    [ADDRESS, ADDRESS6]
        .iter()
        .any(|at| captured.dst == Ok(OrigDstAddr(*at)))
}

/// Serves the probe where it leaves the pod.
pub(crate) async fn pass_on(attachment: Attachment, captured: Captured) {
    let Captured {
        mut stream, client, ..
    } = captured;
    let served = timeout(WITHIN, async {
        let answer = ask(&attachment, &mut stream, client)
            .await
            .unwrap_or_else(|failure| Answer::Failed(failure.to_string()));
        write(&mut stream, &answer).await
    });
    if let Err(error) = served.await.unwrap_or_else(|late| Err(late.into())) {
        tracing::debug!(%client, %error, "capture probe not answered");
    }
}

async fn ask(
    attachment: &Attachment,
    stream: &mut TcpStream,
    client: ClientAddr,
) -> Result<Answer, ProbeError> {
    let question = read::<Question>(stream).await?;
    let dst = OrigDstAddr(ADDRESS);
    let pod = attachment.scope.owner(Role::Outbound, client, dst);
    let pod = pod.map_err(Failure::from)?;
    if let Some(pod) = attachment.scope.hand_over(client.0.ip()) {
        return Ok(reached(attachment, question, &pod, false));
    }
    let identity = attachment.identity_of(&pod)?;
    // Never one from the pool: a tunnel that stands proves nothing about the next one, and would be kept for the next
    // probe alone.
    let key = PoolKey {
        scope: attachment.scope.id().clone(),
        attachment: attachment.number,
        source: identity.clone(),
        source_address: client.0.ip(),
        destination: SocketAddr::new(client.0.ip(), HBONE_PORT),
        expected: [identity].into(),
    };
    let tunnel = outbound::open_tunnel(attachment, &key).await?;
    let stream = tunnel
        .connect(&Authority::Address(ADDRESS), http::HeaderMap::new(), WITHIN)
        .await?;
    let mut stream = StreamIo::new(stream);
    write(&mut stream, &question).await?;
    Ok(read(&mut stream).await?)
}

/// Whether a stream in a tunnel is a probe: only the pod itself asks so.
pub(crate) fn is_asked(authority: &Authority, client: ClientAddr, local: SocketAddr) -> bool {
    *authority == Authority::Address(ADDRESS) && client.0.ip() == local.ip()
}

/// Serves the probe where it arrives at the pod.
pub(crate) async fn answer(attachment: &Attachment, pod: &LocalWorkload, stream: HboneStream) {
    let mut stream = StreamIo::new(stream);
    let served = timeout(WITHIN, async {
        let question = read::<Question>(&mut stream).await?;
        write(&mut stream, &reached(attachment, question, pod, true)).await?;
        // The asker's end, so that the stream is not reset behind the answer.
        stream.read(&mut [0]).await
    });
    if let Err(error) = served.await.unwrap_or_else(|late| Err(late.into())) {
        tracing::debug!(pod = &*pod.uid, %error, "capture probe not answered");
    }
}

fn reached(
    attachment: &Attachment,
    question: Question,
    pod: &LocalWorkload,
    tunnelled: bool,
) -> Answer {
    Answer::Reached(Reached {
        nonce: question.nonce,
        uid: pod.uid.to_string(),
        capture_mode: attachment.scope.id().capture_mode.to_owned(),
        tunnelled,
    })
}

/// Reads a message of one line.
///
/// # Errors
/// When the stream fails or ends, and `InvalidData` when the line is too long or not such a message.
pub async fn read<T: for<'de> Deserialize<'de>>(
    stream: &mut (impl tokio::io::AsyncRead + Unpin),
) -> io::Result<T> {
    let mut line = Vec::new();
    // Byte by byte would do for one line; the rest of the buffer is nobody's.
    BufReader::new(stream.take(LIMIT))
        .read_until(b'\n', &mut line)
        .await?;
    Ok(serde_json::from_slice(&line)?)
}

/// Writes a message of one line, and that nothing follows.
///
/// # Errors
/// When the stream fails.
pub async fn write(
    stream: &mut (impl tokio::io::AsyncWrite + Unpin),
    message: &impl Serialize,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.shutdown().await
}
