//! Both ends of the mesh control plane: delta discovery (ADS) and certificates on request, over gRPC.
#![forbid(unsafe_code)]

pub mod convert;
pub mod messages;
