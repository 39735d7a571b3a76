//! The PROXY protocol, version 2, as far as two relays need it: the addresses of a TCP connection that was relayed.
//!
//! Format: section 2.2 of the protocol's specification (haproxy.org, `proxy-protocol.txt`): 12 bytes of signature; version
//! and command; address family and transport; length of the rest; addresses and ports in network order; extensions.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// First bytes of every header. Chosen by the specification so that no other protocol begins with them.
const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// Bytes up to and including the length.
const PREFIX: usize = 16;
/// Version 2, command PROXY.
const PROXY: u8 = 0x21;
/// IPv4, stream.
const TCP4: u8 = 0x11;
/// IPv6, stream.
const TCP6: u8 = 0x21;
/// Two IPv4 addresses and two ports.
const LENGTH4: usize = 12;
/// Two IPv6 addresses and two ports.
const LENGTH6: usize = 36;

/// The two ends of the connection that is relayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Who opened it.
    pub source: SocketAddr,
    /// What its bytes are for.
    pub destination: SocketAddr,
}

/// Why there is no header at the beginning of a connection.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Some other protocol, or none.
    #[error("no PROXY protocol header: the connection begins with {0:02x?}")]
    Signature(Vec<u8>),
    /// A header that says nothing about a relayed TCP connection.
    #[error(
        "PROXY protocol header with command {command:#04x} and family {family:#04x}: want 0x21 with 0x11 or 0x21"
    )]
    Kind {
        /// Version and command.
        command: u8,
        /// Address family and transport.
        family: u8,
    },
    /// Less than the addresses of the family need.
    #[error("PROXY protocol header with {0} bytes of addresses: too few for its family")]
    Short(usize),
    /// The connection failed or ended within the header.
    #[error("reading the PROXY protocol header: {0}")]
    Io(#[from] io::Error),
}

impl Header {
    /// The header in bytes. A pair of different families is written as IPv6.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(PREFIX + LENGTH6);
        bytes.extend(SIGNATURE);
        bytes.push(PROXY);
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                bytes.push(TCP4);
                bytes.extend((LENGTH4 as u16).to_be_bytes());
                bytes.extend(source.octets());
                bytes.extend(destination.octets());
            }
            (source, destination) => {
                bytes.push(TCP6);
                bytes.extend((LENGTH6 as u16).to_be_bytes());
                bytes.extend(as_v6(source).octets());
                bytes.extend(as_v6(destination).octets());
            }
        }
        bytes.extend(self.source.port().to_be_bytes());
        bytes.extend(self.destination.port().to_be_bytes());
        bytes
    }

    /// Reads the header, and not one byte of what comes after it. Extensions are skipped.
    ///
    /// # Errors
    /// The connection does not begin with a header of a relayed TCP connection, or ends in it.
    pub async fn read(from: &mut (impl AsyncRead + Unpin)) -> Result<Self, HeaderError> {
        // The shortest header that is accepted, so that one call usually gets all of it and never too much.
        let mut bytes = vec![0; PREFIX + LENGTH4];
        let mut filled = 0;
        while filled < bytes.len() {
            let read = from.read(&mut bytes[filled..]).await?;
            if read == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
            let had_prefix = filled >= PREFIX;
            filled += read;
            // Said as soon as it shows: other protocols may begin with fewer bytes, and then wait for an answer.
            let begun = filled.min(SIGNATURE.len());
            if bytes[..begun] != SIGNATURE[..begun] {
                bytes.truncate(filled.min(PREFIX));
                return Err(HeaderError::Signature(bytes));
            }
            if !had_prefix && filled >= PREFIX {
                bytes.resize(PREFIX + rest(&bytes[..PREFIX])?, 0);
            }
        }
        addresses(bytes[13], &bytes[PREFIX..])
    }
}

fn as_v6(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped(),
        IpAddr::V6(v6) => v6,
    }
}

/// Bytes that come after a prefix with the right signature.
fn rest(prefix: &[u8]) -> Result<usize, HeaderError> {
    let (command, family) = (prefix[12], prefix[13]);
    let needed = match (command, family) {
        (PROXY, TCP4) => LENGTH4,
        (PROXY, TCP6) => LENGTH6,
        _ => return Err(HeaderError::Kind { command, family }),
    };
    let length = usize::from(u16::from_be_bytes([prefix[14], prefix[15]]));
    if length < needed {
        return Err(HeaderError::Short(length));
    }
    Ok(length)
}

/// The addresses in what comes after the prefix.
fn addresses(family: u8, rest: &[u8]) -> Result<Header, HeaderError> {
    let short = || HeaderError::Short(rest.len());
    let (source, rest_of, destination) = if family == TCP4 {
        let (source, after) = rest.split_first_chunk::<4>().ok_or_else(short)?;
        let (destination, after) = after.split_first_chunk::<4>().ok_or_else(short)?;
        let v4 = |octets: &[u8; 4]| IpAddr::V4(Ipv4Addr::from(*octets));
        (v4(source), after, v4(destination))
    } else {
        let (source, after) = rest.split_first_chunk::<16>().ok_or_else(short)?;
        let (destination, after) = after.split_first_chunk::<16>().ok_or_else(short)?;
        let v6 = |octets: &[u8; 16]| IpAddr::V6(Ipv6Addr::from(*octets)).to_canonical();
        (v6(source), after, v6(destination))
    };
    let ports = rest_of.first_chunk::<4>().ok_or_else(short)?;
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    Ok(Header {
        source: SocketAddr::new(source, port(0)),
        destination: SocketAddr::new(destination, port(2)),
    })
}

#[cfg(test)]
mod fuzz;
#[cfg(test)]
mod tests;
