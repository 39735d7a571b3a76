//! Buffers on the byte path: what was read and not sent, what was received and not written.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};

/// What one read may take at first. Enough for a request, small enough for ten thousand connections.
const SMALLEST_READ: usize = 16 * 1024;
/// What one read may take of a busy connection. Larger reads were not faster, they leave the cache.
pub(crate) const LARGEST_READ: usize = 256 * 1024;
/// Received chunks below this length are copied together if others wait already. A frame of one byte pins hundreds of
/// bytes of bookkeeping, and the buffer that it was received in.
const COPIED_BELOW: usize = 4 * 1024;
/// Slices in one vectored write.
const SLICES: usize = 16;

/// Reads a connection into a buffer that grows while reads fill it and is given back while nothing comes.
#[derive(Debug)]
pub(crate) struct Intake {
    buffer: BytesMut,
    read_size: usize,
}

impl Default for Intake {
    fn default() -> Self {
        Self {
            buffer: BytesMut::new(),
            read_size: SMALLEST_READ,
        }
    }
}

impl Intake {
    pub(crate) fn buffered(&self) -> &BytesMut {
        &self.buffer
    }

    /// Whether as much waits here as one read may take; reading on would only move the queue from the kernel to us.
    pub(crate) fn is_full(&self) -> bool {
        self.buffer.len() >= LARGEST_READ
    }

    /// The first `length` bytes, without a copy.
    pub(crate) fn take(&mut self, length: usize) -> Bytes {
        self.buffer.split_to(length).freeze()
    }

    pub(crate) fn advance(&mut self, length: usize) {
        self.buffer.advance(length);
        if self.buffer.is_empty() {
            // Makes the whole allocation usable for the next read.
            self.buffer.clear();
        }
    }

    /// Reads once. Zero bytes are the end of the stream.
    pub(crate) fn poll_read<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
    ) -> Poll<io::Result<usize>> {
        if self.buffer.capacity() - self.buffer.len() < self.read_size / 2 {
            self.buffer.reserve(self.read_size);
        }
        let room = self.buffer.capacity() - self.buffer.len();
        match pin!(from.read_buf(&mut self.buffer)).poll(cx) {
            Poll::Ready(Ok(length)) => {
                if length == room && self.read_size < LARGEST_READ {
                    self.read_size *= 2;
                } else if length < self.read_size / 4 && self.read_size > SMALLEST_READ {
                    self.read_size /= 2;
                }
                Poll::Ready(Ok(length))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                if self.buffer.is_empty() {
                    self.buffer = BytesMut::new();
                }
                Poll::Pending
            }
        }
    }
}

/// Chunks that wait to be written.
#[derive(Debug, Default)]
pub(crate) struct Outlet {
    chunks: VecDeque<Bytes>,
    /// Small chunks copied together; written after `chunks`.
    tail: BytesMut,
}

impl Outlet {
    pub(crate) fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.tail.is_empty()
    }

    /// Adds a chunk at the end.
    pub(crate) fn push(&mut self, chunk: Bytes) {
        if chunk.is_empty() {
            return;
        }
        if chunk.len() < COPIED_BELOW && !self.is_empty() {
            if self.tail.capacity() - self.tail.len() < chunk.len() {
                self.tail.reserve(SMALLEST_READ.max(self.tail.len()));
            }
            self.tail.extend_from_slice(&chunk);
            return;
        }
        if !self.tail.is_empty() {
            self.chunks.push_back(self.tail.split().freeze());
        }
        self.chunks.push_back(chunk);
    }

    /// Writes once, all that one call takes. Must not be called when empty.
    pub(crate) fn poll_write<W: AsyncWrite + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        to: &mut W,
    ) -> Poll<io::Result<usize>> {
        let mut slices = [IoSlice::new(&[]); SLICES];
        let mut used = 0;
        let tail = (!self.tail.is_empty()).then_some(&self.tail[..]);
        let waiting = self.chunks.iter().map(|chunk| &chunk[..]).chain(tail);
        for (slice, chunk) in slices.iter_mut().zip(waiting) {
            *slice = IoSlice::new(chunk);
            used += 1;
        }
        let written = ready!(Pin::new(to).poll_write_vectored(cx, &slices[..used]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.advance(written);
        Poll::Ready(Ok(written))
    }

    fn advance(&mut self, mut written: usize) {
        while let Some(front) = self.chunks.front_mut() {
            if written < front.len() {
                front.advance(written);
                return;
            }
            written -= front.len();
            self.chunks.pop_front();
        }
        self.tail.advance(written);
        if self.tail.is_empty() {
            // An idle connection keeps no memory.
            self.tail = BytesMut::new();
            self.chunks = VecDeque::new();
        }
    }
}
