//! Side-by-side measurement: the same load through each capture, and through none, in interleaved rounds; with proof, from
//! captured packets and device counters, of the path that the bytes took.
//!
//! [`run()`] does it all. [`variant`] and [`case`] say what is compared, [`load`] makes the traffic with iperf3 and wrk,
//! [`accounting`] reads CPU time, [`proof`] judges captured packets ([`pcap`], [`tls_records`]), [`statistics`] and
//! [`report`] turn samples into a table.

pub mod accounting;
pub mod case;
pub mod load;
pub mod pcap;
pub mod proof;
pub mod report;
pub mod run;
pub mod statistics;
pub mod tls_records;
pub mod variant;

pub use case::{Case, Path};
pub use run::{BenchSpec, run};
pub use variant::Variant;
