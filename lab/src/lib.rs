//! The lab: nodes, pods and traffic in network namespaces; load, measurement and reports.
//!
//! [`topology`] says what a lab consists of, [`standing`] builds and removes it, [`traffic`] is the load generator,
//! [`mod@bench`] measures, [`guest`] boots another kernel to do so in.
#![forbid(unsafe_code)]

pub mod bench;
pub mod experiment;
pub mod guest;
pub mod standing;
pub mod topology;
pub mod traffic;
