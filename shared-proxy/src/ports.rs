//! Source ports of sockets that speak with somebody else's address.
//!
//! The kernel picks ephemeral ports per network namespace. Two captures of one pod, and the pod itself, would pick ports
//! for the same (source address, destination) without knowing of each other, and a SYN with a tuple that is in use
//! elsewhere kills the connection that uses it. So every kind of speaker owns a range, and binds inside it explicitly.

use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU32, Ordering};

use socket2::{SockAddr, Socket};

/// Range of the node capture. Disjoint from [`INPOD`] and from the usual `ip_local_port_range` (32768-60999).
pub const NODE: RangeInclusive<u16> = 10_000..=20_999;
/// Range of the in-pod capture.
pub const INPOD: RangeInclusive<u16> = 21_000..=31_999;
/// Never used as a source port: the proxies' own listeners live here, and rule sets match these numbers.
pub const LEFT_OUT: RangeInclusive<u16> = 15_000..=15_099;

/// Number of counters. Pairs of source and destination are spread over them by hash; two pairs that share one only move
/// each other's next port, so the number decides about nothing but how soon a port comes round again.
const COUNTERS: usize = 4096;
/// How many ports one bind tries. `EADDRINUSE` is rare, because every socket here sets `SO_REUSEADDR`; a range in which
/// this many ports in a row are taken by others is misconfigured.
const TRIES: u32 = 1024;

/// Hands out source ports of one range, the next one per (source, destination) at each call, so that a port is reused as
/// late as possible.
#[derive(Debug)]
pub struct SourcePorts {
    first: u16,
    /// How many ports of the range may be used.
    usable: u32,
    hasher: RandomState,
    counters: Box<[AtomicU32]>,
}

impl SourcePorts {
    /// Ports of `range`, except [`LEFT_OUT`].
    pub fn new(range: RangeInclusive<u16>) -> Self {
        let usable = range
            .clone()
            .filter(|port| !LEFT_OUT.contains(port))
            .count();
        Self {
            first: *range.start(),
            usable: u32::try_from(usable).unwrap_or(0),
            hasher: RandomState::new(),
            counters: (0..COUNTERS).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// Binds `socket` to `source` and a port of the range, and returns the port. Sets `SO_REUSEADDR`, without which
    /// `TIME_WAIT` would limit a client to some hundred connections a second.
    ///
    /// A port that is free to bind may still be in use towards `destination`: then connecting fails with
    /// `EADDRNOTAVAIL`, and the caller binds another socket, which gets the next port.
    ///
    /// # Errors
    /// `EADDRINUSE` when no port can be had; any other error of `bind` at once (`EADDRNOTAVAIL` here means that
    /// `source` is not local and the socket not transparent).
    pub fn bind(
        &self,
        socket: &Socket,
        source: IpAddr,
        destination: SocketAddr,
    ) -> io::Result<u16> {
        socket.set_reuse_address(true)?;
        let hash = self.hasher.hash_one((source, destination));
        // Both halves of the hash are used: the low one chooses the counter, the high one where this pair starts, which
        // differs in each process, so that a restarted proxy does not walk over its predecessor's ports.
        let offset = (hash >> 32) as u32;
        let counter = &self.counters[hash as usize % COUNTERS];
        for _ in 0..TRIES.min(self.usable) {
            let count = counter.fetch_add(1, Ordering::Relaxed);
            let port = self.port(offset.wrapping_add(count));
            match socket.bind(&SockAddr::from(SocketAddr::new(source, port))) {
                Ok(()) => return Ok(port),
                Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            format!(
                "no free source port for {source} from {} on ({} usable)",
                self.first, self.usable
            ),
        ))
    }

    /// The port that belongs to a count: counts run round the usable ports.
    fn port(&self, count: u32) -> u16 {
        let index = (count % self.usable.max(1)) as u16;
        let port = self.first.saturating_add(index);
        let below = LEFT_OUT.start().saturating_sub(self.first);
        if self.first <= *LEFT_OUT.end() && index >= below {
            let skipped = LEFT_OUT.end() - (*LEFT_OUT.start()).max(self.first) + 1;
            port.saturating_add(skipped)
        } else {
            port
        }
    }
}

#[cfg(test)]
mod tests;
