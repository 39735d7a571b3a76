//! Queueing disciplines, as far as they say that programs may stand in a device's packet path.

use std::collections::BTreeSet;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcMessage};

use super::{Netlink, NetlinkError};

/// The disciplines that take filters, and with them programs, where packets enter or leave.
const TAKE_PROGRAMS: [&str; 2] = ["clsact", "ingress"];

impl Netlink {
    /// Indices of the devices that have a place for programs in their packet path.
    pub async fn with_classifier(&self) -> Result<BTreeSet<u32>, NetlinkError> {
        let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
        let answer = self.list(request).await;
        let messages =
            answer.map_err(|e| NetlinkError::kernel("list of queueing disciplines", e))?;
        let takes_programs = |attribute: &TcAttribute| match attribute {
            TcAttribute::Kind(kind) => TAKE_PROGRAMS.contains(&kind.as_str()),
            _ => false,
        };
        let indices = messages.iter().filter_map(|message| match message {
            RouteNetlinkMessage::NewQueueDiscipline(found)
                if found.attributes.iter().any(takes_programs) =>
            {
                u32::try_from(found.header.index).ok()
            }
            _ => None,
        });
        Ok(indices.collect())
    }
}
