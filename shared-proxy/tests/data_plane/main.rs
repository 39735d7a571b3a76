//! The whole data plane over loopback: client → outbound → mutual TLS and HTTP/2 → inbound → application. Two cores stand
//! for two nodes; no root is needed.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod bytes;
mod ending;
mod hostile;
mod loops;
mod mesh;
mod outbound_rows;
mod peer;
mod policy_rows;
mod probe;
mod protocol;
mod refusals;
mod retry;
mod revoked;
mod server_rows;
mod sharing;
mod socks5;
mod switching;
