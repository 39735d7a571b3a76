//! Upstream connections.

use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::task::Poll;
use std::time::{Duration, Instant};

use socket2::SockRef;
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use super::delays::Subject;
use super::recapture::Own;
use super::{Attachment, Shared};
use crate::capture::{HBONE_PORT, OnBehalfOf};
use crate::telemetry::{Direction, Step};

/// How many sockets are tried when the chosen source port is in use towards the destination.
const TRIES: usize = 8;

/// Why there is no upstream connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The scope could not make a socket.
    #[error("no socket towards {to} for {who:?}: {source}")]
    Socket {
        /// The destination.
        to: SocketAddr,
        /// Who was to speak.
        who: OnBehalfOf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination cannot be reached.
    #[error("cannot connect to {to}: {source}")]
    Connect {
        /// The destination.
        to: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The destination did not answer.
    #[error("{to} did not answer within {after:?}{}", hint(*.to))]
    TimedOut {
        /// The destination.
        to: SocketAddr,
        /// How long it had.
        after: Duration,
    },
}

/// Silence, where a refusal would be normal, has one usual cause.
fn hint(to: SocketAddr) -> &'static str {
    if to.port() == HBONE_PORT {
        ": maybe a NetworkPolicy is blocking HBONE port 15008"
    } else {
        ""
    }
}

impl Attachment {
    /// Counts how long a step took that began at `began`.
    pub(crate) fn took(&self, step: Step, direction: Direction, began: Instant) {
        let capture_mode = self.scope.id().capture_mode;
        let time = began.elapsed();
        self.core
            .telemetry
            .took(step, capture_mode, direction, time);
    }

    /// Connects to `to` with the address of `who`, by the capture that the pod has: a tunnel that came by another one
    /// lives on when the pod's capture changes.
    pub(crate) async fn dial(
        &self,
        to: SocketAddr,
        who: OnBehalfOf,
    ) -> Result<TcpStream, DialError> {
        let config = &self.core.config;
        let (pod, other, direction) = match who {
            OnBehalfOf::LocalWorkload(pod) => (pod, to.ip(), Direction::Outbound),
            OnBehalfOf::RemoteClient(client) => (to.ip(), client, Direction::Inbound),
        };
        let whose = Subject {
            direction,
            client: SocketAddr::new(
                match who {
                    OnBehalfOf::LocalWorkload(pod) => pod,
                    OnBehalfOf::RemoteClient(client) => client,
                },
                0,
            ),
            destination: to,
        };
        let (_until_made, attachment) = self.dialling(pod, other, whose).await;
        let began = Instant::now();
        let stream = timeout(
            config.connect_timeout,
            connect(&attachment, to, who, direction),
        )
        .await
        .map_err(|_| DialError::TimedOut {
            to,
            after: config.connect_timeout,
        })??;
        attachment.took(Step::Connect, direction, began);
        Ok(stream)
    }
}

async fn connect(
    attachment: &Attachment,
    to: SocketAddr,
    who: OnBehalfOf,
    direction: Direction,
) -> Result<TcpStream, DialError> {
    let (core, scope) = (&attachment.core, &attachment.scope);
    let config = &core.config;
    let mut tries = 0;
    loop {
        let socket = scope
            .socket(to, who)
            .and_then(|socket| {
                socket.set_nodelay(true)?;
                config.set_liveness(&SockRef::from(&socket))?;
                Ok(socket)
            })
            .map_err(|source| DialError::Socket { to, who, source })?;
        tries += 1;
        match connect_known(core, socket, to, direction).await {
            Ok(stream) => return Ok(stream),
            Err(error) if error.kind() == io::ErrorKind::AddrNotAvailable && tries < TRIES => {}
            Err(source) => return Err(DialError::Connect { to, source }),
        }
    }
}

/// Connects, and remembers the connection's ends before what it leads to can have been looked at.
async fn connect_known(
    core: &Shared,
    socket: TcpSocket,
    to: SocketAddr,
    direction: Direction,
) -> io::Result<TcpStream> {
    let (own, same) = Own::of(&socket)?;
    let bound = socket.local_addr().ok().filter(|from| from.port() != 0);
    if let Some(from) = bound {
        core.own_connections.opens(direction, from, to, own);
        return socket.connect(to).await;
    }
    // The kernel chooses the port when it sends the first packet.
    let mut connecting = pin!(socket.connect(to));
    let begun = poll_fn(|context| Poll::Ready(connecting.as_mut().poll(context))).await;
    let from = SockRef::from(&same).local_addr();
    if let Some(from) = from.ok().and_then(|from| from.as_socket()) {
        core.own_connections.opens(direction, from, to, own);
    }
    drop(same);
    match begun {
        Poll::Ready(connected) => connected,
        Poll::Pending => connecting.await,
    }
}
