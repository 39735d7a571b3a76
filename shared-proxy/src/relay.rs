//! Bytes both ways between two connections, with half-close and reset carried through.
//!
//! FIN on one side becomes FIN (or END_STREAM) on the other, in each direction by itself. A reset, a dead peer or a cut
//! becomes a reset on the other side, never a FIN: an application must not take an aborted answer for a complete one.

mod buffer;
mod copy;
mod leg;

use std::future::{Future, poll_fn};
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::Interest;
use tokio::net::tcp::ReadHalf;

pub(crate) use buffer::{Intake, Outlet};
pub use leg::Leg;

use crate::hbone::stream::{FromTunnel, HboneStream, ToTunnel};
use copy::Copy;

/// Counts a connection's bytes while they pass. Called once per chunk; must not block.
pub trait Meter {
    /// Bytes that went from the client to the application.
    fn to_application(&self, bytes: u64);
    /// Bytes that went from the application to the client.
    fn to_client(&self, bytes: u64);
    /// This end will send nothing more; called once for each end at most.
    fn ended(&self, end: End) {
        let _ = end;
    }
}

/// Which end of the user's connection a TCP leg is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The one that opened it.
    Client,
    /// The one that serves it.
    Application,
}

/// Why a relay ended early. Both sides have been reset by then.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// The client's TCP connection failed.
    #[error("the client's connection failed: {0}")]
    Client(#[source] io::Error),
    /// The TCP connection towards the application failed.
    #[error("the application's connection failed: {0}")]
    Application(#[source] io::Error),
    /// The tunnel's stream was reset, or its connection died.
    #[error("the tunnel failed: {0}")]
    Tunnel(#[source] h2::Error),
}

impl RelayError {
    fn of(end: End, error: io::Error) -> Self {
        match end {
            End::Client => Self::Client(error),
            End::Application => Self::Application(error),
        }
    }
}

/// How often one poll of a direction goes round before it lets other tasks run.
pub(crate) const ROUNDS_PER_POLL: usize = 32;

/// Relays between two TCP connections until both directions have ended.
pub async fn between_tcp(
    mut client: Leg,
    mut application: Leg,
    meter: &impl Meter,
) -> Result<(), RelayError> {
    let (client_read, mut client_write) = client.split();
    let (application_read, mut application_write) = application.split();
    let mut client_side = ReadSide::new(client_read, End::Client);
    let mut application_side = ReadSide::new(application_read, End::Application);
    let (mut forth, mut back) = (Copy::default(), Copy::default());
    poll_fn(|cx| {
        if let Some(from) = client_side.open() {
            let moved = forth.poll(cx, from, &mut application_write, |n| {
                meter.to_application(n)
            });
            if moved
                .map_err(|e| e.between(End::Client, End::Application))?
                .is_ready()
            {
                client_side.ended();
                meter.ended(End::Client);
            }
        }
        if let Some(from) = application_side.open() {
            let moved = back.poll(cx, from, &mut client_write, |n| meter.to_client(n));
            if moved
                .map_err(|e| e.between(End::Application, End::Client))?
                .is_ready()
            {
                application_side.ended();
                meter.ended(End::Application);
            }
        }
        if client_side.is_over() && application_side.is_over() {
            return Poll::Ready(Ok(()));
        }
        client_side.poll_watch(cx)?;
        application_side.poll_watch(cx)?;
        Poll::Pending
    })
    .await?;
    drop((client_side, application_side));
    client.finish();
    application.finish();
    Ok(())
}

/// Relays between a TCP connection, which is the user's `end`, and a tunnel's stream until both directions have ended.
pub async fn through_tunnel(
    mut leg: Leg,
    end: End,
    stream: HboneStream,
    meter: &impl Meter,
) -> Result<(), RelayError> {
    let HboneStream {
        mut send, mut recv, ..
    } = stream;
    let (read, mut write) = leg.split();
    let mut tcp_side = ReadSide::new(read, end);
    let (mut out, mut back) = (ToTunnel::default(), FromTunnel::default());
    let mut tunnel_over = false;
    let counted = |from: End, bytes: u64| match from {
        End::Client => meter.to_application(bytes),
        End::Application => meter.to_client(bytes),
    };
    let other = match end {
        End::Client => End::Application,
        End::Application => End::Client,
    };
    let result = poll_fn(|cx| {
        if let Some(from) = tcp_side.open() {
            let moved = out.poll(cx, from, &mut send, |n| counted(end, n));
            if moved.map_err(|e| e.between(end, end))?.is_ready() {
                tcp_side.ended();
                meter.ended(end);
            }
        }
        if !tunnel_over {
            let moved = back.poll(cx, &mut recv, &mut write, |n| counted(other, n));
            tunnel_over = moved.map_err(|e| e.between(end, end))?.is_ready();
            if tunnel_over {
                meter.ended(other);
            }
        }
        if tcp_side.is_over() && tunnel_over {
            return Poll::Ready(Ok(()));
        }
        tcp_side.poll_watch(cx)?;
        // A reset after the peer's END_STREAM shows only on the sending half.
        if tunnel_over && let Poll::Ready(reset) = send.poll_reset(cx) {
            let error = reset.map_or_else(|error| error, h2::Error::from);
            return Poll::Ready(Err(RelayError::Tunnel(error)));
        }
        Poll::Pending
    })
    .await;
    drop(tcp_side);
    match result {
        Ok(()) => leg.finish(),
        Err(_) => send.send_reset(h2::Reason::CANCEL),
    }
    result
}

/// Which half of a direction failed.
#[derive(Debug)]
pub(crate) enum MoveError {
    /// The TCP connection that is read.
    Read(io::Error),
    /// The TCP connection that is written.
    Write(io::Error),
    /// The tunnel.
    Tunnel(h2::Error),
}

impl MoveError {
    /// The relay's error, in a direction that reads from `read` and writes to `written`.
    fn between(self, read: End, written: End) -> RelayError {
        match self {
            Self::Read(error) => RelayError::of(read, error),
            Self::Write(error) => RelayError::of(written, error),
            Self::Tunnel(error) => RelayError::Tunnel(error),
        }
    }
}

/// The reading half of a TCP connection. After its end it is watched for a reset, which nothing else would show until
/// the next write.
struct ReadSide<'a> {
    end: End,
    state: ReadState<'a>,
}

enum ReadState<'a> {
    Open(ReadHalf<'a>),
    Over(Pin<Box<dyn Future<Output = io::Result<()>> + Send + 'a>>),
    /// Between the two.
    Moving,
}

impl<'a> ReadSide<'a> {
    fn new(half: ReadHalf<'a>, end: End) -> Self {
        Self {
            end,
            state: ReadState::Open(half),
        }
    }

    fn open(&mut self) -> Option<&mut ReadHalf<'a>> {
        match &mut self.state {
            ReadState::Open(half) => Some(half),
            _ => None,
        }
    }

    fn ended(&mut self) {
        if let ReadState::Open(half) = std::mem::replace(&mut self.state, ReadState::Moving) {
            self.state = ReadState::Over(Box::pin(async move {
                half.ready(Interest::ERROR).await?;
                let error = half.as_ref().take_error()?;
                Err(error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()))
            }));
        }
    }

    fn is_over(&self) -> bool {
        matches!(self.state, ReadState::Over(_))
    }

    fn poll_watch(&mut self, cx: &mut Context<'_>) -> Result<(), RelayError> {
        let ReadState::Over(watch) = &mut self.state else {
            return Ok(());
        };
        match watch.as_mut().poll(cx) {
            Poll::Ready(Err(error)) => Err(RelayError::of(self.end, error)),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
