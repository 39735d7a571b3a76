//! The whole data plane over loopback: client → outbound → mutual TLS and HTTP/2 → inbound → application. Two cores stand
//! for two nodes; no root is needed.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod bytes;
mod ending;
mod mesh;
mod protocol;
mod refusals;
mod sharing;
