//! Backend 2, `inpod`: redirect rules and the proxy's listeners inside each pod's network namespace, which the node agent
//! hands to the proxy over a Unix socket ([`zds`]).
//!
//! The whole mode is two screens: [`plan`] (kernel objects as data) and [`scope`] (sockets). [`facts`] has its numbers.
#![forbid(unsafe_code)]

pub mod extent;
pub mod facts;
pub mod plan;
pub mod scope;
pub mod zds;
