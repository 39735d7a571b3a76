//! Backend 1, `node`: ipset, iptables marks and policy routing on the node steer pod traffic through two overlay tunnels
//! into the proxy's network namespace, where TPROXY hands it to one set of listeners.
//!
//! The whole mode is two screens: [`plan`] (kernel objects as data) and [`scope`] (sockets). [`facts`] has its numbers.
#![forbid(unsafe_code)]

pub mod facts;
pub mod plan;
pub mod scope;
