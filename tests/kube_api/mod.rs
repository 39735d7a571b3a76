//! A server that speaks the part of the Kubernetes API that agents and `kubectl` use with pods, namespaces and events: list,
//! watch with resource versions, bookmarks and 410, selectors, merge and strategic merge patches, the status subresource,
//! events, discovery. It keeps nothing on a disk, and a UID that it is given, so that its pods can be those of a lab.
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

mod answers;
mod patch;
pub mod real;
mod selector;
mod serve;
mod store;

pub use patch::strategic;
pub use serve::Server;
pub use store::{Kind, Store};
