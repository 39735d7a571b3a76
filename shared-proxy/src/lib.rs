//! The core: a Layer-4 mutual-TLS node proxy that does not know how its traffic is captured.
//!
//! Read a connection top to bottom: [`capture`] (the seam through which it arrives) → [`core`] (listeners of a scope) →
//! [`outbound`] or [`inbound`] → [`pool`] and [`hbone`] (HTTP/2 CONNECT over mutual TLS) → [`relay`] (bytes both ways).
//! Beside it: [`dns`] (the queries of captured pods), [`socks5`] (their requests), [`state`] (workloads, services, policies), [`identity`] (certificates and their checks), [`tls_stream`],
//! [`telemetry`].
#![forbid(unsafe_code)]

pub mod capture;
pub mod core;
pub mod dns;
pub mod drain;
mod file_changes;
pub mod hbone;
pub mod identity;
pub mod inbound;
pub mod outbound;
pub mod pool;
pub mod ports;
pub mod probe;
pub mod relay;
pub mod socks5;
pub mod state;
pub mod telemetry;
pub mod tls_stream;
