//! The node's own objects: those of the node capture, which need the proxy's namespace, and those of the in-pod capture.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, anyhow};
use host_net::engine;
use host_net::netlink::Netlink;
use host_net::netns::Netns;
use host_net::plan::{Family, OverlayKind, Place, Plan};
use host_net::sysctl;
use inpod_redirect::zds::NodeConfiguration;
use inpod_redirect::zds::server::{ConnectionId, ProxyConnected, ProxyEvent, ProxyHook};
use ipnet::IpNet;
use node_redirect::facts::{OVERLAY_OVERHEAD, TUNNEL_IN, TUNNEL_OUT};
use node_redirect::plan::{Ends6, HostFacts, ProxyFacts};
use tokio::sync::mpsc;

use super::Agent;
use super::datapath::{refuse_bridge, refuse_taken_port};
use crate::options::{Capture, NodeFlow, resolve_overlay};

/// The node capture as it was set up for the connected proxy.
#[derive(Debug, Clone)]
pub(super) struct NodeSetup {
    /// The proxy's connection.
    pub(super) connection: ConnectionId,
    pub(super) proxy: Netns,
    pub(super) host_facts: HostFacts,
    pub(super) proxy_facts: ProxyFacts,
}

/// Under this name the journal has the objects of the proxy that is being replaced.
const PROXY_BEFORE: &str = "proxy-node-before";

impl Agent {
    pub(super) fn host_place(&self) -> Place {
        Place {
            label: "node".to_owned(),
            netns: self.host.clone(),
        }
    }

    pub(super) fn node_setup(&self) -> Option<NodeSetup> {
        self.status().setup.clone()
    }

    pub(super) fn flow(&self) -> node_redirect::plan::Flow {
        match self.config.variant.node_flow {
            NodeFlow::Hybrid => node_redirect::plan::Flow::Hybrid,
            NodeFlow::Tunnel => node_redirect::plan::Flow::Tunnel,
        }
    }

    /// Brings a place to a plan, from whatever the journal says an earlier agent left there.
    pub(super) async fn converge(&self, place: &Place, to: &Plan) -> anyhow::Result<()> {
        let record = self.journal.load(&to.name)?;
        if record
            .as_ref()
            .is_some_and(|record| record.netns != place.netns.id())
        {
            // The namespace was replaced. If the old one still stands, it gets its objects taken away.
            for error in engine::undo(&to.name, None, &self.journal).await {
                tracing::warn!(%error, plan = to.name, "the namespace of an earlier proxy or pod is not clean");
            }
        }
        let between = record
            .filter(|record| record.netns == place.netns.id())
            .and_then(|record| inpod_redirect::plan::between(&record.plan, to));
        for plan in between.iter().chain([to]) {
            engine::apply(place, &Plan::empty(&to.name), plan, &self.journal).await?;
        }
        Ok(())
    }

    /// The probe exemption of the in-pod capture.
    pub(super) async fn make_inpod_host_objects(&self) -> anyhow::Result<()> {
        if self.config.mode.uses_inpod() {
            let plan = inpod_redirect::plan::host(has_ipv6(&self.host));
            self.refuse_strangers_on_node(&plan).await?;
            self.converge(&self.host_place(), &plan)
                .await
                .context("probe exemption")?;
        }
        Ok(())
    }

    /// The node capture's objects in the node's and in the proxy's namespace.
    async fn set_up_node(&self, connection: ConnectionId, proxy: Netns) -> anyhow::Result<()> {
        let _alone = self.setting_up.lock().await;
        self.refuse_after_undo()?;
        let overlay = resolve_overlay(self.config.variant.overlay).await;
        let setup = facts(
            &self.host,
            connection,
            proxy,
            overlay,
            self.config.geneve_port,
            self.config.dns_capture,
        )
        .await?;
        let on_node = node_redirect::plan::host(&setup.host_facts, self.flow());
        self.refuse_strangers_on_node(&on_node).await?;
        let proxy_place = Place {
            label: "proxy".to_owned(),
            netns: setup.proxy.clone(),
        };
        let in_proxy = node_redirect::plan::proxy(&setup.proxy_facts, self.flow());
        // The earlier proxy's namespace keeps its objects while this one gets its own: it is in use.
        self.set_aside(&in_proxy.name, &setup.proxy).await?;
        self.converge(&proxy_place, &in_proxy).await?;
        // From here until the node leads to the new proxy, packets that begin a connection are lost, and sent again by
        // whoever waits for an answer: a connection that an earlier proxy took on would be stranded. Those that it has are
        // cut while it can still say so to their ends.
        let began = Instant::now();
        let before = self.node_setup();
        self.deafen(before.as_ref()).await;
        self.zds.take_node_pods_from_others(connection).await;
        if let Err(error) = self.converge(&self.host_place(), &on_node).await {
            self.go_back_to(before, &setup.proxy, &in_proxy.name).await;
            return Err(error);
        }
        tracing::info!(
            proxy = %setup.host_facts.proxy_ip,
            device = setup.host_facts.proxy_veth,
            overlay = %overlay,
            ipv6 = setup.host_facts.ends6.is_some(),
            changed_over_in = ?began.elapsed(),
            "node capture is set up"
        );
        self.take_back_aside(before.as_ref()).await;
        self.status().setup = Some(setup);
        self.converge_pods(Capture::Node).await;
        Ok(())
    }

