//! Which TCP ports are listened on in a namespace, and which connections are open there, asked over `NETLINK_SOCK_DIAG`.
//!
//! `/proc/net/tcp` would tell, too, after a walk through the table of all connections of the machine. A question is an
//! `nlmsghdr` and an `inet_diag_req_v2`, each answer an `inet_diag_msg` (linux/inet_diag.h); numbers are in host byte
//! order, ports and addresses in network byte order.

mod connections;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};

use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr as NetlinkAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::netns::Netns;

pub use connections::{Connection, connections};

/// `SOCK_DIAG_BY_FAMILY`.
const BY_FAMILY: u16 = 20;
/// `NLM_F_REQUEST | NLM_F_DUMP`.
const DUMP: u16 = 0x301;
const KIND_ERROR: u16 = 2;
const KIND_DONE: u16 = 3;
const HEADER: usize = 16;
/// `TCP_LISTEN`, as the bit of a state.
const LISTENING: u32 = 1 << 10;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
/// Size of an `inet_diag_msg`; attributes follow it.
const MESSAGE: usize = 72;
/// `INET_DIAG_SKV6ONLY`, which every listener of IPv6 has.
const ONLY_IPV6: u16 = 11;
const BUFFER: usize = 64 << 10;
const ANSWER_WITHIN_S: i64 = 5;

/// Asks about one namespace, for as long as it is held; a question costs two system calls per family.
pub struct Listeners {
    socket: Mutex<Socket>,
}

impl std::fmt::Debug for Listeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Listeners").finish_non_exhaustive()
    }
}

impl Listeners {
    /// Of a namespace.
    pub fn of(netns: &Netns) -> io::Result<Self> {
        Ok(Self {
            socket: Mutex::new(open(netns)?),
        })
    }

    /// The addresses that are listened on at this moment. A socket of IPv6 that takes connections of IPv4 too listens on
    /// both wildcard addresses.
    pub fn now(&self) -> io::Result<BTreeSet<SocketAddr>> {
        let socket = self.socket.lock().unwrap_or_else(PoisonError::into_inner);
        let mut found = BTreeSet::new();
        ask(&socket, LISTENING, &mut |message| {
            found.extend(local_address(message));
            found.extend(also_by_ipv4(message));
        })?;
        Ok(found)
    }
}

/// A socket for questions about one namespace.
fn open(netns: &Netns) -> io::Result<Socket> {
    let socket = netns.run(|| Socket::new(NETLINK_SOCK_DIAG))??;
    setsockopt(
        &socket,
        sockopt::ReceiveTimeout,
        &TimeVal::seconds(ANSWER_WITHIN_S),
    )?;
    Ok(socket)
}

/// Hands every TCP socket in one of these states to `found`, as an `inet_diag_msg` with what follows it.
fn ask(socket: &Socket, states: u32, found: &mut dyn FnMut(&[u8])) -> io::Result<()> {
    for family in [AF_INET, AF_INET6] {
        match ask_about(socket, family, states, found) {
            // A kernel without IPv6.
            Err(error) if family == AF_INET6 && error.kind() == io::ErrorKind::NotFound => {}
            asked => asked?,
        }
    }
    Ok(())
}

fn ask_about(
    socket: &Socket,
    family: u8,
    states: u32,
    found: &mut dyn FnMut(&[u8]),
) -> io::Result<()> {
    socket.send_to(&question(family, states), &NetlinkAddr::new(0, 0), 0)?;
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        match socket.recv(&mut buffer, 0) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        }
        if collect(&buffer, found)? {
            return Ok(());
        }
    }
}

