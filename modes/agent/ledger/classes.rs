//! Which class a connection is of.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use host_net::sockets::{Connection, connections};
use inpod_redirect::zds::Delays;

use super::{Class, Line, Way};
use crate::agent::draining::sort;
use crate::agent::{Agent, Pod};
use crate::options::Capture;

/// The pod's connections before a change.
#[derive(Debug, Default)]
pub(crate) struct Earlier(BTreeSet<(SocketAddr, SocketAddr)>);

impl Agent {
    /// What is open before a change. Nothing if the pod cannot be looked into.
    pub(crate) fn earlier(&self, pod: &Pod) -> Earlier {
        let open = pod.open_netns().and_then(|netns| connections(&netns));
        let ends = open.unwrap_or_default().into_iter();
        Earlier(ends.map(|end| (end.local, end.peer)).collect())
    }

    /// Every connection of the pod that leaves it, in its class: right after it has changed `from` one capture `to`
    /// another, of which either may be none.
    ///
    /// # Errors
    /// The kernel does not tell.
    pub(crate) fn lines(
        &self,
        pod: &Pod,
        from: Option<Capture>,
        to: Option<Capture>,
        earlier: &Earlier,
        delays: &Delays,
    ) -> anyhow::Result<Vec<Line>> {
        let mut nodes = BTreeSet::new();
        let mut ends = Vec::new();
        for capture in from.into_iter().chain(to.filter(|_| to != from)) {
            let by = Pod {
                mode: capture,
                ..pod.clone()
            };
            nodes.extend(self.nodes_of(&by)?);
            ends.push((capture, self.proxy_ends_by(pod, capture)?));
        }
        let netns = pod.open_netns()?;
        let in_pod = connections(&netns)?;
        // Of one that is ending the proxy's end may be gone by now, of one that begins it may have come just now.
        for (capture, ends) in &mut ends {
            ends.extend(self.proxy_ends_by(pod, *capture)?);
            ends.sort_unstable();
            ends.dedup();
        }
        let ipv6 = to.is_none() || self.captures_ipv6(pod);
        let mut waited = Waited::of(delays);
        let mut lines = BTreeMap::new();
        let line = |class, end: &Connection, by| Line {
            class,
            local: end.local,
            peer: end.peer,
            by,
            ended: false,
        };
        for (capture, by) in &ends {
            let is_to = Some(*capture) == to;
            for end in sort(pod, &nodes, &in_pod, by, ipv6).through {
                let was = earlier.0.contains(&(end.local, end.peer));
                let class = match (was, is_to) {
                    (true, _) => Class::Kept,
                    (false, _) if waited.take(&end) => Class::Delayed,
                    (false, true) => Class::New,
                    (false, false) => Class::Kept,
                };
                let by = (*capture).into();
                let entry = lines.entry((end.local, end.peer));
                entry.or_insert_with(|| line(class, &end, by));
            }
        }
        let proxys = ends.iter().flat_map(|(_, ends)| ends.iter().copied());
        let proxys: Vec<Connection> = proxys.collect();
        let mut rest = sort(pod, &nodes, &in_pod, &proxys, ipv6);
        if !rest.outside.is_empty() {
            // What has ended since was ending.
            let present: BTreeSet<Connection> = connections(&netns)?.into_iter().collect();
            rest.outside.retain(|end| present.contains(end));
        }
        for (class, found) in [
            (Class::Outside, rest.outside),
            (Class::Node, rest.node),
            (Class::Cut, rest.cut),
        ] {
            for end in found {
                let was = earlier.0.contains(&(end.local, end.peer));
                // Where nothing captures, what begins goes beside the proxy like what is older.
                let class = match (class, to) {
                    (Class::Outside, None) if !was => Class::New,
                    (class, _) => class,
                };
                let entry = lines.entry((end.local, end.peer));
                entry.or_insert_with(|| line(class, &end, Way::None));
            }
        }
        let ends = ends.iter();
        let ends = ends.flat_map(|(by, ends)| ends.iter().map(|end| (end, Way::from(*by))));
        for (end, by) in ends {
            // One of the pod's, seen from its other end.
            if !lines.contains_key(&(end.peer, end.local)) {
                let entry = lines.entry((end.local, end.peer));
                entry.or_insert_with(|| line(Class::Proxy, end, by));
            }
        }
        Ok(lines.into_values().collect())
    }
}

/// Connections that waited, to be found among those that are open afterwards.
struct Waited {
    /// Those whose client is known by its port.
    exactly: BTreeSet<(SocketAddr, SocketAddr)>,
    /// How many came out of tunnels, by the client's address: the pod sees a port that the proxy chose.
    tunnelled: BTreeMap<(IpAddr, SocketAddr), usize>,
}

impl Waited {
    fn of(delays: &Delays) -> Self {
        let mut waited = Self {
            exactly: BTreeSet::new(),
            tunnelled: BTreeMap::new(),
        };
        for one in &delays.connections {
            waited.exactly.insert((one.client, one.destination));
            let key = (one.client.ip(), one.destination);
            *waited.tunnelled.entry(key).or_default() += 1;
        }
        waited
    }

    /// Whether this one waited; each of those without a port is found once.
    fn take(&mut self, end: &Connection) -> bool {
        if self.exactly.contains(&(end.local, end.peer)) {
            return true;
        }
        match self.tunnelled.get_mut(&(end.peer.ip(), end.local)) {
            Some(left @ 1..) => {
                *left -= 1;
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use inpod_redirect::zds::Delayed;

    use super::*;

    #[test]
    fn one_that_waited_is_found_once() {
        let at = |text: &str| text.parse::<SocketAddr>().unwrap();
        let end = |local: &str, peer: &str| Connection {
            local: at(local),
            peer: at(peer),
            mark: 0,
        };
        let delayed = |client: &str, destination: &str| Delayed {
            client: at(client),
            destination: at(destination),
            waited: Duration::ZERO,
        };
        let connections = vec![
            delayed("10.0.0.1:4000", "10.0.0.2:80"),
            delayed("10.0.0.3:0", "10.0.0.1:80"),
        ];
        let mut waited = Waited::of(&Delays::new(connections, 2));
        assert!(waited.take(&end("10.0.0.1:4000", "10.0.0.2:80")));
        assert!(!waited.take(&end("10.0.0.1:4001", "10.0.0.2:80")));
        assert!(waited.take(&end("10.0.0.1:80", "10.0.0.3:12000")));
        assert!(!waited.take(&end("10.0.0.1:80", "10.0.0.3:12001")));
        assert!(!waited.take(&end("10.0.0.1:81", "10.0.0.3:12002")));
    }
}
