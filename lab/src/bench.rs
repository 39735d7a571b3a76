//! Side-by-side measurement: the same load through each capture, and through none, in interleaved rounds; with proof, from
//! captured packets and device counters, of the path that the bytes took.
//!
//! [`run()`] does it all. [`variant`] and [`case`] say what is compared, [`stage`] is where, [`load`] makes the traffic,
//! [`accounting`] reads CPU time and [`counters`] devices, [`proof`] judges captured packets ([`tap`], [`pcap`],
//! [`tls_records`]), [`report`] keeps every sample, [`summary`] says what they come to by [`statistics`], [`verdict`] whether
//! that is to be believed, [`table`] prints it. [`resume`] goes on with a broken-off run. [`mod@cost`] keeps accounts of each variant
//! alone, [`geneve`] runs all of it on another kernel.

pub mod accounting;
pub mod case;
pub mod cost;
pub mod counters;
pub mod delay;
pub mod environment;
pub mod equality;
pub mod external;
pub mod foreign;
pub mod geneve;
pub mod interrupt;
pub mod load;
pub mod pace;
pub mod pcap;
pub mod pinning;
pub mod proof;
pub mod relayed;
pub mod report;
pub mod resume;
pub mod run;
pub mod self_check;
pub mod stage;
pub mod statistics;
pub mod summary;
pub mod table;
pub mod tap;
pub mod tls_records;
pub mod variant;
pub mod verdict;

pub use case::{Case, Path};
pub use run::{BenchSpec, run};
pub use variant::Variant;