    /// After the node's own objects could not be made, which took themselves back: takes away those in the namespace of the
    /// proxy that was to be led to, and puts back those of the one before it.
    async fn go_back_to(&self, before: Option<NodeSetup>, proxy: &Netns, plan: &str) {
        if before
            .as_ref()
            .is_some_and(|before| before.proxy.id() == proxy.id())
        {
            return;
        }
        for error in engine::undo(plan, Some(proxy), &self.journal).await {
            tracing::warn!(%error, "the namespace of a proxy that the node does not lead to is not clean");
        }
        let Some(before) = before else {
            return;
        };
        let put_back = async {
            self.journal.forget(PROXY_BEFORE)?;
            self.zds.announce_node_pods(before.connection).await;
            self.converge_node(&before).await
        };
        if let Err(error) = put_back.await {
            let error = format!("{error:#}");
            tracing::error!(
                error,
                "the node capture does not lead to the proxy before, either"
            );
        }
    }

    /// Renames the record of a plan in another namespace than `proxy`.
    async fn set_aside(&self, name: &str, proxy: &Netns) -> anyhow::Result<()> {
        let Some(record) = self.journal.load(name)? else {
            return Ok(());
        };
        if record.netns != proxy.id() {
            self.take_back_aside(self.node_setup().as_ref()).await;
            let mut aside = record;
            aside.plan.name = PROXY_BEFORE.to_owned();
            // In this order: what is under both names is taken away twice, which is fine.
            self.journal.store(&aside)?;
            self.journal.forget(name)?;
        }
        Ok(())
    }

    /// Takes the rules away by which the earlier proxy's namespace takes packets in; what it sends still finds its way.
    async fn deafen(&self, before: Option<&NodeSetup>) {
        let deafened = async {
            let record = self.journal.load(PROXY_BEFORE)?;
            if let (Some(mut record), Some(before)) = (record, before)
                && record.netns == before.proxy.id()
            {
                record.plan.steps.retain(|step| !step.is_firewall());
                let place = Place {
                    label: record.place_label,
                    netns: before.proxy.clone(),
                };
                self.converge(&place, &record.plan).await?;
                tracing::debug!("the earlier proxy takes no packet any more");
            }
            anyhow::Ok(())
        };
        if let Err(error) = deafened.await {
            let error = format!("{error:#}");
            tracing::warn!(
                error,
                "an earlier proxy goes on taking connections while the node changes over"
            );
        }
    }

    /// Takes away what the earlier proxy's namespace has, if it still stands.
    async fn take_back_aside(&self, before: Option<&NodeSetup>) {
        let netns = before.map(|setup| &setup.proxy);
        for error in engine::undo(PROXY_BEFORE, netns, &self.journal).await {
            tracing::warn!(%error, "the namespace of an earlier proxy is not clean");
        }
    }
}

impl Agent {
    /// The node capture's objects in the proxy's namespace, then in the node's.
    async fn converge_node(&self, setup: &NodeSetup) -> anyhow::Result<()> {
        let proxy = Place {
            label: "proxy".to_owned(),
            netns: setup.proxy.clone(),
        };
        let in_proxy = node_redirect::plan::proxy(&setup.proxy_facts, self.flow());
        self.converge(&proxy, &in_proxy).await?;
        let on_node = node_redirect::plan::host(&setup.host_facts, self.flow());
        self.converge(&self.host_place(), &on_node).await
    }

    /// Puts back what is missing of the node's own objects.
    pub(super) async fn mend_node(&self) -> anyhow::Result<()> {
        let _alone = self.setting_up.lock().await;
        self.refuse_after_undo()?;
        self.make_inpod_host_objects().await?;
        match self.node_setup() {
            Some(setup) => self.converge_node(&setup).await,
            None => Ok(()),
        }
    }
}

