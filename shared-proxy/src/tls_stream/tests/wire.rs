//! Wires that pass few bytes at a time, and that count.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};

/// Reads and writes of a wire that moved something.
#[derive(Debug, Clone, Default)]
pub struct Counts(Arc<[AtomicUsize; 2]>);

impl Counts {
    pub fn reads(&self) -> usize {
        self.0[0].load(Ordering::Relaxed)
    }

    pub fn writes(&self) -> usize {
        self.0[1].load(Ordering::Relaxed)
    }
}

pub struct Wire {
    io: DuplexStream,
    most: usize,
    counts: Counts,
}

impl Wire {
    /// Passes `most` bytes at a time.
    pub fn new(io: DuplexStream, most: usize) -> Self {
        let counts = Counts::default();
        Self { io, most, counts }
    }

    pub fn counted(io: DuplexStream, counts: Counts) -> Self {
        let most = usize::MAX;
        Self { io, most, counts }
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let most = buf.remaining().min(self.most);
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut part))?;
        let length = part.filled().len();
        buf.advance(length);
        self.counts.0[0].fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let most = buf.len().min(self.most);
        let written = ready!(Pin::new(&mut self.io).poll_write(cx, &buf[..most]))?;
        self.counts.0[1].fetch_add(1, Ordering::Relaxed);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
