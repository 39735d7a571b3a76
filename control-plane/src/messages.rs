//! The messages of the control plane (proto3), written by hand from their field numbers.
//!
//! Decoding is tolerant, as the format wants: fields of any order, unknown ones skipped. Whether a message means something
//! is asked when it is converted ([`crate::convert`]).

pub mod authorization;
pub mod certificate;
pub mod discovery;
pub mod workload;

use prost::Message;

/// Type of [`workload::Address`] resources.
pub const ADDRESS_TYPE: &str = "type.googleapis.com/istio.workload.Address";
/// Type of [`authorization::Authorization`] resources.
pub const AUTHORIZATION_TYPE: &str = "type.googleapis.com/istio.security.Authorization";

/// A message of any type, and the name of the type.
#[derive(Clone, PartialEq, Message)]
pub struct Any {
    /// `type.googleapis.com/` and the message's full name.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The message.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: bytes::Bytes,
}

#[cfg(test)]
pub(crate) mod tests;
