//! What the proxy knows of the mesh: workloads, services, policies.
//!
//! A [`Snapshot`] is immutable and indexed; the [`Store`] holds the one in force and tells subscribers of a next one.
//! Snapshots are made from a file in the field's LOCAL_XDS form ([`local_xds`]), or by applying the [`Change`]s that a
//! control plane sends.

mod address;
pub mod balancing;
#[cfg(test)]
mod fuzz;
pub mod gateway;
pub mod local_xds;
mod on_demand;
pub mod persistent_map;
pub mod policy;
mod ranges;
pub mod service;
pub mod snapshot;
pub mod store;
mod update;
pub mod workload;

pub use address::{InvalidAddress, NamespacedHostname, NetworkAddress, NetworkRange};
pub use on_demand::OnDemand;
pub use policy::{Policy, authorize};
pub use service::Service;
pub use snapshot::{Snapshot, SnapshotError};
pub use store::Store;
pub use update::Change;
pub use workload::Workload;
