//! The program: command line, choice of mode, agent, proxy start-up. The only place that names both backends.
#![forbid(unsafe_code)]

pub mod cni;
pub mod run_dir;
pub mod unix_http;
