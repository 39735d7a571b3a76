//! A running pod leaves the mesh, and its connections do not notice.
//!
//! What captures goes first, so that nothing more comes to the proxy; what carries the connections that were captured
//! stays: in the pod the hooks of its tables, the marks' chains, the rule and the route by which answers find the proxy, on
//! the node the reverse path filter. When the last of them has ended, or the time is over, that goes too. A pod that drains
//! is on the list as such, so an agent that starts meanwhile goes on where the last one ended.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::anyhow;
use host_net::netns::Netns;
use host_net::sockets::{Connection, connections};
use inpod_redirect::facts::{MARK_PROXY, PROBE_ADDRESS, PROBE_ADDRESS6};
use inpod_redirect::zds::Delays;
use nix::sys::socket::SockaddrStorage;
use serde::{Deserialize, Serialize};
use shared_proxy::capture::{DNS_PORT, OUTBOUND_PORT};
use tokio::time::{sleep, timeout};

use super::enrol::CONFIRM_WITHIN;
use super::ledger::{Ledger, Way};
use super::{Agent, Pod, PodState};
use crate::options::Capture;

/// Time between two looks at what is left of the connections of pods that drain.
const LOOKS_EVERY: Duration = Duration::from_secs(1);
/// The proxy resets what is left at the deadline; the resets find their way for as long.
pub(super) const RESETS_WITHIN: Duration = Duration::from_secs(1);

/// Open TCP connections of a pod, by the way that they go.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodConnections {
    /// UID of the pod.
    pub uid: String,
    /// Those that do not go through the proxy: they began before the pod was captured, or after that ended.
    pub outside: usize,
    /// Those with the node itself, its probes above all, which no capture takes.
    #[serde(default)]
    pub node: usize,
    /// Those that go through the proxy.
    pub through: usize,
    /// Those by IPv6 where IPv6 is not captured: it is dropped, so they were cut.
    #[serde(default)]
    pub cut: usize,
}

/// What is said of a pod that leaves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LettingGo {
    /// `namespace/name`.
    pub pod: String,
    /// Connections that go on through the proxy.
    pub through: usize,
    /// For so many seconds at most.
    pub seconds: u64,
}

/// What is waited for.
#[derive(Debug, Default)]
pub(super) struct Awaited {
    /// The proxy's ends of connections that are to end, by UID of the pod.
    ends: Mutex<BTreeMap<String, BTreeSet<Connection>>>,
    /// UIDs of pods of which the proxy may not have heard that they drain.
    untold: Mutex<BTreeSet<String>>,
}

impl Awaited {
    /// How many are left of those that were there at the first look: what begins later is another pod's.
    pub(super) fn left(&self, uid: &str, present: BTreeSet<Connection>) -> usize {
        let mut awaited = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        match awaited.get_mut(uid) {
            Some(left) => {
                left.retain(|end| present.contains(end));
                left.len()
            }
            None => {
                let count = present.len();
                awaited.insert(uid.to_owned(), present);
                count
            }
        }
    }

    pub(super) fn forget(&self, uid: &str) {
        let mut awaited = self.ends.lock().unwrap_or_else(PoisonError::into_inner);
        awaited.remove(uid);
        self.untold().remove(uid);
    }

