//! rustls' state machine, client or server.

use std::io::IoSlice;
use std::ops::Deref;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncodeTlsData, EncryptError, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, CommonState, Error, ServerConfig};

use super::RECORD;
use super::buffers::{Input, Output};

/// What TLS 1.3 adds to a record, in bytes: head, content type, tag.
const RECORD_OVERHEAD: usize = 5 + 1 + 16;
/// Room for an alert, in bytes. What it is too small for is made room for when rustls says so.
const SMALL_MESSAGE: usize = 64;

pub(super) struct Session {
    side: Side,
    /// All received bytes have been looked at, and what is left of them is the beginning of something.
    exhausted: bool,
}

enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

/// What a step is taken for.
pub(super) enum Want<'a> {
    /// To receive: called with the plaintext of each record.
    Plaintext(&'a mut dyn FnMut(&[u8])),
    /// To send the first so many bytes of these slices.
    Encrypt(&'a [IoSlice<'a>], usize),
    /// To send a close_notify.
    Close,
}

/// What a step came to.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// There may be more to do with the same bytes.
    Progress,
    /// There was plaintext.
    Plaintext,
    /// The peer said close_notify: there will be no more plaintext.
    PeerClosed,
    /// Nothing more can be done with the bytes that were received.
    Exhausted,
    /// What was to be sent is in the output.
    Sent,
}

impl Deref for Session {
    type Target = CommonState;

    fn deref(&self) -> &CommonState {
        match &self.side {
            Side::Client(connection) => connection,
            Side::Server(connection) => connection,
        }
    }
}

impl Session {
    pub(super) fn client(
        config: Arc<ClientConfig>,
        name: ServerName<'static>,
    ) -> Result<Self, Error> {
        let connection = UnbufferedClientConnection::new(config, name)?;
        Ok(Self::of(Side::Client(Box::new(connection))))
    }

    pub(super) fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        let connection = UnbufferedServerConnection::new(config)?;
        Ok(Self::of(Side::Server(Box::new(connection))))
    }

    fn of(side: Side) -> Self {
        Self {
            side,
            exhausted: false,
        }
    }

    /// One step of the state machine. What it has to send is in `output` afterwards.
    pub(super) fn step(
        &mut self,
        input: &mut Input,
        output: &mut Output,
        want: &mut Want<'_>,
    ) -> Result<Event, Error> {
        let received = match want {
            Want::Plaintext(_) => input.waiting(),
            // rustls wants to see the beginning of a message again that it has seen already.
            _ if self.exhausted => input.waiting(),
            // It sends nothing before it has decrypted all records that it sees. Plaintext came last, so that none of
            // them is half of a message, and it can do without them.
            _ => &mut [],
        };
        let (discard, event) = match &mut self.side {
            Side::Client(connection) => {
                settle(connection.process_tls_records(received), output, want)
            }
            Side::Server(connection) => {
                settle(connection.process_tls_records(received), output, want)
            }
        };
        input.discard(discard);
        match event {
            Ok(Event::Exhausted | Event::PeerClosed) => self.exhausted = true,
            Ok(Event::Plaintext) => self.exhausted = false,
            Ok(Event::Progress | Event::Sent) | Err(_) => {}
        }
        event
    }

    /// After an error: what rustls has to say to the peer about it goes to `output`.
    pub(super) fn encode_alert(&mut self, input: &mut Input, output: &mut Output) {
        let mut nothing = |_: &[u8]| ();
        while self.wants_write() {
            let step = self.step(input, output, &mut Want::Plaintext(&mut nothing));
            if step.is_err() {
                return;
            }
        }
    }
}

