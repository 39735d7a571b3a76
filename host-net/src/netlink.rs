//! Links, addresses, policy rules and routes of one network namespace, over rtnetlink.
//!
//! Every `add_*` creates the object, never changes one: the identical object is [`Made::Existed`], another one in its
//! place [`NetlinkError::Conflict`]. Every `del_*` removes exactly the described object and nothing that merely
//! resembles it (devices excepted: they go by name); an absent one is `Ok(false)`. Every `check_*` tells the three
//! cases apart without changing anything.
//!
//! Rules and routes are stamped with [`ROUTE_PROTOCOL`]. The stamp is ignored when comparing (an identical rule of
//! somebody else serves as well), but only stamped ones are ever deleted.

use std::io;
use std::sync::Arc;

use tokio::sync::Mutex;

use crate::netns::Netns;
use crate::plan::OverlayKind;

mod addresses;
mod disciplines;
mod links;
mod request;
mod routes;
mod rules;
mod topology;

pub use addresses::ListedAddress;
pub use links::{LinkInfo, Overlay, overlay_supported};
pub use routes::{ListedRoute, RouteInfo};
pub use rules::ListedRule;

/// Protocol number (`proto 133` in `ip route` and `ip rule`) on everything that is made here. It makes our objects
/// recognisable; who owns them is the journal's knowledge.
pub const ROUTE_PROTOCOL: u8 = 133;

/// How many requests are on their way at once in a batch. Each answer occupies under 1 KiB of the socket's receive
/// buffer (208 KiB by default), so that this many never overflow it.
const PIPELINE: usize = 64;

/// What an `add_*` did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Made {
    /// The object is new.
    Created,
    /// The identical object was there before.
    Existed,
}

/// What is found where an object should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Presence {
    /// Nothing.
    Absent,
    /// Exactly the object.
    Same,
    /// Another object in its place.
    Different {
        /// What stands there, as `ip` would print it.
        found: String,
    },
}

/// Why a request failed; each names the object.
#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    /// No socket in the namespace.
    #[error("rtnetlink in {netns}: {source}")]
    Connect {
        /// Where.
        netns: String,
        /// Why.
        source: io::Error,
    },
    /// The kernel said no.
    #[error("{object}: {source}")]
    Kernel {
        /// The object, e.g. `route 10.244.1.4/32 in table 100`.
        object: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// A different object stands in the way.
    #[error("{object}: something else is in its place: {found}")]
    Conflict {
        /// What was wanted.
        object: String,
        /// What is there.
        found: String,
    },
    /// The object needs a device that does not exist.
    #[error("{object}: there is no device {dev}")]
    NoDevice {
        /// What was wanted.
        object: String,
        /// The missing device.
        dev: String,
    },
    /// The kernel lacks the driver of an overlay.
    #[error("{}", no_overlay(*.0))]
    NoOverlay(OverlayKind),
}

fn no_overlay(kind: OverlayKind) -> &'static str {
    match kind {
        OverlayKind::Geneve => {
            "this kernel has no geneve: load the module (modprobe geneve) or use --overlay vxlan"
        }
        OverlayKind::Vxlan => "this kernel has no vxlan: load the module (modprobe vxlan)",
    }
}

impl NetlinkError {
    fn kernel(object: impl Into<String>, source: io::Error) -> Self {
        let object = object.into();
        Self::Kernel { object, source }
    }
}

/// A connection to the kernel that stays in one network namespace, whichever thread uses it.
///
/// Its socket is served by a task of the runtime that called [`Netlink::connect`]; the task ends with this value.
#[derive(Debug)]
pub struct Netlink {
    handle: rtnetlink::Handle,
    /// The kernel runs one listing per socket at a time and answers EBUSY to a second one.
    listing: Arc<Mutex<()>>,
}

impl Netlink {
    /// Opens a connection in `ns`. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The namespace cannot be entered or has no rtnetlink.
    pub async fn connect(ns: &Netns) -> Result<Self, NetlinkError> {
        let opened = ns
            .run(rtnetlink::new_connection_with_strict_check)
            .and_then(|opened| opened);
        let (mut connection, handle, _unsolicited) =
            opened.map_err(|source| NetlinkError::Connect {
                netns: ns.id().to_string(),
                source,
            })?;
        // Without these an answer is indistinguishable from a connection that died, and errors at the end of a
        // listing are lost.
        connection.set_forward_ack(true);
        connection.set_forward_done(true);
        tokio::spawn(connection);
        Ok(Self {
            handle,
            listing: Arc::default(),
        })
    }
}

#[cfg(test)]
mod tests;
