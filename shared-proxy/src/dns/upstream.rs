//! Passing a query on to the resolvers.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, timeout_at};

use super::DnsConfig;
use super::message::{LARGEST_TCP, Question, Transport, with_id};
use crate::capture::{OnBehalfOf, Scope};

/// Why a query has no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum UpstreamError {
    /// The configuration names none.
    #[error("no resolver is configured")]
    NoResolver,
    /// None of them answered; what the last one did.
    #[error("no resolver answered; the last one, {resolver}: {source}")]
    AllFailed {
        /// The last one that was asked.
        resolver: SocketAddr,
        /// What it did.
        #[source]
        source: io::Error,
    },
}

/// The first answer that a resolver gives, as it came. `speakers` are the addresses of who asks, the one that it asked with
/// first: a resolver of the other family is asked with one of its own.
pub(super) async fn ask(
    scope: &dyn Scope,
    config: &DnsConfig,
    speakers: &[IpAddr],
    question: &Question,
    query: &[u8],
    transport: Transport,
) -> Result<Vec<u8>, UpstreamError> {
    let mut failure = UpstreamError::NoResolver;
    for _ in 0..config.attempts {
        for resolver in &config.upstreams {
            let resolver = *resolver;
            // The id is ours and random, as is the socket's port: nobody beside the path can guess an answer.
            let id: u16 = rand::random();
            let query = with_id(query, id);
            let deadline = Instant::now() + config.upstream_timeout;
            let exchange = async {
                match transport {
                    Transport::Udp => by_udp(scope, resolver, &query, question, id).await,
                    Transport::Tcp => {
                        let Some(speaker) = speaker(speakers, resolver) else {
                            return Err(io::ErrorKind::AddrNotAvailable.into());
                        };
                        by_tcp(scope, resolver, speaker, &query, question, id).await
                    }
                }
            };
            let answered = match timeout_at(deadline, exchange).await {
                Ok(answered) => answered,
                Err(_) => Err(silent(config.upstream_timeout)),
            };
            match answered {
                Ok(answer) => return Ok(answer),
                Err(source) => failure = UpstreamError::AllFailed { resolver, source },
            }
        }
    }
    Err(failure)
}

fn speaker(speakers: &[IpAddr], resolver: SocketAddr) -> Option<IpAddr> {
    let of_family = |speaker: &&IpAddr| speaker.is_ipv4() == resolver.is_ipv4();
    let found = speakers.iter().find(of_family);
    found.or(speakers.first()).copied()
}

fn silent(after: Duration) -> io::Error {
    io::Error::new(
        io::ErrorKind::TimedOut,
        format!("no answer within {after:?}"),
    )
}

async fn by_udp(
    scope: &dyn Scope,
    resolver: SocketAddr,
    query: &[u8],
    question: &Question,
    id: u16,
) -> io::Result<Vec<u8>> {
    let socket = scope.datagram(resolver)?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut buffer = Vec::with_capacity(usize::from(LARGEST_TCP));
    loop {
        buffer.clear();
        socket.recv_buf(&mut buffer).await?;
        // Anything else may be an earlier answer, or a forged one: the right one may still come.
        if question.is_answered_by(&buffer, id) {
            buffer.shrink_to_fit();
            return Ok(buffer);
        }
    }
}

async fn by_tcp(
    scope: &dyn Scope,
    resolver: SocketAddr,
    pod: IpAddr,
    query: &[u8],
    question: &Question,
    id: u16,
) -> io::Result<Vec<u8>> {
    let length = u16::try_from(query.len())
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "the query is too long"))?;
    let socket = scope.socket(resolver, OnBehalfOf::LocalWorkload(pod))?;
    let mut stream = socket.connect(resolver).await?;
    let mut framed = length.to_be_bytes().to_vec();
    framed.extend_from_slice(query);
    stream.write_all(&framed).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if question.is_answered_by(&answer, id) {
        Ok(answer)
    } else {
        Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "the answer is to another question",
        ))
    }
}
