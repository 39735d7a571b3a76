//! What both captures do to a Linux host, as data.
//!
//! A capture mode describes the kernel objects that it wants as a [`plan::Plan`]: a list of [`plan::Step`]s for one
//! network namespace. This crate makes them real ([`engine::apply`]), compares them with the kernel
//! ([`engine::inspect`]), takes them away again ([`engine::remove`]) and prints them as the commands an operator
//! would have typed ([`commands::as_commands`]). It knows no mode and no proxy.
//!
//! Modules, bottom up: [`netns`] (namespaces), [`netlink`] (links, addresses, rules, routes), [`ipset`], [`iptables`],
//! [`nft`], [`sysctl`], then [`plan`], [`journal`], [`engine`], [`commands`], [`dump`]; beside
//! them [`watch`] (hearing of changes) and [`sockets`] (who listens).
#![deny(unsafe_code)]

pub mod commands;
pub mod dump;
pub mod engine;
pub mod ipset;
pub mod iptables;
pub mod journal;
pub mod netlink;
pub mod netns;
mod nfnetlink;
pub mod nft;
pub mod plan;
pub mod sockets;
pub mod sysctl;
pub mod watch;
