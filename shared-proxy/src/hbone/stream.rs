//! The two directions of one stream of a tunnel.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::relay::{Intake, MoveError, Outlet, ROUNDS_PER_POLL};

/// An established stream: the CONNECT was answered with 200.
#[derive(Debug)]
pub struct HboneStream {
    /// Towards the peer.
    pub send: SendStream<Bytes>,
    /// From the peer.
    pub recv: RecvStream,
}

/// From a TCP connection into the tunnel.
///
/// Never more than one frame per window: what cannot be sent waits here and is joined by what else arrives, so a slow
/// receiver is not fed thousands of tiny frames once it opens its window.
#[derive(Debug, Default)]
pub(crate) struct ToTunnel {
    intake: Intake,
    ended: bool,
}

impl ToTunnel {
    /// Moves what can be moved. Ready when `from` has ended and END_STREAM is queued.
    pub(crate) fn poll<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut SendStream<Bytes>,
        count: impl Fn(u64),
    ) -> Poll<Result<(), MoveError>> {
        for _ in 0..ROUNDS_PER_POLL {
            let waiting = self.intake.buffered().len();
            let mut blocked = false;
            if waiting > 0 {
                match poll_window(cx, to, waiting).map_err(MoveError::Tunnel)? {
                    Poll::Ready(window) => {
                        let length = window.min(waiting);
                        let last = self.ended && length == waiting;
                        to.send_data(self.intake.take(length), last)
                            .map_err(MoveError::Tunnel)?;
                        count(length as u64);
                        if last {
                            return Poll::Ready(Ok(()));
                        }
                        continue;
                    }
                    Poll::Pending => blocked = true,
                }
            }
            if self.ended {
                if blocked {
                    return Poll::Pending;
                }
                to.send_data(Bytes::new(), true)
                    .map_err(MoveError::Tunnel)?;
                return Poll::Ready(Ok(()));
            }
            if blocked && self.intake.is_full() {
                return Poll::Pending;
            }
            let read = ready!(self.intake.poll_read(cx, from)).map_err(MoveError::Read)?;
            self.ended = read == 0;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

/// How many of `wanted` bytes may be sent at once; at least one.
pub(super) fn poll_window(
    cx: &mut Context<'_>,
    to: &mut SendStream<Bytes>,
    wanted: usize,
) -> Poll<Result<usize, h2::Error>> {
    to.reserve_capacity(wanted);
    let mut window = to.capacity();
    while window == 0 {
        window = match ready!(to.poll_capacity(cx)) {
            Some(capacity) => capacity?,
            // Only a reset or a dead connection closes the sending half before we do.
            None => match to.poll_reset(cx) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(reason)) => return Poll::Ready(Err(reason.into())),
                Poll::Pending => return Poll::Ready(Err(Reason::STREAM_CLOSED.into())),
            },
        };
    }
    Poll::Ready(Ok(window))
}

/// From the tunnel to a TCP connection.
///
/// Frames are taken as soon as they arrive, however slow the connection is, and credit for them is given back only when
/// the connection has taken their bytes: the window bounds what waits here, and nothing waits inside HTTP/2, where small
/// frames use up the budget that all streams of the connection share.
#[derive(Debug, Default)]
pub(crate) struct FromTunnel {
    outlet: Outlet,
    ended: bool,
}

impl FromTunnel {
    /// Moves what can be moved. Ready when the peer has ended the stream and `to` has been told so.
    pub(crate) fn poll<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut RecvStream,
        to: &mut W,
        count: impl Fn(u64),
    ) -> Poll<Result<(), MoveError>> {
        for _ in 0..ROUNDS_PER_POLL {
            while !self.ended {
                match from.poll_data(cx) {
                    Poll::Ready(Some(chunk)) => {
                        self.outlet.push(chunk.map_err(MoveError::Tunnel)?);
                    }
                    Poll::Ready(None) => self.ended = true,
                    Poll::Pending => break,
                }
            }
            if self.outlet.is_empty() {
                if !self.ended {
                    return Poll::Pending;
                }
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(MoveError::Write)?;
                return Poll::Ready(Ok(()));
            }
            let written = ready!(self.outlet.poll_write(cx, to)).map_err(MoveError::Write)?;
            from.flow_control()
                .release_capacity(written)
                .map_err(MoveError::Tunnel)?;
            count(written as u64);
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
