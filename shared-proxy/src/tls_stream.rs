//! TLS over any byte stream, for few system calls and few copies.
//!
//! Ciphertext is read up to [`LARGEST_INPUT`] bytes at a time, however small the records in it are, and decrypted where it
//! lies. What is written is encrypted from the caller's slices into one buffer and leaves in one `write`. Both buffers
//! grow with the traffic and are given back when it ebbs: a connection at rest holds neither. The protocol and all
//! cryptography are rustls', through its unbuffered interface, which costs one copy more each way than would have to be
//! (it hands out plaintext, and takes in ciphertext, through vectors of its own); here is only what lies between that and
//! a socket.

mod buffers;
mod session;
#[cfg(test)]
mod tests;

use std::fmt;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ServerConfig};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use buffers::{Input, Output};
use session::{Event, Session, Want};

/// Most ciphertext that one read takes, in bytes. Reading 128 KiB costs a third less per byte than reading record by
/// record (16 KiB); twice as much gained nothing more and leaves less of the cache to the rest.
pub const LARGEST_INPUT: usize = 128 * 1024;
/// Most plaintext that waits, encrypted, to be written, in bytes: half a large DATA frame of HTTP/2 and its head. Twice as
/// much halves the writes but gained no CPU, and it would be memory.
pub const LARGEST_OUTPUT: usize = 128 * 1024 + RECORD;
/// Plaintext that one turn of the event loop may take, in bytes. A busy connection ends its turn then, and the tasks that
/// it has fed move the bytes on while they are in the cache: a tenth less CPU per byte than to decrypt all that there is,
/// a window of 1 MiB.
pub const TURN: usize = 256 * 1024;
/// Most plaintext in one TLS record, in bytes (RFC 8446, 5.1).
const RECORD: usize = 16 * 1024;
/// A flush of less than this may wait for what else is written in the same turn of the event loop, in bytes.
const WORTH_A_WRITE: usize = 64 * 1024;

/// A TLS connection over `T`, whose handshake is done.
///
/// Reads end with `UnexpectedEof` if the peer's bytes end without a close_notify: somebody may have cut them off. An error
/// of the protocol is an `InvalidData` with the [`rustls::Error`] inside; the peer has been told by an alert then.
pub struct TlsStream<T> {
    io: T,
    session: Session,
    input: Input,
    output: Output,
    /// Plaintext of a record that did not fit into the caller's buffer.
    surplus: Surplus,
    /// The end of the peer's bytes, once it is known.
    ended: Option<End>,
    close_notify_sent: bool,
    /// The last write was several slices, whose flush is hardly ever the turn's last.
    flush_may_wait: bool,
    /// Plaintext taken in this turn of the event loop.
    taken: usize,
}

#[derive(Debug)]
enum End {
    CloseNotify,
    Truncated,
    Failed(rustls::Error),
}

#[derive(Default)]
struct Surplus {
    bytes: Vec<u8>,
    taken: usize,
}

impl Surplus {
    /// Moves what fits. False if there was nothing.
    fn give(&mut self, to: &mut ReadBuf<'_>) -> bool {
        let rest = &self.bytes[self.taken..];
        if rest.is_empty() {
            return false;
        }
        let length = rest.len().min(to.remaining());
        to.put_slice(&rest[..length]);
        self.taken += length;
        if self.taken == self.bytes.len() {
            *self = Self::default();
        }
        true
    }
}

impl<T> fmt::Debug for TlsStream<T> {
    /// Without the bytes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsStream")
            .field("ended", &self.ended)
            .field("buffer_memory", &self.buffer_memory())
            .finish_non_exhaustive()
    }
}

impl<T> TlsStream<T> {
    /// The peer's certificates, leaf first; `None` if it has proved nothing.
    pub fn peer_certificates(&self) -> Option<&[CertificateDer<'static>]> {
        self.session.peer_certificates()
    }

    /// The application protocol that both have agreed on.
    pub fn alpn_protocol(&self) -> Option<&[u8]> {
        self.session.alpn_protocol()
    }