/// Finds out what the plans of the node capture are functions of.
async fn facts(
    host: &Netns,
    connection: ConnectionId,
    proxy: Netns,
    overlay: OverlayKind,
    port: u16,
    dns: bool,
) -> anyhow::Result<NodeSetup> {
    let in_proxy = Netlink::connect(&proxy).await?;
    let on_host = Netlink::connect(host).await?;
    let own_address = |dev: &str, address: IpAddr| match address {
        IpAddr::V4(ip)
            if !ip.is_loopback() && ![TUNNEL_IN.proxy, TUNNEL_OUT.proxy].contains(&dev) =>
        {
            Some(ip)
        }
        _ => None,
    };
    let proxy_addresses = in_proxy.addresses().await?;
    let (device, proxy_ip) = proxy_addresses
        .iter()
        .find_map(|(dev, net)| own_address(dev, net.addr()).map(|ip| (dev.clone(), ip)))
        .ok_or_else(|| {
            anyhow!("the proxy's network namespace has no IPv4 address: is it the proxy pod's?")
        })?;
    let route = on_host
        .route_to(IpAddr::V4(proxy_ip))
        .await
        .with_context(|| format!("no route to the proxy {proxy_ip}"))?;
    let host_ip = match route.src {
        Some(IpAddr::V4(ip)) => ip,
        _ => {
            return Err(anyhow!(
                "the node has no IPv4 source address towards the proxy {proxy_ip}"
            ));
        }
    };
    let link = on_host
        .link(&route.dev)
        .await?
        .ok_or_else(|| anyhow!("device {} towards the proxy {proxy_ip} is gone", route.dev))?;
    refuse_bridge("the proxy", proxy_ip.into(), &link)?;
    refuse_taken_port("the node", host, port, overlay).await?;
    refuse_taken_port("the proxy's namespace", &proxy, port, overlay).await?;
    let ends6 = ends6(host, &on_host, &proxy_addresses, &device).await?;
    let main_routes = on_host.routes(Family::V4).await?;
    let mtu = link.mtu.saturating_sub(OVERLAY_OVERHEAD);
    Ok(NodeSetup {
        connection,
        host_facts: HostFacts {
            proxy_ip,
            proxy_veth: route.dev,
            host_ip,
            overlay,
            port,
            mtu,
            main_has_default_route: main_routes
                .iter()
                .any(|route| route.table == MAIN_TABLE && route.dst.prefix_len() == 0),
            ipv6: has_ipv6(host),
            ends6,
            dns,
        },
        proxy_facts: ProxyFacts {
            proxy_ip,
            host_ip,
            device,
            overlay,
            port,
            mtu,
            ends6,
            dns,
        },
        proxy,
    })
}

/// Why a node captures no IPv6.
pub(super) const NO_IPV6: &str = "it needs a proxy with an IPv6 address, a node with one towards it, and net.ipv6.conf.all.forwarding = 1";

/// Between which addresses captured IPv6 travels, where it can: the proxy's on the device of its IPv4 address, and the node's
/// towards it.
async fn ends6(
    host: &Netns,
    on_host: &Netlink,
    proxy_addresses: &[(String, IpNet)],
    device: &str,
) -> anyhow::Result<Option<Ends6>> {
    let forwards = sysctl::read(host, "net/ipv6/conf/all/forwarding").is_ok_and(|on| on != "0");
    let of_proxy = proxy_addresses
        .iter()
        .find_map(|(dev, net)| match net.addr() {
            IpAddr::V6(ip) if dev == device && !ip.is_unicast_link_local() => Some(ip),
            _ => None,
        });
    let Some(proxy_ip) = of_proxy.filter(|_| forwards) else {
        return Ok(None);
    };
    let route = on_host.route_to(proxy_ip.into()).await;
    Ok(match route.ok().and_then(|route| route.src) {
        Some(IpAddr::V6(host_ip)) if !host_ip.is_unicast_link_local() => {
            Some(Ends6 { proxy_ip, host_ip })
        }
        _ => None,
    })
}

/// The main routing table (rt_tables).
pub(super) const MAIN_TABLE: u32 = 254;

/// Whether IPv6 exists in a namespace at all; without it there is nothing to drop, and ip6tables cannot work.
pub(super) fn has_ipv6(netns: &Netns) -> bool {
    netns
        .run(|| std::path::Path::new("/proc/sys/net/ipv6").exists())
        .unwrap_or(false)
}

/// The agent's work when a proxy comes.
pub(super) struct PrepareNode(pub(super) Arc<Agent>);

