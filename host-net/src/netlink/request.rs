//! One request, its answer, and the rules for believing it.

use std::io;

use futures_util::StreamExt;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;

use super::Netlink;

/// A listing that changes while it is read is read again, this often at most.
const LISTING_ATTEMPTS: usize = 20;

struct Answer {
    messages: Vec<RouteNetlinkMessage>,
    /// Objects came or went meanwhile; some may be missing.
    interrupted: bool,
}

impl Netlink {
    /// Creates an object; EEXIST when something is in its place.
    pub(super) async fn create(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        let flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
        self.ask(message, flags).await.map(drop)
    }

    /// Changes or deletes an object.
    pub(super) async fn change(&self, message: RouteNetlinkMessage) -> io::Result<()> {
        self.ask(message, NLM_F_ACK).await.map(drop)
    }

    /// Asks for one object.
    pub(super) async fn get(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        // With an acknowledgement an answer that cannot be decoded ends the wait too.
        Ok(self.ask(message, NLM_F_ACK).await?.messages)
    }

    /// Lists all objects that match; complete at one moment, or an error.
    pub(super) async fn list(
        &self,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let _turn = self.listing.lock().await;
        for _ in 0..LISTING_ATTEMPTS {
            let answer = self.ask(message.clone(), NLM_F_DUMP).await?;
            if !answer.interrupted {
                return Ok(answer.messages);
            }
        }
        Err(io::Error::other(
            "the kernel's list kept changing while it was read",
        ))
    }

    async fn ask(&self, message: RouteNetlinkMessage, flags: u16) -> io::Result<Answer> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        let mut answers = self.handle.clone().request(request).map_err(|_| gone())?;
        let mut answer = Answer {
            messages: Vec::new(),
            interrupted: false,
        };
        while let Some(part) = answers.next().await {
            answer.interrupted |= part.header.flags & NLM_F_DUMP_INTR != 0;
            match part.payload {
                NetlinkPayload::InnerMessage(message) => answer.messages.push(message),
                NetlinkPayload::Done(done) if done.code == 0 => return Ok(answer),
                NetlinkPayload::Done(done) => {
                    return Err(io::Error::from_raw_os_error(done.code.abs()));
                }
                NetlinkPayload::Error(error) if error.code.is_none() => return Ok(answer),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                _ => return Err(io::Error::other("rtnetlink lost messages")),
            }
        }
        Err(gone())
    }
}

fn gone() -> io::Error {
    io::Error::new(
        io::ErrorKind::BrokenPipe,
        "the rtnetlink connection has ended",
    )
}