    /// Bytes of memory that the connection's buffers hold. None while it rests.
    pub fn buffer_memory(&self) -> usize {
        self.input.memory() + self.output.memory() + self.surplus.bytes.capacity()
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> TlsStream<T> {
    /// Makes the handshake of a client. Its last flight is sent along with what is written or read first.
    ///
    /// # Errors
    /// I/O errors of `io`; `UnexpectedEof` if it ends meanwhile; `InvalidData` with the [`rustls::Error`] that the
    /// handshake failed with.
    pub async fn connect(
        io: T,
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> io::Result<Self> {
        let session = Session::client(config, name).map_err(invalid)?;
        Self::over(io, session).handshake().await
    }

    /// Makes the handshake of a server.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub async fn accept(io: T, config: Arc<ServerConfig>) -> io::Result<Self> {
        let session = Session::server(config).map_err(invalid)?;
        Self::over(io, session).handshake().await
    }

    fn over(io: T, session: Session) -> Self {
        Self {
            io,
            session,
            input: Input::default(),
            output: Output::default(),
            surplus: Surplus::default(),
            ended: None,
            close_notify_sent: false,
            flush_may_wait: false,
            taken: 0,
        }
    }

    async fn handshake(mut self) -> io::Result<Self> {
        poll_fn(|cx| self.poll_handshake(cx)).await?;
        Ok(self)
    }

    fn poll_handshake(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            let surplus = &mut self.surplus.bytes;
            let mut keep = |plaintext: &[u8]| surplus.extend_from_slice(plaintext);
            let want = &mut Want::Plaintext(&mut keep);
            match self.session.step(&mut self.input, &mut self.output, want) {
                Err(error) => return Poll::Ready(Err(self.fail(cx, error))),
                Ok(Event::Exhausted) => {}
                Ok(Event::PeerClosed) => {
                    self.ended = Some(End::CloseNotify);
                    continue;
                }
                Ok(_) => continue,
            }
            if !self.session.is_handshaking() {
                return Poll::Ready(Ok(()));
            }
            ready!(self.poll_drain(cx))?;
            if ready!(self.input.poll_fill(cx, &mut self.io))? == 0 {
                let text = "the peer closed the connection during the TLS handshake";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::UnexpectedEof, text)));
            }
        }
    }

    /// Ends the connection for an error of the protocol: tells the peer, if it is to be told and the socket takes it.
    fn fail(&mut self, cx: &mut Context<'_>, error: rustls::Error) -> io::Error {
        self.session.encode_alert(&mut self.input, &mut self.output);
        // The first error counts, whether or not the peer hears of it.
        let _ = self.poll_drain(cx);
        self.ended = Some(End::Failed(error.clone()));
        invalid(error)
    }

    /// Writes everything that waits.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.waiting().is_empty() {
            let waiting = self.output.waiting();
            let written = ready!(Pin::new(&mut self.io).poll_write(cx, waiting))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.output.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Decrypts into `buf` what has been received, until one of them is used up.
    fn decrypt(&mut self, buf: &mut ReadBuf<'_>) -> Result<(), rustls::Error> {
        while buf.remaining() > 0 && self.ended.is_none() {
            let surplus = &mut self.surplus.bytes;
            let mut give = |plaintext: &[u8]| {
                let (now, later) = plaintext.split_at(plaintext.len().min(buf.remaining()));
                buf.put_slice(now);
                surplus.extend_from_slice(later);
            };
            let want = &mut Want::Plaintext(&mut give);
            match self.session.step(&mut self.input, &mut self.output, want)? {
                Event::PeerClosed => self.ended = Some(End::CloseNotify),
                Event::Exhausted => break,
                _ => {}
            }
        }
        Ok(())
    }

    /// Puts into the output what is to be sent.
    fn send(&mut self, mut want: Want<'_>) -> io::Result<()> {
        loop {
            let step = self
                .session
                .step(&mut self.input, &mut self.output, &mut want);
            match step.map_err(invalid)? {
                Event::Sent => return Ok(()),
                Event::PeerClosed => self.ended = Some(End::CloseNotify),
                Event::Exhausted | Event::Progress | Event::Plaintext => {}
            }
        }
    }

    fn poll_write_slices(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let total: usize = slices.iter().map(|slice| slice.len()).sum();
        if total == 0 {
            return Poll::Ready(Ok(0));
        }
        if self.close_notify_sent || matches!(self.ended, Some(End::Failed(_))) {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        if self.output.waiting().len() + total > LARGEST_OUTPUT {
            ready!(self.poll_drain(cx))?;
        }
        let length = total.min(LARGEST_OUTPUT);
        self.send(Want::Encrypt(slices, length))?;
        self.flush_may_wait = slices.len() > 1 && length == total;
        Poll::Ready(Ok(length))
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.output.waiting().is_empty() {
            // A failed write shows again at the next one; what the peer said before it went is of more use here.
            let _ = this.poll_drain(cx);
        }
        if buf.remaining() == 0 || this.surplus.give(buf) {
            return Poll::Ready(Ok(()));
        }
        if this.taken >= TURN {
            this.taken = 0;
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buf.filled().len();
        loop {
            let failure = this.decrypt(buf).err();
            let failure = failure.map(|error| this.fail(cx, error));
            let length = buf.filled().len() - before;
            if length > 0 {
                this.taken += length;
                return Poll::Ready(Ok(()));
            }
            if let Some(error) = failure {
                return Poll::Ready(Err(error));
            }
            match &this.ended {
                Some(End::CloseNotify) => return Poll::Ready(Ok(())),
                Some(End::Failed(error)) => return Poll::Ready(Err(invalid(error.clone()))),
                Some(End::Truncated) => {
                    let text = "the peer closed the connection without a TLS close_notify";
                    let error = io::Error::new(io::ErrorKind::UnexpectedEof, text);
                    return Poll::Ready(Err(error));
                }
                None => {}
            }
            match this.input.poll_fill(cx, &mut this.io)? {
                Poll::Ready(0) => this.ended = Some(End::Truncated),
                Poll::Ready(_) => {}
                Poll::Pending => {
                    this.taken = 0;
                    return Poll::Pending;
                }
            }
        }
    }
}

impl<T: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<T> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write_slices(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// HTTP/2 flushes after every DATA frame that it does not copy (head and payload, two slices), and once more when it
    /// has none left. The former waits for the latter, so that the frames of all streams leave together. Should the
    /// latter not come, the task is woken to make up for it.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.flush_may_wait && self.output.waiting().len() < WORTH_A_WRITE {
            self.flush_may_wait = false;
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if !this.close_notify_sent && !matches!(this.ended, Some(End::Failed(_))) {
            this.send(Want::Close)?;
        }
        this.close_notify_sent = true;
        ready!(this.poll_drain(cx))?;
        match ready!(Pin::new(&mut this.io).poll_shutdown(cx)) {
            // The peer was faster; there is nothing left to shut down.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            result => Poll::Ready(result),
        }
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
