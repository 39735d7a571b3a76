//! Netfilter's netlink protocol, as far as this crate speaks it: requests to one subsystem, answered on the spot.
//!
//! A message is `nlmsghdr` (16 bytes, host byte order), `nfgenmsg` (4 bytes: family, version 0, resource id in network
//! byte order), then attributes (linux/netfilter/nfnetlink.h). The kernel answers while the request is being sent, so
//! the code is synchronous; the receive timeout only guards against an answer that never comes.

mod attributes;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use thiserror::Error;

pub(crate) use attributes::{Attribute, AttributeWriter, Attributes, Malformed};

use crate::netns::Netns;

/// `AF_INET` in `nfgenmsg`.
pub(crate) const FAMILY_INET: u8 = 2;
/// `AF_INET6` in `nfgenmsg`.
pub(crate) const FAMILY_INET6: u8 = 10;

pub(crate) const FLAG_REQUEST: u16 = 0x1;
pub(crate) const FLAG_ACK: u16 = 0x4;
pub(crate) const FLAG_EXCL: u16 = 0x200;
pub(crate) const FLAG_DUMP: u16 = 0x300;
pub(crate) const FLAG_CREATE: u16 = 0x400;

const HEADER: usize = 16;
const SUBHEADER: usize = 4;
const KIND_ERROR: u16 = 2;
const KIND_DONE: u16 = 3;

/// The largest datagram that the kernel puts together for a dump or an error that quotes the request.
const RECEIVE_BUFFER: usize = 256 * 1024;
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// What can go wrong in an exchange.
#[derive(Debug, Error)]
pub(crate) enum NfnetlinkError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("the kernel answered something that is not the netfilter protocol: {0}")]
    Malformed(#[from] Malformed),
    /// The kernel refused: a positive error number, and the request as the kernel quotes it (attributes only).
    #[error("error {code}")]
    Refused { code: i32, quoted: Vec<u8> },
}

/// One request.
#[derive(Debug)]
pub(crate) struct Request {
    /// Subsystem in the upper byte, command in the lower.
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) family: u8,
    /// `res_id`: the subsystem for the messages that begin and end a batch, otherwise 0.
    pub(crate) resource: u16,
    pub(crate) attributes: Vec<u8>,
}

impl Request {
    /// A request that the kernel acknowledges.
    pub(crate) fn new(subsystem: u8, command: u8, attributes: Vec<u8>) -> Self {
        Self {
            kind: u16::from(subsystem) << 8 | u16::from(command),
            flags: FLAG_REQUEST | FLAG_ACK,
            family: FAMILY_INET,
            resource: 0,
            attributes,
        }
    }

    /// Adds flags.
    pub(crate) fn with_flags(mut self, flags: u16) -> Self {
        self.flags |= flags;
        self
    }

    /// Asks for a multi-part answer, which ends with its own message in place of the acknowledgement.
    pub(crate) fn dump(mut self) -> Self {
        self.flags = FLAG_REQUEST | FLAG_DUMP;
        self
    }

    fn encode(&self, sequence: u32, into: &mut Vec<u8>) {
        let length = HEADER + SUBHEADER + self.attributes.len();
        into.extend_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_ne_bytes());
        into.extend_from_slice(&self.kind.to_ne_bytes());
        into.extend_from_slice(&self.flags.to_ne_bytes());
        into.extend_from_slice(&sequence.to_ne_bytes());
        into.extend_from_slice(&0u32.to_ne_bytes());
        into.push(self.family);
        into.push(0);
        into.extend_from_slice(&self.resource.to_be_bytes());
        into.extend_from_slice(&self.attributes);
        into.resize(into.len().next_multiple_of(4), 0);
    }
}

/// A socket that lives in one network namespace, whichever thread uses it.
pub(crate) struct Connection {
    inner: Mutex<Inner>,
}

struct Inner {
    socket: Socket,
    sequence: u32,
}

impl Connection {
    /// Opens the socket inside `netns`.
    pub(crate) fn open(netns: &Netns) -> io::Result<Self> {
        let socket = netns.run(|| Socket::new(NETLINK_NETFILTER))??;
        let timeout = TimeVal::milliseconds(ANSWER_WITHIN.as_millis() as i64);
        setsockopt(&socket, sockopt::ReceiveTimeout, &timeout)?;
        setsockopt(&socket, sockopt::RcvBuf, &(2 * RECEIVE_BUFFER))?;
        Ok(Self {
            inner: Mutex::new(Inner {
                socket,
                sequence: 0,
            }),
        })
    }

    /// The kernel's number of the namespace that the socket lives in (asm-generic/socket.h): unique for as long as the machine
    /// runs.
    pub(crate) fn namespace(&self) -> io::Result<u64> {
        const SO_NETNS_COOKIE: libc::c_int = 71;
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let mut cookie = 0u64;
        let mut length = libc::socklen_t::try_from(size_of::<u64>()).unwrap_or_default();
        // SAFETY: the descriptor is open for as long as the lock is held; the kernel writes at most `length` bytes, which is
        // the size of `cookie`, and the length; both outlive the call.
        #[allow(unsafe_code)]
        let answer = unsafe {
            libc::getsockopt(
                inner.socket.as_raw_fd(),
                libc::SOL_SOCKET,
                SO_NETNS_COOKIE,
                (&raw mut cookie).cast(),
                &raw mut length,
            )
        };
        nix::errno::Errno::result(answer)?;
        Ok(cookie)
    }

