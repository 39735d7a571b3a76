//! Packets with file descriptors over a SEQPACKET socket.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use prost::Message;
use tokio_seqpacket::UnixSeqpacket;
use tokio_seqpacket::ancillary::{AncillaryMessageWriter, OwnedAncillaryMessage};

/// Receive buffer of the field's protocol, bytes. A longer packet is an error there.
pub const PLAIN_PACKET: usize = 1024;
/// Receive buffer once the extension is agreed on, bytes.
pub const EXTENDED_PACKET: usize = 128 * 1024;

/// Room for control messages: more descriptors than ever expected, so that too many are seen (and closed), not lost.
const CONTROL_BUFFER: usize = 256;

/// Why a packet could not be received or sent.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The socket failed.
    #[error("ZDS socket: {0}")]
    Io(#[from] io::Error),
    /// The other end closed the connection.
    #[error("the other end closed the ZDS connection")]
    Closed,
    /// The packet was longer than the protocol allows (MSG_TRUNC).
    #[error("ZDS packet longer than {0} bytes")]
    Oversized(usize),
    /// More descriptors than fit (MSG_CTRUNC), or the process may not open any more.
    #[error(
        "file descriptors of a ZDS packet were lost: too many, or this process reached RLIMIT_NOFILE"
    )]
    DescriptorsLost,
    /// The packet is not the protobuf message that belongs here.
    #[error("ZDS packet cannot be parsed: {0}")]
    Malformed(#[from] prost::DecodeError),
}

/// One received packet.
#[derive(Debug)]
pub struct Packet {
    /// The message.
    pub bytes: Vec<u8>,
    /// Attached descriptors (close-on-exec), closed on drop.
    pub fds: Vec<OwnedFd>,
}

impl Packet {
    /// Parses the message.
    pub fn parse<M: Message + Default>(&self) -> Result<M, TransportError> {
        Ok(M::decode(self.bytes.as_slice())?)
    }
}

/// One end of a ZDS connection.
#[derive(Debug)]
pub struct Transport {
    socket: UnixSeqpacket,
    buffer: Vec<u8>,
}

impl Transport {
    /// Wraps a connected socket; packets are limited to [`PLAIN_PACKET`] bytes.
    pub fn new(socket: UnixSeqpacket) -> Self {
        Self {
            socket,
            buffer: vec![0; PLAIN_PACKET],
        }
    }

    /// Allows packets of the extension's size from here on.
    pub fn allow_extended_packets(&mut self) {
        self.buffer.resize(EXTENDED_PACKET, 0);
    }

    /// Sends one message with at most one descriptor.
    pub async fn send(
        &self,
        message: &impl Message,
        fd: Option<BorrowedFd<'_>>,
    ) -> Result<(), TransportError> {
        let bytes = message.encode_to_vec();
        let sent = match fd {
            None => self.socket.send(&bytes).await?,
            Some(fd) => {
                let mut control = [0; CONTROL_BUFFER];
                let mut ancillary = AncillaryMessageWriter::new(&mut control);
                ancillary
                    .add_fds([fd])
                    .map_err(|_| io::Error::other("no room for a file descriptor"))?;
                self.socket
                    .send_with_ancillary(&bytes, &mut ancillary)
                    .await?
            }
        };
        if sent != bytes.len() {
            return Err(io::Error::from(io::ErrorKind::WriteZero).into());
        }
        Ok(())
    }

    /// Receives one packet. Safe to drop before it is ready: no packet is lost.
    pub async fn receive(&mut self) -> Result<Packet, TransportError> {
        let mut control = [0; CONTROL_BUFFER];
        let (info, ancillary) = self
            .socket
            .recv_with_ancillary(&mut self.buffer, &mut control)
            .await?;
        let mut fds = Vec::new();
        for message in ancillary.into_messages() {
            if let OwnedAncillaryMessage::FileDescriptors(received) = message {
                fds.extend(received);
            }
        }
        if info.ancillary_truncated() {
            return Err(TransportError::DescriptorsLost);
        }
        if info.truncated() {
            return Err(TransportError::Oversized(self.buffer.len()));
        }
        // A SEQPACKET socket reports the end as a packet of no bytes; no message of the protocol is empty.
        if info.bytes_read() == 0 {
            return Err(TransportError::Closed);
        }
        let bytes = self.buffer[..info.bytes_read()].to_vec();
        Ok(Packet { bytes, fds })
    }
}
