//! TCP connections that are open in a namespace, with the marks of their sockets.

use std::io;
use std::net::SocketAddr;

use super::{address, ask, open};
use crate::netns::Netns;

/// `TCP_ESTABLISHED`, `TCP_FIN_WAIT1`, `TCP_FIN_WAIT2`, `TCP_CLOSE_WAIT`, `TCP_LAST_ACK` and `TCP_CLOSING` as bits: both
/// ends know of the connection, and one of them may still have something to say.
const OPEN: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 8 | 1 << 9 | 1 << 11;
/// Length of an `inet_diag_msg`; attributes follow.
const MESSAGE: usize = 72;
const ATTRIBUTE_HEADER: usize = 4;
/// `INET_DIAG_MARK`: told to whoever has CAP_NET_ADMIN.
const MARK: u16 = 15;

/// One end of an open TCP connection. IPv4 in an IPv6 socket is shown as IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Connection {
    /// Address of this end.
    pub local: SocketAddr,
    /// Address of the other end.
    pub peer: SocketAddr,
    /// Mark of the socket (`SO_MARK`).
    pub mark: u32,
}

/// The TCP connections that are open in a namespace at this moment.
///
/// # Errors
/// The namespace cannot be entered, or the kernel does not answer.
pub fn connections(netns: &Netns) -> io::Result<Vec<Connection>> {
    let socket = open(netns)?;
    let mut found = Vec::new();
    ask(&socket, OPEN, &mut |message| found.extend(parse(message)))?;
    Ok(found)
}

/// An `inet_diag_msg`: ports at 4 and 6, addresses at 8 and 24, attributes behind it.
pub(super) fn parse(message: &[u8]) -> Option<Connection> {
    let canonical = |at: SocketAddr| SocketAddr::new(at.ip().to_canonical(), at.port());
    Some(Connection {
        local: canonical(address(message, 4, 8)?),
        peer: canonical(address(message, 6, 24)?),
        mark: mark(message.get(MESSAGE..)?).unwrap_or_default(),
    })
}

fn mark(mut attributes: &[u8]) -> Option<u32> {
    loop {
        let header: &[u8; ATTRIBUTE_HEADER] = attributes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = attributes.get(ATTRIBUTE_HEADER..length)?;
        if kind == MARK {
            return value.first_chunk().copied().map(u32::from_ne_bytes);
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]
    use std::net::{TcpListener, TcpStream};

    use nix::sys::socket::{setsockopt, sockopt};

    use super::*;

    #[test]
    fn both_ends_of_a_connection_are_seen_with_their_marks() {
        let listener = TcpListener::bind("[::]:0").unwrap();
        let to = SocketAddr::from(([127, 0, 0, 1], listener.local_addr().unwrap().port()));
        let client = TcpStream::connect(to).unwrap();
        let (server, _) = listener.accept().unwrap();
        setsockopt(&server, sockopt::Mark, &0x539).unwrap();
        let from = client.local_addr().unwrap();
        let here = Netns::current().unwrap();
        let found = connections(&here).unwrap();
        for (local, peer, mark) in [(from, to, 0), (to, from, 0x539)] {
            let end = Connection { local, peer, mark };
            assert!(found.contains(&end), "{end:?}: {found:?}");
        }
        let elsewhere = Netns::create_unnamed().unwrap();
        assert_eq!(connections(&elsewhere).unwrap(), []);
        drop((client, server));
        let left = connections(&here).unwrap();
        assert!(!left.iter().any(|end| end.local == from));
    }
}
