//! The way of a connection, predicted hop by hop from the state of the kernel and beside it what the plans say.
//!
//! Nothing is sent. The state of every namespace on the way is read once ([`gather`]), a packet is led through it by a
//! small model of what the kernel does with one ([`world`], `hooks`, `routing`), and the same packet through the state as
//! it would be with every planned object in place ([`planned`]). Where the two ways part, the hop is flagged ([`compare`]). What
//! the model does not know, it says ([`hop::Hop::unknown`]).

pub mod compare;
pub mod gather;
mod hooks;
pub mod hop;
pub mod mesh;
pub mod narrative;
pub mod nft;
pub mod packet;
pub mod planned;
mod question;
pub mod render;
mod routing;
pub mod rule;
pub mod state;
pub mod story;
#[cfg(test)]
mod tests;
pub mod world;

use serde::{Deserialize, Serialize};

use hop::Hop;
use story::Leg;

pub use question::{Asked, Prepared, ask, prepare};

/// The predicted way of a connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    /// Who begins it.
    pub from: String,
    /// Where to.
    pub to: String,
    /// How the pod that begins it is captured: `node, tunnel`, `node, hybrid`, `inpod, redirect`, `inpod, tproxy`,
    /// `inpod, nftables`; none for one that is not, and for anybody else.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capture: Option<String>,
    /// Its legs in order.
    pub legs: Vec<Leg>,
    /// What could not be read, or is not evaluated.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl Explanation {
    /// Who, where to, and how captured.
    pub fn heading(&self) -> String {
        let capture = self.capture.as_ref();
        let capture = capture.map_or_else(String::new, |capture| format!("   ({capture})"));
        format!("{} → {}{capture}", self.from, self.to)
    }

    /// All hops in order.
    pub fn hops(&self) -> impl Iterator<Item = &Hop> {
        let walks = self.legs.iter().flat_map(|leg| &leg.walks);
        walks.flat_map(|walk| &walk.hops)
    }

    /// How many hops are not as planned.
    pub fn differences(&self) -> usize {
        self.hops().filter(|hop| hop.differs.is_some()).count()
    }
}