    fn untold(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.untold.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Agent {
    /// Stops capturing a running pod: what is new passes beside the proxy, what is open goes on for up to `within`.
    pub(super) async fn let_go(&self, uid: &str, within: Duration) -> anyhow::Result<LettingGo> {
        let _alone = self.busy.lock(uid).await;
        let pod = self
            .pods
            .get(uid)
            .filter(|pod| matches!(pod.state, PodState::Captured | PodState::Draining))
            .ok_or_else(|| anyhow!("the pod is not captured"))?;
        self.drain(&pod, within).await
    }

    /// As [`Agent::let_go`], of a pod that nobody else is busy with.
    pub(super) async fn drain(&self, pod: &Pod, within: Duration) -> anyhow::Result<LettingGo> {
        let name = pod.qualified_name();
        let ledger = (pod.state == PodState::Captured).then(|| {
            (
                Ledger::begun(pod, pod.mode.into(), Way::None),
                self.earlier(pod),
            )
        });
        let pod = Pod {
            state: PodState::Draining,
            drains_until: Some(now().saturating_add(within.as_secs())),
            // What begins from here on is not captured, and goes on if it is enrolled again.
            settled: false,
            ..pod.clone()
        };
        self.awaited.forget(&pod.uid);
        self.pods.put(pod.clone())?;
        self.make_redirect(&pod).await?;
        self.tell_that_it_drains(&pod, within).await;
        let ends = self.proxy_ends(&pod)?;
        self.awaited.left(&pod.uid, ends.into_iter().collect());
        let through = self.connections_of(&pod).map_or(0, |all| all.through);
        if let Some((ledger, earlier)) = ledger {
            let lines = self.lines(&pod, Some(pod.mode), None, &earlier, &Delays::default());
            self.ledgers.add(Ledger {
                until: pod.drains_until,
                ..ledger.with(lines.unwrap_or_default())
            });
        }
        tracing::info!(
            pod = name,
            through,
            within = ?within,
            "pod captures nothing new; its connections through the proxy go on"
        );
        Ok(LettingGo {
            pod: name,
            through,
            seconds: within.as_secs(),
        })
    }

    /// The proxy first takes what waits in its queues, then no more. One that does not hear of it is to keep the pod until
    /// it does: from a pod that nobody names any more it would soon cut what goes on.
    async fn tell_that_it_drains(&self, pod: &Pod, within: Duration) {
        let name = pod.qualified_name();
        match timeout(CONFIRM_WITHIN, self.zds.del(&pod.uid, within)).await {
            Ok(Ok(())) => {
                self.awaited.untold().remove(&pod.uid);
                return;
            }
            Ok(Err(error)) => {
                tracing::warn!(pod = name, %error, "the proxy did not confirm that a pod drains");
            }
            Err(_) => tracing::warn!(
                pod = name,
                "the proxy did not confirm within {CONFIRM_WITHIN:?} that a pod drains"
            ),
        }
        self.tell_later_that_it_drains(&pod.uid);
    }

    /// Has a proxy that connects keep a pod that drains, and hear of that.
    pub(super) fn tell_later_that_it_drains(&self, uid: &str) {
        self.zds.expect(uid);
        self.awaited.untold().insert(uid.to_owned());
    }

    async fn tell_of_drains(&self) {
        if !self.status().proxy_ready {
            return;
        }
        let untold = self.awaited.untold().clone();
        for uid in untold {
            let _alone = self.busy.lock(&uid).await;
            let pod = self.pods.get(&uid);
            match pod.filter(|pod| pod.state == PodState::Draining) {
                Some(pod) => {
                    let within = self.drain_time(Some(&pod));
                    self.tell_that_it_drains(&pod, within).await;
                }
                None => drop(self.awaited.untold().remove(&uid)),
            }
        }
    }

    /// How long a pod may drain: as long as was said before, or else the agent's own time.
    pub(super) fn drain_time(&self, known: Option<&Pod>) -> Duration {
        known
            .and_then(|pod| pod.drains_until)
            .map_or(self.config.drain, |until| {
                Duration::from_secs(until.saturating_sub(now()))
            })
    }

    /// A running pod that an earlier agent was enrolling may have connections through the proxy by now: it drains.
    pub(super) fn resume_draining(&self) -> anyhow::Result<()> {
        for pod in self.pods.all() {
            if pod.live && pod.state == PodState::Pending {
                let within = self.drain_time(Some(&pod));
                self.pods.put(Pod {
                    state: PodState::Draining,
                    drains_until: Some(now().saturating_add(within.as_secs())),
                    ..pod
                })?;
            }
        }
        Ok(())
    }

    /// Ends what has drained, for ever.
    pub(super) async fn attend_drains(&self) {
        loop {
            sleep(LOOKS_EVERY).await;
            self.tell_of_drains().await;
            let drains = |pod: &Pod| pod.state == PodState::Draining;
            for pod in self.pods.all().into_iter().filter(drains) {
                if let Err(error) = self.end_if_drained(&pod).await {
                    tracing::error!(
                        pod = pod.qualified_name(),
                        error = format!("{error:#}"),
                        "a pod that has drained left something behind"
                    );
                }
            }
            self.end_left_captures().await;
        }
    }

    /// The connections of a pod that do not go through the proxy.
    pub(super) fn outside(&self, pod: &Pod) -> anyhow::Result<BTreeSet<Connection>> {
        let in_pod = connections(&pod.open_netns()?)?;
        let proxys = self.proxy_ends(pod)?;
        Ok(sort(
            pod,
            &self.nodes_of(pod)?,
            &in_pod,
            &proxys,
            self.captures_ipv6(pod),
        )
        .outside)
    }

    /// The addresses from which the node itself speaks with a pod.
    pub(super) fn nodes_of(&self, pod: &Pod) -> anyhow::Result<BTreeSet<IpAddr>> {
        Ok(match pod.mode {
            // What the node says to a captured pod comes from here; what it said before is older than the capture.
            Capture::Inpod => BTreeSet::from([PROBE_ADDRESS.into(), PROBE_ADDRESS6.into()]),
            Capture::Node => addresses_of(&self.host)?,
        })
    }

    /// Has the account of the pod's last change say which of the connections that it kept have ended.
    pub(super) fn look_at_kept(&self, pod: &Pod) {
        let open = pod.open_netns().and_then(|netns| connections(&netns));
        if let Ok(open) = open {
            let present = open.iter().map(|end| (end.local, end.peer)).collect();
            self.ledgers.look(&pod.uid, &present);
        }
    }

    async fn end_if_drained(&self, pod: &Pod) -> anyhow::Result<()> {
        self.look_at_kept(pod);
        // Where the kernel cannot be asked, the time decides.
        let left = self
            .proxy_ends(pod)
            .ok()
            .map(|ends| self.awaited.left(&pod.uid, ends.into_iter().collect()));
        let until = pod.drains_until.unwrap_or_default();
        let over = now() >= until.saturating_add(RESETS_WITHIN.as_secs());
        if left != Some(0) && !over {
            return Ok(());
        }
        let mut ended = false;
        // Whoever enrolled or drained it anew meanwhile has changed its entry.
        self.unenrol(&pod.uid, |found| found == pod).await?;
        if self.pods.get(&pod.uid).is_none() {
            self.awaited.forget(&pod.uid);
            self.ledgers.end(&pod.uid);
            ended = true;
        }
        if ended {
            tracing::info!(
                pod = pod.qualified_name(),
                cut = left.unwrap_or_default(),
                "pod has drained"
            );
        }
        Ok(())
    }

    /// The open connections of those pods that `wanted` means and that can be looked into.
    pub(super) fn connections_of_all(&self, wanted: impl Fn(&Pod) -> bool) -> Vec<PodConnections> {
        let pods = self.pods.all().into_iter().filter(wanted);
        pods.filter_map(|pod| self.connections_of(&pod).ok())
            .collect()
    }

    /// The open connections of a pod.
    pub(super) fn connections_of(&self, pod: &Pod) -> anyhow::Result<PodConnections> {
        let in_pod = connections(&pod.open_netns()?)?;
        let proxys = self.proxy_ends(pod)?;
        let sorted = sort(
            pod,
            &self.nodes_of(pod)?,
            &in_pod,
            &proxys,
            self.captures_ipv6(pod),
        );
        Ok(PodConnections {
            uid: pod.uid.clone(),
            outside: sorted.outside.len(),
            through: sorted.through.len(),
            node: sorted.node.len(),
            cut: sorted.cut.len(),
        })
    }

    /// Whether the pod's IPv6 goes through the proxy; else it is dropped.
    pub(super) fn captures_ipv6(&self, pod: &Pod) -> bool {
        match pod.mode {
            Capture::Node => self
                .node_setup()
                .is_some_and(|setup| setup.host_facts.ends6.is_some()),
            Capture::Inpod => pod.addresses.iter().any(IpAddr::is_ipv6),
        }
    }

    /// The proxy's sockets that speak with the pod, or for it.
    fn proxy_ends(&self, pod: &Pod) -> anyhow::Result<Vec<Connection>> {
        let mut ends = Vec::new();
        for capture in pod.captures() {
            ends.extend(self.proxy_ends_by(pod, capture)?);
        }
        Ok(ends)
    }

    /// As [`Agent::proxy_ends`], of one capture.
    pub(super) fn proxy_ends_by(
        &self,
        pod: &Pod,
        capture: Capture,
    ) -> anyhow::Result<Vec<Connection>> {
        let mut ends = match capture {
            Capture::Inpod => connections(&pod.open_netns()?)?,
            Capture::Node => {
                let setup = self
                    .node_setup()
                    .ok_or_else(|| anyhow!("no proxy has connected since the agent started"))?;
                connections(&setup.proxy)?
            }
        };
        let of_pod = |at: SocketAddr| pod.addresses.contains(&at.ip());
        ends.retain(|end| match capture {
            Capture::Inpod => is_proxys(end),
            Capture::Node => of_pod(end.local) || of_pod(end.peer),
        });
        Ok(ends)
    }
}

/// All addresses in a namespace.
fn addresses_of(netns: &Netns) -> anyhow::Result<BTreeSet<IpAddr>> {
    let found = netns.run(|| {
        let interfaces = nix::ifaddrs::getifaddrs()?;
        let ips = interfaces.filter_map(|interface| ip(&interface.address?));
        Ok::<_, nix::Error>(ips.collect())
    });
    Ok(found??)
}

fn ip(address: &SockaddrStorage) -> Option<IpAddr> {
    let v4 = address.as_sockaddr_in().map(|at| IpAddr::from(at.ip()));
    v4.or_else(|| address.as_sockaddr_in6().map(|at| IpAddr::from(at.ip())))
}

fn is_proxys(end: &Connection) -> bool {
    end.mark & MARK_PROXY.mask == MARK_PROXY.value
}

/// A pod's connections by the way that they go, as in [`PodConnections`].
#[derive(Default)]
pub(super) struct Sorted {
    pub(super) outside: BTreeSet<Connection>,
    pub(super) through: BTreeSet<Connection>,
    pub(super) node: BTreeSet<Connection>,
    pub(super) cut: BTreeSet<Connection>,
}

/// An application's connection goes through the proxy if the proxy has a socket that speaks with it: with the address of
/// its peer, or, for redirected ones, from one of the ports that they are redirected to.
pub(super) fn sort(
    pod: &Pod,
    nodes: &BTreeSet<IpAddr>,
    in_pod: &[Connection],
    proxys: &[Connection],
    captures_ipv6: bool,
) -> Sorted {
    let peers: BTreeSet<(SocketAddr, SocketAddr)> =
        proxys.iter().map(|end| (end.peer, end.local)).collect();
    // Two connections to different servers may have one port, and only one of them may have been redirected.
    let mut redirected: BTreeMap<SocketAddr, usize> = BTreeMap::new();
    for end in proxys {
        if [OUTBOUND_PORT, DNS_PORT].contains(&end.local.port()) {
            *redirected.entry(end.peer).or_default() += 1;
        }
    }
    let within = |ip: IpAddr| ip.is_loopback() || pod.addresses.contains(&ip);
    let mut sorted = Sorted::default();
    for end in in_pod {
        if is_proxys(end) {
            continue;
        }
        if peers.contains(&(end.local, end.peer)) {
            sorted.through.insert(*end);
        } else if let Some(left @ 1..) = redirected.get_mut(&end.local) {
            *left -= 1;
            sorted.through.insert(*end);
        } else if within(end.peer.ip()) {
            continue;
        } else if nodes.contains(&end.peer.ip()) {
            sorted.node.insert(*end);
        } else if end.peer.is_ipv6() && !captures_ipv6 && pod.state != PodState::Draining {
            sorted.cut.insert(*end);
        } else {
            sorted.outside.insert(*end);
        }
    }
    sorted
}

pub(super) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
