//! Addresses of hostnames.

use std::fmt;
use std::io;
use std::net::IpAddr;

use futures_util::future::BoxFuture;

/// Finds the addresses of workloads that are known by hostname only.
pub trait Resolve: fmt::Debug + Send + Sync + 'static {
    /// All addresses of `hostname`, in order of preference.
    fn resolve<'a>(&'a self, hostname: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>>;
}

/// Asks as every program in the proxy's own namespaces does.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve<'a>(&'a self, hostname: &'a str) -> BoxFuture<'a, io::Result<Vec<IpAddr>>> {
        Box::pin(async move {
            let found = tokio::net::lookup_host((hostname, 0)).await?;
            Ok(found.map(|address| address.ip().to_canonical()).collect())
        })
    }
}
