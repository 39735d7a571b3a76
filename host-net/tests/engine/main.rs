//! The engine on a real kernel: every test makes namespaces of its own and needs root.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod crash;
mod drift;
mod neighbours;
mod plans;
mod rollback;
mod round_trip;
mod stage;
mod strangers;
mod together;