    /// Sends one request and returns the attributes of every message of the answer.
    pub(crate) fn exchange(&self, request: &Request) -> Result<Vec<Vec<u8>>, NfnetlinkError> {
        self.exchange_batch(std::slice::from_ref(request))
    }

    /// Sends several messages in one datagram. The answer is complete with the first acknowledgement, so exactly one
    /// of them asks for it.
    pub(crate) fn exchange_batch(
        &self,
        requests: &[Request],
    ) -> Result<Vec<Vec<u8>>, NfnetlinkError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.sequence = inner.sequence.wrapping_add(1);
        let sequence = inner.sequence;
        let mut bytes = Vec::new();
        for request in requests {
            request.encode(sequence, &mut bytes);
        }
        inner.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::new();
        let mut buffer = Vec::with_capacity(RECEIVE_BUFFER);
        loop {
            buffer.clear();
            match inner.socket.recv(&mut buffer, 0) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error.into()),
            }
            if collect(&buffer, sequence, &mut answer)? {
                return Ok(answer);
            }
        }
    }
}

/// Takes the messages out of one datagram; true when the answer is complete. Messages with another sequence number
/// belong to an exchange that was given up and are skipped.
fn collect(
    datagram: &[u8],
    sequence: u32,
    answer: &mut Vec<Vec<u8>>,
) -> Result<bool, NfnetlinkError> {
    let mut rest = datagram;
    while !rest.is_empty() {
        let message = Message::first_of(rest)?;
        rest = rest
            .get(message.length.next_multiple_of(4)..)
            .unwrap_or_default();
        if message.sequence != sequence {
            continue;
        }
        match message.kind {
            KIND_ERROR | KIND_DONE => {
                // Some kernels end a dump without a code.
                let code = message.payload.first_chunk().copied();
                let code = code.map_or(0, i32::from_ne_bytes);
                if code == 0 {
                    return Ok(true);
                }
                let quoted = message.payload.get(4 + HEADER + SUBHEADER..);
                return Err(NfnetlinkError::Refused {
                    code: code.saturating_neg(),
                    quoted: quoted.unwrap_or_default().to_vec(),
                });
            }
            _ => {
                let attributes = message.payload.get(SUBHEADER..);
                answer.push(attributes.ok_or(Malformed::Truncated)?.to_vec());
            }
        }
    }
    Ok(false)
}

struct Message<'a> {
    length: usize,
    kind: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl<'a> Message<'a> {
    fn first_of(bytes: &'a [u8]) -> Result<Self, Malformed> {
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Malformed::Truncated)?;
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let payload = bytes.get(HEADER..length).ok_or(Malformed::Truncated)?;
        Ok(Self {
            length,
            kind: u16::from_ne_bytes([header[4], header[5]]),
            sequence: u32::from_ne_bytes([header[8], header[9], header[10], header[11]]),
            payload,
        })
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use proptest::prelude::*;

    use super::*;

    fn message(kind: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = u32::try_from(HEADER + payload.len())
            .unwrap()
            .to_ne_bytes()
            .to_vec();
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(&sequence.to_ne_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(payload);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn answers_of_an_exchange_that_was_given_up_are_skipped() {
        let mut datagram = message(0x0607, 6, &[0, 0, 0, 0, 1]);
        datagram.extend(message(KIND_ERROR, 6, &(-17i32).to_ne_bytes()));
        datagram.extend(message(0x0607, 7, &[0, 0, 0, 0, 2, 3]));
        datagram.extend(message(KIND_DONE, 7, &0i32.to_ne_bytes()));
        let mut answer = Vec::new();
        assert!(collect(&datagram, 7, &mut answer).unwrap());
        assert_eq!(answer, [vec![2, 3]]);
    }

    #[test]
    fn a_refusal_carries_the_code_and_the_quoted_attributes() {
        let mut payload = (-4103i32).to_ne_bytes().to_vec();
        payload.extend_from_slice(&[9; HEADER + SUBHEADER]);
        payload.extend_from_slice(b"quoted");
        let refused = collect(&message(KIND_ERROR, 1, &payload), 1, &mut Vec::new());
        match refused {
            Err(NfnetlinkError::Refused { code, quoted }) => {
                assert_eq!((code, quoted.as_slice()), (4103, b"quoted".as_slice()));
            }
            other => panic!("{other:?}"),
        }
    }

    proptest! {
        #[test]
        fn arbitrary_datagrams_do_not_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), sequence in 0u32..3) {
            let _ = collect(&bytes, sequence, &mut Vec::new());
        }

        #[test]
        fn arbitrary_payloads_do_not_panic(kind in 0u16..8, bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = collect(&message(kind, 1, &bytes), 1, &mut Vec::new());
        }
    }
}
