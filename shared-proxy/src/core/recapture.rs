//! Connections of the proxy's own that come back to it, because their pod is captured on the node and in its namespace at
//! the same time. Served, they would be opened again, perhaps for ever: they are refused, and counted.

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use socket2::SockRef;

use super::{Attachment, Failure};
use crate::capture::{Captured, Role};
use crate::telemetry::Direction;

/// What was opened comes back at once if it does; longer than any queue, and shorter than it takes the proxy to choose a
/// port again.
const REMEMBERED_FOR: Duration = Duration::from_secs(5);

/// A connection that was opened: for which end, from where and to where.
type Opened = (Direction, SocketAddr, SocketAddr);

/// The connections that were opened lately.
#[derive(Debug, Default)]
pub(crate) struct OwnConnections {
    lately: Mutex<Lately>,
    refused: AtomicU64,
}

#[derive(Debug, Default)]
struct Lately {
    all: HashSet<Opened>,
    order: VecDeque<(Instant, Opened)>,
}

impl Lately {
    fn forget(&mut self, before: Option<Instant>) {
        while let Some((at, opened)) = self.order.front().copied() {
            if before.is_none_or(|before| at >= before) {
                return;
            }
            self.order.pop_front();
            self.all.remove(&opened);
        }
    }
}

impl OwnConnections {
    fn lately(&self) -> MutexGuard<'_, Lately> {
        self.lately.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// To be called before a connection is opened.
    pub(super) fn opens(&self, direction: Direction, from: SocketAddr, to: SocketAddr) {
        let now = Instant::now();
        let mut lately = self.lately();
        lately.forget(now.checked_sub(REMEMBERED_FOR));
        let opened = (direction, from, to);
        if lately.all.insert(opened) {
            lately.order.push_back((now, opened));
        }
    }

    fn contains(&self, opened: &Opened) -> bool {
        self.lately().all.contains(opened)
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
    fn what_was_opened_is_remembered_for_a_time() {
        let own = OwnConnections::default();
        let (from, to) = (
            "10.0.0.1:21000".parse().unwrap(),
            "10.0.0.2:80".parse().unwrap(),
        );
        let opened = (Direction::Outbound, from, to);
        own.opens(opened.0, from, to);
        own.opens(opened.0, from, to);
        assert!(own.contains(&opened));
        assert!(!own.contains(&(Direction::Inbound, from, to)));
        own.lately().forget(Some(Instant::now() + REMEMBERED_FOR));
        assert!(!own.contains(&opened));
        assert!(own.lately().order.is_empty());
    }
}