impl ProxyHook for PrepareNode {
    /// Nothing is made yet: an earlier proxy goes on serving while this one learns of the pods.
    async fn on_proxy(&self, proxy: &ProxyConnected) -> Result<Option<NodeConfiguration>, String> {
        let configuration = self.0.configuration_for(proxy).await;
        if let Err(error) = &configuration {
            self.0.status().obstacle = Some(error.clone());
        }
        configuration
    }

    async fn on_snapshot(&self, proxy: &ProxyConnected) -> Result<(), String> {
        // In a task of its own: whoever waits for this gives up after a time, and the kernel is not left half told.
        let (agent, connected) = (Arc::clone(&self.0), proxy.clone());
        let led = tokio::spawn(async move { agent.lead_to(&connected).await })
            .await
            .unwrap_or_else(|error| Err(error.to_string()));
        // The proxy connects again and again; whoever asks what is missing hears of the last attempt.
        self.0.status().obstacle = led.as_ref().err().cloned();
        led
    }
}

impl Agent {
    async fn configuration_for(
        &self,
        proxy: &ProxyConnected,
    ) -> Result<Option<NodeConfiguration>, String> {
        if !self.config.mode.uses_node() {
            return Ok(None);
        }
        if proxy.proxy_netns.is_none() {
            return Err(
                "this proxy does not speak the extension that node capture needs: use `ambidex proxy` or --mode inpod"
                    .to_owned(),
            );
        }
        let configuration = self.node_configuration().await;
        configuration
            .map(Some)
            .map_err(|error| format!("{error:#}"))
    }

    /// Makes the node's objects lead to a proxy.
    async fn lead_to(&self, proxy: &ProxyConnected) -> Result<(), String> {
        let Some(netns) = &proxy.proxy_netns else {
            return Ok(());
        };
        if !self.config.mode.uses_node() {
            return Ok(());
        }
        self.set_up_node(proxy.id, netns.clone())
            .await
            .context("setting up the node capture")
            .map_err(|error| format!("{error:#}"))
    }

    async fn node_configuration(&self) -> anyhow::Result<NodeConfiguration> {
        let netlink = Netlink::connect(&self.host).await?;
        // The same at every connection of a proxy, or it would end what it serves: with the tunnels' addresses before they
        // are made, and without the link-local ones that come and go with pods.
        let passing = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let mut node_addresses: BTreeSet<IpAddr> = [TUNNEL_IN, TUNNEL_OUT]
            .iter()
            .flat_map(|tunnel| [tunnel.host_addr.into(), tunnel.host_addr6.into()])
            .collect();
        let found = netlink.addresses().await?;
        node_addresses.extend(
            found
                .iter()
                .map(|(_, net)| net.addr())
                .filter(|ip| !passing(ip)),
        );
        Ok(NodeConfiguration {
            flow: self.config.variant.node_flow.to_string(),
            same_node: self.config.variant.same_node.to_string(),
            node_addresses: node_addresses.into_iter().collect(),
        })
    }

    /// Follows the connections of proxies: the agent is ready while one of them has its snapshot. When the latest one
    /// goes and an earlier one is still there, as in an upgrade that failed, the node capture leads to that one again.
    pub(super) async fn follow_proxies(&self, mut events: mpsc::UnboundedReceiver<ProxyEvent>) {
        let mut ready = BTreeSet::new();
        let mut connected = BTreeMap::new();
        while let Some(event) = events.recv().await {
            match event {
                ProxyEvent::Connected(proxy) => {
                    tracing::info!(
                        connection = proxy.id,
                        extension = proxy.extension,
                        "proxy said hello"
                    );
                    connected.insert(proxy.id, proxy.proxy_netns);
                }
                ProxyEvent::SnapshotSent { id } => {
                    ready.insert(id);
                }
                ProxyEvent::Disconnected { id } => {
                    tracing::warn!(connection = id, "proxy disconnected");
                    ready.remove(&id);
                    connected.remove(&id);
                    self.fall_back(id, &connected).await;
                }
            }
            self.status().proxy_ready = !ready.is_empty();
        }
    }

    async fn fall_back(
        &self,
        gone: ConnectionId,
        connected: &BTreeMap<ConnectionId, Option<Netns>>,
    ) {
        let served = |setup: &NodeSetup| setup.connection == gone;
        let Some((id, Some(netns))) = connected.last_key_value() else {
            return;
        };
        if !self.node_setup().as_ref().is_some_and(served) {
            return;
        }
        self.zds.announce_node_pods(*id).await;
        if let Err(error) = self.set_up_node(*id, netns.clone()).await {
            tracing::error!(
                connection = id,
                error = format!("{error:#}"),
                "the node capture does not lead to the proxy that is left"
            );
        }
    }
}
