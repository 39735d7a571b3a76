//! The program: command line, choice of mode, agent, proxy start-up. The only place that names both backends.
#![forbid(unsafe_code)]

pub mod agent;
pub mod agent_client;
pub mod bug_report;
mod calendar;
pub mod cli;
pub mod cni;
pub mod control;
mod descriptors;
pub mod doctor;
pub mod explain;
pub mod logging;
pub mod options;
pub mod proxy;
pub mod proxy_client;
pub mod run_dir;
pub mod trace;
pub mod unix_http;
