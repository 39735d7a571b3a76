//! Side-by-side measurement: the same load through each capture, and through none, in interleaved rounds; with proof, from
//! captured packets and device counters, of the path that the bytes took.
//!
//! [`run()`] does it all. [`variant`] and [`case`] say what is compared, [`stage`] is where, [`load`] makes the traffic,
//! [`accounting`] reads CPU time and [`counters`] devices, [`proof`] judges captured packets ([`tap`], [`pcap`],
//! [`tls_records`]), [`report`] keeps every sample, [`statistics`] and [`table`] print them.

pub mod accounting;
pub mod case;
pub mod counters;
pub mod environment;
pub mod external;
pub mod geneve;
pub mod interrupt;
pub mod load;
pub mod pcap;
pub mod pinning;
pub mod proof;
pub mod relayed;
pub mod report;
pub mod run;
pub mod stage;
pub mod statistics;
pub mod table;
pub mod tap;
pub mod tls_records;
pub mod variant;

pub use case::{Case, Path};
pub use run::{BenchSpec, run};
pub use variant::Variant;
