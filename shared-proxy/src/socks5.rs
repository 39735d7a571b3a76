//! SOCKS5 (RFC 1928): a captured pod asks for connections by name, or from a program that was told to use a proxy.
//!
//! Only what a pod may need of its own proxy: no authentication, because nobody but the pod reaches the listener, and
//! CONNECT. A request is read field by field and not one byte further: what follows belongs to the connection.

#[cfg(test)]
mod fuzz;
pub(crate) mod serve;

use std::io;
use std::net::{IpAddr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The version that every message begins with.
const VERSION: u8 = 5;
/// Method: no authentication required.
const NO_AUTHENTICATION: u8 = 0;
/// Answer to a client none of whose methods is accepted.
const NO_METHOD: u8 = 0xff;
/// Command: make a TCP connection.
const CONNECT: u8 = 1;
/// Address types.
const IPV4: u8 = 1;
const HOSTNAME: u8 = 3;
const IPV6: u8 = 4;

/// Where a client wants to be connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// An address; a name that is one counts as one.
    Address(SocketAddr),
    /// A name, in lower case and without the last dot, and a port.
    Hostname(String, u16),
}

/// The answer to a request (RFC 1928, section 6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reply {
    /// The connection is there.
    Succeeded = 0,
    /// What no other answer fits.
    Failed = 1,
    /// A policy says no.
    NotAllowed = 2,
    /// The destination cannot be reached, or has no address.
    Unreachable = 4,
    /// Another command than CONNECT.
    CommandNotSupported = 7,
    /// Another kind of address.
    AddressTypeNotSupported = 8,
}

/// Why a request is not served.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It broke off.
    #[error("a SOCKS request broke off: {0}")]
    Io(#[from] io::Error),
    /// It did not come.
    #[error("no SOCKS request in time")]
    TimedOut,
    /// Another version, or another protocol.
    #[error("not SOCKS5: version {0}")]
    Version(u8),
    /// The client wants to prove who it is.
    #[error("the SOCKS client accepts no method without authentication")]
    Authentication,
    /// Not CONNECT.
    #[error("SOCKS command {0}: only CONNECT (1) is served")]
    Command(u8),
    /// Neither an address nor a name.
    #[error("SOCKS address type {0} is not known")]
    AddressType(u8),
    /// Not a name that anybody could have.
    #[error("a SOCKS request for something that is no hostname: {0:?}")]
    Hostname(String),
}

impl Error {
    /// What the client is answered; nothing if it does not speak the protocol, or was answered already.
    pub fn reply(&self) -> Option<Reply> {
        match self {
            Self::Io(_) | Self::TimedOut | Self::Version(_) | Self::Authentication => None,
            Self::Command(_) => Some(Reply::CommandNotSupported),
            Self::AddressType(_) => Some(Reply::AddressTypeNotSupported),
            Self::Hostname(_) => Some(Reply::Failed),
        }
    }
}

/// Reads what a client says until it has said where it wants to go, and answers its greeting.
///
/// # Errors
/// See [`Error`]; [`Error::reply`] is still to be sent.
pub async fn read_request(
    reader: &mut (impl AsyncRead + Unpin),
    writer: &mut (impl AsyncWrite + Unpin),
) -> Result<Target, Error> {
    expect_version(reader).await?;
    let mut methods = [0; u8::MAX as usize];
    let methods = &mut methods[..usize::from(reader.read_u8().await?)];
    reader.read_exact(methods).await?;
    let accepted = methods.contains(&NO_AUTHENTICATION);
    let answer = match accepted {
        true => NO_AUTHENTICATION,
        false => NO_METHOD,
    };
    writer.write_all(&[VERSION, answer]).await?;
    if !accepted {
        return Err(Error::Authentication);
    }
    expect_version(reader).await?;
    let command = reader.read_u8().await?;
    let _reserved = reader.read_u8().await?;
    // The address is read whatever the command is: the answer comes behind the whole request.
    let target = read_target(reader).await?;
    match command {
        CONNECT => target,
        other => Err(Error::Command(other)),
    }
}

async fn expect_version(reader: &mut (impl AsyncRead + Unpin)) -> Result<(), Error> {
    match reader.read_u8().await? {
        VERSION => Ok(()),
        other => Err(Error::Version(other)),
    }
}

/// The outer error ends the reading; the inner one is about what was read to its end.
async fn read_target(
    reader: &mut (impl AsyncRead + Unpin),
) -> Result<Result<Target, Error>, Error> {
    let address = match reader.read_u8().await? {
        IPV4 => IpAddr::from(reader.read_u32().await?.to_be_bytes()),
        IPV6 => IpAddr::from(reader.read_u128().await?.to_be_bytes()).to_canonical(),
        HOSTNAME => {
            let mut name = [0; u8::MAX as usize];
            let name = &mut name[..usize::from(reader.read_u8().await?)];
            reader.read_exact(name).await?;
            let port = reader.read_u16().await?;
            return Ok(named(name, port));
        }
        other => return Err(Error::AddressType(other)),
    };
    let port = reader.read_u16().await?;
    Ok(Ok(Target::Address(SocketAddr::new(address, port))))
}

fn named(name: &[u8], port: u16) -> Result<Target, Error> {
    let text = String::from_utf8_lossy(name);
    if let Ok(address) = text.parse::<IpAddr>() {
        let address = SocketAddr::new(address.to_canonical(), port);
        return Ok(Target::Address(address));
    }
    let name = text.strip_suffix('.').unwrap_or(&text);
    // Underscores and hyphens anywhere: resolvers are asked for such names too.
    let is_label = |label: &str| {
        let known = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        (1..=63).contains(&label.len()) && label.bytes().all(known)
    };
    if name.len() <= 253 && name.split('.').all(is_label) {
        Ok(Target::Hostname(name.to_ascii_lowercase(), port))
    } else {
        Err(Error::Hostname(text.into_owned()))
    }
}

/// Answers a request. The address that was bound is never told: it means nothing to a client.
///
/// # Errors
/// The client has gone.
pub async fn write_reply(writer: &mut (impl AsyncWrite + Unpin), reply: Reply) -> io::Result<()> {
    let message = [VERSION, reply as u8, 0, IPV4, 0, 0, 0, 0, 0, 0];
    writer.write_all(&message).await
}
