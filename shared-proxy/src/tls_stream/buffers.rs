//! The two buffers of a connection. Their memory is initialised once, when they grow; bytes are tracked by offsets.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, ReadBuf};

use super::LARGEST_INPUT;

/// First size of a buffer, in bytes: a request fits. A buffer of this size is given back whenever it is empty. HTTP/2 keeps a
/// buffer of 8 KiB per connection of which it hardly ever uses the second half; with another size here, the allocator never
/// gives it one that was used up by us, all of which is resident.
const SMALLEST: usize = 6 * 1024;
/// How much larger than what was last needed a buffer may stay.
const GENEROSITY: usize = 8;
/// So many times in a row must less have been needed before a large buffer is given back: a busy connection is not to
/// allocate for every lull.
const LULLS: u8 = 2;

/// When to give back a buffer that is empty.
#[derive(Default)]
struct Ebb {
    /// Bytes that went through the buffer since it was last empty and nothing more to do.
    used: usize,
    lulls: u8,
}

impl Ebb {
    fn used(&mut self, bytes: usize) {
        self.used += bytes;
    }

    /// Whether to give back a buffer of this size, which is empty.
    fn is_over(&mut self, size: usize) -> bool {
        let used = std::mem::take(&mut self.used);
        if size <= SMALLEST {
            return true;
        }
        if used >= size / GENEROSITY {
            self.lulls = 0;
            return false;
        }
        self.lulls += 1;
        if self.lulls < LULLS {
            return false;
        }
        self.lulls = 0;
        true
    }
}

/// Ciphertext that was received and not yet decrypted.
#[derive(Default)]
pub(super) struct Input {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// The last read left no room: there may be more than the buffer takes.
    was_filled: bool,
    ebb: Ebb,
}

impl Input {
    pub(super) fn waiting(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.end]
    }

    pub(super) fn discard(&mut self, length: usize) {
        self.start = (self.start + length).min(self.end);
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
    }

    pub(super) fn memory(&self) -> usize {
        self.bytes.capacity()
    }

    /// Reads once. All complete records must have been taken out before. Zero is the end.
    pub(super) fn poll_fill<R: AsyncRead + Unpin>(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut R,
    ) -> Poll<io::Result<usize>> {
        if self.start > 0 {
            // The beginning of a record; at most 16 KiB.
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.bytes.is_empty() {
            self.bytes.resize(SMALLEST, 0);
        } else if (self.was_filled || self.end == self.bytes.len())
            && self.bytes.len() < LARGEST_INPUT
        {
            let larger = self.bytes.len() * 4;
            self.bytes.resize(larger.min(LARGEST_INPUT), 0);
        }
        if self.end == self.bytes.len() {
            // rustls refuses records and handshake messages long before they are this large.
            let text = "a TLS message larger than any that is allowed";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        let mut room = ReadBuf::new(&mut self.bytes[self.end..]);
        match Pin::new(from).poll_read(cx, &mut room) {
            Poll::Ready(Ok(())) => {
                let length = room.filled().len();
                self.was_filled = room.remaining() == 0;
                self.end += length;
                self.ebb.used(length);
                Poll::Ready(Ok(length))
            }
            Poll::Ready(Err(error)) => Poll::Ready(Err(error)),
            Poll::Pending => {
                self.was_filled = false;
                if self.end == 0 && self.ebb.is_over(self.bytes.len()) {
                    self.bytes = Vec::new();
                }
                Poll::Pending
            }
        }
    }
}

/// Ciphertext that waits to be written.
#[derive(Default)]
pub(super) struct Output {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    ebb: Ebb,
}

impl Output {
    pub(super) fn waiting(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub(super) fn memory(&self) -> usize {
        self.bytes.capacity()
    }

    /// `length` bytes, or more, at the end, to be written to. [`filled`](Self::filled) makes them count.
    pub(super) fn room(&mut self, length: usize) -> &mut [u8] {
        if self.bytes.len() - self.end < length {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            let needed = self.end + length;
            if self.bytes.len() < needed {
                let size = needed.next_multiple_of(SMALLEST);
                if self.end == 0 {
                    // Nothing to move: zeroed memory is cheaper to get than to make.
                    self.bytes = vec![0; size];
                } else {
                    self.bytes.resize(size, 0);
                }
            }
        }
        &mut self.bytes[self.end..]
    }

    pub(super) fn filled(&mut self, length: usize) {
        self.end += length;
        self.ebb.used(length);
    }

    /// Takes what was written from the front.
    pub(super) fn advance(&mut self, length: usize) {
        self.start += length;
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            if self.ebb.is_over(self.bytes.len()) {
                self.bytes = Vec::new();
            }
        }
    }
}
