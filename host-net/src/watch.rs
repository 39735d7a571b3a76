//! Hearing of changes in a namespace when they happen, instead of looking again and again.
//!
//! The kernel tells of changes of links, addresses, routes and policy routing rules (rtnetlink groups) and of rules written
//! through nf_tables, which includes `iptables-nft` (`NFNLGRP_NFTABLES`). It does not tell of changes of legacy iptables,
//! of ipsets and of sysctls: those have to be looked at.

use std::io;

use futures_util::FutureExt;
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_ROUTE};
use netlink_sys::{AsyncSocket, AsyncSocketExt, TokioSocket};

use crate::netns::Netns;

/// `RTNLGRP_LINK`; `RTNLGRP_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`; the same of IPv6 (linux/rtnetlink.h).
const ROUTE_GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// `NFNLGRP_NFTABLES` (linux/netfilter/nfnetlink.h).
const NFTABLES_GROUP: u32 = 7;
/// What is told is not read beyond this: that something was told is enough.
const BUFFER: usize = 4096;

/// Hears of changes in one namespace, for as long as it is held.
pub struct Watch {
    route: TokioSocket,
    nftables: TokioSocket,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Begins to listen in a namespace. Must be called on a Tokio runtime.
    pub fn new(netns: &Netns) -> io::Result<Self> {
        Ok(Self {
            route: subscribe(netns, NETLINK_ROUTE, &ROUTE_GROUPS)?,
            nftables: subscribe(netns, NETLINK_NETFILTER, &[NFTABLES_GROUP])?,
        })
    }

    /// Waits until something has changed since the last call. Who changed it is not told.
    pub async fn changed(&mut self) -> io::Result<()> {
        tokio::select! {
            told = heard(&mut self.route) => told,
            told = heard(&mut self.nftables) => told,
        }
    }
}

fn subscribe(netns: &Netns, protocol: isize, groups: &[u32]) -> io::Result<TokioSocket> {
    let mut socket = netns.run(|| TokioSocket::new(protocol))??;
    socket.socket_mut().bind_auto()?;
    for group in groups {
        socket.socket_mut().add_membership(*group)?;
    }
    Ok(socket)
}

/// Waits for news and takes all that is there.
async fn heard(socket: &mut TokioSocket) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(BUFFER);
    told(socket.recv(&mut buffer).await)?;
    while let Some(more) = {
        buffer.clear();
        socket.recv(&mut buffer).now_or_never()
    } {
        told(more)?;
    }
    Ok(())
}

/// That messages were lost is news, too.
fn told(received: io::Result<()>) -> io::Result<()> {
    match received {
        Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => Ok(()),
        received => received,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use std::process::Command;
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    const SOON: Duration = Duration::from_secs(20);

    async fn hears(netns: &Netns, watch: &mut Watch, command: &str) {
        let quiet = timeout(Duration::from_millis(50), watch.changed()).await;
        assert!(quiet.is_err(), "before `{command}` nothing happens");
        let status = netns.run(|| Command::new("sh").args(["-c", command]).status());
        assert!(status.unwrap().unwrap().success(), "{command}");
        timeout(SOON, watch.changed()).await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn changes_of_routes_rules_and_nftables_are_heard_and_those_elsewhere_are_not() {
        let (netns, other) = (
            Netns::create_unnamed().unwrap(),
            Netns::create_unnamed().unwrap(),
        );
        let (mut watch, mut elsewhere) = (Watch::new(&netns).unwrap(), Watch::new(&other).unwrap());
        hears(&netns, &mut watch, "ip link set lo up").await;
        hears(&netns, &mut watch, "ip rule add pref 7 table 7").await;
        hears(
            &netns,
            &mut watch,
            "ip route add local 10.0.0.0/8 dev lo table 7",
        )
        .await;
        hears(&netns, &mut watch, "iptables-nft -t nat -N some").await;
        hears(&netns, &mut watch, "nft flush ruleset").await;
        let quiet = timeout(Duration::from_millis(50), elsewhere.changed()).await;
        assert!(quiet.is_err());
    }
}