/// Does what a state of rustls asks for. Returns how many received bytes are done with, too.
fn settle<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    output: &mut Output,
    want: &mut Want<'_>,
) -> (usize, Result<Event, Error>) {
    let mut discard = status.discard;
    let event = status.state.and_then(|state| match state {
        ConnectionState::ReadTraffic(mut traffic) => {
            let Want::Plaintext(give) = want else {
                return Err(Error::General("plaintext out of turn".to_owned()));
            };
            while let Some(record) = traffic.next_record() {
                let record = record?;
                discard += record.discard;
                give(record.payload);
            }
            Ok(Event::Plaintext)
        }
        ConnectionState::EncodeTlsData(message) => {
            encode(message, output)?;
            Ok(Event::Progress)
        }
        ConnectionState::TransmitTlsData(transmit) => {
            // It is in `output`, before everything that comes after it.
            transmit.done();
            Ok(Event::Progress)
        }
        ConnectionState::PeerClosed => Ok(Event::PeerClosed),
        ConnectionState::WriteTraffic(mut traffic) => match want {
            Want::Plaintext(_) => Ok(Event::Exhausted),
            Want::Encrypt(slices, length) => {
                encrypt(&mut traffic, slices, *length, output)?;
                Ok(Event::Sent)
            }
            Want::Close => {
                seal(output, SMALL_MESSAGE, |room| {
                    traffic.queue_close_notify(room)
                })?;
                Ok(Event::Sent)
            }
        },
        ConnectionState::BlockedHandshake | ConnectionState::Closed => match want {
            Want::Plaintext(_) => Ok(Event::Exhausted),
            Want::Encrypt(..) | Want::Close => Err(Error::HandshakeNotComplete),
        },
        other => Err(Error::General(format!(
            "unexpected state of TLS: {other:?}"
        ))),
    });
    (discard, event)
}

fn encode<Data>(mut message: EncodeTlsData<'_, Data>, output: &mut Output) -> Result<(), Error> {
    let mut length = 0;
    loop {
        match message.encode(output.room(length)) {
            Ok(written) => {
                output.filled(written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(size)) if size.required_size > length => {
                length = size.required_size;
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}

/// Encrypts the first `length` bytes of `slices`, in records as full as can be: straight from a slice where a record's
/// bytes lie together, from a copy where they do not.
fn encrypt<Data>(
    traffic: &mut WriteTraffic<'_, Data>,
    slices: &[IoSlice<'_>],
    length: usize,
    output: &mut Output,
) -> Result<(), Error> {
    let mut records = |plaintext: &[u8], output: &mut Output| {
        let records = plaintext.len().div_ceil(RECORD);
        let room = plaintext.len() + records * RECORD_OVERHEAD;
        seal(output, room, |room| traffic.encrypt(plaintext, room))
    };
    let mut gathered = Vec::new();
    let mut left = length;
    for slice in slices {
        let mut rest = &slice[..slice.len().min(left)];
        left -= rest.len();
        if !gathered.is_empty() {
            let (joining, others) = rest.split_at(rest.len().min(RECORD - gathered.len()));
            gathered.extend_from_slice(joining);
            rest = others;
            if gathered.len() < RECORD && left > 0 {
                continue;
            }
            records(&gathered, output)?;
            gathered.clear();
        }
        let incomplete = if left > 0 { rest.len() % RECORD } else { 0 };
        let (complete, beginning) = rest.split_at(rest.len() - incomplete);
        if !complete.is_empty() {
            records(complete, output)?;
        }
        if !beginning.is_empty() {
            gathered.reserve_exact(RECORD.min(beginning.len() + left));
            gathered.extend_from_slice(beginning);
        }
    }
    Ok(())
}

/// Lets rustls write `length` bytes to the output; more, if a message has to go first that it made meanwhile.
fn seal(
    output: &mut Output,
    mut length: usize,
    mut write: impl FnMut(&mut [u8]) -> Result<usize, EncryptError>,
) -> Result<(), Error> {
    loop {
        match write(output.room(length)) {
            Ok(written) => {
                output.filled(written);
                return Ok(());
            }
            Err(EncryptError::InsufficientSize(size)) if size.required_size > length => {
                length = size.required_size;
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}
