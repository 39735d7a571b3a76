//! Client and server against each other, and the client against a server that misbehaves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::disallowed_methods)]

mod certificates;
mod discovery;
mod edges;
mod hostile;
mod rig;
mod scale;
mod script;
