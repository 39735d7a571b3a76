//! Experiments: a scripted migration of a lab's pods under load, judged by packets, access logs and every byte.
//!
//! [`file`](mod@file) is what a user writes, [`engine`] the load (a process in each pod, [`pattern`] what it says), [`driver`] runs it,
//! [`steps`] does what the script says, [`wire`] listens on devices, [`access`] reads the proxies' logs, [`judge`] says what
//! held, [`result`](mod@result) is result.json and [`report`] its short form. [`run()`] does it all.

pub mod access;
pub mod driver;
pub mod engine;
pub mod file;
pub mod judge;
pub mod pattern;
pub mod report;
pub mod result;
pub mod run;
pub mod steps;
pub mod timeline;
pub mod wire;

pub use file::Experiment;
pub use result::Outcome;
pub use run::{Order, run};

use std::time::{SystemTime, UNIX_EPOCH};

/// The time of day in microseconds since 1970: what processes and captures of one machine have in common.
pub fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    })
}