fn question(family: u8, states: u32) -> Vec<u8> {
    let body = 56;
    let mut bytes = Vec::with_capacity(HEADER + body);
    bytes.extend(
        u32::try_from(HEADER + body)
            .unwrap_or_default()
            .to_ne_bytes(),
    );
    bytes.extend(BY_FAMILY.to_ne_bytes());
    bytes.extend(DUMP.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_TCP, 0, 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.resize(HEADER + body, 0);
    bytes
}

/// Takes the sockets out of one datagram; true when the answer is complete.
fn collect(datagram: &[u8], found: &mut dyn FnMut(&[u8])) -> io::Result<bool> {
    let cut = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            "sock_diag: a message is cut off",
        )
    };
    let mut rest = datagram;
    while !rest.is_empty() {
        let header: &[u8; HEADER] = rest.first_chunk().ok_or_else(cut)?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let payload = rest.get(HEADER..length).ok_or_else(cut)?;
        match kind {
            KIND_DONE => return Ok(true),
            KIND_ERROR => {
                let code = payload.first_chunk().copied().map_or(0, i32::from_ne_bytes);
                return Err(io::Error::from_raw_os_error(code.saturating_neg()));
            }
            _ => found(payload),
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The local address in an `inet_diag_msg`: family at 0, port at 4, address at 8.
fn local_address(message: &[u8]) -> Option<SocketAddr> {
    address(message, 4, 8)
}

/// What a listener of IPv6 listens on by IPv4: nothing where it was made for IPv6 alone (`INET_DIAG_SKV6ONLY`), or is bound
/// to an address.
fn also_by_ipv4(message: &[u8]) -> Option<SocketAddr> {
    let local = local_address(message)?;
    if local.is_ipv4() || !local.ip().is_unspecified() {
        return None;
    }
    let mut rest = message.get(MESSAGE..)?;
    while let Some(header) = rest.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = rest.get(4..length)?;
        if kind == ONLY_IPV6 {
            let both = value.first() == Some(&0);
            return both.then(|| (Ipv4Addr::UNSPECIFIED, local.port()).into());
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    None
}

fn address(message: &[u8], port_at: usize, ip_at: usize) -> Option<SocketAddr> {
    let port = u16::from_be_bytes(*message.get(port_at..)?.first_chunk()?);
    let ip = message.get(ip_at..)?;
    let ip = match *message.first()? {
        AF_INET => IpAddr::from(Ipv4Addr::from(*ip.first_chunk::<4>()?)),
        AF_INET6 => IpAddr::from(Ipv6Addr::from(*ip.first_chunk::<16>()?)),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]
    use std::net::TcpListener;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_listened_on_in_a_namespace_is_seen_and_nothing_else() {
        let netns = Netns::create_unnamed().unwrap();
        let here = TcpListener::bind("127.0.0.1:0").unwrap();
        let listeners = Listeners::of(&netns).unwrap();
        assert_eq!(listeners.now().unwrap(), BTreeSet::new());
        let there = netns.run(|| TcpListener::bind("0.0.0.0:15001")).unwrap();
        let there = there.unwrap();
        let found = listeners.now().unwrap();
        assert_eq!(found, BTreeSet::from([there.local_addr().unwrap()]));
        let own = Listeners::of(&Netns::current().unwrap()).unwrap();
        assert!(own.now().unwrap().contains(&here.local_addr().unwrap()));
        drop(there);
        assert_eq!(listeners.now().unwrap(), BTreeSet::new());
    }

    #[test]
    fn a_socket_of_both_families_is_seen_in_both() {
        let netns = Netns::create_unnamed().unwrap();
        let listen = |only_v6| {
            crate::sysctl::write(&netns, "net/ipv6/bindv6only", only_v6).unwrap();
            netns.run(|| TcpListener::bind("[::]:0")).unwrap().unwrap()
        };
        let (both, one) = (listen("0"), listen("1"));
        let [both_at, one_at] = [&both, &one].map(|socket| socket.local_addr().unwrap());
        let by_ipv4 = SocketAddr::from((Ipv4Addr::UNSPECIFIED, both_at.port()));
        let found = Listeners::of(&netns).unwrap().now().unwrap();
        assert_eq!(found, BTreeSet::from([by_ipv4, both_at, one_at]));
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = collect(&bytes, &mut |message| {
                connections::parse(message);
            });
        }

        #[test]
        fn arbitrary_messages_do_not_panic(kind in 0u16..30, bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut datagram = u32::try_from(HEADER + bytes.len()).unwrap().to_ne_bytes().to_vec();
            datagram.extend(kind.to_ne_bytes());
            datagram.extend([0; 10]);
            datagram.extend(bytes);
            let _ = collect(&datagram, &mut |message| {
                also_by_ipv4(message);
                connections::parse(message);
            });
        }
    }
}
