//! One direction between two TCP connections.

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite};

use super::{Intake, MoveError, ROUNDS_PER_POLL};

/// State of one direction.
#[derive(Debug, Default)]
pub(super) struct Copy {
    intake: Intake,
    ended: bool,
}

impl Copy {
    /// Moves what can be moved. Ready when `from` has ended and `to` has been told so.
    pub(super) fn poll<R, W>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
        to: &mut W,
        count: impl Fn(u64),
    ) -> Poll<Result<(), MoveError>>
    where
        R: AsyncRead + Unpin,
        W: AsyncWrite + Unpin,
    {
        for _ in 0..ROUNDS_PER_POLL {
            let waiting = self.intake.buffered();
            if !waiting.is_empty() {
                let written =
                    ready!(Pin::new(&mut *to).poll_write(cx, waiting)).map_err(MoveError::Write)?;
                if written == 0 {
                    return Poll::Ready(Err(MoveError::Write(
                        std::io::ErrorKind::WriteZero.into(),
                    )));
                }
                self.intake.advance(written);
                count(written as u64);
                continue;
            }
            if self.ended {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(MoveError::Write)?;
                return Poll::Ready(Ok(()));
            }
            let read = ready!(self.intake.poll_read(cx, from)).map_err(MoveError::Read)?;
            self.ended = read == 0;
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
