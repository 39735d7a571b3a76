//! Both ends of the mesh control plane: delta discovery (ADS) and certificates on request, over gRPC.
//!
//! [`ads`] follows a control plane and keeps a store like its own; [`ca`] asks it for certificates; [`server`] is one,
//! with a mesh from YAML files and a built-in CA. All contact with gRPC is in this crate: the data plane does not know it.
#![forbid(unsafe_code)]

pub mod ads;
pub mod backoff;
pub mod ca;
pub mod convert;
#[cfg(test)]
mod fuzz;
pub mod messages;
pub mod server;
pub mod transport;
