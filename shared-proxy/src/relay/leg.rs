//! A TCP connection that ends in a reset unless it is said to have ended well.

use std::time::Duration;

use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::net::tcp::{ReadHalf, WriteHalf};

/// One TCP connection of a relay. Dropping it resets the connection, so that a cut, a panic or an early return cannot
/// look like an orderly end to the other side; [`Leg::finish`] closes it in order.
#[derive(Debug)]
pub struct Leg {
    stream: TcpStream,
    finished: bool,
}

impl Leg {
    /// Takes charge of a connection.
    pub fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            finished: false,
        }
    }

    /// The connection.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }

    /// Both halves.
    pub fn split(&mut self) -> (ReadHalf<'_>, WriteHalf<'_>) {
        self.stream.split()
    }

    /// Closes the connection with FIN.
    pub fn finish(mut self) {
        self.finished = true;
    }
}

impl Drop for Leg {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing can be done about an error here: the connection is closed anyway, with FIN at worst.
            let _ = SockRef::from(&self.stream).set_linger(Some(Duration::ZERO));
        }
    }
}
