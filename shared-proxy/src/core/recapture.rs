//! Connections of the proxy's own that come back to it, because their pod is captured on the node and in its namespace at
//! the same time. Served, they would be opened again, perhaps for ever: they are refused, and counted.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{Attachment, Failure};
use crate::capture::{Captured, Role};
use crate::telemetry::Direction;

/// What was opened comes back at once if it does; longer than any queue.
const REMEMBERED_FOR: Duration = Duration::from_secs(5);

/// A connection that was opened: for which end, from where and to where.
type Opened = (Direction, SocketAddr, SocketAddr);

/// A socket of this process, known without holding it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Own {
    fd: RawFd,
    inode: u64,
}

impl Own {
    /// The socket, and another descriptor of it to ask it by.
    pub(super) fn of(socket: impl AsFd) -> io::Result<(Self, File)> {
        let fd = socket.as_fd();
        let same = File::from(fd.try_clone_to_owned()?);
        let own = Self {
            fd: fd.as_raw_fd(),
            inode: same.metadata()?.ino(),
        };
        Ok((own, same))
    }

    /// Whether it is open. Once it is closed, anybody in its namespace may have its port.
    fn is_open(self) -> bool {
        let link = fs::read_link(format!("/proc/self/fd/{}", self.fd));
        link.is_ok_and(|name| name.as_os_str() == format!("socket:[{}]", self.inode).as_str())
    }
}

/// The connections that were opened lately.
#[derive(Debug, Default)]
pub(crate) struct OwnConnections {
    lately: Mutex<Lately>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Lately {
    all: HashMap<Opened, (Instant, Own)>,
    order: VecDeque<(Instant, Opened)>,
}

impl Lately {
    fn forget(&mut self, before: Option<Instant>) {
        while let Some((at, opened)) = self.order.front().copied() {
            if before.is_none_or(|before| at >= before) {
                return;
            }
            self.order.pop_front();
            if self
                .all
                .get(&opened)
                .is_some_and(|(latest, _)| *latest == at)
            {
                self.all.remove(&opened);
            }
        }
    }
}

impl OwnConnections {
    fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called when a socket connects, before what it leads to can have been looked at.
    pub(super) fn opens(&self, direction: Direction, from: SocketAddr, to: SocketAddr, own: Own) {
        let now = Instant::now();
        let opened = (direction, from, to);
        let mut lately = self.lately();
        lately.forget(now.checked_sub(REMEMBERED_FOR));
        lately.all.insert(opened, (now, own));
        lately.order.push_back((now, opened));
    }

    fn contains(&self, opened: &Opened) -> bool {
        let own = self.lately().all.get(opened).map(|(_, own)| *own);
        own.is_some_and(Own::is_open)
    }

    /// How many came back.
    pub(super) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }
}

impl Attachment {
    /// Refuses a connection that this proxy itself has opened for the same end of it; hands others back. One that was opened
    /// in a client's name may arrive at its server's end, if both are pods of this node: that is another end of it.
    pub(super) fn unless_own(&self, role: Role, captured: Captured) -> Option<Captured> {
        let direction = match role {
            Role::Outbound => Direction::Outbound,
            Role::InboundPlaintext => Direction::Inbound,
            _ => return Some(captured),
        };
        let own = &self.core.own_connections;
        let Some(to) = captured.dst.as_ref().ok().copied() else {
            return Some(captured);
        };
        if !own.contains(&(direction, captured.client.0, to.0)) {
            return Some(captured);
        }
        own.refused.fetch_add(1, Ordering::Relaxed);
        let reason = Failure::CapturedTwice.describe();
        self.core.telemetry.refused(
            direction,
            self.scope.id().capture_mode,
            captured.client,
            Some(to),
            &reason,
        );
        // Whoever waits for it learns at once; without this it ends in order, which is all the same.
        let _ = SockRef::from(&captured.stream).set_linger(Some(Duration::ZERO));
        None
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn what_is_open_is_remembered_for_a_time() {
        let own = OwnConnections::default();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let (from, to) = (
            "10.0.0.1:21000".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
        );
        let opened = (Direction::Outbound, from, to);
        for _ in 0..2 {
            own.opens(opened.0, from, to, Own::of(&socket).unwrap().0);
        }
        assert!(own.contains(&opened));
        assert!(!own.contains(&(Direction::Inbound, from, to)));
        own.lately().forget(Some(Instant::now() + REMEMBERED_FOR));
        assert!(!own.contains(&opened));
        assert!(own.lately().order.is_empty());
    }

    /// An application may choose the port that the proxy has let go.
    #[test]
    fn what_was_closed_is_no_own_connection() {
        let own = OwnConnections::default();
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = "10.0.0.1:21000".parse().unwrap();
        let (known, same) = Own::of(&socket).unwrap();
        drop(same);
        own.opens(Direction::Outbound, address, address, known);
        assert!(own.contains(&(Direction::Outbound, address, address)));
        drop(socket);
        // Another socket may get its number.
        let _other = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        assert!(!own.contains(&(Direction::Outbound, address, address)));
    }
}
