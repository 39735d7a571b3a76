//! Bytes both ways between two TCP connections without copying them into the process.
//!
//! Half-close and reset are carried through as the proxy's own relay does: FIN becomes FIN in each direction by itself;
//! an error on one side resets both.

use std::future::{Future, poll_fn};
use std::io;
use std::net::Shutdown;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use nix::fcntl::SpliceFFlags;
use shared_proxy::relay::Leg;
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;

use crate::pipe::{CAPACITY, Pipe, Pipes};

/// Relays until both directions have ended. When this fails, or is dropped, both connections are reset.
///
/// # Errors
/// The first error of either connection.
pub async fn between(client: Leg, application: Leg, pipes: &Pipes) -> io::Result<()> {
    let mut forth = Direction::new(client.stream(), application.stream());
    let mut back = Direction::new(application.stream(), client.stream());
    poll_fn(|cx| {
        let over = [forth.poll(cx, pipes)?, back.poll(cx, pipes)?];
        if over.iter().all(Poll::is_ready) {
            return Poll::Ready(io::Result::Ok(()));
        }
        forth.poll_watch(cx)?;
        back.poll_watch(cx)?;
        Poll::Pending
    })
    .await?;
    drop((forth, back));
    client.finish();
    application.finish();
    Ok(())
}

/// One direction of a connection. A pipe that is dropped with it is closed, and not used again with bytes in it.
struct Direction<'a> {
    from: &'a TcpStream,
    to: &'a TcpStream,
    /// Held while there are bytes in it.
    pipe: Option<Pipe>,
    /// How many.
    held: usize,
    /// After the end of this direction: ready when `from` is reset, which nothing else would show until the next write.
    watch: Option<Pin<Box<dyn Future<Output = io::Error> + Send + 'a>>>,
}

impl<'a> Direction<'a> {
    fn new(from: &'a TcpStream, to: &'a TcpStream) -> Self {
        Self {
            from,
            to,
            pipe: None,
            held: 0,
            watch: None,
        }
    }

    /// Moves what can be moved. Ready when the sender has closed this direction and everything has been passed on. The
    /// pipe is filled only when it is empty: with bytes in it, "would block" could mean a full pipe or an empty socket.
    ///
    /// Tokio's readiness has a budget per poll, so that one busy connection cannot keep the others waiting.
    fn poll(&mut self, cx: &mut Context<'_>, pipes: &Pipes) -> Poll<io::Result<()>> {
        if self.watch.is_some() {
            return Poll::Ready(Ok(()));
        }
        loop {
            while self.held > 0 {
                ready!(self.poll_empty(cx))?;
            }
            let filled = self.poll_fill(cx, pipes);
            if self.held == 0
                && let Some(pipe) = self.pipe.take()
            {
                pipes.give_back(pipe);
            }
            if ready!(filled)? == 0 {
                SockRef::from(self.to).shutdown(Shutdown::Write)?;
                self.watch = Some(Box::pin(broken(self.from)));
                return Poll::Ready(Ok(()));
            }
        }
    }

    /// From the socket into the pipe. Ready with zero at the sender's end.
    fn poll_fill(&mut self, cx: &mut Context<'_>, pipes: &Pipes) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.from.poll_read_ready(cx))?;
            let pipe = match &mut self.pipe {
                Some(pipe) => pipe,
                none => none.insert(pipes.take()?),
            };
            let mut moved = 0;
            let done = self.from.try_io(Interest::READABLE, || {
                moved = splice(self.from, &pipe.write, CAPACITY)?;
                // Fewer bytes than slots cannot have filled the pipe, so the socket is empty: asking it again to hear
                // that would be a third system call for each small message. The end is news of its own.
                if (1..pipe.slots).contains(&moved) {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Ok(())
            });
            self.held = moved;
            match done {
                Ok(()) => return Poll::Ready(Ok(moved)),
                Err(_) if moved > 0 => return Poll::Ready(Ok(moved)),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }

    /// From the pipe into the socket, once.
    fn poll_empty(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.to.poll_write_ready(cx))?;
        let Some(pipe) = &self.pipe else {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        };
        let held = &mut self.held;
        let done = self.to.try_io(Interest::WRITABLE, || {
            // Not more than there is, or the kernel would hold back a last short segment for what might come.
            *held -= splice(&pipe.read, self.to, *held)?;
            // The socket took less than it was offered, so it is full.
            if *held > 0 {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Ok(())
        });
        match done {
            Err(error) if !is_transient(&error) => Poll::Ready(Err(error)),
            _ => Poll::Ready(Ok(())),
        }
    }

    fn poll_watch(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        match &mut self.watch {
            Some(watch) => match watch.as_mut().poll(cx) {
                Poll::Ready(error) => Err(error),
                Poll::Pending => Ok(()),
            },
            None => Ok(()),
        }
    }
}

fn splice(
    from: impl std::os::fd::AsFd,
    to: impl std::os::fd::AsFd,
    most: usize,
) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(nix::fcntl::splice(from, None, to, None, most, flags)?)
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

/// Waits until a connection is reset.
async fn broken(stream: &TcpStream) -> io::Error {
    let error = match stream.ready(Interest::ERROR).await {
        Ok(_) => stream.take_error(),
        Err(error) => Err(error),
    };
    match error {
        Ok(error) => error.unwrap_or_else(|| io::ErrorKind::ConnectionReset.into()),
        Err(error) => error,
    }
}

#[cfg(test)]
mod tests;
