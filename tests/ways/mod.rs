//! What a trace is held against: the stations of an article, and the grammar of a diagram.
#![allow(dead_code, reason = "each test program uses another part")]
#![allow(clippy::unwrap_used, clippy::expect_used)]

pub mod article;
pub mod mermaid;
pub mod styles;
