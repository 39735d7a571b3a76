//! A stream of a tunnel as a byte stream, so that another tunnel can run inside it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use h2::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::stream::{HboneStream, poll_window};

/// Most that one write takes, in bytes: what the outer tunnel writes at once.
const LARGEST_WRITE: usize = 64 << 10;

/// Reads and writes the bytes of a stream. Dropped before both ends have said that they are done, it resets the stream.
#[derive(Debug)]
pub struct StreamIo {
    stream: HboneStream,
    /// Of the last frame, what nobody has read yet.
    rest: Bytes,
    sent_end: bool,
    received_end: bool,
}

impl StreamIo {
    /// Of an established stream.
    pub fn new(stream: HboneStream) -> Self {
        Self {
            stream,
            rest: Bytes::new(),
            sent_end: false,
            received_end: false,
        }
    }
}

fn failed(error: h2::Error) -> io::Error {
    if error.is_io() {
        return error
            .into_io()
            .unwrap_or_else(|| io::ErrorKind::BrokenPipe.into());
    }
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

impl AsyncRead for StreamIo {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.rest.is_empty() && !this.received_end {
            match ready!(this.stream.recv.poll_data(cx)) {
                Some(frame) => this.rest = frame.map_err(failed)?,
                None => this.received_end = true,
            }
        }
        let length = this.rest.len().min(buffer.remaining());
        buffer.put_slice(&this.rest[..length]);
        this.rest.advance(length);
        this.stream
            .recv
            .flow_control()
            .release_capacity(length)
            .map_err(failed)?;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for StreamIo {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let send = &mut self.get_mut().stream.send;
        let wanted = bytes.len().min(LARGEST_WRITE);
        let length = ready!(poll_window(cx, send, wanted))
            .map_err(failed)?
            .min(wanted);
        let frame = Bytes::copy_from_slice(&bytes[..length]);
        send.send_data(frame, false).map_err(failed)?;
        Poll::Ready(Ok(length))
    }

    /// What was written is with the outer tunnel, which sends it on its own.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.sent_end {
            this.sent_end = true;
            this.stream
                .send
                .send_data(Bytes::new(), true)
                .map_err(failed)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for StreamIo {
    fn drop(&mut self) {
        if !self.sent_end {
            self.stream.send.send_reset(Reason::CANCEL);
        }
    }
}
